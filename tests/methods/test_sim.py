"""Known-answer tests of SIM, numbered as in the method's specification."""

import pytest
import torch
from torch import nn

from diffdistill.methods import sim
from diffdistill.parts import matching
from diffdistill.parts.matching import implicit_loss, score_identity, slope
from diffdistill.schedules import EDM
from diffdistill.testing import GaussianNet, gaussian, run_method, shifted, student_samples

SMALL = EDM(t_max=5.0)
SIGMA = 0.8
HUBER = {  # c: divergence, gradient, if the norm is detached, if z_t is detached
    0.1: (0.2625043, (-0.3992517, -0.4187023), (-0.6837999, -0.4187023), (-0.2776047, -0.5822580)),
    0.5: (0.1324899, (-0.2904876, -0.2690109), (-0.3401361, -0.2690109), (-0.2019797, -0.3740932)),
    2.0: (0.0416145, (-0.1115524, -0.0941855), (-0.1137269, -0.0941855), (-0.0775637, -0.1309767)),
}


def normal(n=130):
    """Nodes [n, 1] and weights [n] of the standard normal, float64; the trapezoidal rule."""
    x = torch.linspace(-7.5, 7.5, n, dtype=torch.float64)
    w = (-x.square() / 2).exp()
    return x[:, None], w / w.sum()


def pairs(n=130):
    """Nodes of two independent normals, [n * n, 1] each, and weights [n * n]."""
    x, w = normal(n)
    return x.repeat(n, 1), x.repeat_interleave(n, 0), (w[:, None] * w).flatten()


def divergence(a, b, kind, c, sigma=SIGMA, n=130):
    """E d(D_student(z) - D_teacher(z)) where z ~ the student of frozen parameters."""
    u, w = normal(n)
    t = torch.full((len(u),), sigma, dtype=torch.float64)
    z = b.detach() + (a.detach() ** 2 + sigma**2).sqrt() * u
    gain = a**2 / (a**2 + sigma**2)
    one = torch.ones(1, dtype=torch.float64)
    y = b + gain * (z - b) - GaussianNet(one, one.clone(), EDM())(z, t).detach()
    return (w * slope(kind, y, c, 4)[0]).sum()


def parameters(a=0.5, b=0.3):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b)]


def world(monkeypatch, n=130, **options):
    """The method at data N(1, 1), student b + a z, exact fake score; its mean is a quadrature."""
    zeta, eps, w = (v.float() for v in pairs(n))
    engine = run_method(
        "sim", gaussian((1.0,), 1.0), steps=1, batch_size=len(w), train=False, **options
    )
    method, params = engine.method, [torch.tensor(v, requires_grad=True) for v in (0.5, 0.3)]
    with torch.no_grad():
        method.fake_score.net.mean.fill_(0.3)
        method.fake_score.net.std.fill_(0.5)
    method.generate = lambda batch: params[1] + params[0] * zeta
    method.times = lambda kind, x: torch.full((len(x),), SIGMA, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    exact = lambda d, r: len(w) * w * implicit_loss(d, r)  # noqa: E731
    monkeypatch.setattr(sim, "implicit_loss", exact)
    return method, engine._micro_batches(0)[0], params


def slopes(monkeypatch, **options):
    """(loss, dL/da, dL/db)"""
    method, batch, params = world(monkeypatch, **options)
    loss = method.student_loss(batch)["sim"]
    return loss.item(), *(g.item() for g in torch.autograd.grad(loss, params))


def test_1_squared_distance_is_twice_sid(monkeypatch):
    value, *grads = slopes(monkeypatch, distance="l2")
    assert grads == pytest.approx((-0.4729632, -0.3928748), abs=1e-5)
    assert value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("c", HUBER)
def test_2_pseudo_huber(monkeypatch, c):
    want, gradient, _, _ = HUBER[c]
    a, b = parameters()
    exact = divergence(a, b, "pseudo_huber", c)
    assert exact.item() == pytest.approx(want, abs=1e-5)
    grads = torch.autograd.grad(exact, [a, b])
    assert [g.item() for g in grads] == pytest.approx(gradient, abs=1e-5)
    value, *grads = slopes(monkeypatch, huber=c)
    assert grads == pytest.approx(gradient, abs=2e-5)
    assert value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("pseudo_huber", 1e-10), ("l2", 1e-12)])
