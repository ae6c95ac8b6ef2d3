"""Known-answer tests of SlimFlow, numbered as in its specification.

The data are N(m, s^2) and the pairs x = m + s eps. Times here run from data (0) to noise (1), so t
is one minus the specification's.
"""

import math

import pytest
import torch
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.engine import OptimConfig
from diffdistill.methods import slimflow
from diffdistill.parts import perceptual, reflow
from diffdistill.parts.reflow import euler, flow_times, mirrored, on_path, perturbed, randomness
from diffdistill.parts.rollout import sample
from diffdistill.run import make_roles
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, add_noise, bcast
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian, run_method, student_samples, tiny_denoiser

RF = RectifiedFlow()
SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
MEAN, STD = 1.0, 0.5
SAME = {"width": 1.0, "depth": 1.0}  # closed-form teachers are not shrunk
STAGE = {"reflow_steps": 6, "anneal_steps": 3}


def draw(n, *, std=STD, seed=7, dtype=torch.float32):
    eps = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return eps, MEAN + std * eps


def one(v, n=1):
    return torch.full((n,), v, dtype=torch.float64)


class Best(nn.Module):
    """The optimal flow of stage one at a constant beta, and a line that it should not need."""

    def __init__(self, beta, schedule=RF, mean=MEAN, std=STD):
        super().__init__()
        self.kappa, self.schedule, self.mean, self.std = (
            math.sqrt(1 - beta**2), schedule, mean, std,
        )  # fmt: skip
        self.off = nn.Parameter(torch.zeros(2))

    def velocity(self, z, t):
        """E[x - eps' | z_t], as the specification gives it."""
        u, s, k = bcast(1 - t, z), self.std, self.kappa
        gain = u * s**2 - (1 - u) + (1 - 2 * u) * s * k
        gain = gain / (u**2 * s**2 + (1 - u) ** 2 + 2 * u * (1 - u) * s * k)
        return self.mean + gain * (z - u * self.mean)

    def forward(self, z, tau):
        a, b = self.schedule.alpha(tau), self.schedule.sigma(tau)
        z, t = z / bcast(a + b, z), b / (a + b)
        v = self.velocity(z, t) + self.off[0] + self.off[1] * z
        return z + bcast(t, z) * v


def flow(beta, schedule=RF, **data):
    return Denoiser(Best(beta, schedule, **data), schedule, "x0", shape=(1,))


def method(student, frozen=None, teacher=None, **options):
    """The method with given networks, and its engine."""
    options = {"reflow_steps": 1, "anneal": "none", **SAME, **options}
    made = run_method(
        "slimflow", teacher or gaussian((MEAN,), STD, RF), steps=2, train=False, batch_size=4,
        pairs=draw(64), **options,
    )  # fmt: skip
    made.method.attach({"student": student} | ({"flow": frozen} if frozen else {}))
    return made.method, made


# ---- 1: the optimal velocity ------------------------------------------------------------


def line(z, target):
    """Slope and intercept of the regression of target on z."""
    slope = ((z - z.mean()) * (target - target.mean())).mean() / z.var(correction=0)
    return slope.item(), (target.mean() - slope * z.mean()).item()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [0.3, 0.7])
def test_1_regression_gives_the_optimal_velocity(t, beta):
    eps, x = draw(400_000, dtype=torch.float64)
    noise = perturbed(eps, beta)
    z, best = add_noise(RF, x, noise, one(t)), Best(beta)
    ends = best.velocity(torch.tensor([[0.0], [1.0]], dtype=torch.float64), one(t, 2))
    want = (ends[1] - ends[0]).item(), ends[0].item()
    assert line(z, x - noise) == pytest.approx(want, abs=0.01)
    wrong = line(z, x - eps)  # the unperturbed noise
    assert (wrong == pytest.approx(want, abs=0.01)) == (beta == 0)


def gradient(beta, student, batch=100_000):
    """Of the loss of stage one, in an offset and a slope of the velocity."""
    engine = run_method(
        "slimflow", gaussian((MEAN,), STD, student.schedule), steps=1, train=False,
        batch_size=batch, pairs=draw(batch), anneal="constant", beta=beta, **SAME, **STAGE,
    )  # fmt: skip
    engine.method.attach({"student": student})
    torch.manual_seed(0)
    loss = engine.method.reflow_loss(engine._micro_batches(0)[0])["velocity"]
    return torch.autograd.grad(loss, student.net.off)[0]


