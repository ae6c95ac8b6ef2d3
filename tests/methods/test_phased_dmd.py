"""Known-answer tests of Phased DMD, numbered as in the method's specification."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.methods import phased_dmd
from diffdistill.parts.interval import (
    interval_dsm,
    interval_times,
    interval_weight,
    kernel,
    kl_direction,
    noise_from,
    sub_interval_target,
)
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, add_noise
from diffdistill.testing import gaussian, run_method, shifted, student_samples

RF, SMALL = RectifiedFlow(), EDM(t_max=5.0)
SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
PREDICTIONS = ("x0", "eps", "v", "flow")


def at(t, n=1):
    return torch.full((n,), t, dtype=torch.float64)


def draw(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 1, generator=g, dtype=torch.float64)


def coefficients(schedule, t, s, prediction):
    """The target's factors of x_s and of eps."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return [
        sub_interval_target(schedule, x, e, at(t), s, prediction).item()
        for x, e in ((one, zero), (zero, one))
    ]


def test_1_coefficients():
    a, b = kernel(RF, at(0.8), 0.5)
    assert (a.item(), b.item()) == pytest.approx((0.4, 0.774597), abs=1e-6)
    assert coefficients(RF, 0.8, 0.5, "flow") == pytest.approx([-2, 1.290994], abs=1e-6)
    assert coefficients(RF, 0.8, 0.5, "x0") == pytest.approx([2, -0.258199], abs=1e-6)
    assert coefficients(RF, 0.8, 0.5, "eps") == pytest.approx([0, 1.032796], abs=1e-6)
    for s in (None, 0.0):  # clean data: the ordinary targets
        assert coefficients(RF, 0.8, s, "flow") == pytest.approx([-1, 1], abs=1e-6)
        assert coefficients(RF, 0.8, s, "x0") == pytest.approx([1, 0], abs=1e-6)
        assert coefficients(RF, 0.8, s, "eps") == pytest.approx([0, 1], abs=1e-6)


def test_1_edm_has_no_alpha():
    a, b = kernel(SMALL, at(2.0), 1.5)
    assert (a.item(), b.item() ** 2) == pytest.approx((1, 4 - 2.25))
    want = [1, -(1.5**2) / math.sqrt(1.75)]
    assert coefficients(SMALL, 2.0, 1.5, "x0") == pytest.approx(want)


@pytest.mark.parametrize("schedule", [RF, TrigFlow(), SMALL, SD])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_1_targets_agree_with_the_noisy_sample(schedule, prediction):
    """alpha x0 + sigma eps of the targets is z_t itself, and any type is a function of these."""
    t, s = {"RectifiedFlow": (0.8, 0.5), "TrigFlow": (1.2, 0.7), "EDM": (3.0, 1.0)}.get(
        type(schedule).__name__, (700.0, 300.0)
    )
    (x_s, eps), t = draw(5), at(t, 5)
    z = noise_from(schedule, x_s, eps, t, s)
    out = sub_interval_target(schedule, x_s, eps, t, s, prediction)
    denoiser = Denoiser(torch.nn.Identity(), schedule, prediction)
    x0 = sub_interval_target(schedule, x_s, eps, t, s, "x0")
    torch.testing.assert_close(denoiser.to_x0(out, z, t), x0)
    noise = sub_interval_target(schedule, x_s, eps, t, s, "eps")
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), z)


def fit(schedule, target_of, s, t, n=400_000):
    """Least squares of a target on z_t, data N(0.7, 1.3^2): (intercept, slope)."""
    x, e0 = draw(n)
    x_s = add_noise(schedule, 0.7 + 1.3 * x, e0, at(s, n))
    eps = draw(n, 1)[0]
    z = noise_from(schedule, x_s, eps, at(t, n), s)
    y = target_of(x_s, eps)
    slope = ((z - z.mean()) * (y - y.mean())).mean() / z.var()
    return (y.mean() - slope * z.mean()).item(), slope.item()


def flow_target(schedule, s, t):
    return lambda x_s, eps: sub_interval_target(schedule, x_s, eps, at(t, len(eps)), s, "flow")


