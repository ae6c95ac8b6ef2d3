"""Known-answer tests of DMD and DMD2, numbered as in the method's specification."""

import math

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch, Sampler
from diffdistill.methods import dmd
from diffdistill.parts import gan
from diffdistill.parts.rollout import backward_simulation
from diffdistill.parts.score import matching_direction, uniform_times, vsd_surrogate
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, bcast, student_times
from diffdistill.testing import (
    GaussianNet,
    PredictionNet,
    gaussian,
    run_method,
    student_samples,
    tiny_denoiser,
)  # fmt: skip

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SMALL = EDM(t_max=5.0)


def test_1_one_element_surrogate():
    x = torch.tensor([[3.0]], requires_grad=True)
    x0_teacher, x0_fake = x.detach() / 2, (x.detach() + 2) / 2
    v = matching_direction(x, x0_teacher, x0_fake)
    loss = vsd_surrogate(x, v)
    loss.backward()
    assert v.item() == pytest.approx(2 / 3, abs=1e-6)
    assert loss.item() == pytest.approx(2 / 9, abs=1e-6)
    assert x.grad.item() == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("m", "q", "want_mean", "want_scale"),
    [(2.0, 1.0, 1.0, 0.0), (0.0, 2.0, 0.0, 0.6), (0, 1, 0, 0)],
)
def test_2_gaussian_gradient_in_closed_form(m, q, want_mean, want_scale):
    real, fake = gaussian((0.0,), 1.0), gaussian((float(m),), float(q))
    z = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    x = m + q * z
    t = torch.ones(len(x), dtype=torch.float64)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gap = fake(noisy, t) - real(noisy, t)
    assert gap.mean().item() == pytest.approx(want_mean, abs=0.01)
    assert (gap * z).mean().item() == pytest.approx(want_scale, abs=0.01)


def test_3_scale_identity():
    g = torch.Generator().manual_seed(0)
    x, xr, xf, z = torch.randn(4, 5, 7, generator=g, dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    s_fake, s_real = (-(z - alpha * d) / sigma**2 for d in (xf, xr))
    m = (x - xr).abs().mean(1, keepdim=True)
    w_paper = sigma**2 / alpha / m  # Eq. 8 of DMD
    v = matching_direction(x, xr, xf)
    torch.testing.assert_close(w_paper * alpha * (s_fake - s_real), alpha * v)


def make(steps=1, **options):
    teacher = tiny_denoiser(SMALL, "x0")
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 3
    return run_method(
        "dmd", teacher, steps=steps, batch_size=8, x=x, cond={"label": lambda i: labels[i]},
        train=False, **options,
    )  # fmt: skip


def test_4_only_the_student_gets_gradients_and_the_gan_path_reaches_it():
    engine = make(gan=1.0)
    method, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("student",))
    x = torch.randn(8, 1, 8, 8, requires_grad=True)
    method.generate = lambda b: (x, b.cond)
    torch.manual_seed(0)
    losses = method.student_loss(batch)
    (matching,) = torch.autograd.grad(losses["matching"], x, retain_graph=True)
    torch.manual_seed(0)
    t = uniform_times(method.schedule, x, 0.02, 0.98)
    z = x.detach() + bcast(t, x) * torch.randn_like(x)
    with torch.no_grad():
        v = matching_direction(
            x, method.teacher(z, t, batch.cond), method.fake_score(z, t, batch.cond)
        )
    torch.testing.assert_close(matching, v / x.numel())
    (through_gan,) = torch.autograd.grad(losses["gan"], x)
    assert through_gan.abs().max() > 1e-4
    assert method.logits(x, batch.cond).std() > 1e-3
    for role in ("fake_score", "discriminator"):
        assert all(p.grad is None for p in getattr(method, role).parameters())


def test_4_critics_are_bit_identical_after_the_students_step():
    engine = make(gan=1.0)
    before = {r: [p.clone() for p in engine.roles[r].params] for r in engine.roles}
    batches, logs = engine._micro_batches(0), {}
    engine._unfreeze_only(("student",))
    engine._run(engine.updates[0], 0, 0, batches, logs)
    same = {
        r: all(torch.equal(a, b) for a, b in zip(before[r], engine.roles[r].params, strict=True))
        for r in engine.roles
    }
    assert same == {"student": False, "fake_score": True, "discriminator": True}


@pytest.mark.parametrize(("renoise", "holds"), [("fresh", True), ("ode", False)])
def test_5_backward_simulation_moments(renoise, holds):
    sampler = Sampler(student_times(SD, 4), renoise)
    assert sampler.times == (999.0, 749.0, 499.0, 249.0)
    half = lambda u, t, cond: 0.5 * u  # noqa: E731
    torch.manual_seed(0)
    eps = torch.randn(200_000, 1)
    variances = [backward_simulation(half, SD, eps, {}, sampler, i).var().item() for i in range(4)]
    right = variances == pytest.approx([1.0, 0.9575, 0.7888, 0.4578], abs=0.006)
    assert right is holds


