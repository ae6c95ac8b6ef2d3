"""Known-answer tests of flow maps, numbered as in the specification."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.engine import OptimConfig
from diffdistill.kernels import student_jvp
from diffdistill.methods import flow_maps
from diffdistill.parts import flow_map
from diffdistill.parts.flow_map import Flow, TwoTimes, jump
from diffdistill.parts.trig import Trig
from diffdistill.schedules import EDM, RectifiedFlow
from diffdistill.testing import gaussian, run_method, student_samples

MU, STD = 0.3, 0.7


def one(v):
    return torch.tensor([v], dtype=torch.float64)


def col(v):
    return v.view(-1, 1)


def var(t):
    return col((1 - t) ** 2 * STD**2 + t**2)


def velocity(z, t):
    """v of N(0.3, 0.7^2)."""
    slope = col(-2 * (1 - t) * STD**2 + 2 * t)
    return -MU + slope / (2 * var(t)) * (z - MU * col(1 - t))


def end(z, t, r):
    return MU * col(1 - r) + (var(r) / var(t)).sqrt() * (z - MU * col(1 - t))


def exact(z, t, r):
    return (z - end(z, t, r)) / col(t - r)


def linear(z, t, r):
    return 0.4 * z - 0.2 * col(t) + 0.1 * col(r)


Z, T, R = one(0.9)[:, None], one(0.8), one(0.2)


# ---- 1 to 3 the exact map ---------------------------------------------------------------


def test_1_exact_map():
    found = [velocity(Z, T), end(Z, T, R), exact(Z, T, R), end(Z, T, one(0.0)), exact(Z, T, 0 * R)]
    want = [0.59399636, 0.85502829, 0.07495285, 1.02399739, -0.15499674]
    assert [v.item() for v in found] == pytest.approx(want, abs=1e-8)


def eulerian(along):
    moved = student_jvp(exact, (Z, T, R), along)[1]
    return moved.item(), flow_map.eulerian(velocity(Z, T), moved, T, R).item()


def test_2_eulerian():
    moved, target = eulerian((velocity(Z, T), torch.ones(1).double(), None))
    assert moved == pytest.approx(0.86507251, abs=1e-8)
    assert target == pytest.approx(0.07495285, abs=1e-8)


def test_2_wrong_tangents():
    v, on = velocity(Z, T), torch.ones(1).double()
    assert eulerian((v, None, None))[1] == pytest.approx(0.43491020, abs=1e-7)
    assert eulerian((v, on, on))[1] == pytest.approx(-0.63395201, abs=1e-7)
    moved = student_jvp(exact, (Z, T, R), (v, on, None))[1]
    assert flow_map.eulerian(v, -moved, T, R).item() == pytest.approx(1.11303987, abs=1e-7)


def test_3_lagrangian_and_semigroup():
    x = jump(Z, exact(Z, T, R), T, R)
    moved = student_jvp(exact, (Z, T, R), (None, None, torch.ones(1).double()))[1]
    assert moved.item() == pytest.approx(1.18150811, abs=1e-7)
    assert velocity(x, R).item() == pytest.approx(-0.63395201, abs=1e-8)
    target = flow_map.lagrangian(velocity(x, R), moved, T, R).item()
    assert target == pytest.approx(0.07495285, abs=1e-8)
    for g, parts in ((0.5, (0.39582989, -0.24592418)), (0.25, (0.24728443, -0.44204187))):
        w = flow_map.between(T, R, one(g))
        first = exact(Z, T, w)
        second = exact(jump(Z, first, T, w), w, R)
        assert (first.item(), second.item()) == pytest.approx(parts, abs=1e-8)
        assert torch.lerp(first, second, one(g)).item() == pytest.approx(0.07495285, abs=1e-8)


# ---- 4 targets, 5 zeros -----------------------------------------------------------------


def method(u, **options):
    """With u in place of the student, and the Gaussian's exact velocity as the teacher's."""
    teacher = gaussian((MU,), STD, RectifiedFlow())
    found = flow_maps.FlowMaps(flow_maps.Config(**options), teacher)
    found.u = lambda z, t, r, cond: u(z, t, r)
    if found.cfg.velocity == "teacher":
        found.velocity = lambda z, t, cond: velocity(z, t)
    return found


@pytest.mark.parametrize(
    ("identity", "source", "want"),
    [
        ("eulerian", "teacher", 0.57143723),
        ("eulerian", "data", 0.57143723),  # with the exact v in place of the data's
        ("eulerian", "self", 0.3328),
        ("lagrangian", "self", 0.3472),
        ("lagrangian", "teacher", -0.58669683 + 0.06),
        ("semigroup", "self", 0.25),
    ],
)
def test_4_targets_of_a_linear_student(identity, source, want):
    m = method(linear, identity=identity, velocity=source)
    assert linear(Z, T, R).item() == pytest.approx(0.22)
    assert jump(Z, linear(Z, T, R), T, R).item() == pytest.approx(0.768)
    assert m.target(Z, velocity(Z, T), T, R, {}).item() == pytest.approx(want, abs=1e-8)


def points(n=200):
    t, r = torch.rand(2, n, dtype=torch.float64).sort(0, descending=True).values * 0.95 + 0.02
    return torch.randn(n, 1, dtype=torch.float64), t + 1e-3, r


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian", "semigroup"])
def test_5_the_exact_map_is_a_zero_of_every_identity(identity):
    z, t, r = points()
    m = method(exact, identity=identity, gamma="uniform")
    target = m.target(z, velocity(z, t), t, r, {})
    assert (target - exact(z, t, r)).abs().max() < 1e-9


def test_5_wrong_factor_of_the_derivative_is_no_zero():
    z, t, r = points()
    m = method(exact)
    half = m.target(z, velocity(z, t), t, r, {}, share=0.5)
    assert (half - exact(z, t, r)).abs().max() > 0.05


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_5_any_number_of_jumps_ends_at_the_same_point(steps):
    z, grid = torch.randn(50, 1, dtype=torch.float64), torch.linspace(1, 0, steps + 1).double()
    x = z
    for t, r in pairwise(grid):
        x = jump(x, exact(x, t.expand(50), r.expand(50)), t.expand(50), r.expand(50))
    torch.testing.assert_close(x, MU + STD * z)


# ---- 7 weight, 8 diagonal, 9 start ------------------------------------------------------


def test_7_weight():
    delta = torch.tensor([[0.3, -0.4, 1.2]], dtype=torch.float64, requires_grad=True)
    loss = flow_map.adaptive(delta, 1.0, 0.01)
    assert loss.item() == pytest.approx(0.99411765, abs=1e-8)
    (slope,) = torch.autograd.grad(loss, delta)
    torch.testing.assert_close(slope, 2 * delta.detach() / 1.7)  # the weight is a constant
    square = torch.tensor([[1.69**0.5]], dtype=torch.float64)
    weight = flow_map.adaptive(square, 0.75, 1e-3).item() / 1.69
    assert weight == pytest.approx(0.67436076, abs=1e-8)


class Timed(nn.Module):
    """The exact velocity of the Gaussian, and a correction that learns; with a time embedding."""

    def __init__(self, width=48):
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.inp, self.mid, self.out = (
            nn.Linear(1, width),
            nn.Linear(width, width),
            nn.Linear(width, 1),
        )
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z, t):
        k = torch.arange(4, dtype=t.dtype)
        waves = torch.cat([(t[:, None] * k).cos(), (t[:, None] * k).sin()], 1).to(z.dtype)
        h = nn.functional.silu(self.inp(z) + self.time_embedding(waves))
        return velocity(z, t).to(z.dtype) + self.out(nn.functional.silu(self.mid(h)))


def make(steps=1, batch_size=8, optim=None, train=False, **options):
    torch.manual_seed(0)
    teacher = Denoiser(Timed(), RectifiedFlow(), "flow", shape=(1,))
    x = MU + STD * torch.randn(4096, 1, generator=torch.Generator().manual_seed(7))
    return run_method(
        "flow_maps", teacher, steps=steps, batch_size=batch_size, x=x, optim=optim, train=train,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_8_on_the_diagonal_there_is_no_derivative(source, monkeypatch):
    engine = make(diagonal=1.0, velocity=source, power=0.0)
    m, batch = engine.method, engine._micro_batches(0)[0]
    m.jvp = None  # a call would fail
    m.draw = lambda like: torch.linspace(0.2, 0.9, 16).double().view(2, 8)
    torch.manual_seed(0)
    found = m.loss(batch)["map"].item()
    torch.manual_seed(0)
    eps, t = torch.randn_like(batch.x), torch.linspace(0.2, 0.9, 16).double()[:8]
    z = flow_map.interpolate(batch.x, eps, t)
    v = velocity(z, t) if source == "teacher" else eps - batch.x
    want = (velocity(z, t) - v).square().sum(1).mean().item()  # a new student is the teacher
    assert found == pytest.approx(want, abs=1e-6)


def test_8_part_of_the_batch(monkeypatch):
    engine, seen = make(diagonal=0.25, student_steps=1), []
    m = engine.method
    right = m.target
    m.target = lambda *a: seen.append(a) or right(*a)
    m.loss(engine._micro_batches(0)[0])
    ((z, _, t, r, _, _),) = seen
    assert len(z) == 6 and (t > r).all()


def test_9_the_student_starts_as_the_teacher():
    m = make().method
    z, t, r = points(20)
    with torch.no_grad():
        u = m.u(z.float(), t, r, {})
    torch.testing.assert_close(u, velocity(z, t).float(), rtol=1e-3, atol=1e-4)
    nn.init.normal_(m.student.net.second[-1].weight)
    nn.init.normal_(m.student.net.net.out.weight)
    with torch.no_grad():
        assert (m.u(z.float(), t, r, {}) - m.u(z.float(), t, 0 * r, {})).abs().max() > 1e-3


# ---- the second time, other schedules ---------------------------------------------------


def test_without_a_second_time_the_next_step_is_meant():
    net = TwoTimes(Timed(), RectifiedFlow(), 1.0, (1.0, 0.5, 0.25))
    t = one(1.0), one(0.7), one(0.5), one(0.3), one(0.25), one(0.1)
    assert [net.following(v).item() for v in t] == [0.5, 0.5, 0.25, 0.25, 0.0, 0.0]
    nn.init.normal_(net.second[-1].weight)
    nn.init.normal_(net.net.out.weight)
    z = torch.randn(1, 1)
    torch.testing.assert_close(net(z, one(1.0)), net(z, one(1.0), r=one(0.5)))
    assert not torch.equal(net(z, one(1.0)), net(z, one(1.0), r=one(0.0)))


class Piped(nn.Module):
    """Like a pipeline's network: the UNet is inside."""

    def __init__(self):
        super().__init__()
        self.unet = Timed()

    @property
    def backbone(self):
        return self.unet

    def forward(self, z, t):
        return self.unet(z, t)