def test_2_targets_are_unbiased():
    assert fit(RF, flow_target(RF, 0.5, 0.9), 0.5, 0.9) == pytest.approx(
        (-0.7619, 0.8840), abs=6e-3
    )
    trig = TrigFlow()
    s, t = 0.5, 0.9
    want = lambda x_s, eps: sub_interval_target(trig, x_s, eps, at(t, len(eps)), s, "v")  # noqa: E731
    # exact: v = alpha eps - sigma x0 of N(0.7, 1.69)
    alpha, sigma = math.cos(t), math.sin(t)
    var = alpha**2 * 1.69 + sigma**2
    slope = (alpha * sigma - sigma * alpha * 1.69) / var
    assert fit(trig, want, s, t) == pytest.approx(
        (-0.7 * sigma - slope * alpha * 0.7, slope), abs=6e-3
    )


@pytest.mark.parametrize(
    "target", [lambda x_s, eps: eps - x_s, lambda x_s, eps: -x_s, lambda x_s, eps: eps - 2 * x_s]
)
def test_2_clean_data_targets_are_wrong(target):
    got = fit(RF, target, 0.5, 0.9)
    assert got != pytest.approx((-0.7619, 0.8840), abs=0.05)


def test_2_the_tempting_target_has_the_documented_bias_wrong():
    assert fit(RF, lambda x, eps: eps - x, 0.5, 0.9) == pytest.approx((-0.415, 0.919), abs=6e-3)


def test_2_noising_the_boundary_like_clean_data_is_wrong():
    x, e0 = draw(400_000)
    x_s = add_noise(RF, 0.7 + 1.3 * x, e0, at(0.5, len(x)))
    want = (0.1**2 * 1.69 + 0.9**2) ** 0.5
    t = at(0.9, len(x))
    right = noise_from(RF, x_s, draw(len(x), 1)[0], t, 0.5)
    assert right.std().item() == pytest.approx(want, abs=2e-3)
    wrong = add_noise(RF, x_s, draw(len(x), 1)[0], t)
    assert wrong.mean().item() != pytest.approx(0.07, abs=0.02)


def test_3_clamp():
    t = torch.tensor([0.52, 0.8], dtype=torch.float64)
    assert kernel(RF, t, 0.5)[1].square().tolist() == pytest.approx([0.04, 0.6])
    assert interval_weight(RF, t, 0.5, 10.0).tolist() == pytest.approx([0.4, 1])
    assert interval_weight(RF, t, 0.5, 0.0).tolist() == [1, 1]
    assert interval_weight(RF, t, None, 10.0).tolist() == [1, 1]


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_3_the_loss_is_that_of_the_networks_own_prediction(prediction):
    class Constant(torch.nn.Module):
        def forward(self, z, t):
            return torch.full_like(z, 0.3)

    net = Denoiser(Constant(), RF, prediction, shape=(1,))
    (x_s, eps), t = draw(64).float(), torch.linspace(0.55, 0.95, 64, dtype=torch.float64)
    target = sub_interval_target(RF, x_s, eps, t, 0.5, prediction)
    weight = interval_weight(RF, t, 0.5, 10.0)[:, None].float()
    want = (weight * (0.3 - target).square()).mean()
    torch.testing.assert_close(interval_dsm(net, x_s, eps, t, 0.5, {}), want, rtol=1e-4, atol=0)