def test_2_surrogate_is_the_exact_gradient(kind, tolerance):
    a, b = parameters()
    exact = torch.autograd.grad(divergence(a, b, kind, 2.0), [a, b])
    zeta, eps, w = pairs()
    x = b + a * zeta
    z, t = x + SIGMA * eps, torch.full((len(w),), SIGMA, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    f = GaussianNet(one, one.clone(), EDM())(z, t)
    g = GaussianNet(b.detach()[None], a.detach()[None], EDM())(z, t)
    loss = (w * implicit_loss(slope(kind, g - f, 2.0, 4)[1], g - x)).sum()
    for got, want in zip(torch.autograd.grad(loss, [a, b]), exact, strict=True):
        assert abs(got - want) < tolerance


@pytest.mark.parametrize("c", HUBER)
def test_2_detached_norm_is_wrong_in_the_scale(monkeypatch, c):
    def frozen(kind, y, c, power):
        value, _ = slope(kind, y, c, power)
        return value, y / (value + c).detach()[:, None]

    monkeypatch.setattr(sim, "slope", frozen)
    _, *grads = slopes(monkeypatch, huber=c)
    assert grads == pytest.approx(HUBER[c][2], abs=2e-5)
    assert grads[0] != pytest.approx(HUBER[c][1][0], abs=1e-3)  # the mean's is right by symmetry


@pytest.mark.parametrize("c", HUBER)
def test_2_detached_input_is_wrong_and_a_normalised_dmd(monkeypatch, c):
    add = sim.add_noise
    monkeypatch.setattr(sim, "add_noise", lambda *args: add(*args).detach())
    _, *grads = slopes(monkeypatch, huber=c)
    assert grads == pytest.approx(HUBER[c][3], abs=2e-5)


def test_3_wide_huber_is_half_the_square(monkeypatch):
    _, *grads = slopes(monkeypatch, huber=1000.0, n=40)
    assert [1000 * g for g in grads] == pytest.approx((-0.2364816, -0.1964374), abs=1e-3)


def plane(derivative):
    """Gradients (a, b) of two coordinates, one scale; Monte Carlo, in pairs of opposite noise."""
    rng = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 400_000, 2, generator=rng, dtype=torch.float64)
    zeta, eps = torch.cat([draws, -draws], 1)
    mean, std = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
    x = b + a * zeta
    z, t = x + SIGMA * eps, torch.tensor(SIGMA, dtype=torch.float64)
    f = GaussianNet(mean, std, EDM())(z, t)
    g = GaussianNet(b.detach(), a.detach() * std, EDM())(z, t)
    loss = implicit_loss(derivative(g - f), g - x).mean()
    da, db = torch.autograd.grad(loss, [a, b])
    return [da.item(), *db.tolist()]


def test_4_norm_of_the_whole_sample():
    grads = plane(lambda y: slope("pseudo_huber", y, 0.5, 4)[1])
    assert grads == pytest.approx([-0.5241556, -0.2384842, 0.2384842], abs=3e-3)


def test_4_norm_of_each_element_is_wrong():
    grads = plane(lambda y: y / (y.square() + 0.25).sqrt())
    assert grads == pytest.approx([-0.5812, -0.2690, 0.2691], abs=3e-3)


def test_5_equals_sid_at_alpha_one_element_by_element():
    g = torch.Generator().manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(3)]
    student, teacher, fake = nets
    noise, eps = torch.randn(2, 16, 3, generator=g, dtype=torch.float64)
    losses = []
    for kind in ("sim", "sid"):
        x = student(noise)
        z = x + 0.5 * eps
        f, h = teacher(z), fake(z)
        if kind == "sim":
            loss = implicit_loss(slope("l2", h - f, 0.0, 2)[1] / 2, h - x).sum()
        else:
            loss = score_identity(x, f, h, 1.0).sum()
        losses.append(torch.autograd.grad(loss, list(student.parameters())))
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("distance", ["pseudo_huber", "l2", "lp"])
def test_6_every_sample_is_at_rest_at_the_optimum(distance):
    engine = run_method(
        "sim", gaussian((1.0,), 0.5), steps=1, batch_size=64, train=False, distance=distance,
        huber=0.1,
    )  # fmt: skip
    x = torch.randn(64, 1, requires_grad=True)
    engine.method.generate = lambda batch: x
    losses = engine.method.student_loss(engine._micro_batches(0)[0])
    (grad,) = torch.autograd.grad(losses["sim"], x)
    assert (grad == 0).all() and losses["_divergence"] == 0


@pytest.mark.parametrize(("c", "rate"), [(0.1, 0.3), (1.0, 1.5)])
def test_7_descent_of_the_methods_loss_with_the_exact_fake_score_converges(monkeypatch, c, rate):
    method, batch, params = world(monkeypatch, n=30, huber=c)
    fake = method.fake_score.net
    for step in range(400):
        sigma = (0.2, 0.5, 1.0, 2.0)[step % 4]
        method.times = lambda kind, x, at=sigma: torch.full((len(x),), at, dtype=torch.float64)
        with torch.no_grad():
            fake.std.copy_(params[0]), fake.mean.copy_(params[1])
        grads = torch.autograd.grad(method.student_loss(batch)["sim"], params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= rate * 0.99**step * g
    assert [p.item() for p in params] == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "want", "gradient"),
    [
        ("l2", 25.0, (6.0, 8.0)),
        ("lp", 337.0, (108.0, 256.0)),
        ("pseudo_huber", 13.0 - 12.0, (3 / 13, 4 / 13)),
    ],
)
def test_distances_by_hand(kind, want, gradient):
    y = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    value, derivative = slope(kind, y, 12.0, 4)
    assert value.tolist() == pytest.approx([want])
    assert derivative.flatten().tolist() == pytest.approx(gradient)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), y)[0], derivative)