@pytest.mark.parametrize("schedule", [RF, EDM(), SD, TrigFlow()])
@pytest.mark.parametrize(("beta", "other"), [(0.0, 1.0), (0.5, 0.9), (1.0, 0.0)])
def test_1_the_loss_is_at_rest_at_the_optimal_velocity(beta, other, schedule):
    assert gradient(beta, flow(beta, schedule)).abs().max() < 0.03
    assert gradient(beta, flow(other, schedule)).abs().max() > 0.05


def test_1_wrong_mixing_moves_the_optimum(monkeypatch):
    """(1 - beta) eps + beta xi has less than unit variance."""
    mixed = lambda eps, beta: (1 - beta) * eps + beta * torch.randn_like(eps)  # noqa: E731
    monkeypatch.setattr(slimflow, "perturbed", mixed)
    assert gradient(0.5, flow(0.5)).abs().max() > 0.1


# ---- 2 and 3: samples -------------------------------------------------------------------

STDS = [(0.0, 0.5), (0.25, 0.484123), (0.5, 0.433013), (0.75, 0.330719), (1.0, 0.0)]


@pytest.mark.parametrize(("beta", "want"), STDS)
def test_2_one_step_and_the_whole_ode(beta, want):
    eps = torch.tensor([[-1.0], [0.0], [2.0]])
    x = sample(flow(beta), RF, [eps], {}, euler(RF, 1))
    torch.testing.assert_close(x, MEAN + want * eps, rtol=0, atol=2e-6)
    many = sample(flow(beta), RF, [eps] * 800, {}, euler(RF, 800))
    torch.testing.assert_close(many, MEAN + STD * eps, rtol=0, atol=5e-3)