def test_4_kl_gradient():
    """real N(0.7, 1.69); x_s ~ m + q z, so its clean data are N(mu, v) with the same x_s."""
    n, s, t, m, q = 2_000_000, 0.5, 0.8, 0.1, 0.9
    z, eps = draw(n)
    x_s = m + q * z
    z_t = noise_from(RF, x_s, eps, at(t, n), s)
    a, b = (v.item() for v in kernel(RF, at(t), s))

    def denoised(mean, var):  # exact x0 from the score of N(mean, var) at t
        return (z_t - t**2 * (z_t - mean) / var) / (1 - t)

    real = denoised(0.2 * 0.7, 0.04 * 1.69 + 0.64)
    fake = denoised(a * m, (a * q) ** 2 + b**2)
    got = kl_direction(RF, at(t, n), s, real, fake)
    # w (v_phi - v_psi) with w = a / (sigma + sigma^2 / alpha) = 0.1
    torch.testing.assert_close(got, 0.1 * (fake - real) / t)
    assert got.mean().item() == pytest.approx(-0.05653, abs=5e-4)
    assert (got * z).mean().item() == pytest.approx(0.00614, abs=5e-4)

    def kl(m, q):
        mean, var = a * m, (a * q) ** 2 + b**2
        p_mean, p_var = 0.14, 0.04 * 1.69 + 0.64
        return 0.5 * (var / p_var + (mean - p_mean) ** 2 / p_var - 1 + math.log(p_var / var))

    assert (kl(m + 1e-4, q) - kl(m - 1e-4, q)) / 2e-4 == pytest.approx(-0.05653, abs=1e-5)
    assert (kl(m, q + 1e-4) - kl(m, q - 1e-4)) / 2e-4 == pytest.approx(0.00614, abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "s", "t"),
    [(RF, 0.5, 0.9), (TrigFlow(), 0.5, 1.2), (SMALL, 1.0, 3.0), (SD, 300.0, 800.0)],
)
def test_5_kernels_compose(schedule, s, t):
    mu, var = 0.7, 0.25
    (alpha_s, sigma_s), (alpha, sigma) = (
        (schedule.alpha(at(v)).item(), schedule.sigma(at(v)).item()) for v in (s, t)
    )
    a, b = (v.item() for v in kernel(schedule, at(t), s))
    assert a * alpha_s * mu == pytest.approx(alpha * mu)
    twice = a**2 * (alpha_s**2 * var + sigma_s**2) + b**2
    assert twice == pytest.approx(alpha**2 * var + sigma**2)


class Point(torch.nn.Module):
    """Knows the one datum there is; one parameter, which does not matter."""

    def __init__(self, c):
        super().__init__()
        self.c, self.w = c, torch.nn.Parameter(torch.zeros(1))

    def forward(self, z, t):
        return torch.full_like(z, self.c) + 0 * self.w


@pytest.mark.parametrize("schedule", [RF, SMALL])
@pytest.mark.parametrize("phase", [0, 1])
def test_6_the_exit_lands_on_the_boundary(schedule, phase):
    teacher = Denoiser(Point(0.3), schedule, "x0", shape=(1,))
    engine = run_method("phased_dmd", teacher, steps=1, batch_size=8, train=False)
    method, batch = engine.method, engine._micro_batches(0)[0]
    exits = set()
    for index in (0, 1):
        object.__setattr__(batch, "randint", lambda n, index=index: exits.add((n, index)) or index)
        torch.manual_seed(5)
        x0, x_s = method.rollout(batch, phase)
        torch.manual_seed(5)
        eps = torch.randn(8, 1)
        if schedule is SMALL:  # the start is sigma eps: what is not the datum counts as noise
            eps = eps - 0.3 / 5.0
        s = method.end(phase)
        want = torch.full((8, 1), 0.3) if s is None else add_noise(schedule, x0, eps, at(s, 8))
        torch.testing.assert_close(x_s, want, atol=1e-5, rtol=1e-5)
    assert exits == {(2, 0), (2, 1)}
    assert method.end(1) is None and method.end(0) == method.sampler().times[2]


POINTS = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)


def exact_velocity(z, t):
    logits = -0.5 * ((z[:, None] - (1 - t) * POINTS) / t) ** 2
    x0 = (logits.softmax(1) * POINTS).sum(1)
    return (z - x0) / t


def learned_velocity(target_of, t, s, n=400_000):
    """The minimiser of the sub-interval loss at t among functions constant on 120 bins of z."""
    g = torch.Generator().manual_seed(int(1000 * t))
    x = POINTS[torch.randint(0, 4, (n,), generator=g)]
    e0, eps = torch.randn(2, n, generator=g, dtype=torch.float64)
    x_s = (1 - s) * x + s * e0
    z = noise_from(RF, x_s, eps, at(t, n), s)
    y = target_of(x_s, eps, t)
    edges = torch.linspace(-3, 3.5, 121, dtype=torch.float64)
    index = torch.bucketize(z, edges).clamp(1, 120) - 1
    count = torch.bincount(index, minlength=120)
    mean = torch.bincount(index, weights=y, minlength=120) / count.clamp_min(1)
    middle = torch.bincount(index, weights=z, minlength=120) / count.clamp_min(1)
    keep = count > 50
    middle, mean = middle[keep], mean[keep]

    def velocity(q):
        i = torch.searchsorted(middle, q).clamp(1, len(middle) - 1)
        w = ((q - middle[i - 1]) / (middle[i] - middle[i - 1])).clamp(0, 1)
        return torch.lerp(mean[i - 1], mean[i], w)

    return velocity


