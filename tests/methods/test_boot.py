"""Known-answer tests of BOOT, numbered as in the specification."""

import contextlib
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffdistill.denoiser import Denoiser, guided
from diffdistill.engine import OptimConfig
from diffdistill.methods import boot
from diffdistill.parts import signal
from diffdistill.parts.signal import signal_levels, signal_step, told
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, bcast
from diffdistill.testing import gaussian, run_method, student_samples

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SMALL = EDM(t_max=5.0)
MEAN, STD = 0.7, 0.5


def exact(rho):
    """Coefficient of the start noise in the signal of N(mean, 0.5^2)."""
    return math.sqrt(STD**2 + rho**2) - rho


def one(v):
    return torch.tensor([v], dtype=torch.float64)


def step(solver, y, rho_t, rho_s, schedule=None, teacher=None, eps=1.0):
    """One step of N(0.7, 0.5^2) at eps = 1, as a coefficient."""
    schedule = schedule or EDM(t_min=1e-4)
    teacher = teacher or gaussian((MEAN,), STD, schedule)
    ratios = one(rho_t), one(rho_s)
    t, s = (schedule.t_of_ratio(r) for r in ratios)
    if rho_s == 0:
        s = one(math.nan)
    y, eps = torch.tensor([[MEAN + y]]), torch.full((1, 1), eps)
    with torch.no_grad():
        return signal_step(solver, teacher, schedule, y, eps, t, ratios, s, {}).item() - MEAN


# ---- 1 and 2 ----------------------------------------------------------------------------


def test_1_the_signal_and_its_slope():
    assert exact(0.0) == STD and exact(1e4) == pytest.approx(0, abs=1e-4)
    numeric = (exact(math.exp(1e-4)) - exact(math.exp(-1e-4))) / 2e-4
    assert numeric == pytest.approx(-0.1055728, abs=1e-6)
    slope = (step("euler", exact(1.0), 1.0, math.exp(-1.0)) - exact(1.0)) / 1.0  # D - Y
    assert -slope == pytest.approx(-0.1055728, abs=1e-6)


@pytest.mark.parametrize("schedule", [EDM(), TrigFlow(), RectifiedFlow()])
def test_2_single_step(schedule):
    y = exact(1.0)
    assert y == pytest.approx(0.1180340, abs=1e-6)
    found = {k: step(k, y, 1.0, 0.8, schedule) for k in ("ddim", "euler", "heun")}
    assert found["ddim"] == pytest.approx(0.1391486, abs=1e-6)
    assert found["euler"] == pytest.approx(0.1415919, abs=1e-6)
    assert exact(0.8) == pytest.approx(0.1433981, abs=1e-6)
    assert abs(found["heun"] - exact(0.8)) < 3e-4
    for solver in found:  # eps = 0: the mean stays
        assert step(solver, 0.0, 1.0, 0.8, schedule, eps=0.0) == pytest.approx(0, abs=1e-6)


def test_2_another_noise_in_the_teachers_input_is_wrong(monkeypatch):
    add = signal.add_noise
    monkeypatch.setattr(signal, "add_noise", lambda s, y, eps, t: add(s, y, torch.zeros(1, 1), t))
    found = step("ddim", exact(1.0), 1.0, 0.8)  # what is left of it on average
    assert found == pytest.approx(0.2 * 0.2 * exact(1.0) + 0.8 * exact(1.0), abs=1e-6)
    assert found != pytest.approx(0.1391486, abs=1e-2)


# ---- 3 the fixed point ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (25, (0.447742, 0.518786, 0.499072)),
        (50, (0.472212, 0.508208, 0.498251)),
        (100, (0.484942, 0.503066, 0.498069)),
        (1000, (0.496691, 0.498515, 0.498014)),
    ],
)
def test_3_fixed_point_of_the_solvers(steps, want):
    rhos = torch.logspace(math.log10(80), math.log10(0.002), steps + 1, dtype=torch.float64)
    teacher = gaussian((0.0,), STD)
    eps = torch.ones(1, 1)
    for solver, end in zip(("ddim", "euler", "heun"), want, strict=True):
        with torch.no_grad():
            y = teacher(80 * eps, rhos[:1], {})
            for t, s in pairwise(rhos.split(1)):
                y = signal_step(solver, teacher, EDM(), y, eps, t, (t, s), s, {})
        assert y.item() == pytest.approx(end, abs=1e-5)


@dataclass(frozen=True)
class LogUniform(EDM):
    """80 to 0.002 in 25 steps."""

    def grid(self):
        return torch.logspace(math.log10(0.002), math.log10(80), 26, dtype=torch.float64)


class Table(nn.Module):
    """One coefficient for each level."""

    def __init__(self, levels=27):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(levels))


