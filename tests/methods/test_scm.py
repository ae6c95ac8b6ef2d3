"""Known-answer tests of sCM (sCD and sCT), numbered as in the specification."""

import math

import pytest
import torch
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.engine import OptimConfig
from diffdistill.method import Sampler
from diffdistill.methods import scm
from diffdistill.parts import consistency, jvp
from diffdistill.parts.consistency import Consistency, ConsistencyConfig, normalised, tangent
from diffdistill.parts.rollout import sample
from diffdistill.parts.trig import Trig, conditional_velocity, mix
from diffdistill.registry import get_method
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow
from diffdistill.testing import (
    PredictionNet,
    gaussian,
    mixture,
    run_method,
    student_samples,
    tiny_denoiser,
)

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
ROWS = {  # mu, s, sigma_d, t, x: dx/dt, F, cos sin dF/dt, df/dt, g (r=1), g (r=.5), f*
    (0.3, 0.7, 0.5, 1.0, 0.9): (
        -0.50400939, -1.00801879, -0.01599566, -0.74252138, -0.40118601, -0.20059301, 1.21302720,
    ),
    (-1.0, 2.0, 0.5, 0.4, 0.2): (
        -0.05002556, -0.10005111, -0.07516814, -0.03707848, -0.03415154, -0.01707577, 0.21039830,
    ),
    (0.5, 0.5, 0.5, 1.2, -0.3): (
        -0.46601954, -0.93203909, -0.12237966, 0.44847752, 0.16250931, 0.08125465, 0.01882112,
    ),
}  # fmt: skip


def one(v):
    return torch.tensor([v], dtype=torch.float64)


class Gauss:
    """TrigFlow of N(mu, s^2)."""

    def __init__(self, mu, s, sigma_d):
        self.mu, self.s, self.d = mu, s, sigma_d

    def root(self, t):
        return (t.cos() ** 2 * self.s**2 + t.sin() ** 2 * self.d**2).sqrt().view(-1, 1)

    def gap(self, x, t):
        return x - self.mu * t.cos().view(-1, 1)

    def velocity(self, x, t):
        pull = (t.sin() * t.cos() * (self.d**2 - self.s**2)).view(-1, 1) / self.root(t) ** 2
        return -self.mu * t.sin().view(-1, 1) + pull * self.gap(x, t)

    def star(self, x, t):
        return self.mu + self.s * self.gap(x, t) / self.root(t)

    def field(self, x, t):
        return self.velocity(x, t) / self.d

    def star_field(self, x, t):
        c, s = t.cos().view(-1, 1), t.sin().view(-1, 1)
        return (c * x - self.star(x, t)) / (self.d * s)


def linear(x, t):
    return 0.8 * x / 0.5 + 0.25 * (3 * t).sin().view(-1, 1)


def step(sigma_d=0.5, **options):
    found = Consistency(Trig(TrigFlow(), sigma_d), ConsistencyConfig(**options))
    found.jvp.guarded = True  # some of these fields do not move in x
    return found


def tangent_of(field, law, x, t, r=1.0, derivative=None):
    """(tF, g)"""
    velocity = law.velocity(x, t)
    moved = (derivative or step(law.d).derivative)(field, x, t, velocity)
    return moved, tangent(field(x, t), velocity, x, t, moved, r, law.d)


# ---- 1 to 3 -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_1_a_student_that_is_the_teacher(row):
    law, t, x = Gauss(*row[:3]), one(row[3]), one(row[4])[:, None]
    velocity, f, moved, slope, g, half, star = ROWS[row]
    got, found = tangent_of(law.field, law, x, t)
    values = law.velocity(x, t), law.field(x, t), got, found / t.cos(), found
    for value, want in zip(values, (velocity, f, moved, slope, g), strict=True):
        assert value.item() == pytest.approx(want, abs=2e-8)
    assert tangent_of(law.field, law, x, t, 0.5)[1].item() == pytest.approx(half, abs=2e-8)
    assert law.star(x, t).item() == pytest.approx(star, abs=2e-8)
    closed = -t.sin() * (law.s * law.d) ** 2 * law.gap(x, t) / law.root(t) ** 4
    assert (found / t.cos()).item() == pytest.approx(closed.item(), abs=1e-12)


