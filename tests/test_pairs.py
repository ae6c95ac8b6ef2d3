"""Stored trajectories of a teacher: shards, resuming, and that they are the teacher's samples."""

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import config, passes
from diffdistill.data import prepare
from diffdistill.parts import ode
from diffdistill.schedules import EDM
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian

SHARD = prepare.PAIRS_PER_SHARD
TABLE = torch.arange(10)
LOOKUPS = {"label": lambda i: TABLE[i]}


def pairs(folder, count=2 * SHARD + 10, guidance=1.0, steps=40):
    teacher = load_teacher(gaussian((0.7,), 0.3, EDM()))
    return prepare.teacher_pairs(teacher, LOOKUPS, 10, count, steps, guidance, folder, "cpu")


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def solved(monkeypatch):
    """Batches that the solver was asked for; it fails at number `solved.fail`."""

    class Solved(list):
        fail = None

    calls, solve = Solved(), ode.ddim

    def counting(denoise, schedule, eps, cond, steps):
        if len(calls) == calls.fail:
            raise KeyboardInterrupt
        calls.append(eps)
        return solve(denoise, schedule, eps, cond, steps)

    monkeypatch.setattr(ode, "ddim", counting)
    return calls


def test_pairs_are_ends_of_the_teachers_paths(tmp_path):
    eps, x, cond = pairs(tmp_path)
    assert eps.shape == x.shape == (2 * SHARD + 10, 1)
    assert eps.dtype == x.dtype == torch.float32
    assert eps.var().item() == pytest.approx(1, abs=0.15)
    residual = x - 0.7 - 0.3 * eps
    assert residual.abs().max() < 0.15
    shuffled = x - 0.7 - 0.3 * eps.roll(1, 0)
    assert shuffled.std() > 5 * residual.std()
    assert cond["label"](torch.tensor([3, 13, 25])).tolist() == [3, 3, 5]
    files = shards(tmp_path)
    assert [f.name for f in files] == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
    ]
    assert load_file(files[1])["x"].shape == (SHARD, 1)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, solved):
    whole = pairs(tmp_path / "a")[:2]
    solved.clear()
    solved.fail = 1
    with pytest.raises(KeyboardInterrupt):
        pairs(tmp_path / "b")
    assert len(shards(tmp_path / "b")) == 1
    solved.fail = None
    again = pairs(tmp_path / "b")[:2]
    assert len(solved) == 3  # one before, two after
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    pairs(tmp_path / "b")
    assert len(solved) == 3  # all there
    more = pairs(tmp_path / "b", count=3 * SHARD + 1)
    assert len(solved) == 4 and torch.equal(more[0][: len(whole[0])], whole[0])


@pytest.mark.parametrize("keep", [0, 40, -3])
def test_a_damaged_shard_is_made_again(tmp_path, solved, keep):
    whole = pairs(tmp_path)[:2]
    solved.clear()
    file = shards(tmp_path)[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=r"00001.safetensors is damaged .* made again"):
        again = pairs(tmp_path)[:2]
    assert len(solved) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_other_settings_have_other_files(tmp_path, solved):
    pairs(tmp_path, count=1, steps=40)
    pairs(tmp_path, count=1, steps=20)
    assert len(solved) == 2 and len(shards(tmp_path)) == 2


def test_pairs_of_the_edm_teacher_are_its_pipelines_samples(tmp_path):
    """Guidance acts where its scheduler says, and no noise is added."""
    teacher = load_teacher("fashion-edm")
    name, solve = prepare.pair_solver(teacher, 1.8, 4)
    scheduler = teacher.pipe.scheduler.config
    limits = f"{scheduler['guidance_tmin']:g}-{scheduler['guidance_tmax']:g}"
    assert name == f"pairs-heun4-g1.8-{limits}"
    noise, label = torch.randn(2, *teacher.denoiser.shape), torch.tensor([3, 7])
    x = solve(noise, {"label": label})
    teacher.pipe.scheduler.register_to_config(s_churn=0.0)
    want = teacher.pipe(
        label.tolist(), 4, guidance_scale=1.8, latents=noise, output_type="pt"
    ).images
    torch.testing.assert_close((x / 2 + 0.5).clamp(0, 1), want, rtol=0, atol=1e-5)
    assert prepare.pair_solver(teacher, 1.0, 0)[0] == f"pairs-heun{teacher.info['steps']}-g1"


def test_passes_for_pairs_are_those_of_the_sampler():
    teacher = load_teacher("fashion-edm")
    cfg, _ = config.compose(["recipe=slimflow_fashion", "method.pairs=300"])
    each = teacher.pipe.passes(None, 1.8)
    assert passes.of_pairs(cfg, teacher) == 2 * SHARD * each