def test_6_support_of_the_times():
    like = torch.empty(100_000, 1)
    t = uniform_times(SD, like, 0.02, 0.98)
    assert (t.min().item(), t.max().item()) == (20, 980)
    t = uniform_times(SD, like)
    assert (t.min().item(), t.max().item()) == (0, 999)
    grid = EDM().grid()
    assert [round(grid[i].item(), d) for i, d in ((20, 5), (500, 4), (980, 2))] == [
        0.00323, 2.5265, 72.05,
    ]  # fmt: skip
    drawn = uniform_times(EDM(), like)
    assert torch.isin(drawn, grid).all()


@pytest.mark.parametrize(
    ("limits", "want"), [({}, (0, 999)), ({"t_low": 0.2, "t_high": 0.6}, (180, 620))]
)
def test_6_the_fake_score_trains_a_little_beyond_the_matching_times(monkeypatch, limits, want):
    drawn = []

    def uniform(schedule, x, low=0.0, high=1.0):
        drawn.append(uniform_times(schedule, x.repeat(20_000, 1), low, high))
        return uniform_times(schedule, x, low, high)

    monkeypatch.setattr(dmd, "uniform_times", uniform)
    method = dmd.DMD(dmd.Config(**limits), gaussian((0.0,), 1.0, SD))
    method.attach({name: method.teacher.clone() for name in method.roles()})
    method.fake_score_loss(Batch(size=4, shape=(1,), cond={}))
    assert (drawn[0].min(), drawn[0].max()) == want


def test_6_the_end_of_the_times_of_the_gan(monkeypatch):
    seen = []
    draw = uniform_times
    monkeypatch.setattr(
        dmd, "uniform_times", lambda *given, **k: seen.append(draw(*given, **k)) or seen[-1]
    )
    engine = make(gan=1.0, gan_t_high=0.3)
    batch = engine.stream.batch(0, 0, range(8), 8)
    for _ in range(200):
        engine.method.logits(torch.zeros(8, *engine.method.teacher.shape), batch.cond)
    drawn, grid = torch.cat(seen), engine.method.schedule.grid()
    assert drawn.min() == grid[0] and drawn.max() == grid[round(0.3 * len(grid))]
    with pytest.raises(ValueError, match=r"gan_t_high=0.0. Allowed"):
        dmd.Config(gan_t_high=0.0).validate()


def test_7_update_counts():
    engine = make(steps=50, ttur=5)
    engine.fit()
    assert {n: r.updates for n, r in engine.roles.items()} == {"student": 10, "fake_score": 50}


def test_8_gan_optimum_of_a_linear_logit():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(100_000, generator=g), 2 + torch.randn(100_000, generator=g)
    w = torch.zeros(2, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=50)

    def closure():
        opt.zero_grad()
        loss = gan.critic_loss(w[0] + w[1] * real, w[0] + w[1] * fake)
        loss.backward()
        return loss

    opt.step(closure)
    assert w.tolist() == pytest.approx([2, -2], abs=0.05)
    x = torch.tensor([0.7], requires_grad=True)
    gan.generator_loss(2 - 2 * x).backward()
    assert x.grad.item() == pytest.approx(2 / (1 + math.exp(2 - 1.4)), abs=1e-5)


def test_distils_a_gaussian():
    engine = run_method("dmd", gaussian((1.0, -0.5), 0.4, SMALL), steps=500, batch_size=256, ttur=2)
    x = student_samples(engine, 20_000)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.05)


def test_distils_a_gaussian_wrong_sign_runs_away(monkeypatch):
    swapped = lambda x, teacher, fake: matching_direction(x, fake, teacher)  # noqa: E731
    monkeypatch.setattr(dmd, "matching_direction", swapped)
    teacher = gaussian((1.0, -0.5), 0.4, SMALL)
    with torch.no_grad():  # start off the target, or the wrong sign rests at an unstable optimum
        engine = run_method("dmd", teacher, steps=300, batch_size=256, ttur=2, train=False)
        engine.method.student.net.mean += 0.3
    engine.fit()
    x = student_samples(engine, 20_000)
    assert (x.mean(0) - torch.tensor([1.0, -0.5])).abs().max() > 0.3


