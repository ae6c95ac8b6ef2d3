"""Known-answer tests of TBCM, numbered as in the specification."""

import math

import pytest
import torch

from diffdistill.engine import OptimConfig
from diffdistill.method import Needs
from diffdistill.methods import tbcm
from diffdistill.parts import trajectory as parts
from diffdistill.parts.consistency import Consistency, ConsistencyConfig, weighted
from diffdistill.parts.trajectory import acceptable, calm, route, stratified, trajectory
from diffdistill.parts.trig import Trig
from diffdistill.schedules import EDM, TrigFlow
from diffdistill.testing import gaussian, mixture, run_method, student_samples, tiny_denoiser

ROUTE = [
    1.5708, 1.54231, 1.50951, 1.47144, 1.42684, 1.37412, 1.31123, 1.23558, 1.14404, 1.03312,
    0.89970, 0.74247, 0.56420, 0.37345, 0.18320, 0.00626,
]  # fmt: skip


# ---- 1 times ----------------------------------------------------------------------------


def test_1_route():
    assert route(16).tolist() == pytest.approx(ROUTE, abs=1e-5)


def test_1_wrong_route_with_one_shift():
    once = torch.linspace(1, 1e-3, 16, dtype=torch.float64)
    once = 2.5 * once / (1 + 1.5 * once)
    assert torch.atan2(once, 1 - once).tolist() != pytest.approx(ROUTE, abs=1e-3)


def test_1_strata():
    edges = route(16)
    t = stratified(edges, torch.empty(2000, 1), 1e-4, math.pi / 2 - 1e-6)
    assert t.shape == (16, 2000) and (t.diff(dim=0) < 0).all()
    assert (t[0] == math.pi / 2 - 1e-6).all()
    assert ((t[1:] >= edges[1:, None]) & (t[1:] <= edges[:-1, None])).all()
    assert t[8].mean().item() == pytest.approx((edges[7] + edges[8]).item() / 2, abs=4e-3)
    short = stratified(edges, torch.empty(100, 1), 0.1, 1.5)
    assert short.max() == 1.5 and short.min() >= 0.1


# ---- 2 and 3 paths ----------------------------------------------------------------------


def uniform(count, batch):
    times = math.pi / 2 * torch.arange(count, 0, -1, dtype=torch.float64) / count
    return times.clamp(max=math.pi / 2 - 1e-6)[:, None].expand(-1, batch)


@pytest.mark.parametrize(("steps", "factor"), [(4, 0.72855339), (16, 0.92567649)])
def test_2_ddim_on_data_of_the_noises_std(steps, factor):
    teacher = gaussian((0.3,), 0.5, TrigFlow())
    eps = torch.tensor([[-1.0], [0.0], [2.0]])
    found = trajectory(Trig(TrigFlow(), 0.5), teacher, eps, {}, uniform(steps, 3))
    start = 0.5 * eps  # = mu cos t + a at t = pi / 2
    torch.testing.assert_close(found.end, 0.3 + factor * start, atol=2e-5, rtol=0)
    t = found.t[1]
    torch.testing.assert_close(
        found.velocity[1], -0.3 * t.sin()[:, None].float(), atol=1e-4, rtol=0
    )
    assert found.x.shape == found.velocity.shape == (steps, 3, 1)


def test_2_wrong_step_that_keeps_the_time():
    """Euler in place of the rotation."""
    teacher, trig = gaussian((0.3,), 0.5, TrigFlow()), Trig(TrigFlow(), 0.5)
    times, x = uniform(4, 1), torch.tensor([[1.0]])
    for i, t in enumerate(times):
        s = times[i + 1] if i < 3 else torch.zeros_like(t)
        x = x - (t - s).float()[:, None] * trig.velocity(teacher, x, t, {})
    assert x.item() != pytest.approx(0.3 + 0.72855339, abs=0.05)