def tabular(monkeypatch, teacher, **options):
    """The method with a student that is linear in eps at each of 27 levels."""
    student = lambda t: Denoiser(Table(), t.schedule, "x0", shape=(1,))  # noqa: E731
    monkeypatch.setattr(boot.BOOT, "roles", lambda self: {"student": student})
    monkeypatch.setattr(
        boot.BOOT, "signal", lambda self, eps, level, cond: self.student.net.c[level, None] * eps
    )
    return run_method("boot", teacher, train=False, **{"steps": 1, "batch_size": 128} | options)


def fixed_point(teacher):
    """Coefficients of the exact ddim recursion, level 1 (rho = 0.002) first."""
    eps, rhos, found = torch.ones(1, 1), LogUniform().grid().flip(0), []
    with torch.no_grad():
        y = teacher(80 * eps, rhos[:1], {})
        for t, s in zip(rhos.split(1), (*rhos.split(1)[1:], one(math.nan)), strict=True):
            found.append(y.item())
            after = torch.nan_to_num(s, 0.0)
            y = signal_step("ddim", teacher, EDM(), y, eps, t, (t, after), s, {})
    return [y.item(), *found[::-1]]


@pytest.mark.parametrize("seed", [0])
def test_3_a_linear_student_reaches_it(monkeypatch, seed):
    teacher = gaussian((0.0,), STD, LogUniform())
    engine = tabular(
        monkeypatch, teacher, steps=1300, seed=seed,
        optim={"default": OptimConfig(lr=2e-2, weight_decay=0.0, decay="linear", final=0.0)},
    )  # fmt: skip
    assert engine.method.levels.step == 1 and len(engine.method.levels) == 27
    engine.fit()
    found, want = engine.method.student.net.c.tolist(), fixed_point(teacher)
    assert want[1] == pytest.approx(0.447742, abs=1e-5)
    assert found[1:] == pytest.approx(want[1:], abs=1e-3)
    assert found[0] == pytest.approx(want[0], abs=2e-3)


@pytest.mark.parametrize(("u", "want"), [(0.5, math.pi), (0.1, 10.1664074), (0.9, 10.1664074)])
def test_4_slope_of_log_rho(u, want):
    """Cosine schedule in its own time, 0 to 1: the quarter turn of TrigFlow."""
    h, quarter = 1e-3, math.pi / 2
    t, s = one((u + h / 2) * quarter), one((u - h / 2) * quarter)
    ratios = t.tan(), s.tan()
    y = torch.zeros(1, 1)
    found = signal_step(
        "euler", lambda z, t, cond: 1 + 0 * z, TrigFlow(), y, y, t, ratios, s, {}
    )  # D - Y = 1
    assert found.item() / h == pytest.approx(want, rel=1e-4)


# ---- 5 to 7 -----------------------------------------------------------------------------


def routed(monkeypatch, **options):
    """(gradient of each level's coefficient by the bootstrap loss, what it should be)."""
    teacher = gaussian((0.0,), STD, LogUniform())
    engine = tabular(monkeypatch, teacher, batch_size=4, **options)
    method, batch = engine.method, engine._micro_batches(0)[0]
    c = method.student.net.c
    c.data.copy_(torch.linspace(0.6, 0.0, 27))
    draw = lambda self, n, device: torch.full((n,), 12)  # noqa: E731
    monkeypatch.setattr(signal.Levels, "draw", draw)
    eps = torch.randn(4, 1)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: eps)
    (grad,) = torch.autograd.grad(method.loss(batch)["bootstrap"], [c])
    t, s = (method.levels.ratio(torch.tensor([i])) for i in (12, 11))
    target = signal_step(
        "ddim", teacher, EDM(), c[12] * eps, eps, t.expand(4), (t.expand(4), s.expand(4)),
        s.expand(4), {},
    ).detach()  # fmt: skip
    w = (1 - s / t).item() ** -2
    return grad, (2 * w * (c[11] * eps - target) * eps / 4).sum().item()


def test_5_gradients_reach_the_lower_level_alone(monkeypatch):
    grad, want = routed(monkeypatch)
    assert [i for i in range(27) if grad[i] != 0] == [11]
    assert grad[11].item() == pytest.approx(want, rel=1e-4)


def test_5_a_target_with_a_gradient_is_wrong(monkeypatch):
    monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)
    grad, _ = routed(monkeypatch)
    assert grad[12] != 0