def test_power_distance_is_exact_too():
    a, b = parameters()
    exact = torch.autograd.grad(divergence(a, b, "lp", 0.0), [a, b])
    grads = line(a, b)
    assert grads == pytest.approx([g.item() for g in exact], abs=1e-9)


def line(a, b):
    zeta, eps, w = pairs(30)
    x = b + a * zeta
    z, t = x + SIGMA * eps, torch.tensor(SIGMA, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    f = GaussianNet(one, one.clone(), EDM())(z, t)
    g = GaussianNet(b.detach()[None], a.detach()[None], EDM())(z, t)
    loss = (w * implicit_loss(slope("lp", g - f, 0.0, 4)[1], g - x)).sum()
    return [p.item() for p in torch.autograd.grad(loss, [a, b])]


def test_balance_shows_a_fake_score_that_lags(monkeypatch):
    method, batch, _ = world(monkeypatch, huber=0.5, n=40)
    assert abs(method.student_loss(batch)["_balance"]) < 1e-4
    with torch.no_grad():
        method.fake_score.net.mean += 1.0
    assert abs(method.student_loss(batch)["_balance"]) > 0.2


def test_default_width_and_normaliser(monkeypatch):
    seen = []
    monkeypatch.setattr(sim, "slope", lambda k, y, c, p: seen.append(c) or slope(k, y, c, p))
    teacher = gaussian((0.0,) * 3072, 1.0, SMALL)
    engine = run_method("sim", teacher, steps=1, batch_size=2, train=False)
    engine.method.student_loss(engine._micro_batches(0)[0])
    assert seen == pytest.approx([0.0299], abs=1e-4)
    plain, weighed = (slopes(monkeypatch, distance="l2", normaliser=n)[2] for n in ("none", "l1"))
    assert plain != pytest.approx(weighed, rel=0.1)
    assert matching.sample_weight("none", EDM(), torch.ones(1), torch.ones(1, 1), None).item() == 1


def test_the_teacher_is_guided_and_the_fake_score_is_not():
    teacher = shifted(SMALL)
    one = {"shift": lambda i: torch.ones(len(i), 1)}
    engine = run_method(
        "sim", teacher, steps=1, batch_size=4, cond=one, train=False, guidance=3.0, distance="l2"
    )
    losses = engine.method.student_loss(engine._micro_batches(0)[0])
    assert losses["_divergence"].item() == pytest.approx(4.0)  # |1 - 3|^2; both guided: 0


@pytest.mark.parametrize("kind", ["uniform", "lognormal"])
def test_times_of_both_updates(kind):
    engine = run_method(
        "sim", gaussian((0.0,), 1.0), steps=1, train=False, fake_times=kind, student_times=kind,
        t_low=0.0, t_high=0.8,
    )  # fmt: skip
    t = engine.method.times(kind, torch.empty(100_000, 1))
    if kind == "uniform":
        assert t.max().item() == EDM().grid()[800]
    else:
        assert t.log().mean().item() == pytest.approx(-1.2, abs=0.02)


def test_options_reach_sampler_and_updates():
    method = sim.SIM(
        sim.Config(student_steps=2, conditioning_time=2.5, ttur=3), gaussian((0.0,), 1.0)
    )
    assert method.sampler().times[0] == 2.5 and len(method.sampler().times) == 2
    assert [(u.name, u.every) for u in method.updates()] == [("fake_score", 1), ("student", 3)]


def distilled(**options):
    engine = run_method(
        "sim", gaussian((1.0, -0.5), 0.4, SMALL), lr={"student": 4e-3, "default": 1e-2},
        batch_size=256, t_low=0.0, t_high=0.8, huber=0.1, **options,
    )  # fmt: skip
    return student_samples(engine, 20_000)


def test_distils_a_gaussian():
    x = distilled(steps=500)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.05)


def test_distils_a_gaussian_wrong_sign_runs_away(monkeypatch):
    monkeypatch.setattr(sim, "implicit_loss", lambda d, r: -implicit_loss(d, r))
    x = distilled(steps=200)
    assert (x.mean(0) - torch.tensor([1.0, -0.5])).abs().max() > 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distance": "lp", "power": 3}, "power=3 is no even number"),
        ({"huber": -1.0}, "huber=-1.0 is not above 0"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sim.Config(**options).validate()