def test_a_one_step_student_is_a_stock_network():
    net = TwoTimes(Piped(), RectifiedFlow(), 1.0, (1.0,))
    for layer in (net.second[-1], net.net.unet.out):
        nn.init.normal_(layer.weight)
    z = torch.randn(5, 1)
    t = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(net.backbone(z, t), net(z, t))
    assert not torch.allclose(net.net.unet(z, t), net(z, t))
    teacher = Denoiser(Piped(), RectifiedFlow(), "flow", shape=(1,))
    with pytest.raises(ValueError, match="has no place in a pipeline's network"):
        flow_maps.FlowMaps(flow_maps.Config(student_steps=2), teacher)
    with pytest.raises(ValueError, match="one sub-module time_embedding or timestep_embedder"):
        TwoTimes(nn.Linear(1, 1), EDM(), 1.0, (1.0,))


@pytest.mark.parametrize(
    ("schedule", "std", "mean"), [(EDM(), 0.35, 0.15), (RectifiedFlow(), 0.7, 0.3)]
)
def test_any_schedule_is_a_straight_path(schedule, std, mean):
    data_std = std / STD
    flow = Flow(Trig(schedule, data_std, 1.0))
    teacher = gaussian((mean,), std, schedule)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z = torch.tensor([[0.2], [-0.5], [1.0]])
    with torch.no_grad():
        found = flow.velocity(teacher, z, t, {})
    torch.testing.assert_close(found, velocity(z.double(), t).float(), rtol=1e-3, atol=1e-4)
    tau = torch.tensor(flow.own(t.tolist()))
    torch.testing.assert_close(flow_map.flow_time(schedule, data_std, tau), t)