def check_linear(derivative):
    law, x, t = Gauss(0.3, 0.7, 0.5), one(0.9)[:, None], one(1.0)
    moved, g = tangent_of(linear, law, x, t, derivative=derivative)
    assert linear(x, t).item() == pytest.approx(1.47528, abs=1e-6)
    assert moved.item() == pytest.approx(-0.70420967, abs=1e-8)
    assert g.item() == pytest.approx(-0.41954947, abs=1e-8)
    half = tangent_of(linear, law, x, t, 0.5, derivative)[1].item()
    assert half == pytest.approx(-0.39100997, abs=1e-8)


def test_1_any_student():
    check_linear(step().derivative)


def test_1_wrong_tangents():
    """The state's as if F took x / sigma_d; the time's dropped; the teacher's left out."""
    right = step().derivative

    def scaled(field, x, t, velocity):
        return right(field, x, t, velocity / 0.5)

    def no_time(field, x, t, velocity):
        return right(lambda x, u: field(x, t), x, t, velocity)

    def no_state(field, x, t, velocity):
        return right(field, x, t, 0 * velocity)

    for wrong in (scaled, no_time, no_state):
        with pytest.raises(AssertionError):
            check_linear(wrong)


def test_2_the_consistency_function_is_the_fixed_point_of_a_full_tangent():
    law = Gauss(0.3, 0.7, 0.5)
    x = torch.randn(500, 1, dtype=torch.float64)
    t = torch.rand(500, dtype=torch.float64) * 1.4 + 0.1
    assert tangent_of(law.star_field, law, x, t)[1].abs().max() < 1e-13
    x, t = one(0.9)[:, None], one(1.0)
    assert law.star_field(x, t).item() == pytest.approx(-1.72734446, abs=1e-8)
    wrong = tangent_of(law.star_field, law, x, t, 0.5)[1].item()
    assert wrong == pytest.approx(0.05249757, abs=1e-8)


@pytest.mark.parametrize("h, want", [(1e-2, -0.42514811), (1e-3, -0.42010941), (1e-4, -0.41960547)])
def test_3_discrete_consistency_tends_to_the_tangent(h, want):
    law, x, t = Gauss(0.3, 0.7, 0.5), one(0.9)[:, None], one(1.0)
    f = lambda x, t: t.cos() * x - t.sin() * 0.5 * linear(x, t)  # noqa: E731
    before = math.cos(h) * x - math.sin(h) * law.velocity(x, t)  # DDIM
    found = t.cos() * (f(x, t) - f(before, t - h)) / math.sin(h)
    assert found.item() == pytest.approx(want, abs=2e-8)


# ---- 4 normalisation, 9 weights ---------------------------------------------------------


def test_4_normalisation():
    g = torch.tensor([[0.3, -0.4, 1.2]], dtype=torch.float64)
    unit = normalised(g)
    assert unit[0].tolist() == pytest.approx([0.21428571, -0.28571429, 0.85714286], abs=1e-8)
    f = torch.zeros_like(g, requires_grad=True)
    loss = (f - f.detach() - unit).square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.86224490, abs=1e-8)
    torch.testing.assert_close(f.grad, -2 * unit)
    rms = normalised(g, "rms")[0].tolist()
    assert rms == pytest.approx([0.35271, -0.47028, 1.41084], abs=1e-5)
    assert normalised(g, "clip")[0].tolist() == [0.3, -0.4, 1.0]
    assert normalised(g, "root")[0, 2].item() == pytest.approx(1.2 / 1.79**0.5)
    assert torch.equal(normalised(g, "none"), g)
    image = torch.randn(3, 2, 4, 4)
    each = torch.stack([normalised(i[None])[0] for i in image])
    torch.testing.assert_close(normalised(image), each)