def test_guided_fake_score_wrong_fixed_point():
    """The teacher is guided, the fake score never: with g = 2 the mean moves to u + 2 (c - u)."""

    class Conditional(GaussianNet):
        def forward(self, z, t, shift):
            return super().forward(z - shift, t) + shift

    net = Conditional(torch.zeros(1), torch.tensor([0.5]), SMALL)
    teacher = Denoiser(net, SMALL, "x0", shape=(1,), null_cond={"shift": torch.zeros(1, 1)})
    one = {"shift": lambda i: torch.ones(len(i), 1)}
    engine = run_method("dmd", teacher, steps=400, batch_size=256, ttur=2, guidance=2.0, cond=one)
    mean = student_samples(engine, 20_000, {"shift": torch.ones(20_000, 1)}).mean().item()
    # guided denoiser: 2 D(z - 1) + 2 - D(z) has its fixed point at mean 2 - gain terms, beyond 1
    assert mean > 1.3


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize(
    "schedule", [EDM(t_max=5.0), RectifiedFlow(t_max=0.98), TrigFlow(t_max=1.5)]
)
def test_any_prediction_type_and_schedule(prediction, schedule):
    net = gaussian((0.8,), 0.5, schedule).net
    teacher = Denoiser(PredictionNet(net, schedule, prediction), schedule, prediction, shape=(1,))
    engine = run_method("dmd", teacher, steps=250, batch_size=128, ttur=2)
    x = student_samples(engine, 10_000)
    assert x.mean().item() == pytest.approx(0.8, abs=0.15)


def test_few_steps_train_on_their_own_inputs():
    engine = run_method(
        "dmd", gaussian((1.0,), 0.4, SMALL), steps=900, batch_size=256, ttur=2, student_steps=2
    )
    x = student_samples(engine, 20_000)
    assert x.mean().item() == pytest.approx(1.0, abs=0.06)


def test_regression_pulls_to_the_pairs():
    teacher = gaussian((0.0,), 1.0, SMALL)
    eps = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    engine = run_method(
        "dmd", teacher, steps=400, ttur=1, regression=20.0, pairs=(eps, 1.5 + 0.0 * eps)
    )
    assert student_samples(engine, 5000).mean().item() > 0.75


def test_v1_critic_sees_the_samples_from_before_the_update():
    engine = make(ttur=1)
    batch = engine._micro_batches(0)[0]
    engine._unfreeze_only(("student",))
    engine.method.student_loss(batch)
    x, _ = batch.memo["x"]
    assert not x.requires_grad
    calls = []
    engine.method.generate = lambda b: calls.append(b)
    engine.method.fake_score_loss(batch)
    assert calls == [] and "x" not in batch.memo


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"student_steps": 4, "student_input": "noise"}, "student_input=noise is for one step"),
        ({"student_steps": 2, "regression": 0.25}, "regression trains one step"),
        ({"regression": 0.25, "regression_concat": True}, "method.ttur=1"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        dmd.Config(**options).validate()


def test_pair_outputs_join_the_batch_when_asked_to():
    pairs = (torch.zeros(32, 1, 8, 8), torch.zeros(32, 1, 8, 8))
    labels = torch.arange(64) % 3
    engine = run_method(
        "dmd", tiny_denoiser(SMALL, "x0"), steps=1, batch_size=8, pairs=pairs, ttur=1, train=False,
        cond={"label": lambda i: labels[i % 64]}, regression=0.25, regression_concat=True,
    )  # fmt: skip
    batch = engine._micro_batches(0)[0]
    engine.method.student_loss(batch)
    x, cond = batch.memo["x"]
    assert len(x) == 16 and len(cond["label"]) == 16
    assert torch.equal(cond["label"][8:], batch.pair.cond["label"])


def test_conditioning_time_and_renoise_reach_the_sampler():
    teacher = gaussian((0.0,), 1.0, SD)
    assert dmd.DMD(dmd.Config(conditioning_time=399.0), teacher).sampler().times == (399.0,)
    lower = dmd.Config(student_steps=2, conditioning_time=599.0)
    assert dmd.DMD(lower, teacher).sampler().times == (599.0, 299.0)
    few = dmd.DMD(dmd.Config(student_steps=2, renoise="ode"), teacher).sampler()
    assert few == Sampler((999.0, 499.0), "ode")


def test_needs_follow_the_options():
    needs = dmd.DMD.needs
    assert not needs(dmd.Config()).images
    assert needs(dmd.Config(gan=1e-3)).images and needs(dmd.Config(gan=1e-3)).features
    assert needs(dmd.Config(regression=0.25)).pairs == 2000
    assert needs(dmd.Config(student_steps=4, student_input="noised_data")).images


def test_batch_index_is_shared_over_processes():
    a, b = (Batch(1, (1,), {}, shared=torch.Generator().manual_seed(5)) for _ in range(2))
    assert [a.randint(4) for _ in range(20)] == [b.randint(4) for _ in range(20)]