def test_sampler_jumps():
    m = flow_maps.FlowMaps(
        flow_maps.Config(student_steps=4), gaussian((0.0,), 1.0, RectifiedFlow())
    )
    assert m.sampler().times == pytest.approx((1.0, 0.75, 0.5, 0.25))
    assert m.sampler().renoise == "ode"
    m = flow_maps.FlowMaps(flow_maps.Config(student_steps=2, data_std=0.5), gaussian((0.0,), 1.0))
    assert m.sampler().times == pytest.approx((80.0, 0.5)) and m.flow.high == pytest.approx(
        80 / 80.5
    )


# ---- training ---------------------------------------------------------------------------


def trained(steps, **options):
    optim = {"default": OptimConfig(lr=5e-3, weight_decay=0.0, decay="linear")}
    return make(steps, 256, optim, True, power=0.0, **options)


def error(engine):
    """Root mean square of u - exact u, over times."""
    t, r = torch.rand(2, 4000, dtype=torch.float64).sort(0, descending=True).values
    t, r = t.clamp(0.01, 0.99), r.clamp(max=0.98)
    keep = t > r + 1e-3
    z = MU * col(1 - t) + var(t).sqrt() * torch.randn(4000, 1, dtype=torch.float64)
    with torch.no_grad():
        found = engine.method.u(z.float(), t, r, {})
    return (found - exact(z, t, r))[keep].square().mean().sqrt().item()