@pytest.mark.parametrize("right", [True, False])
def test_7_trajectories_of_the_interval_and_of_the_wrong_target(right):
    s = 0.5

    def target(x_s, eps, t):
        if right:
            return sub_interval_target(RF, x_s, eps, at(t, len(eps)), s, "flow")
        return eps - x_s

    start = torch.linspace(-1.8, 1.8, 19, dtype=torch.float64)
    times = torch.linspace(1, s, 11, dtype=torch.float64).tolist()
    ends = []
    for exact in (True, False):
        z = start.clone()
        for t, u in itertools.pairwise(times):
            t_in = min(t, 0.999)
            field = (lambda q, t=t_in: exact_velocity(q, t)) if exact else learned_velocity(
                target, t_in, s
            )  # fmt: skip
            z = z + (u - t) * field(z)
        ends.append(z)
    error = (ends[0] - ends[1]).abs().max().item()
    assert error < 0.06 if right else error > 0.15


# ---- the method -------------------------------------------------------------------------


def run(steps, teacher=None, train=True, **options):
    teacher = teacher or gaussian((1.0, -0.5), 0.4, SMALL)
    return run_method(
        "phased_dmd", teacher, steps=steps, batch_size=64, lr=0.01, train=train,
        **{"phase_steps": 4, "ttur": 2} | options,
    )  # fmt: skip


def test_8_phases_are_isolated():
    engine = run(8, train=False)
    method = engine.method
    copies = lambda r: [p.detach().clone() for p in engine.roles[r].params]  # noqa: E731
    teacher = [p.clone() for p in method.teacher.parameters()]
    seen = []
    last = engine.updates[3]
    look = lambda b: seen.append(copies("fake_score")) or last.loss(b)  # noqa: E731
    engine.updates = (*engine.updates[:3], replace(last, loss=look))
    for _ in range(4):
        engine.train_step()
    first, fake = copies("student"), copies("fake_score")
    assert all(map(torch.equal, copies("student_2"), teacher))
    assert not all(map(torch.equal, fake, teacher))
    for _ in range(4):
        engine.train_step()
    assert all(map(torch.equal, copies("student"), first))
    assert not all(map(torch.equal, copies("student_2"), teacher))
    assert all(map(torch.equal, seen[0], teacher)) and not all(map(torch.equal, seen[1], teacher))
    assert engine.roles["student_2"].updates == 2 and engine.roles["fake_score"].updates == 8


def test_8_a_fake_score_that_is_kept_is_wrong(monkeypatch):
    monkeypatch.setattr(phased_dmd.PhasedDMD, "transitions", lambda self: ())
    engine = run(4, train=False)
    for _ in range(4):
        engine.train_step()
    before = [p.clone() for p in engine.roles["fake_score"].params]
    assert not all(map(torch.equal, before, engine.method.teacher.parameters()))
    with pytest.raises(AssertionError):
        test_8_phases_are_isolated()


@pytest.mark.parametrize(
    "options",
    [{}, {"generator_loss": "kl"}, {"schedule": "alternating", "phase_steps": 1},
     {"phases": 1, "student_steps": 1}, {"fake_rollout": "full", "clamp": 0.0}],
)  # fmt: skip
def test_distils_a_gaussian(options):
    engine = run(300, **{"phase_steps": 150, "student_steps": 2} | options)
    x = student_samples(engine, 20_000)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.08)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.08)


def test_distils_with_the_clean_data_target_is_wrong(monkeypatch):
    """The fake score of x_s taken for clean data: the first phase does not reach its marginal."""

    def boundary(engine):
        torch.manual_seed(0)
        batch = engine.stream.batch(0, 0, range(4000), 4000)
        s = engine.method.end(0)
        with torch.no_grad():
            x_s = engine.method.rollout(batch, 0)[1]
        return (x_s.std(0) - (0.16 + s**2) ** 0.5).abs().max().item()

    options = dict(phase_steps=10_000, student_steps=2, generator_loss="kl")
    right = boundary(run(250, **options))

    def naive(denoiser, x_s, eps, t, s, cond, clamp):
        z = noise_from(denoiser.schedule, x_s, eps, t, s)
        return (denoiser(z, t, cond) - x_s).square().mean()

    monkeypatch.setattr(phased_dmd, "interval_dsm", naive)
    assert boundary(run(250, **options)) > 2 * right + 0.02