def test_5_the_boundary_moves_the_noisy_end_alone(monkeypatch):
    teacher = gaussian((0.0,), STD, LogUniform())
    engine = tabular(monkeypatch, teacher, batch_size=4, boundary=0.3)
    method, batch, c = engine.method, engine._micro_batches(0)[0], engine.method.student.net.c
    eps = torch.randn(4, 1)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: eps)
    loss = method.loss(batch)["boundary"]
    coefficient = 80 * STD**2 / (STD**2 + 80**2)
    assert loss.item() == pytest.approx(0.3 * (coefficient * eps).square().mean().item(), rel=1e-4)
    (grad,) = torch.autograd.grad(loss, [c])
    assert [i for i in range(27) if grad[i] != 0] == [26]


def test_6_point_mass():
    """A constant student is at rest; an offset at the noisy end falls as rho."""
    teacher = gaussian((MEAN,), 0.0, SMALL)
    rhos = torch.tensor([5.0, 3.0, 1.0, 0.2], dtype=torch.float64).split(1)
    for offset in (0.0, 1.0):
        y, eps = torch.full((1, 1), MEAN + offset), torch.randn(1, 1)
        for t, s in pairwise(rhos):
            with torch.no_grad():
                y = signal_step("ddim", teacher, SMALL, y, eps, t, (t, s), s, {})
            want = MEAN + offset * s.item() / 5.0
            assert y.item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "heun", "euler"])
def test_6_a_constant_student_has_no_loss(monkeypatch, solver):
    teacher = gaussian((MEAN,), 0.0, SMALL)
    engine = run_method("boot", teacher, steps=1, train=False, solver=solver)
    engine.method.signal = lambda eps, level, cond: torch.full_like(eps, MEAN)
    losses = engine.method.loss(engine._micro_batches(0)[0])
    assert losses["boundary"].item() == pytest.approx(0, abs=1e-9)
    assert losses["bootstrap"].item() == pytest.approx(0, abs=1e-6)


class Label(nn.Module):
    """D is the label."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, z, t, label):
        return label[:, None].float() + 0 * (z + self.p)


def test_7_guidance(monkeypatch):
    net = Denoiser(Label(), EDM(), "x0", shape=(1,), null_cond={"label": torch.tensor([0])})
    cond, zero = {"label": torch.tensor([1])}, torch.zeros(1, 1)
    denoise = guided(net, 3.0)
    assert denoise(zero, one(1.0), cond).item() == 3
    found = signal_step(
        "ddim", denoise, EDM(), zero, zero, one(1.0), (one(1.0), one(0.9)), one(0.9), cond
    )
    assert found.item() == pytest.approx(0.3, abs=1e-6)
    engine = run_method(
        "boot", net, steps=1, batch_size=4, train=False, guidance=3.0, boundary=1.0,
        cond={"label": lambda i: torch.ones(len(i), dtype=torch.long)},
    )  # fmt: skip
    engine.method.signal = lambda eps, level, cond: torch.zeros_like(eps)
    losses = engine.method.loss(engine._micro_batches(0)[0])
    assert losses["boundary"].item() == 9
    assert losses["bootstrap"].item() == pytest.approx(9, rel=1e-5)  # in the teacher's space


# ---- levels -----------------------------------------------------------------------------


def test_levels_reach_clean_data_from_every_time_of_the_teacher():
    levels = signal_levels(EDM(t_min=0.05), 0.04, 0.0, 1.0)
    grid = EDM(t_min=0.05).grid()
    assert levels.step == 42 and len(levels) == 1042
    assert levels.ratios[0] == 0 and (levels.ratios.diff() > 0).all()
    assert torch.equal(levels.ratios[42:], grid) and torch.equal(levels.times, grid)
    at = levels.time(torch.tensor([41, 42, 1041]))
    assert at[0].isnan() and at[1:].tolist() == [grid[0], 80.0]
    assert levels.ratio(torch.tensor([21])).item() == pytest.approx(0.025)  # half of the lowest
    drawn = levels.draw(100_000, "cpu")
    assert (drawn.min().item(), drawn.max().item()) == (42, 1041)
    few = signal_levels(SD, 0.1, 0.1, 0.5)
    assert (few.times[0].item(), few.times[-1].item(), few.step) == (100, 500, 44)


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun"])
def test_near_clean_data_every_solver_takes_ddims_step(solver):
    y = exact(0.05)
    ddim = step("ddim", y, 0.05, 0.0)
    assert step(solver, y, 0.05, 0.0) == ddim
    assert ddim == pytest.approx((y + 0.05) * 0.25 / 0.2525, abs=1e-6)  # D itself


@pytest.mark.parametrize("schedule", [RectifiedFlow(), TrigFlow()])
def test_noise_without_a_signal_is_refused(schedule):
    teacher = gaussian((0.0,), 1.0, schedule)
    with pytest.raises(ValueError, match=r"noise only.*method.t_high=1.0 must be lower"):
        boot.BOOT(boot.Config(), teacher)
    assert len(boot.BOOT(boot.Config(t_high=0.98), teacher).levels) > 900


# ---- the student's network --------------------------------------------------------------


class Raw(nn.Module):
    """A network that shows what it was given."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, t):
        return self.w * z + bcast(t, z) / 7