def test_few_steps_of_a_teachers_map():
    engine = trained(400, student_steps=2, identity="semigroup", gamma="uniform")
    assert error(make()) > 0.3 and error(engine) < 0.08
    x = student_samples(engine, 20_000)
    assert (x.mean().item(), x.std().item()) == pytest.approx((MU, STD), abs=0.1)


@pytest.mark.parametrize(
    ("steps", "bar", "options"),
    [
        (250, 0.29, {"identity": "lagrangian", "diagonal": 0.5}),  # the slowest
        (150, 0.2, {"identity": "semigroup", "velocity": "self", "diagonal": 0.5}),
        (150, 0.25, {"velocity": "data", "diagonal": 0.5}),
    ],
)
def test_all_identities_and_velocities_learn(steps, bar, options):
    assert error(trained(steps, **options)) < bar  # 0.34 at the start


def test_wrong_sign_of_the_derivative_is_another_map(monkeypatch):
    right = flow_map.eulerian
    monkeypatch.setattr(flow_map, "eulerian", lambda v, d, t, r, s: right(v, -d, t, r, s))
    assert error(trained(60)) > 0.36


def test_normalised_moves():
    m = make(normalise="l2", power=0.0, diagonal=0.0)
    residual = m.method.loss(m._micro_batches(0)[0])["map"].item()
    assert 0 < residual < 1


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
def test_times(times):
    m = flow_maps.FlowMaps(flow_maps.Config(times=times), gaussian((0.0,), 1.0, RectifiedFlow()))
    t, r = m.draw(torch.empty(50_000, 1))
    assert (t >= r).all() and r.min() >= m.flow.low and t.max() <= m.flow.high
    if times == "uniform":
        assert (t.mean().item(), r.mean().item()) == pytest.approx((2 / 3, 1 / 3), abs=0.01)
    else:
        assert torch.cat([t, r]).logit().mean().item() == pytest.approx(-0.4, abs=0.03)
    assert math.isfinite(m.flow.high)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"velocity": "data", "identity": "lagrangian"}, "known at noised data only"),
        ({"velocity": "self", "diagonal": 0.0}, "above 0"),
        ({"velocity": "self", "guidance": 2.0}, "does not ask"),
        ({"diagonal": 1.5}, "0 to 1"),
        ({"derivative": "semi", "precision": "fp16"}, "differences need fp32"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        flow_maps.Config(**options).validate()
    assert flow_maps.FlowMaps.needs(flow_maps.Config()).images