def test_2_paths_tend_to_the_exact_solution():
    """mu cos t + u sqrt(V(t)) for any std."""
    teacher, trig = gaussian((0.3,), 0.7, TrigFlow()), Trig(TrigFlow(), 0.5)
    eps = torch.tensor([[-1.0], [0.5]])
    found = trajectory(trig, teacher, eps, {}, uniform(1000, 2))
    torch.testing.assert_close(found.end, 0.3 + 0.7 * eps, atol=4e-3, rtol=0)
    v = (0.49 * found.t.cos() ** 2 + 0.25 * found.t.sin() ** 2).sqrt()[..., None]
    want = 0.3 * found.t.cos()[..., None] + eps.double() * v
    assert (found.x - want).abs().max() < 4e-3


def test_3_the_exact_function_has_no_tangent_on_an_exact_path():
    t = torch.linspace(0.1, 1.5, 50, dtype=torch.float64)
    law = lambda t: (0.49 * t.cos() ** 2 + 0.25 * t.sin() ** 2).sqrt()[:, None]  # noqa: E731
    c, s = (lambda t: t.cos()[:, None]), (lambda t: t.sin()[:, None])
    star = lambda x, t: 0.3 + 0.7 * (x - 0.3 * c(t)) / law(t)  # noqa: E731
    x = 0.3 * c(t) + 0.8 * law(t)
    assert (star(x, t) - star(x, t)[0]).abs().max() < 1e-12
    velocity = -0.3 * s(t) + s(t) * c(t) * (0.25 - 0.49) * (x - 0.3 * c(t)) / law(t) ** 2
    field = lambda x, t: (c(t) * x - star(x, t)) / (0.5 * s(t))  # noqa: E731
    _, size = Consistency(Trig(TrigFlow(), 0.5), ConsistencyConfig()).residual(
        field, x, t, velocity, 1.0
    )
    assert size.max() < 1e-12


# ---- 4 the loss, 5 r, 6 filter, 7 no images ---------------------------------------------


def make(**options):
    torch.manual_seed(0)  # of the network
    labels = torch.arange(64) % 3
    return run_method(
        "tbcm", tiny_denoiser(EDM(), "eps"), steps=3, batch_size=4, train=False,
        cond={"label": lambda i: labels[i % 64]}, **options,
    )  # fmt: skip


def test_4_the_loss_is_that_of_scm_on_the_points_of_the_paths():
    engine = make(route_steps=5, tangent_warmup=0, guidance=2.0)
    m, batch, given = engine.method, engine._micro_batches(0)[0], []
    right = m.consistency
    m.consistency = lambda *args: given.append(args) or right(*args)
    losses = m.loss(batch)
    ((_, _, x, t, velocity, r),) = given
    assert r == 1 and x.shape == velocity.shape == (16, 1, 8, 8) and t.shape == (16,)
    cond = {"label": batch.cond["label"].repeat(4)}
    field = lambda x, t: m.trig.network(m.student, x, t, cond)  # noqa: E731
    residual, size = right.residual(field, x, t, velocity, 1.0)
    want = weighted(residual, m.log_weight(t)).mean().item()
    assert losses["consistency"].item() == pytest.approx(want)
    assert losses["_tangent"].item() == pytest.approx(size.mean().item())
    with torch.no_grad():
        plain = m.trig.velocity(m.teacher, x, t, cond)
        null = m.trig.velocity(m.teacher, x, t, {"label": torch.full((16,), 3)})
    torch.testing.assert_close(velocity, null + 2 * (plain - null), rtol=1e-3, atol=1e-3)
    later = t.view(4, 4)  # points of one sample are 4 apart
    assert (later.diff(dim=0) < 0).all() and later.max() < m.trig.high


def test_5_share_of_the_tangent():
    cfg = tbcm.Config(tangent_warmup=4000, calm_start=15_000)

    def r(step):
        warm = min(1.0, step / cfg.tangent_warmup)
        return calm(step, cfg.calm_start, cfg.calm_steps, cfg.calm_end, warm)

    found = [r(i) for i in (0, 2000, 4000, 15_000, 16_000, 17_000, 30_000)]
    assert found == pytest.approx([0, 0.5, 1, 1, 0.875, 0.75, 0.75])
    assert calm(10**6, None, 2000, 0.75, 1.0) == 1


