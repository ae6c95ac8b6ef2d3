"""Known-answer tests of SwiftBrush, numbered as in the method's specification."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.methods import swiftbrush
from diffdistill.parts.guidance import with_guidance
from diffdistill.parts.lora import lora_copy
from diffdistill.parts.matching import vsd_direction
from diffdistill.parts.reward import clamped, load_score
from diffdistill.parts.score import vsd_surrogate
from diffdistill.parts.weights import blend, start_from
from diffdistill.schedules import DDPM, EDM, TrigFlow
from diffdistill.testing import gaussian, run_method, student_samples, tiny_denoiser

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SMALL = EDM(t_max=5.0)
NULL = 2


class Points(nn.Module):
    """The denoiser of point masses: labels 0 and 1, null label 2."""

    def __init__(self, means=(1.0, -1.0, 0.0)):
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means)[:, None])

    def forward(self, z, t, label):
        return self.means[label]


def points():
    return Denoiser(
        Points(), TrigFlow(t_max=1.5), "x0", shape=(1,), null_cond={"label": torch.tensor([NULL])}
    )


def both(rows):
    return rows % 2


def settled(monkeypatch=None, fake_scale=None, updates=600, **options):
    """Student means over the last updates of the student against its exact fake score."""
    engine = run_method(
        "swiftbrush", points(), steps=1, batch_size=64, cond={"label": both}, lora_rank=0,
        train=False, **options,
    )  # fmt: skip
    method, batch = engine.method, engine._micro_batches(0)[0]
    if fake_scale is not None:
        monkeypatch.setattr(
            swiftbrush, "with_guidance",
            lambda net, scale: with_guidance(
                net, fake_scale(scale) if net is method.fake_score else scale
            ),
        )  # fmt: skip
    student, fake = method.student.net.means, method.fake_score.net.means
    path = []
    with torch.no_grad():
        student[:2] = torch.tensor([[3.0], [0.5]])
    for _ in range(updates):
        with torch.no_grad():
            fake[:2], fake[NULL] = student[:2], student[:2].mean()
        (grad,) = torch.autograd.grad(method.student_loss(batch)["vsd"], student)
        with torch.no_grad():
            student -= 0.5 * grad
        path.append(student[:2, 0].clone())
    return torch.stack(path[-200:])


def tiny(**options):
    labels = torch.arange(64) % 3
    return run_method(
        "swiftbrush", tiny_denoiser(SMALL, "eps"), batch_size=8, lora_layers="all", lora_rank=4,
        cond={"label": lambda i: labels[i % 64]}, **{"steps": 1, "train": False} | options,
    )  # fmt: skip


class Linear(nn.Module):
    """Point masses as one linear layer, which LoRA can adapt."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.mean.weight.copy_(torch.tensor([[1.0, -1.0, 0.0]]))

    def forward(self, z, t, label):
        return self.mean(nn.functional.one_hot(label, 3).float())


def returned(monkeypatch=None):
    """Student means after training from (1.8, -0.6), which are off the teacher's (1, -1)."""
    schedule, null = TrigFlow(t_max=1.5), {"label": torch.tensor([NULL])}
    teacher = Denoiser(Linear(), schedule, "x0", shape=(1,), null_cond=null)
    engine = run_method(
        "swiftbrush", teacher, steps=500, cond={"label": both}, lora_rank=1, lora_alpha=1.0,
        lora_layers="all", lr={"student": 5e-3, "default": 2e-2}, ttur=2, guidance=2.0, train=False,
    )  # fmt: skip
    teacher.requires_grad_(False)
    with torch.no_grad():
        engine.method.student.net.mean.weight += torch.tensor([[0.8, 0.4, 0.0]])
    if monkeypatch is not None:
        monkeypatch.setattr(
            swiftbrush, "with_guidance", lambda net, scale: with_guidance(teacher, scale)
        )
    engine.fit()
    assert teacher.net.mean.weight.tolist() == [[1.0, -1.0, 0.0]]
    return engine.method.student.net.mean.weight[0, :2].tolist()


def test_a_lora_fake_score_leads_the_student_back():
    assert returned() == pytest.approx([1.0, -1.0], abs=0.15)