class Line(nn.Module):
    """A velocity that is linear in z, with coefficients that depend on t."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, z, t):
        shift, gain = self.body(4 * t.float()[:, None] - 2).chunk(2, 1)
        return shift + gain * z


@pytest.fixture
def linear(monkeypatch):
    """Students are untrained lines."""
    roles = slimflow.SlimFlow.roles
    made = lambda teacher: Denoiser(Line(), RF, "flow", shape=(1,))  # noqa: E731
    monkeypatch.setattr(slimflow.SlimFlow, "roles", lambda self: dict.fromkeys(roles(self), made))


def learned(steps, *, pairs=None, **options):
    return run_method(
        "slimflow", gaussian((MEAN,), STD, RF), steps=steps, batch_size=256,
        pairs=pairs or draw(4096), **SAME, **options,
        optim={"default": OptimConfig(lr=2e-2, weight_decay=0.0, decay="linear", final=0.0)},
    )  # fmt: skip


@pytest.mark.parametrize(("beta", "want"), STDS[::2])
def test_2_stage_one_learns_it(linear, beta, want):
    engine = learned(400, reflow_steps=400, anneal="constant", beta=beta)
    x = student_samples(engine, 20_000)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert x.std().item() == pytest.approx(want, abs=0.06)


def test_2_wrong_pairing_collapses(linear):
    eps, x = draw(4096)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    engine = learned(400, pairs=(eps, shuffled), reflow_steps=400, anneal="none")
    assert student_samples(engine, 20_000).std().item() < 0.1


@pytest.mark.parametrize("schedule", [RF, TrigFlow()])
def test_3_straight_paths(schedule):
    eps = torch.linspace(-2, 2, 9)[:, None]
    ends = [
        sample(flow(0.0, schedule), schedule, [eps] * n, {}, euler(schedule, n)) for n in (1, 2, 7)
    ]
    for end in ends:
        torch.testing.assert_close(end, MEAN + STD * eps, rtol=0, atol=2e-6)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    z = add_noise(RF, MEAN + STD * eps, eps, t)
    torch.testing.assert_close(Best(0.0).velocity(z, t), MEAN + (STD - 1) * eps, rtol=0, atol=2e-6)
    bent = [sample(flow(1.0), RF, [eps] * n, {}, euler(RF, n)) for n in (1, 7)]
    assert (bent[0] - bent[1]).abs().max() > 0.3


# ---- 4: the schedule of beta ------------------------------------------------------------


def test_4_schedules():
    linear = [randomness("linear", k, 100) for k in (0, 50, 100, 150)]
    assert linear == pytest.approx([1, 0.5, 0, 0])
    cosine = [randomness("cosine", k, 100) for k in (0, 50, 100, 150)]
    assert cosine == pytest.approx([1, 0.5, 0, 0])
    assert randomness("exponential", 100, 100) == pytest.approx(0.367879, abs=1e-6)
    assert randomness("exponential", 0, 100) == 1 and randomness("exponential", 900, 100) > 0
    assert [randomness("constant", k, 100, 0.3) for k in (0, 500)] == [0.3, 0.3]
    assert [randomness("none", k, 100) for k in (0, 500)] == [0, 0]


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_4_unit_variance_at_every_beta(beta):
    eps, _ = draw(400_000)
    mixed = perturbed(eps, beta)
    assert mixed.var().item() == pytest.approx(1, abs=0.01)
    share = (mixed * eps).mean().item()
    assert share == pytest.approx(math.sqrt(1 - beta**2), abs=0.01)
    if beta == 0:
        assert mixed is eps


def test_4_beta_is_a_function_of_the_step(monkeypatch):
    seen = []
    monkeypatch.setattr(
        slimflow, "perturbed", lambda eps, beta: seen.append(beta) or perturbed(eps, beta)
    )
    options = {"reflow_steps": 6, "anneal_steps": 4, **SAME}
    engine = run_method(
        "slimflow", gaussian((MEAN,), STD, RF), steps=8, pairs=draw(64), train=False, **options
    )
    logged = [engine.train_step().get("reflow/beta") for _ in range(8)]
    assert seen == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [float(b) for b in logged[:6]] == seen and logged[6:] == [None, None]


# ---- 5 and 6: the flow-guided loss ------------------------------------------------------


@pytest.fixture
def at(monkeypatch):
    """`at(t)` sets the time of the second step, `at(t, eps)` the fresh noise, too."""

    def fix(t, eps=None):
        monkeypatch.setattr(
            slimflow, "flow_times", lambda schedule, like, low, high: (one(t), one(t, len(like)))
        )
        if eps is not None:
            monkeypatch.setattr(torch, "randn", lambda *a, **k: eps)

    return fix


@pytest.mark.parametrize(
    ("beta", "first", "want"),
    [
        (0.0, "student", (0.5, 0.5, 0.5)),
        (0.0, "teacher", (0.5, 0.5, 0.5)),
        (1.0, "student", (0.0692308, 0.3, 0.6)),
        (1.0, "teacher", (0.0615385, 0.2, 0.2)),
    ],
)
def test_5_target(at, beta, first, want):
    frozen = flow(beta, mean=0.0)
    made, _ = method(flow(0.0, mean=0.0), frozen, first_step=first)
    eps = torch.ones(1, 1)
    x = made.one_step(made.student, eps, {})
    assert x.item() == pytest.approx(0.5, abs=1e-6)
    found = []
    for t in (0.8, 0.5, 0.2):
        at(t)
        found.append(made.two_steps(x, eps, {}).item())
    assert found == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("schedule", [EDM(), SD, TrigFlow()])
def test_5_the_target_in_other_schedules(monkeypatch, schedule):
    """Half of the noise is left at t = 0.5 in each of them."""
    half = schedule.t_of_ratio(one(1.0))
    monkeypatch.setattr(slimflow, "flow_times", lambda *a: (one(0.5), half))
    made, _ = method(
        None, flow(1.0, schedule, mean=0.0), teacher=gaussian((0.0,), STD, schedule)
    )  # fmt: skip
    found = made.two_steps(torch.full((1, 1), 0.5), torch.ones(1, 1), {})
    assert found.item() == pytest.approx(0.3, abs=1e-5)


class Still(nn.Module):
    """A flow that stands still, v = 0, or a student that is w times its input."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, z, t):
        return self.w * z


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_6_no_gradient_through_the_target(at, t):
    eps = torch.randn(8, 1)
    student = Denoiser(Still(0.4), RF, "x0", shape=(1,))
    made, engine = method(student, Denoiser(Still(), RF, "x0", shape=(1,)))
    at(t, eps)
    batch = engine._micro_batches(0)[0]
    loss = made.distil_loss(batch)["flow"]
    (grad,) = torch.autograd.grad(loss, student.net.w)
    v = -0.6 * eps  # the specification's v_e; its t is 1 - t here
    assert grad.item() == pytest.approx((2 * t * v * eps).mean().item(), rel=1e-4)
    x = made.one_step(student, eps, {})
    wrong = (x - slimflow.SlimFlow.two_steps.__wrapped__(made, x, eps, {})).square().mean()
    (grad,) = torch.autograd.grad(wrong, student.net.w)
    assert grad.item() == pytest.approx((2 * t**2 * v * eps).mean().item(), rel=1e-4)