def test_5_the_methods_share(monkeypatch):
    engine, seen = make(route_steps=3, tangent_warmup=2, calm_start=2, calm_steps=2), []
    right = engine.method.consistency
    engine.method.consistency = lambda *args: seen.append(args[-1]) or right(*args)
    engine.fit()
    assert seen == [0, 0.5, 1]


def test_6_filter():
    black = torch.full((1000, 2, 4, 4), -0.5)
    assert acceptable(black, [-0.5, -0.5]).sum() == 0
    assert acceptable(black + 1.0, [-0.5, -0.5]).sum() == 1000
    half = acceptable(black + 0.5**0.5, [-0.5, -0.5]).mean().item()
    assert half == pytest.approx(0.5, abs=0.06)


def test_6_a_dropped_sample_loses_exactly_its_points(monkeypatch):
    def loss(keep):
        engine = make(route_steps=5, tangent_warmup=0, black=(0.0,))
        torch.manual_seed(1)
        monkeypatch.setattr(tbcm, "acceptable", lambda end, black: keep)
        return engine.method.loss(engine._micro_batches(0)[0])["consistency"].item()

    whole = loss(torch.ones(4))
    parts_ = [loss(torch.eye(4)[i]) for i in range(4)]
    assert sum(parts_) == pytest.approx(whole, rel=1e-4)
    assert loss(torch.tensor([1.0, 0, 1, 1])) == pytest.approx(whole - parts_[1], rel=1e-4)


def test_6_the_filter_sees_samples_in_unit_std(monkeypatch):
    seen = []
    monkeypatch.setattr(tbcm, "acceptable", lambda *a: seen.append(a) or acceptable(*a))
    engine = make(route_steps=3, black=(-1.0,), data_std=0.5, sigma_data=2.0)
    m, batch = engine.method, engine._micro_batches(0)[0]
    path = parts.trajectory
    monkeypatch.setattr(
        tbcm, "trajectory", lambda *a: path(*a)._replace(end=torch.full((4, 1, 8, 8), -4.0))
    )
    m.loss(batch)
    ((end, black),) = seen
    assert (end == -2).all() and black == [-2.0]


def test_7_neither_images_nor_pairs_are_needed():
    assert tbcm.TBCM.needs(tbcm.Config()) == Needs()
    engine = make(route_steps=3)
    assert engine._micro_batches(0)[0].x is None
    engine.fit()
    assert engine.roles["student"].updates == 3


# ---- training ---------------------------------------------------------------------------


def trained(steps, **options):
    engine = run_method(
        "tbcm", mixture([(0.3,)], 0.7, EDM(t_max=20.0)), steps=steps, batch_size=64, data_std=0.5,
        optim={"default": OptimConfig(lr=8e-3, weight_decay=0.0, decay="linear")},
        **{"tangent_warmup": 20, "route_steps": 8} | options,
    )  # fmt: skip
    return student_samples(engine, 20_000)


def test_distils_a_gaussian_without_data():
    x = trained(300)
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.29, 0.70), abs=0.08)


def test_wrong_end_of_the_warm_up_shrinks_the_samples():
    assert trained(150, calm_start=0, calm_steps=1, calm_end=0.25).std().item() < 0.6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"route_steps": 1}, "2 or more"),
        ({"shift": 0.0}, "more than 0"),
        ({"calm_steps": 0}, "1 or more"),
        ({"calm_end": 1.5}, "up to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tbcm.Config(**options).validate()


def test_black_has_a_value_per_channel():
    with pytest.raises(ValueError, match="one value for each"):
        tbcm.TBCM(tbcm.Config(black=(0.0, 1.0)), tiny_denoiser(EDM()))


def test_sampler():
    times = tbcm.TBCM(tbcm.Config(student_steps=2), gaussian((0.0,), 1.0)).sampler().times
    assert times == (80.0, pytest.approx(math.tan(1.0)))