def test_4_the_residual_moves_along_plus_g_and_wrong_sign_is_seen():
    law, x, t = Gauss(0.3, 0.7, 0.5), one(0.9)[:, None], one(1.0)
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    field = lambda x, t: weight * x / 0.5 + 0.25 * (3 * t).sin()[:, None]  # noqa: E731
    residual, size = step().residual(field, x, t, law.velocity(x, t), 1.0)
    assert size.item() == pytest.approx(0.41954947, abs=1e-8)
    assert residual.item() == pytest.approx(0.41954947 / 0.51954947, abs=1e-8)
    (slope,) = torch.autograd.grad(residual.square().sum() / 2, weight)
    assert slope.item() == pytest.approx(0.41954947 / 0.51954947 * 1.8, abs=1e-7)
    assert slope.item() > 0, "wrong sign: descending must lower F, as g is negative"


def test_9_adaptive_weight():
    square = torch.tensor([0.04, 2.5])
    w = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = consistency.weighted(square.sqrt()[:, None], w).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert (w.exp() * square).tolist() == pytest.approx([1, 1], abs=1e-3)
    assert consistency.weighted(square.sqrt()[:, None], None).tolist() == pytest.approx([0.04, 2.5])
    head = consistency.LogWeight(2.5)
    t = torch.rand(5, dtype=torch.float64)
    assert head(t).tolist() == [2.5] * 5
    nn.init.normal_(head.out.weight)
    assert head(t).dtype == torch.float32 and head(t).std() > 0.1


def test_9_adaptive_weight_starts_at_its_optimum():
    teacher = tiny_denoiser(size=8)
    elements = math.prod(teacher.shape)
    g = torch.randn(4, *teacher.shape)
    unit = consistency.normalised(g, "l2", c=1e-9)
    w = scm.Config().log_weight(teacher)(torch.rand(4, dtype=torch.float64)).requires_grad_()
    assert w.tolist() == pytest.approx([math.log(elements)] * 4)
    (slope,) = torch.autograd.grad(consistency.weighted(unit, w).sum(), w)
    assert slope.abs().max() < 1e-4
    assert scm.Config(normalise="none").log_weight(teacher).out.bias.item() == 0


@pytest.mark.parametrize("name", ["scm", "rcm", "tbcm", "sana_sprint"])
def test_no_time_is_later_than_the_students_first(name):
    teacher, cls = gaussian((0.0,), 0.5, EDM()), get_method(name)
    x = torch.zeros(10_000, 1)
    for first, want in ((None, 80.0), (40.0, 40.0)):
        method = cls(cls.Config(conditioning_time=first), teacher)
        t = method.trig.draw(x, 2.0, 1.4)
        assert method.trig.own(t)[0].max().item() == pytest.approx(want, rel=1e-6)
        assert method.sampler().times == (pytest.approx(want),)