def test_6_the_weight_scales_the_loss(at):
    eps = torch.randn(8, 1)
    student, frozen = flow(0.3), flow(1.0)
    losses = []
    for weight in (1.0, 0.25):
        made, engine = method(student, frozen, flow_guided=weight)
        at(0.5, eps)
        losses.append(made.distil_loss(engine._micro_batches(0)[0])["flow"].item())
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-5)


def test_times_stay_in_their_range():
    like = torch.zeros(20_000, 1)
    for schedule, low, high in ((RF, 1e-3, 1.0), (EDM(t_min=0.05), 0.05 / 1.05, 80 / 81)):
        t, own = flow_times(schedule, like)
        assert t.min() >= low and t.max() <= high
        assert t.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
        torch.testing.assert_close(schedule.sigma(own) / schedule.alpha(own), t / (1 - t))
    t, _ = flow_times(EDM(), like, 0.2, 0.8)
    assert (
        t.min() >= 0.2 and t.max() <= 0.8 and t.std().item() == pytest.approx(0.6 / 12**0.5, 0.02)
    )


# ---- 7: flips ---------------------------------------------------------------------------


def test_7_flips_keep_pairs_together(monkeypatch):
    x, eps = torch.randn(1000, 1, 4, 6), torch.randn(1000, 1, 4, 6)
    a, b = mirrored(x, eps)
    turned = [torch.equal(p, q) for p, q in zip(a, x.flip(-1), strict=True)]
    assert turned == [torch.equal(p, q) for p, q in zip(b, eps.flip(-1), strict=True)]
    assert 400 < sum(turned) < 600
    kept = [torch.equal(p, q) for p, q in zip(a, x, strict=True)]
    assert [not k for k in kept] == turned