def test_adapters_left_off_are_wrong_and_teach_nothing(monkeypatch):
    assert returned(monkeypatch) == pytest.approx([1.8, -0.6], abs=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_1_the_gradient_is_exactly_zero_at_the_start(guidance):
    method = (engine := tiny(guidance=guidance)).method
    losses = method.student_loss(engine._micro_batches(0)[0])
    grads = torch.autograd.grad(losses["vsd"], list(method.student.parameters()), allow_unused=True)
    assert losses["_gap"] == 0
    assert all(g is None or (g == 0).all() for g in grads)


def test_1_the_lora_moves_away_and_the_teacher_stays():
    engine = tiny(steps=5, train=False)
    method, batch = engine.method, engine._micro_batches(0)[0]
    before = {n: p.clone() for n, p in method.teacher.named_parameters()}
    engine.fit()
    assert all(torch.equal(before[n], p) for n, p in method.teacher.named_parameters())
    assert method.student_loss(batch)["_gap"] > 1e-6


def test_1_only_the_adapter_trains_and_shares_the_teachers_storage():
    teacher = tiny_denoiser(SMALL)
    teacher.requires_grad_(False)
    fake = lora_copy(teacher, rank=2, alpha=4.0, layers="all")
    own = {id(p) for p in teacher.parameters()}
    trained = {n for n, p in fake.named_parameters() if p.requires_grad}
    assert trained == fake.trainable_names == {n for n in trained if "lora_" in n}
    assert own == {id(p) for n, p in fake.named_parameters() if n not in trained}
    z, t = torch.randn(3, 1, 8, 8), torch.ones(3, dtype=torch.float64)
    cond = {"label": torch.arange(3)}
    with torch.no_grad():
        assert torch.equal(fake(z, t, cond), teacher(z, t, cond))
        for name, p in fake.named_parameters():
            if "lora_B" in name:
                p += 0.1
        assert not torch.allclose(fake(z, t, cond), teacher(z, t, cond))


def test_1_lora_is_alpha_over_rank_times_the_product():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

        def forward(self, z, t):
            return self.to_q(z) + self.to_k(z)

    teacher = Denoiser(Attention(), EDM(), "x0", shape=(3,))
    fake = lora_copy(teacher, rank=2, alpha=5.0)
    named = dict(fake.named_parameters())
    (a,), (b,) = ([p for n, p in named.items() if part in n] for part in ("lora_A", "lora_B"))
    with torch.no_grad():
        b.normal_()
    z, t = torch.randn(4, 3), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(fake(z, t) - teacher(z, t), 5.0 / 2 * z @ a.T @ b.T)


def test_2_sign_and_scale():
    schedule, t = TrigFlow(), torch.tensor([math.pi / 4], dtype=torch.float64)
    teacher, fake = gaussian((0.0,), 1.0, schedule), gaussian((2.0,), 1.0, schedule)
    x = torch.tensor([[0.3]], requires_grad=True)
    z = torch.tensor([[1.7]])
    v = vsd_direction(schedule, t, teacher(z, t), fake(z, t))
    loss = vsd_surrogate(x, v)
    loss.backward()
    assert v.item() == pytest.approx(0.5, abs=1e-6)
    assert loss.item() == pytest.approx(0.125, abs=1e-6)
    assert x.grad.item() == pytest.approx(0.5, abs=1e-6)


def test_2_the_weight_is_sigma_squared_between_eps_predictions():
    g = torch.Generator().manual_seed(0)
    z, f, h = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    t = torch.tensor([20.0, 300.0, 700.0, 980.0], dtype=torch.float64)
    alpha, sigma = SD.alpha(t)[:, None], SD.sigma(t)[:, None]
    e, low = ((z - alpha * d) / sigma for d in (f, h))
    torch.testing.assert_close(vsd_direction(SD, t, f, h), sigma**2 * (e - low))
    assert vsd_direction(SD, t, f, f * math.inf).isfinite().all()


def test_3_both_guided_meet_the_teacher():
    path = settled(guidance=4.5)
    torch.testing.assert_close(path[-1], torch.tensor([1.0, -1.0]), atol=1e-3, rtol=0)


def test_3_unguided_fake_score_wrong_fixed_point(monkeypatch):
    path = settled(monkeypatch, lambda scale: 1.0, guidance=4.5, updates=1500)
    torch.testing.assert_close(path[-1], torch.tensor([4.5, -4.5]), atol=1e-2, rtol=0)


def test_4_random_guidance_keeps_the_fixed_point_without_noise():
    path = settled(guidance=0.5, guidance_max=4.0, updates=1000)
    torch.testing.assert_close(path.mean(0), torch.tensor([1.0, -1.0]), atol=1e-3, rtol=0)
    assert path.std(0).max() < 1e-3


def test_4_random_guidance_with_an_unguided_fake_score_is_wrong(monkeypatch):
    path = settled(monkeypatch, lambda scale: 1.0, guidance=0.5, guidance_max=4.0, updates=1500)
    torch.testing.assert_close(path.mean(0), torch.tensor([2.25, -2.25]), atol=0.1, rtol=0)
    assert path.std(0).min() > 1e-3


def test_4_independent_scales_are_wrong(monkeypatch):
    path = settled(
        monkeypatch, lambda s: 0.5 + 3.5 * torch.rand(len(s)), guidance=0.5, guidance_max=4.0,
        updates=1000,
    )  # fmt: skip
    assert path.std(0).min() > 1e-2  # the draws do not cancel at the fixed point


def test_4_the_scale_is_one_draw_per_sample():
    method = tiny(guidance=0.5, guidance_max=4.0).method
    scale = method.scale(torch.empty(100_000, 1))
    assert scale.shape == (100_000,) and 0.5 <= scale.min() < scale.max() <= 4.0
    assert scale.mean().item() == pytest.approx(2.25, abs=0.02)


@pytest.mark.parametrize(("lora_weight", "want"), [("alpha2", 0.25), ("none", 1.0)])
def test_5_weight_of_the_lora_loss(monkeypatch, lora_weight, want):
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, z, t):
            return self.scale * z

    engine = run_method(
        "swiftbrush", Denoiser(Zero(), TrigFlow(t_max=1.5), "eps", shape=(2,)), steps=1,
        batch_size=4, lora_rank=0, guidance=1.0, train=False, lora_weight=lora_weight,
    )  # fmt: skip
    third = lambda s, x, *a: torch.full((len(x),), math.pi / 3, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(swiftbrush, "uniform_times", third)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    loss = engine.method.lora_loss(engine._micro_batches(0)[0])["dsm"]
    assert loss.item() == pytest.approx(want, abs=1e-5)


def test_6_times_and_null_conditions(monkeypatch):
    engine = run_method(
        "swiftbrush", points(), steps=1, batch_size=16, cond={"label": both}, lora_rank=0,
        train=False, guidance=1.0,
    )  # fmt: skip
    method, batch = engine.method, engine._micro_batches(0)[0]
    asked, seen = [], []
    draw = swiftbrush.uniform_times
    monkeypatch.setattr(
        swiftbrush, "uniform_times", lambda s, x, *r: asked.append(r) or draw(s, x, *r)
    )
    monkeypatch.setattr(
        swiftbrush, "dsm", lambda net, x, eps, t, cond, **k: seen.append(cond["label"]) or 0.0
    )
    batch.shared.manual_seed(0)
    for _ in range(10_000):
        batch.memo["x"] = torch.zeros(16, 1), batch.cond
        method.lora_loss(batch)
    null = torch.stack(seen) == NULL
    assert torch.equal(null.any(1), null.all(1))
    assert null.float().mean().item() == pytest.approx(0.1, abs=0.01)
    method.student_loss(batch)
    assert asked[0] == () and asked[-1] == (0.02, 0.98)  # indices 0..999 and 20..980, test of dmd


def test_6_the_lora_sees_the_samples_from_before_the_update():
    engine = tiny(guidance=1.0)
    method, batch = engine.method, engine._micro_batches(0)[0]
    method.student_loss(batch)
    x, _ = batch.memo["x"]
    method.generate = None  # must not be needed
    assert not x.requires_grad and method.lora_loss(batch)["dsm"] > 0


def test_7_clamped_clip():
    for cosine, want, slope in ((0.40, 0.0, 0.0), (0.20, 0.15, -1.0)):
        similarity = torch.tensor([cosine], requires_grad=True)
        loss = clamped(similarity, 0.35)
        loss.backward()
        assert loss.item() == pytest.approx(want, abs=1e-6) and similarity.grad.item() == slope


def test_7_the_clip_loss_reaches_the_student_and_fades(tmp_path):
    file = tmp_path / "score.py"
    file.write_text("def bright(images, cond):\n    return images.mean((1, 2, 3)) / 10\n")
    options = {"clip": 0.1, "clip_steps": 50, "clip_score": f"{file}:bright", "guidance": 1.0}
    engine = tiny(**options)
    updates = [u for u in engine.updates if u.name == "student"]
    spans = [(u.start, u.stop) for u in updates]
    assert spans == [(i * 5, i * 5 + 5) for i in range(10)] + [(50, None)]
    assert [u.loss.keywords["clip"] for u in updates] == pytest.approx(
        [0.1 - 0.01 * i for i in range(11)]
    )
    batch = engine._micro_batches(0)[0]
    engine.method.teacher.decode = lambda x: 2 * x
    losses = updates[0].loss(batch)
    x = batch.memo["x"][0]
    want = 0.1 * (0.35 - 0.2 * x.mean((1, 2, 3))).clamp(min=0).mean()
    assert losses["clip"].item() == pytest.approx(want.item(), rel=1e-5)
    params = list(engine.method.student.parameters())
    grads = torch.autograd.grad(losses["clip"], params, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)
    assert "clip" not in updates[-1].loss(batch)


def test_9_merge_of_two_students(tmp_path):
    a, b = (
        {"w": torch.randn(5), "s": torch.tensor(1.0)},
        {"w": torch.randn(5), "s": torch.tensor(3.0)},
    )
    assert torch.equal(blend(a, b, 1.0)["w"], a["w"])
    assert blend(a, b, 0.5)["s"] == 2
    teacher = points()
    for name, means in (("a", (1.0, 2.0, 3.0)), ("b", (3.0, 4.0, 5.0))):
        (tmp_path / name).mkdir()
        save_file(Points(means).state_dict(), tmp_path / name / "student.safetensors")
    folders = str(tmp_path / "a"), str(tmp_path / "b")
    assert start_from(folders[0])(teacher).net.means[:, 0].tolist() == [1.0, 2.0, 3.0]
    engine = run_method(
        "swiftbrush", teacher, steps=1, cond={"label": both}, lora_rank=0, train=False,
        init=folders[0], merge=folders[1], merge_share=0.25,
    )  # fmt: skip
    assert engine.method.student.net.means[:, 0].tolist() == [2.5, 3.5, 4.5]
    assert teacher.net.means[:, 0].tolist() == [1.0, -1.0, 0.0]


def test_9_students_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has none of"):
        start_from(str(tmp_path))(points())
    save_file({"means": torch.zeros(2, 1)}, tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match="and the teacher differ in"):
        start_from(str(tmp_path))(points())
    with pytest.raises(ValueError, match="cannot blend"):
        blend({"a": torch.zeros(1)}, {"a": torch.zeros(2)}, 0.5)


def test_options_reach_sampler_updates_and_needs():
    cfg = swiftbrush.Config(conditioning_time=2.5, ttur=3, regression=0.1, pairs=7, pair_steps=9)
    method = swiftbrush.SwiftBrush(cfg, gaussian((0.0,), 1.0))
    assert method.sampler().times == (2.5,)
    assert [(u.name, u.every) for u in method.updates()] == [("student", 3), ("fake_score", 1)]
    assert (method.needs(cfg).pairs, method.needs(cfg).pair_steps) == (7, 9)


def test_no_null_conditions_when_switched_off(monkeypatch):
    engine = run_method(
        "swiftbrush", points(), steps=1, batch_size=16, cond={"label": both}, lora_rank=0,
        train=False, null_every=0,
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(swiftbrush, "dsm", lambda n, x, e, t, cond, **k: seen.append(cond["label"]))
    batch = engine._micro_batches(0)[0]
    for _ in range(100):
        engine.method.lora_loss(batch)
    assert (torch.stack(seen) < NULL).all()


def distilled(**options):
    engine = run_method(
        "swiftbrush", gaussian((1.0, -0.5), 0.4, SMALL), batch_size=256, lora_rank=0, guidance=1.0,
        ttur=2, **options,
    )  # fmt: skip
    return student_samples(engine, 20_000)


def test_distils_a_gaussian():
    x = distilled(steps=600, lr=4e-3)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.05)


def test_regression_on_teacher_pairs_pulls():
    eps = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    x = distilled(steps=300, regression=20.0, pairs=(eps, 2.0 + 0.0 * eps))
    assert x.mean().item() > 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_max": 2.0}, "guidance_max=2.0 is below"),
        ({"merge": "b"}, "blends into method.init"),
        ({"init": "a", "merge": "b", "merge_share": 1.5}, "merge_share=1.5"),
        ({"clip": 0.1}, "FILE.py:FUNCTION"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        swiftbrush.Config(**options).validate()


def test_a_score_function_that_is_missing_is_refused(tmp_path):
    (tmp_path / "score.py").write_text("other = 1\n")
    with pytest.raises(ValueError, match="has no function 'bright'"):
        load_score(f"{tmp_path / 'score.py'}:bright")


def test_lora_needs_layers_it_can_adapt():
    with pytest.raises(ValueError, match=r"lora_layers=all, or method\.lora_rank=0"):
        run_method("swiftbrush", points(), steps=1, cond={"label": both}, train=False)


def test_guidance_needs_a_null_condition():
    with pytest.raises(ValueError, match="unconditional branch"):
        with_guidance(gaussian((0.0,), 1.0), torch.ones(3))
    with pytest.raises(ValueError, match="unconditional branch"):
        with_guidance(gaussian((0.0,), 1.0), 0.0)


def test_needs_follow_the_options():
    needs = swiftbrush.SwiftBrush.needs
    assert needs(swiftbrush.Config()).pairs == 0 and not needs(swiftbrush.Config()).images
    assert needs(swiftbrush.Config(regression=0.25)).pairs == 2000