def test_warm_up():
    assert [jvp.warm(i, 10) for i in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert jvp.warm(0, 0) == 1


# ---- 5 the wrapper ----------------------------------------------------------------------


def wrapped(schedule, prediction, mean, std, data_std, sigma_d=0.5):
    """The Gaussian's denoiser as a network of this kind, and its TrigFlow."""
    net = gaussian((mean,), std, schedule).net
    denoiser = Denoiser(PredictionNet(net, schedule, prediction), schedule, prediction, shape=(1,))
    return denoiser.requires_grad_(False), Trig(schedule, data_std, sigma_d)


CASES = [  # the law in the teacher's units, the std that TrigFlow takes for its data's
    (EDM(), "x0", 0.3, 0.7, 0.5),
    (SD, "eps", 0.3, 0.7, 0.5),
    (SD, "v", 0.6, 1.4, 1.0),
    (TrigFlow(), "v", 0.6, 1.4, 1.0),
    (RectifiedFlow(), "flow", 0.6, 1.4, 1.0),
    (RectifiedFlow(), "flow", 0.3, 0.7, 0.5),
]


@pytest.mark.parametrize(("schedule", "prediction", "mean", "std", "data_std"), CASES)
def test_5_every_teacher_is_the_same_in_trigflow(schedule, prediction, mean, std, data_std):
    denoiser, trig = wrapped(schedule, prediction, mean, std, data_std)
    law = Gauss(0.3, 0.7, 0.5)
    t = torch.tensor([0.3, 1.0, 1.2], dtype=torch.float64)
    x = torch.tensor([[0.2], [0.9], [-0.3]])
    want = law.field(x.double(), t).float()
    torch.testing.assert_close(trig.network(denoiser, x, t, {}), want, rtol=1e-4, atol=1e-5)
    velocity = trig.velocity(denoiser, x, t, {})
    torch.testing.assert_close(velocity, 0.5 * want, rtol=1e-4, atol=1e-5)
    field = lambda x, t: trig.network(denoiser, x, t, {})  # noqa: E731
    moved = Consistency(trig, ConsistencyConfig()).derivative(field, x, t, velocity)
    want = step().derivative(law.field, x.double(), t, velocity.double()).float()
    torch.testing.assert_close(moved, want, rtol=1e-3, atol=1e-4)
    assert moved[1].item() == pytest.approx(-0.01599566, abs=1e-4)


def test_5_times_and_scales_of_teachers():
    one_, x = one(1.0), torch.tensor([[0.9]])
    flow, trig = wrapped(RectifiedFlow(), "flow", 0.6, 1.4, 1.0)
    tau, rho = trig.own(one_)
    assert tau.item() == pytest.approx(0.60897905, abs=1e-8)
    assert rho.item() * 0.9 == pytest.approx(1.30267390, abs=1e-8)
    assert flow.net((rho * x).float(), tau).item() == pytest.approx(-0.85074982, abs=1e-6)
    end = one(math.pi / 2 - 1e-6)
    assert trig.own(end)[0].item() == pytest.approx(1, abs=1e-5)
    assert trig.network(flow, torch.tensor([[0.4]]), end, {}).item() == pytest.approx(
        -0.6, abs=1e-4
    )
    assert trig.clean(flow, torch.tensor([[0.4]]), end, {}).item() == pytest.approx(0.3, abs=1e-4)
    edm, trig = wrapped(EDM(), "x0", 0.3, 0.7, 0.5)
    sigma, rho = trig.own(one_)
    assert sigma.item() == pytest.approx(0.77870386, abs=1e-8)
    assert rho.item() * 0.9 == pytest.approx(1.66573415, abs=1e-8)
    assert trig.clean(edm, x, one_, {}).item() == pytest.approx(0.91038136, abs=1e-6)
    vp, trig = wrapped(TrigFlow(), "v", 0.3, 0.7, 0.5)
    t = one(1.21202566)
    tau, rho = trig.own(t)
    assert tau.cos().item() == pytest.approx(0.6, abs=1e-7)
    assert 0.37 / rho.item() == pytest.approx(0.21652612, abs=1e-8)
    z = torch.tensor([[0.21652612]])
    assert trig.clean(vp, z, t, {}).item() == pytest.approx(0.36842234, abs=1e-6)
    assert trig.network(vp, z, t, {}).item() == pytest.approx(-0.62455588, abs=2e-6)


def test_5_wrong_scale_of_the_data_is_another_time():
    _, right = wrapped(EDM(), "x0", 0.3, 0.7, 0.5)
    _, wrong = wrapped(EDM(), "x0", 0.3, 0.7, 1.0)
    assert wrong.own(one(1.0))[0].item() == pytest.approx(2 * right.own(one(1.0))[0].item())
    assert wrong.data(torch.ones(1)).item() == 0.5


def test_times_stay_in_the_teachers_range():
    like = torch.empty(50_000, 1)
    trig = Trig(SD, 1.0)
    assert trig.low == pytest.approx(0.0292, abs=1e-3) and trig.high == pytest.approx(
        1.5024, abs=1e-3
    )
    t = trig.draw(like, -1.0, 1.4)
    assert (t.min().item(), t.max().item()) == (trig.low, trig.high)
    drawn = (Trig(EDM(), 0.5).draw(like, -1.0, 1.4).tan() * 0.5).log()
    assert drawn.mean().item() == pytest.approx(-1.0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1.4, abs=0.03)
    for schedule in (RectifiedFlow(), TrigFlow()):
        assert Trig(schedule).high < math.pi / 2 and math.isfinite(math.tan(Trig(schedule).high))


# ---- 6 sCT, 7 sampling ------------------------------------------------------------------


def test_6_the_datas_velocity_is_unbiased():
    n, t = 400_000, one(1.0)
    x0, z = 0.3 + 0.7 * torch.randn(n, 1).double(), 0.5 * torch.randn(n, 1).double()
    x = mix(x0, z, t)
    gap = torch.cat([torch.ones(n, 1), x - 0.3 * math.cos(1)], 1)
    found = torch.linalg.lstsq(gap, conditional_velocity(x0, z, t)).solution.flatten().tolist()
    assert found == pytest.approx([-0.25244, -0.34092], abs=4e-3)


def test_7_one_step_of_the_exact_function():
    law, t = Gauss(0.3, 0.7, 0.5), one(math.atan(160))
    low, high = (law.star(one(v)[:, None], t).item() for v in (-0.5, 0.5))
    assert (low + high) / 2 == pytest.approx(0.297375, abs=1e-6)
    assert (high - low) / 2 == pytest.approx(0.699987, abs=1e-6)


@pytest.mark.parametrize("later", [(), (1.1,), (1.3, 1.1, 0.6)])
def test_7_any_number_of_steps_of_the_exact_function(later):
    law, trig = Gauss(0.3, 0.7, 0.5), Trig(EDM(), 0.5)

    def student(z, sigma, cond):
        t = (sigma / 0.5).atan()
        return law.star(z.double() * t.cos()[:, None], t).float()

    sampler = trig.sampler(80.0, later)
    assert sampler.times[1:] == pytest.approx([0.5 * math.tan(t) for t in later])
    noises = [torch.randn(400_000, 1) for _ in sampler.times]
    x = sample(student, EDM(), noises, {}, sampler)
    mean = 0.297375 if not later else 0.3  # the start lacks the data's mean
    assert (x.mean().item(), x.std().item()) == pytest.approx((mean, 0.7), abs=4e-3)


def test_7_sampler_of_the_config():
    times = {
        n: scm.SCM(scm.Config(student_steps=n), gaussian((0.0,), 1.0)).sampler().times
        for n in (1, 2, 4)
    }
    assert times[1] == (80.0,) and times[2][0] == 80
    assert times[2][1] == pytest.approx(math.tan(1.1))
    assert [round(math.atan(t), 6) for t in times[4][1:]] == [1.3, 1.1, 0.6]
    own = scm.Config(student_steps=2, mid_times=(0.8,), data_std=0.5, conditioning_time=20.0)
    method = scm.SCM(own, gaussian((0.0,), 1.0))
    assert method.sampler() == Sampler((20.0, pytest.approx(0.5 * math.tan(0.8))))


# ---- 8 training -------------------------------------------------------------------------


LAW = Gauss(0.3, 0.7, 0.5)


def trained(steps, **options):
    """The exact denoiser as teacher, a copy with a correction as student."""
    teacher = mixture([(0.3,)], 0.7, EDM(t_max=20.0))
    x = 0.3 + 0.7 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(7))
    return run_method(
        "scm", teacher, steps=steps, batch_size=256, x=x, data_std=0.5,
        optim={"default": OptimConfig(lr=8e-3, weight_decay=0.0, decay="linear")},
        **{"tangent_warmup": 20} | options,
    )  # fmt: skip