def flip_loss(monkeypatch, turn):
    """Loss of stage one at a net that acts on each pixel, with flips by `turn`."""
    monkeypatch.setattr(slimflow, "mirrored", turn)
    teacher = Denoiser(Still(0.4), RF, "x0", shape=(1, 4, 6))
    eps = torch.randn(64, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    engine = run_method(
        "slimflow", teacher, steps=1, batch_size=16, pairs=(eps, 0.3 + 0.5 * eps), train=False,
        anneal="none", flip=True, **SAME, reflow_steps=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return engine.method.reflow_loss(engine._micro_batches(0)[0])["velocity"].item()


def test_7_both_or_none(monkeypatch):
    as_it_is = flip_loss(monkeypatch, lambda x, eps: (x, eps))
    both = flip_loss(monkeypatch, lambda x, eps: (x.flip(-1), eps.flip(-1)))
    assert both == pytest.approx(as_it_is, rel=1e-5)
    for wrong in (lambda x, eps: (x.flip(-1), eps), lambda x, eps: (x, eps.flip(-1))):
        assert abs(flip_loss(monkeypatch, wrong) / as_it_is - 1) > 0.1


# ---- stages -----------------------------------------------------------------------------


def staged(steps, **options):
    options = {**STAGE, **SAME, "optim": {"default": OptimConfig(lr=0.05, weight_decay=0.0)}} | (
        options
    )
    return run_method(
        "slimflow", gaussian((0.0,), 1.0, RF), steps=steps, pairs=draw(64), **options
    )  # fmt: skip


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def test_the_flow_is_the_average_and_the_student_goes_on_from_its_raw_weights():
    engine = staged(6)
    student, frozen = engine.roles["student"], engine.roles["flow"]
    (ema,) = student.ema.values()
    raw, average = weights(student.module), [v.clone() for v in ema.average.values()]
    assert any((a - b).abs().max() > 0.01 for a, b in zip(raw, average, strict=True))
    assert student.optimizer.state and frozen.updates == 0
    moves = engine.method.transitions()
    assert [(m.at, m.source, m.to, m.averaged) for m in moves] == [
        (6, "student", "flow", True), (6, "student", "student", False),
    ]  # fmt: skip
    for move in moves:
        engine._move(move)
    torch.testing.assert_close(weights(frozen.module), average, rtol=0, atol=0)
    torch.testing.assert_close(weights(student.module), raw, rtol=0, atol=0)
    torch.testing.assert_close(list(ema.average.values()), raw, rtol=0, atol=0)
    assert not student.optimizer.state


def test_each_stage_has_its_loss_and_the_flow_stands_still():
    engine = staged(9, train=False)
    names, flows = [], []
    for _ in range(9):
        names.append(sorted(k for k in engine.train_step() if "grad" not in k))
        flows.append(weights(engine.roles["flow"].module))
    assert names[:6] == [["reflow/beta", "reflow/velocity"]] * 6
    assert names[6:] == [["distil/flow", "distil/pair"]] * 3
    torch.testing.assert_close(flows[6], flows[8], rtol=0, atol=0)
    assert not all(torch.equal(a, b) for a, b in zip(flows[5], flows[6], strict=True))
    assert not engine.roles["flow"].module.training


def test_without_guidance_there_is_no_flow():
    engine = staged(8, flow_guided=0.0)
    assert set(engine.roles) == {"student"} and engine.roles["student"].updates == 8
    assert [(m.source, m.to) for m in engine.method.transitions()] == [("student", "student")]


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_resumed_run_is_the_same(tmp_path, stop):
    whole = staged(10, flow_guided=0.5)
    staged(stop, flow_guided=0.5, folder=tmp_path)
    resumed = staged(10, flow_guided=0.5, folder=tmp_path)
    for name in ("student", "flow"):
        a, b = weights(whole.roles[name].module), weights(resumed.roles[name].module)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    a, b = (list(e.roles["student"].ema["default"].average.values()) for e in (whole, resumed))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_distils_a_gaussian(linear, first):
    engine = learned(600, reflow_steps=400, anneal_steps=250, first_step=first)
    x = student_samples(engine, 20_000)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(STD, abs=0.03)


def test_plain_distillation_needs_neither_stage_nor_flow(linear):
    engine = learned(300, reflow_steps=0, flow_guided=0.0)
    assert engine.method.transitions() == () and set(engine.roles) == {"student"}
    assert [u.name for u in engine.updates] == ["distil"]
    assert student_samples(engine, 20_000).std().item() == pytest.approx(STD, abs=0.03)


# ---- several steps ----------------------------------------------------------------------


def test_states_of_a_k_step_student():
    sampler = euler(RF, 4)
    assert sampler.times == pytest.approx((1.0, 0.75, 0.5, 0.25)) and sampler.renoise == "ode"
    eps, x = draw(4000)
    z, own, t = on_path(RF, sampler, x, eps)
    torch.testing.assert_close(z, add_noise(RF, x, eps, t))
    assert sorted(set(own.tolist())) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(900 < (own == v).sum() < 1100 for v in sampler.times)


def test_the_first_state_shows_nothing_of_the_data():
    eps, x = draw(50)
    z, own, t = on_path(EDM(), euler(EDM(), 1), x, eps)
    assert torch.equal(z, 80 * eps) and set(own.tolist()) == {80.0} and set(t.tolist()) == {1.0}
    z, own, t = on_path(EDM(), euler(EDM(), 2), x, eps)
    later = own != 80
    torch.testing.assert_close(z[later], (x + eps)[later])
    assert set(own[later].tolist()) == {1.0} and set(t[later].tolist()) == {0.5}


def test_k_step_distillation(linear):
    engine = learned(300, reflow_steps=0, flow_guided=0.0, student_steps=3)
    assert len(engine.method.sampler().times) == 3
    assert student_samples(engine, 20_000).std().item() == pytest.approx(STD, abs=0.04)


def test_the_pair_loss_is_that_of_velocities(monkeypatch):
    """eps - v against x: |v - (eps - x)|^2 at the state, here at t = 0.5."""
    student = flow(1.0)
    made, engine = method(student, student_steps=2, flow_guided=0.0)
    monkeypatch.setattr(
        slimflow, "on_path",
        lambda s, k, x, eps: (add_noise(s, x, eps, one(0.5)), one(0.5), one(0.5, len(x))),
    )  # fmt: skip
    batch = engine._micro_batches(0)[0]
    x, eps = batch.pair.x, batch.pair.eps
    v = -student.net.velocity((x + eps) / 2, one(0.5))
    want = (v - (eps - x)).square().mean().item()
    assert made.distil_loss(batch)["pair"].item() == pytest.approx(want, rel=1e-4)


# ---- distances --------------------------------------------------------------------------


def test_sums_of_distances(monkeypatch):
    sizes = []

    def lpips(device):
        return lambda a, b: sizes.append(a.shape[1:]) or (a - b).abs().amax((1, 2, 3))

    monkeypatch.setattr(perceptual, "_lpips", lpips)
    teacher = tiny_denoiser()
    a, b = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.5)
    found = {
        k: perceptual.distance(k, a, b, teacher, 64).item()
        for k in ("l2", "l1", "lpips", "lpips+l2", "lpips+l1")
    }
    assert found == pytest.approx(
        {"l2": 0.25, "l1": 0.5, "lpips": 0.5, "lpips+l2": 0.75, "lpips+l1": 1.0}
    )
    assert set(sizes) == {(3, 64, 64)}
    perceptual.distance("lpips", a, b, teacher)
    assert sizes[-1] == (3, 224, 224)


def test_distances_see_images_and_not_velocities(monkeypatch):
    seen = []

    def note(kind, a, b, teacher, size):
        seen.append((kind, a.detach(), b, size))
        return (a - b).square().mean()

    monkeypatch.setattr(slimflow, "distance", note)
    made, engine = method(flow(0.0), flow(0.0), distance="lpips+l1", lpips_size=32)
    batch = engine._micro_batches(0)[0]
    losses = made.distil_loss(batch)
    assert [(k, size) for k, _, _, size in seen] == [("lpips+l1", 32)] * 2
    torch.testing.assert_close(seen[0][1], batch.pair.x, rtol=0, atol=1e-5)
    assert torch.equal(seen[0][2], batch.pair.x)
    torch.testing.assert_close(seen[1][1], seen[1][2], rtol=0, atol=1e-5)
    assert max(v.item() for v in losses.values()) < 1e-10


# ---- options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0.0}, "method.width=0.0"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"pairs": 0}, "method.pairs=0"),
        ({"anneal_steps": 0}, "anneal_steps=0"),
        ({"lpips_size": 0}, "lpips_size=0"),
        ({"student_steps": 0}, "student_steps=0"),
        ({"reflow_steps": -1}, "reflow_steps=-1"),
        ({"solver_steps": -1}, "solver_steps=-1"),
        ({"flow_guided": -1.0}, "flow_guided=-1.0"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
        ({"reflow_steps": 0}, "Set method.flow_guided=0"),
        ({"reflow_steps": 100, "anneal_steps": 100}, "not below method.reflow_steps=100"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        slimflow.Config(**options).validate()


@pytest.mark.parametrize("anneal", ["none", "constant", "exponential"])
def test_other_anneals_have_no_end(anneal):
    slimflow.Config(anneal=anneal, reflow_steps=100, anneal_steps=100).validate()


def test_it_needs_pairs_alone():
    needs = slimflow.SlimFlow.needs(slimflow.Config(pairs=300, solver_steps=7))
    assert (needs.pairs, needs.pair_steps, needs.images) == (300, 7, False)


def test_networks_that_cannot_shrink_are_refused_at_once():
    with pytest.raises(ValueError, match=r"network is a GaussianNet.*method.width=1"):
        slimflow.SlimFlow(slimflow.Config(), gaussian((0.0,), 1.0))


def test_an_adapter_is_refused():
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = load_teacher("shapes-sd").denoiser
    made = slimflow.SlimFlow(slimflow.Config(), teacher)
    with pytest.raises(ValueError, match=r"lora.student adapts"):
        made.attach(make_roles(made, teacher, {"student": 2}))


def test_reflow_and_flow_map_agree_on_time():
    assert reflow.own_times(EDM(), one(0.75)).item() == pytest.approx(3.0)
    assert reflow.own_times(TrigFlow(), one(0.5)).item() == pytest.approx(math.pi / 4)