class Preconditioned(nn.Module):
    """EDM's skip around F(c_in z, t)."""

    def __init__(self, data=0.5):
        super().__init__()
        self.inner, self.data = Raw(), data

    def forward(self, z, t):
        sigma = bcast(t, z)
        total = sigma.square() + self.data**2
        out = sigma * self.data * total.rsqrt()
        return self.data**2 / total * z + out * self.inner(total.rsqrt() * z, t)


@pytest.mark.parametrize(
    ("prediction", "schedule", "at", "time"),
    [
        ("x0", SMALL, 5.0, 1.0),
        ("eps", SD, 599.0, 300.0),
        ("v", TrigFlow(), 1.4, 0.6),
        ("flow", RectifiedFlow(), 0.9, 0.4),
    ],
)
def test_only_the_time_that_the_network_hears_is_another(prediction, schedule, at, time):
    net, eps = Denoiser(Raw(), schedule, prediction), torch.randn(3, 2)
    z = eps * schedule.start_scale(at)
    now, then = (torch.full((3,), v, dtype=torch.float64) for v in (at, time))
    torch.testing.assert_close(told(net, eps, at, now, {}), net(z, now, {}))
    want = net.to_x0(net.net(z, then), z, now)
    torch.testing.assert_close(told(net, eps, at, then, {}), want, rtol=1e-4, atol=1e-5)


def test_only_the_time_that_the_network_hears_is_another_under_edm():
    net, eps = Denoiser(Preconditioned(), EDM(), "x0", sigma_data=0.5), torch.randn(3, 2)
    now, then = (torch.full((3,), v, dtype=torch.float64) for v in (80.0, 2.0))
    torch.testing.assert_close(told(net, eps, 80.0, now, {}), net(80 * eps, now, {}))
    y = told(net, eps, 80.0, then, {})
    inner = net.net.inner(eps * (80 / math.hypot(80, 0.5)), then)
    torch.testing.assert_close(y, 0.5 * inner + 0.25 / 80 * eps, rtol=1e-4, atol=1e-4)


def test_clean_data_is_the_first_call_of_the_sampler(monkeypatch):
    """Level 0 hears the sampler's time, the noisy end half of it."""
    heard = []
    monkeypatch.setattr(boot, "told", lambda s, eps, at, time, cond: heard.append((at, time)))
    method = boot.BOOT(boot.Config(conditioning_time=599.0), gaussian((0.0,), 1.0, SD))
    method.attach({"student": method.teacher})
    last = len(method.levels) - 1
    method.signal(torch.zeros(3, 1), torch.tensor([0, last // 2, last]), {})
    ((at, time),) = heard
    assert at == 599 and method.sampler().times == (599.0,)
    assert time.tolist() == pytest.approx([599, 449.25, 299.5], abs=0.3)


class Smooth(nn.Module):
    """A student that is linear in eps, with coefficients that depend on what it hears."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, z, t):
        shift, gain = self.body(t.float()[:, None] - 3).chunk(2, 1)
        return shift + gain * z / 5


def test_distils_a_gaussian_without_data(monkeypatch):
    student = lambda t: Denoiser(Smooth(), SMALL, "x0", shape=(2,))  # noqa: E731
    monkeypatch.setattr(boot.BOOT, "roles", lambda self: {"student": student})
    teacher = gaussian((1.0, -0.5), 0.4, SMALL)
    engine = run_method(
        "boot", teacher, steps=700, batch_size=256, solver="heun",
        optim={"default": OptimConfig(lr=2e-2, weight_decay=0.0, decay="linear")},
    )  # fmt: skip
    assert engine._micro_batches(0)[0].x is None
    x = student_samples(engine, 20_000)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.05)


def test_it_needs_neither_images_nor_pairs():
    needs = boot.BOOT.needs(boot.Config())
    assert not needs.images and needs.pairs == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.0}, "method.delta=0.0"),
        ({"delta": 0.7}, "up to 0.5"),
        ({"boundary": -1.0}, "boundary=-1.0"),
        ({"heard": 0.0}, "heard=0.0"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        boot.Config(**options).validate()


def test_lpips_has_no_weight(monkeypatch):
    asked = []
    monkeypatch.setattr(
        boot, "distance", lambda kind, a, b, t: asked.append(kind) or (a - b).square().mean()
    )
    engine = run_method("boot", gaussian((0.0,), 1.0, SMALL), steps=1, distance="lpips")
    assert asked == ["lpips", "lpips"] and engine.roles["student"].updates == 1