def error(engine):
    """Root mean square of f - f* over times, at the points of the ODE's law."""
    t = torch.linspace(0.1, 1.5, 4000, dtype=torch.float64)
    x = mix(0.3 + 0.7 * torch.randn(4000, 1), 0.5 * torch.randn(4000, 1), t)
    with torch.no_grad():
        found = engine.method.trig.clean(engine.method.student, x, t, {})
    return (found - LAW.star(x.double(), t)).square().mean().sqrt().item()


def test_8_distils_a_gaussian():
    engine = trained(450)
    assert error(engine) < 0.04
    x = student_samples(engine, 20_000)
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.29, 0.70), abs=0.05)
    engine.method.cfg.student_steps = 2
    x = student_samples(engine, 20_000)
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.3, 0.7), abs=0.05)


def test_8_trains_on_data_alone():
    assert error(trained(200, velocity="data")) < 0.15


def test_8_wrong_warm_up_that_does_not_end_keeps_the_denoiser():
    engine = trained(100, tangent_warmup=10**9)
    assert student_samples(engine, 20_000).std().item() < 0.1 and error(engine) > 0.2


def test_8_wrong_sign_runs_away(monkeypatch):
    monkeypatch.setattr(consistency, "normalised", lambda g, *a: -normalised(g, *a))
    assert error(trained(60)) > 0.5


