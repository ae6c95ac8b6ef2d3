"""The notebooks run on small networks, and what they show is right."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)

from diffdistill import assets
from diffdistill.data import fashion, shapes
from diffdistill.export import export_student, export_token_student
from diffdistill.method import Sampler, TokenSampler
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.loading import load_pipeline
from diffdistill.pipelines.scheduler import HeunEDMScheduler
from diffdistill.schedules import EDM, student_times
from diffdistill.teachers import load_teacher
from diffdistill.teaching.convert import sd3_text_encoder, silent_text_encoders
from diffdistill.testing import mixture, tiny_tokens
from diffdistill.tracking import save_grid

NOTEBOOKS = Path(__file__).parents[1] / "assets" / "notebooks"


@pytest.fixture
def execute(monkeypatch):
    """Runs a notebook's cells and returns its variables; no cell may hold a result."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")

    def run_all(name, space):
        notebook = json.loads((NOTEBOOKS / name).read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"] and cell["execution_count"] is None
                exec(compile("".join(cell["source"]), name, "exec"), space)
                plt.close("all")
        return space

    return run_all


@pytest.fixture
def teacher(tmp_path):
    """The folder of an untrained 28 x 28 teacher, and its network."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, num_class_embeds=11,
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), add_attention=False,
    ).eval()  # fmt: skip
    EDMPipeline(unet, HeunEDMScheduler(4), size=28).save_pretrained(tmp_path / "teacher")
    info = {
        "kind": "teacher", "name": "tiny", "family": "edm", "world": "fashion", "steps": 2,
        "protocol": "fashion-v1", "guidance": 1.0, "licence": "none",
    }  # fmt: skip
    (tmp_path / "teacher" / "diffdistill.json").write_text(json.dumps(info))
    return tmp_path / "teacher", unet


@pytest.fixture
def run(tmp_path, teacher, monkeypatch):
    """A run with an untrained student, three grids, one evaluation, and a row of its teacher."""
    place, unet = teacher
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    export_student(
        folder / "student", teacher_pipe=EDMPipeline(unet, HeunEDMScheduler(4), size=28),
        family="edm", weights=unet, sampler=Sampler((80.0, 2.5)),
        info={"teacher": str(place), "world": "fashion", "method": "dmd"},
    )  # fmt: skip
    (folder / "config.yaml").write_text("a: 1\n")
    for name in ("teacher_000000", "student_000000", "student_000010"):
        save_grid(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), 8, folder / f"samples/{name}.png")
    record = {
        "metric": "fd", "value": 12.5, "protocol": "none-v1", "feature_net": "net", "n": 100,
        "m": 10, "resize": "none", "reference": "r", "steps": 2, "nfe": 2, "guidance": 0,
    }  # fmt: skip
    (folder / "eval").mkdir()
    (folder / "eval" / "step_000010.json").write_text(json.dumps({"records": [record]}))
    row = {
        "pipeline": "tiny",
        "protocol": "none-v1",
        "steps": 4,
        "records": [record | {"value": 9.0, "nfe": 7}],
    }
    other = {"pipeline": "tiny", "steps": 1, "records": [record | {"n": 50, "nfe": 1}]}
    (tmp_path / "reference").mkdir()
    rows = {"weights": {}, "rows": [row, other]}
    (tmp_path / "reference" / "tiny.json").write_text(json.dumps(rows))
    monkeypatch.setattr(assets, "path", lambda *parts: tmp_path.joinpath(*parts))
    return folder


def test_inspect_finds_the_copied_training_image(run, execute, monkeypatch, capsys):
    monkeypatch.setenv("DIFFDISTILL_RUN", str(run))
    space: dict = {}

    def training(split):
        images = torch.randint(0, 256, (20, 1, 28, 28)).to(torch.uint8)
        images[7] = space["ours"][2]  # a copied one
        return images, torch.zeros(20).long()

    monkeypatch.setattr(fashion, "load", training)
    execute("inspect.ipynb", space)
    said = capsys.readouterr().out
    assert "tiny: 2 step(s), unfinished" in said and "FD, n 100, net" in said
    assert space["table"] == [("fd", "tiny, 4 steps", 7, 9.0), ("fd", "tiny", 2, 12.5)]
    (panel,) = space["panels"]  # steps against quality; the row of another n is not in it
    assert [line.points for line in panel.lines] == [[(7, 9.0)], [(2, 12.5)]]
    assert list(space["pictures"]) == ["teacher", "step 0", "step 10"]
    assert space["nearest"][2] == 7 and space["distance"].min() == 0
    assert (space["distance"].amin(1) > 0).sum() == 7
    # the ends of the interpolation are what the two seeds draw
    student = load_pipeline(run / "student")
    assert torch.equal(space["ours"], student.sample(space["conditions"], range(8)))
    assert math.isclose(space["path"][-1].sub(space["b"]).abs().max(), 0, abs_tol=1e-5)
    assert math.isclose(space["path"][0].sub(space["a"]).abs().max(), 0, abs_tol=1e-5)
    assert space["between"].shape == (8, 1, 28, 28)
    assert space["between"][0].ne(space["between"][-1]).float().mean() > 0.5


def denoised(pipe, family, folder):
    """A student of one step that is its teacher."""
    teacher = load_teacher(pipe)
    times = student_times(teacher.denoiser.schedule, 1)
    net = pipe.transformer if family == "sd3" else pipe.unet
    export_student(
        folder / "student", teacher_pipe=pipe, family=family, weights=net, sampler=Sampler(times),
        info={"teacher": str(folder / "teacher"), "method": "dmd", "world": "shapes"},
    )  # fmt: skip


def sd(folder):
    """shapes-sd."""
    pipe = load_pipeline("shapes-sd").pipe
    denoised(pipe, "sd", folder)
    return pipe, {"steps": 2, "guidance": 2.0}


def sd3(folder):
    """A transformer without worth on the autoencoder and text model of shapes-sd."""
    base = load_pipeline("shapes-sd").pipe
    text = sd3_text_encoder(base.text_encoder)
    base.vae.register_to_config(shift_factor=0.0)
    width = base.text_encoder.config.hidden_size
    second, third = silent_text_encoders(len(base.tokenizer), 16, width + 8)
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=width + 8,
        caption_projection_dim=16, pooled_projection_dim=width + 8, pos_embed_max_size=8,
    )  # fmt: skip
    words = {f"tokenizer{i}": base.tokenizer for i in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        transformer=net, vae=base.vae, text_encoder=text, text_encoder_2=second,
        text_encoder_3=third, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), **words,
    )  # fmt: skip
    denoised(pipe, "sd3", folder)
    return pipe, {"steps": 2, "guidance": 2.0}


def tokens(folder):
    """Four tokens in raster order, and an untrained student of both kinds of steps."""
    pipe = tiny_tokens()
    export_token_student(
        folder / "student", teacher_pipe=pipe, net=pipe.model().variant("jump").net,
        sampler=TokenSampler((0, 1), 1),
        info={"teacher": str(folder / "teacher"), "method": "dd1", "world": None},
    )  # fmt: skip
    return pipe, {"steps": pipe.steps, "guidance": 1.5}


@pytest.mark.parametrize("make", [sd, sd3, tokens])
def test_inspect_takes_every_family(make, execute, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    pipe, how = make(run)
    info = {"kind": "teacher", "name": "small", "family": make.__name__, "world": None, **how}
    pipe.save_pretrained(run / "teacher")
    (run / "teacher" / "diffdistill.json").write_text(json.dumps(info))
    (run / "config.yaml").write_text("a: 1\n")
    monkeypatch.setenv("DIFFDISTILL_RUN", str(run))
    monkeypatch.setattr(shapes, "render", lambda scenes, draw=shapes.render: draw(scenes[:40]))
    space = execute("inspect.ipynb", {})
    student, said = load_pipeline(run / "student"), capsys.readouterr().out
    assert f"run: {student.info['steps']} step(s), unfinished" in said
    assert "not evaluated yet" in said
    prompts = make is not tokens
    assert isinstance(space["conditions"][0], str) == prompts
    assert torch.equal(space["ours"], student.sample(space["conditions"], range(8)))
    # an autoregressive teacher has its own number of steps only
    assert len(space["rows"]) == (3 if prompts else 2)
    assert ("not known here" in said) != prompts == ("nearest" in space)
    first, *_, last = space["between"]
    assert first.ne(last).any() and space["between"].shape == space["ours"].shape
    # the first end is what its seed draws
    assert (first.int() - space["ours"][0].int()).abs().max() <= 1


# ---- a mixture in two dimensions --------------------------------------------------------


def test_the_mixture_is_exact_and_its_copies_can_learn():
    """Tweedie: D = (z + sigma^2 grad log p_t(z)) / alpha, with the gradient from autograd."""
    means, std = [(1.5, 0.0), (-1.0, 0.5), (0.0, -2.0)], 0.3
    teacher = mixture(means, std, EDM(t_max=5.0))
    z = torch.randn(50, 2).mul(2).requires_grad_()
    t = torch.linspace(0.05, 5, 50, dtype=torch.float64)
    var = (std**2 + t.square()).float()
    gaps = (z[:, None] - torch.tensor(means)).square().sum(-1) / (2 * var[:, None])
    log_p = (-gaps).logsumexp(1) - var.log()
    (score,) = torch.autograd.grad(log_p.sum(), z)
    want = z + t.square().float()[:, None] * score
    torch.testing.assert_close(teacher(z, t).detach(), want.detach(), atol=1e-4, rtol=1e-4)
    trained = [n for n, p in teacher.named_parameters() if p.requires_grad]
    assert trained and all("correction" in n for n in trained)


def test_the_fake_score_is_watched(execute, capsys):
    space = execute("watch_the_fake_score.ipynb", {})
    first, last = space["seen"][0], space["seen"][-1]
    spread = {steps: x.norm(dim=1).mean().item() for steps, x in space["drawn"].items()}
    assert spread[1] < 0.5 and spread[32] == pytest.approx(1.52, abs=0.05)  # the ring's radius
    # before training both copies are the teacher: the fake score is as wrong as the samples are
    assert first["error"] == pytest.approx(first["distance"]) and first["distance"] > 2
    assert first["shares"].sum() < 0.05
    assert last["error"] < 0.2 * first["error"] and last["distance"] < 0.3 * first["distance"]
    assert last["shares"].sum() > 0.75 and last["shares"].min() > 0.1  # no mode is lost
    assert last["step"] == space["STEPS"] == space["steps"][-1]
    assert "within three std of each mode" in capsys.readouterr().out


# ---- a method of one's own --------------------------------------------------------------


def test_a_method_of_ones_own_trains_and_is_reported(execute, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_TEACHER", str(teacher[0]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)  # one thread
    space = execute("add_a_method.ipynb", {})
    assert (
        space["FILE"].parent.parent == tmp_path and len(space["FILE"].read_text().split("\n")) < 60
    )
    # the untrained network's one step is one point; the trained one has the teacher's spread
    assert space["spread"][0] < 0.05 and space["spread"][300] == pytest.approx(0.4, abs=0.06)
    assert "teacher_stepps" in space["mistake"] and "teacher_steps" in space["mistake"]
    assert not (space["FOLDER"] / "no").exists()
    run, losses = space["run"], space["regression"]
    assert run.status == "finished" and run.info["method"].endswith("few_to_one.py:FewToOne")
    assert {r["n"] for r in run.records} == {space["N"]}
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    page = (space["result"].folder / "report" / "index.html").read_text()
    assert "student/regression" in page and "student/output_std" in page