def test_which_expert_and_where_phases_end():
    shifted = RectifiedFlow(shift=5.0)
    four = phased_dmd.PhasedDMD(phased_dmd.Config(), gaussian((0.0,), 1.0, shifted))
    sampler = four.sampler()
    assert sampler.times == pytest.approx((1, 0.9375, 0.8333, 0.625), abs=2e-3)
    assert sampler.experts == (0, 0, 1, 1) and sampler.renoise == "ode"
    assert four.end(0) == sampler.times[2] and four.end(1) is None
    each = phased_dmd.PhasedDMD(phased_dmd.Config(phases=4), gaussian((0.0,), 1.0, SD))
    assert each.students == ("student", "student_2", "student_3", "student_4")
    assert [each.end(k) for k in range(4)] == [749, 499, 249, None]
    assert [t.at for t in each.transitions()] == [500, 1000, 1500]
    turns = phased_dmd.Config(phases=3, schedule="alternating")
    turns = phased_dmd.PhasedDMD(turns, gaussian((0.0,), 1.0, SD))
    assert {"fake_score", "fake_score_2", "fake_score_3"} < set(turns.roles())
    assert turns.transitions() == () and len(turns.updates()) == 6


def test_times_are_nested_above_the_boundary():
    like = torch.empty(50_000, 1)
    t = interval_times(SD, like, 499.0, 0.02, 0.98, margin=0.02)
    assert (t.min().item(), t.max().item()) == (520, 980)  # up to the noisy end, not to the start
    t = interval_times(SD, like, None, 0.02, 0.98, margin=0.02)
    assert (t.min().item(), t.max().item()) == (20, 980)
    assert interval_times(SD, like, 499.0).min().item() == 500
    with pytest.raises(ValueError, match="no noise levels are left above time 979"):
        interval_times(SD, like, 979.0, high=0.98, margin=0.02)


def test_the_gradient_goes_to_the_clean_estimate_of_one_step(monkeypatch):
    engine = run(1, train=False)
    method, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("student",))
    asked = []
    direction = phased_dmd.matching_direction
    monkeypatch.setattr(
        phased_dmd, "matching_direction", lambda x, a, b: asked.append(x) or direction(x, a, b)
    )
    rolled = []
    rollout = method.rollout
    method.rollout = lambda b, k: rolled.append(rollout(b, k)) or rolled[-1]
    losses = method.student_loss(batch, 0)
    assert asked[0] is rolled[0][0] and rolled[0][1] is not rolled[0][0]
    losses["matching"].backward()
    assert method.student.net.mean.grad is not None and method.student_2.net.mean.grad is None


@pytest.mark.parametrize("phase", [0, 1])
def test_the_teacher_is_guided_and_the_fake_score_is_not(phase):
    engine = run_method(
        "phased_dmd", shifted(SMALL), steps=1,
        batch_size=4, cond={"shift": lambda i: torch.ones(len(i), 1)}, train=False, guidance=3.0,
    )  # fmt: skip
    losses = engine.method.student_loss(engine._micro_batches(0)[0], phase)
    assert losses["_gap"].item() == pytest.approx(2.0)  # |1 - 3|; both guided: 0


def test_times_of_both_updates_in_each_phase(monkeypatch):
    """The student's have limits, the fake score's only the margin above the phase's end."""
    seen = []

    def record(schedule, like, s, low=0.0, high=1.0, margin=0.0):
        seen.append((s, low, high, margin))
        return interval_times(schedule, like, s, low, high, margin)

    monkeypatch.setattr(phased_dmd, "interval_times", record)
    engine = run(1, train=False, t_low=0.1, t_high=0.9, margin=0.05)
    method, batch = engine.method, engine._micro_batches(0)[0]
    for phase in (0, 1):
        method.student_loss(batch, phase)
        method.fake_score_loss(batch, phase)
    s = method.sampler().times[2]
    assert seen == [
        (s, 0.1, 0.9, 0.05), (s, 0.0, 1.0, 0.05), (None, 0.1, 0.9, 0.05), (None, 0.0, 1.0, 0.05)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phases": 5}, "of one step or more each"),
        ({"phases": 0}, "1 or more phases"),
        ({"phase_steps": 0}, "1 or more phase_steps"),
        ({"margin": -0.1}, "the others 0 or more"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        phased_dmd.Config(**options).validate()