# ---- the engine -------------------------------------------------------------------------


def make(**options):
    torch.manual_seed(0)  # of the network
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 3
    return run_method(
        "scm", tiny_denoiser(EDM(), "eps"), steps=3, batch_size=8, x=x, train=False,
        cond={"label": lambda i: labels[i]}, **options,
    )  # fmt: skip


def test_the_guard_runs_once_and_disturbs_nothing(monkeypatch):
    calls = []
    check = jvp.check_tangent
    counted = lambda *a, **k: calls.append(1) or check(*a, **k)  # noqa: E731
    monkeypatch.setattr(jvp, "check_tangent", counted)
    engine, other = make(), make()
    other.method.consistency.jvp.guarded = True
    for e in (engine, other):
        e.fit()
    assert len(calls) == 1
    for a, b in zip(*(e.roles["student"].params for e in (engine, other)), strict=True):
        assert torch.equal(a, b)


@torch.library.custom_op("diffdistill_tests_scm::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * 1


def test_the_guard_refuses_a_network_that_drops_tangents():
    engine = make()
    plain = engine.method.student.net.forward
    engine.method.student.net.forward = lambda z, t, label: plain(z, t, label) + 2 * opaque(z)
    with torch.no_grad(), pytest.raises(ValueError, match=r"custom operators"):
        engine.method.loss(engine._micro_batches(0)[0])


@pytest.mark.parametrize("options", [{}, {"derivative": "fd"}, {"derivative": "semi"}])
def test_modes_agree(options):
    found = []
    for chosen in (options, {}):
        engine = make(tangent_warmup=0, guidance=2.0, **chosen)
        torch.manual_seed(0)
        found.append(engine.method.loss(engine._micro_batches(0)[0]))
    for name in ("consistency", "_tangent"):
        assert found[0][name].item() == pytest.approx(found[1][name].item(), rel=2e-2)


def test_the_student_learns_and_the_warm_up_follows_the_step(monkeypatch):
    seen = []
    right = scm.warm
    monkeypatch.setattr(scm, "warm", lambda i, h: seen.append(right(i, h)) or right(i, h))
    engine = make(tangent_warmup=2)
    before = {n: [p.clone() for p in r.params] for n, r in engine.roles.items()}
    engine.fit()
    assert seen == [0.0, 0.5, 1.0]
    for name, role in engine.roles.items():
        assert not all(map(torch.equal, before[name], role.params)), name
    assert set(make(adaptive=False).roles) == {"student"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"velocity": "data", "guidance": 2.0}, "has no guidance"),
        ({"student_steps": 5}, "1 to 4 steps"),
        ({"student_steps": 1, "mid_times": (1.0,)}, "one mid time less than steps"),
        ({"data_std": 0.0}, "Allowed: more than 0"),
        ({"c": 0.0}, "Allowed: more than 0"),
        ({"tangent_warmup": -1}, "0 or more"),
        ({"derivative": "fd", "precision": "bf16"}, "differences need fp32"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        scm.Config(**options).validate()


def test_mid_times_that_do_not_fall_are_refused():
    for times in ((0.6, 1.1), (1.5707, 1.0)):
        with pytest.raises(ValueError, match="cannot take steps"):
            scm.SCM(scm.Config(student_steps=3, mid_times=times), gaussian((0.0,), 1.0))


def test_needs():
    assert scm.SCM.needs(scm.Config()).images
