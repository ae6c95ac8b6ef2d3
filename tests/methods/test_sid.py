"""Known-answer tests of SiD, SiDA, LSG and few-step SiD, numbered as in the specification."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.methods import sid
from diffdistill.parts import gan
from diffdistill.parts.guidance import drop_conditions, with_guidance
from diffdistill.parts.matching import sample_weight, score_identity
from diffdistill.parts.rollout import student_output
from diffdistill.parts.score import draw_times, lognormal_times
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, bcast, student_times
from diffdistill.testing import gaussian, run_method, student_samples, tiny_denoiser

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SMALL = EDM(t_max=5.0)
# start noise and noise of four samples: exact moments up to the second, all that the loss has
ZETA, NOISE = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])[..., None]


def world(monkeypatch, a=0.5, b=0.3, m=1.0, s=1.0, schedule=None, t=0.8, **options):
    """The method at data N(m, s^2), student b + a z, its exact fake score, one time."""
    engine = run_method(
        "sid", gaussian((m,), s, schedule), steps=1, batch_size=4, train=False,
        **{"normaliser": "none"} | options,
    )  # fmt: skip
    method, params = engine.method, [torch.tensor(v, requires_grad=True) for v in (a, b)]
    with torch.no_grad():
        method.fake_score.net.mean.fill_(b)
        method.fake_score.net.std.fill_(a)
    method.rollout = lambda batch: params[1] + params[0] * ZETA
    times = lambda kind, s, x, *r: torch.full((len(x),), t, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(sid, "draw_times", times)
    monkeypatch.setattr(torch, "randn_like", lambda x: NOISE)
    return method, engine._micro_batches(0)[0], params


def slopes(monkeypatch, **options):
    """(loss, dL/da, dL/db)"""
    method, batch, params = world(monkeypatch, **options)
    loss = method.student_loss(batch, False)["sid"]
    return loss.item(), *(g.item() for g in torch.autograd.grad(loss, params))


@pytest.mark.parametrize(
    ("alpha", "want"),
    [
        (0.0, (-0.1283345, -0.0167690)),
        (0.5, (-0.1824081, -0.1066032)),
        (1.0, (-0.2364816, -0.1964374)),
        (1.2, (-0.2581110, -0.2323710)),
    ],
)
def test_1_gradient_in_closed_form(monkeypatch, alpha, want):
    value, *grads = slopes(monkeypatch, alpha=alpha)
    assert grads == pytest.approx(want, abs=2e-6)
    fisher = 0.1708731
    assert value == pytest.approx({1.0: 0.0, 0.5: fisher / 2}.get(alpha, value), abs=2e-6)


def test_1_variance_preserving(monkeypatch):
    schedule, t = TrigFlow(), math.acos(0.6)
    _, *grads = slopes(monkeypatch, alpha=1.0, schedule=schedule, t=t)
    assert grads == pytest.approx((-0.2075286, -0.3927671), abs=2e-6)


def test_2_detached_input_is_wrong_and_becomes_dmd(monkeypatch):
    add = sid.add_noise
    monkeypatch.setattr(sid, "add_noise", lambda *a: add(*a).detach())
    _, *grads = slopes(monkeypatch, alpha=1.0)
    assert grads == pytest.approx((-0.1644286, -0.2731707), abs=2e-6)


def test_2_detached_difference_is_wrong_and_halves_the_scale(monkeypatch):
    detached = lambda x, f, g, alpha: (f - g).detach() * (g - x)  # noqa: E731
    monkeypatch.setattr(sid, "score_identity", detached)
    _, *grads = slopes(monkeypatch, alpha=1.0)
    assert grads == pytest.approx((-0.1182408, -0.1964374), abs=2e-6)


def test_3_twice_alpha_one_half_is_the_fisher_divergence(monkeypatch):
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 0.3))
    gain, own = 1 / 1.64, a**2 / (a**2 + 0.64)
    fisher = (1 - b) ** 2 * (1 - gain) ** 2 + (gain - own) ** 2 * (a**2 + 0.64)
    exact = [g.item() for g in torch.autograd.grad(fisher, [a, b])]
    assert exact == pytest.approx((-0.3648161, -0.2132064), abs=1e-6)
    _, *grads = slopes(monkeypatch, alpha=0.5)
    assert [2 * g for g in grads] == pytest.approx(exact, abs=4e-6)


@pytest.mark.parametrize(("alpha", "want"), [(1.0, -2.469e-5), (1.2, 4.64e-6)])
def test_4_alpha_beyond_one_pushes_a_broad_students_mean_away(monkeypatch, alpha, want):
    _, _, db = slopes(monkeypatch, alpha=alpha, a=2.0, b=0.0, t=0.1)
    assert db == pytest.approx(want, rel=0.05)


def test_5_hand_numbers():
    x, f, g = torch.tensor([[[1.0, 2.0]], [[0.5, 2.5]], [[0.0, 2.0]]])
    t = torch.ones(1, dtype=torch.float64)
    omega = sample_weight("l1", EDM(), t, x, f)
    assert omega.item() == pytest.approx(2.0)
    terms = omega * score_identity(x, f, g, 1.2)
    torch.testing.assert_close(terms, torch.tensor([[-1.1, -0.1]]))
    assert 100 * terms.sum().item() == pytest.approx(-120, abs=1e-3)
    torch.testing.assert_close(omega * score_identity(x, f, g, 1.0), torch.tensor([[-1.0, 0.0]]))


def test_5_normalisers_in_flow_units():
    t = torch.tensor([0.8], dtype=torch.float64)
    x = torch.zeros(1, 3)
    weights = {"none": 1, "alpha": 0.2, "alpha2": 0.04, "inv_sigma": 1.25, "inv_sigma2": 1.5625,
               "snr": 0.0625, "sqrt_snr": 0.25}  # fmt: skip
    for kind, want in weights.items():
        for schedule, time in ((RectifiedFlow(), t), (EDM(), t / (1 - t))):
            assert sample_weight(kind, schedule, time, x, x).item() == pytest.approx(want), kind
    assert sample_weight("l1", EDM(), t, x, x).item() == pytest.approx(1e5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("normaliser", ["l1", "none", "alpha"])
def test_6_every_sample_is_at_rest_at_the_optimum(monkeypatch, alpha, normaliser):
    method, batch, _ = world(monkeypatch, a=1.0, b=1.0, alpha=alpha, normaliser=normaliser)
    x = torch.randn(4, 1, requires_grad=True)
    method.rollout = lambda batch: x
    (grad,) = torch.autograd.grad(method.student_loss(batch, False)["sid"], x)
    assert (grad == 0).all()


def adversarial(**options):
    labels = torch.arange(64) % 3
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return run_method(
        "sid", tiny_denoiser(SMALL, "x0"), batch_size=8, x=x, cond={"label": lambda i: labels[i]},
        **{"steps": 1, "train": False, "gan": 0.01} | options,
    )  # fmt: skip


def test_7_gan_arithmetic_and_clamp(monkeypatch):
    engine = adversarial()
    method, batch = engine.method, engine._micro_batches(0)[0]
    monkeypatch.setattr(sid, "sample_weight", lambda *a: torch.full((8, 1, 1, 1), 2.0))
    monkeypatch.setattr(gan, "pooled_logits", lambda f: torch.zeros(8, 4, 4))
    half = method.student_loss(batch, True)["gan"].item()
    assert 12 * half == pytest.approx(0.0831777, abs=1e-6)  # 12 elements: the papers sum
    monkeypatch.setattr(gan, "pooled_logits", lambda f: torch.full((8, 4, 4), -50.0))
    assert method.student_loss(batch, True)["gan"].item() == pytest.approx(0.1, rel=1e-3)


def test_7_the_gan_halves_the_matching_loss_only_when_it_is_on():
    engine = adversarial(warmup=10, gan_start=20)
    due = {}
    for step in (0, 9, 10, 15, 19, 20, 30):
        engine.step = step
        due[step] = [u for u in engine.updates if engine.due(u)]
    assert [len(due[s]) for s in (0, 9)] == [1, 1]  # the fake score alone
    batch = engine._micro_batches(0)[0]
    batch.memo["k"] = 0
    values = []
    for step in (15, 30):
        torch.manual_seed(0)
        assert [u.name for u in due[step]] == ["fake_score", "student"]
        values.append(due[step][1].loss(batch))
    assert set(values[0]) == {"sid", "_fisher"} and set(values[1]) == {"sid", "_fisher", "gan"}
    assert values[1]["sid"].item() == pytest.approx(values[0]["sid"].item() / 2, rel=1e-5)


def test_7_the_critics_weights_meet_their_own_samples(monkeypatch):
    """sum w_i bce_i; a batch mean of bce times w, as released for SiDA, is another number."""
    engine = adversarial(fake_times="lognormal", gan_critic=3.0)
    method, batch = engine.method, engine._micro_batches(0)[0]
    logits = iter([torch.arange(8.0).view(8, 1, 1), torch.zeros(8, 2, 2)])
    monkeypatch.setattr(gan, "pooled_logits", lambda f: next(logits))
    weight = torch.arange(1.0, 9.0)
    method.fake_score.loss_weight = lambda t: weight.double()
    loss = method.fake_score_loss(batch)["gan"].item()
    bce = (nn.functional.softplus(torch.arange(8.0)) + math.log(2)) / 2
    assert loss == pytest.approx(3 * (weight * bce).mean().item() / 64, rel=1e-5)
    wrong = 3 * weight.mean().item() * bce.mean().item() / 64
    assert loss != pytest.approx(wrong, rel=0.05)


def test_7_real_and_fake_share_time_noise_and_condition(monkeypatch):
    engine = adversarial()
    method, batch = engine.method, engine._micro_batches(0)[0]
    net, seen = method.fake_score, []
    tap = net.tap
    monkeypatch.setattr(
        net,
        "tap",
        lambda z, t, cond, *a, **k: seen.append((z, t, cond)) or tap(z, t, cond, *a, **k),
    )
    x = torch.zeros(8, 1, 8, 8)
    method.rollout = lambda b: x
    method.fake_score_loss(batch)
    (fake, t, cond), (real, t_real, cond_real) = seen
    assert torch.equal(t, t_real) and torch.equal(cond["label"], cond_real["label"])
    torch.testing.assert_close(real - fake, batch.x - x)


def test_7_the_gan_reaches_student_and_critic_through_the_same_pass():
    engine = adversarial()
    method, batch = engine.method, engine._micro_batches(0)[0]
    before = method.fake_score.passes
    losses = method.student_loss(batch, True)
    assert method.fake_score.passes - before == 8  # estimate and logits in one pass
    through = torch.autograd.grad(losses["gan"], list(method.student.net.out.parameters()))
    assert all(g.abs().max() > 0 for g in through)
    critic = method.fake_score_loss(batch)["gan"]
    inner = torch.autograd.grad(critic, list(method.fake_score.net.mid.parameters()))
    assert all(g.abs().max() > 0 for g in inner)
    assert gan.pooled_logits(torch.ones(2, 5, 4, 4)).shape == (2, 4, 4)
    assert gan.pooled_logits(torch.ones(2, 7, 5)).shape == (2, 5)


class Exact(nn.Module):
    """A few-step student whose output is N(m, s^2) at each of its times."""

    def __init__(self, times, m=0.7, s=0.4):
        super().__init__()
        self.first, self.times = times[0], torch.tensor(times)
        self.mean = nn.Parameter(torch.full((len(times), 1), m))
        self.std = nn.Parameter(torch.full((len(times), 1), s))

    def forward(self, z, t):
        i = int((self.times - t[0]).abs().argmin())
        m, s, sigma = self.mean[i], self.std[i], bcast(t, z)
        if i == 0:
            return m + s / sigma * z
        return m + s * (z - m) / (s**2 + sigma**2).sqrt()


def few_steps(steps=3, **options):
    engine = run_method(
        "sid", gaussian((0.7,), 0.4, SMALL), steps=1, batch_size=20_000, train=False,
        student_steps=steps, **options,
    )  # fmt: skip
    method = engine.method
    net = Exact(method.sampler().times)
    method._roles["student"] = Denoiser(net, SMALL, "x0", shape=(1,))
    return method, engine._micro_batches(0)[0], net


@pytest.mark.parametrize("k", [0, 1, 2])
def test_8_every_step_of_the_exact_student_is_data_and_at_rest(k):
    method, batch, net = few_steps()
    batch.memo["k"] = k
    x = method.rollout(batch)
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.7, 0.4), abs=0.01)
    loss = method.student_loss(batch, False)["sid"]
    for grad in torch.autograd.grad(loss, list(net.parameters())):
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("k", [0, 1, 2])
def test_8_only_the_last_step_has_a_gradient(k):
    method, batch, net = few_steps()
    batch.memo["k"] = k
    with torch.no_grad():
        method.fake_score.net.mean += 0.5
    grads = torch.autograd.grad(method.student_loss(batch, False)["sid"], list(net.parameters()))
    for grad in grads:
        assert [i for i in range(3) if grad[i] != 0] == [k]


def test_8_one_step_index_per_iteration(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        sid,
        "student_output",
        lambda *a, index: drawn.append(index) or student_output(*a, index=index),
    )
    engine = run_method(
        "sid", gaussian((0.7,), 0.4, SMALL), steps=60, batch_size=4, student_steps=4
    )
    assert drawn[::2] == drawn[1::2] and set(drawn) == {0, 1, 2, 3}
    assert {n: r.updates for n, r in engine.roles.items()} == {"student": 60, "fake_score": 60}


def test_8_times_of_the_steps():
    # SiD truncates 625 i / 4, which ends with 156; the common rule counts 626 levels, as DMD2
    assert student_times(SD, 4, 625.0) == (625.0, 468.0, 312.0, 155.0)
    ratio = SD.sigma(torch.tensor(625.0)) / SD.alpha(torch.tensor(625.0))
    assert ratio.item() == pytest.approx(2.5017, abs=1e-3)  # EDM's 2.5


class Labelled(nn.Module):
    """Counts what it is asked for: 10 + label."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.ones(())), []

    def forward(self, z, t, label):
        self.asked += label.tolist()
        return self.weight * (10.0 + label[:, None].float()) + 0 * z


def labelled():
    null = {"label": torch.tensor([5])}
    return Denoiser(Labelled(), SMALL, "x0", shape=(1,), null_cond=null)


@pytest.mark.parametrize(
    ("kappa", "want", "asked"),
    [(0.0, 15, {5}), (1.0, 12, {2}), (-1.0, 18, {2, 5}), (3.0, 6, {2, 5})],
)
def test_9_guidance_at_any_scale(kappa, want, asked):
    net, z = labelled(), torch.zeros(3, 1)
    t, cond = torch.ones(3, dtype=torch.float64), {"label": torch.full((3,), 2)}
    assert with_guidance(net, kappa)(z, t, cond).flatten().tolist() == [want] * 3
    assert set(net.net.asked) == asked
    scales = with_guidance(net, torch.tensor([0.0, 1.0, -1.0]))(z, t, cond)
    assert scales.flatten().tolist() == [15, 12, 18]


@pytest.mark.parametrize(
    ("preset", "kappas", "teacher"),
    [
        ({}, (1, 1), 1),
        ({"guidance": 3.0, "fake_guidance": 1.0, "fake_train_guidance": 1.0}, (1, 1), 3),  # long
        ({"guidance": 3.0}, (3, 3), 3),  # LSG
        ({"fake_guidance": 0.0, "fake_train_guidance": 0.0}, (0, 0), 1),  # Zero-CFG
        ({"fake_guidance": -1.0, "fake_train_guidance": -1.0}, (-1, -1), 1),  # Anti-CFG
    ],
)
def test_9_presets_reach_the_networks(monkeypatch, preset, kappas, teacher):
    assert sid.Config(**preset).kappas == kappas
    engine = run_method(
        "sid", labelled(), steps=1, batch_size=4, cond={"label": lambda i: i % 3}, train=False,
        drop=0.0, **preset,
    )  # fmt: skip
    method, batch, used = engine.method, engine._micro_batches(0)[0], []
    names = {id(method.teacher): "teacher", id(method.fake_score): "fake"}
    monkeypatch.setattr(
        sid, "with_guidance",
        lambda net, s: used.append((names[id(net)], s)) or with_guidance(net, s),
    )  # fmt: skip
    method.student_loss(batch, False)
    assert used == [("teacher", teacher), ("fake", kappas[1])]
    used.clear()
    method.fake_score_loss(batch)
    assert used == [("fake", kappas[0])]


def test_9_zero_guidance_never_asks_for_the_condition_and_logits_always_do(monkeypatch):
    engine = adversarial(fake_guidance=0.0, fake_train_guidance=0.0, drop=0.0)
    method, batch = engine.method, engine._micro_batches(0)[0]
    calls, net = [], method.fake_score.net
    forward = net.forward
    monkeypatch.setattr(
        net,
        "forward",
        lambda z, t, label: calls.append(set(label.tolist())) or forward(z, t, label),
    )
    method.student_loss(batch, True)
    features, estimate = calls
    assert features == set(batch.cond["label"].tolist()) and estimate == {3}


@pytest.mark.parametrize(("kappa", "passes"), [(0.0, 16), (1.0, 8), (-1.0, 16), (3.0, 16)])
def test_9_logits_come_with_the_guided_estimate(kappa, passes):
    method = (engine := adversarial()).method
    batch = engine._micro_batches(0)[0]
    z, t = torch.randn(8, 1, 8, 8), torch.ones(8, dtype=torch.float64)
    before = method.fake_score.passes
    x0, logits = method.fake(z, t, batch.cond, kappa, True)
    assert method.fake_score.passes - before == passes
    plain, none = method.fake(z, t, batch.cond, kappa, False)
    torch.testing.assert_close(x0, plain)
    assert none is None
    want = method.fake_score.features(z, t, batch.cond).mean(1)
    torch.testing.assert_close(logits, want)


def test_9_dropped_conditions_drive_the_student_too(monkeypatch):
    engine = run_method(
        "sid", labelled(), steps=1, batch_size=4096, cond={"label": lambda i: i % 3}, train=False,
        guidance=2.0,
    )  # fmt: skip
    method, batch = engine.method, engine._micro_batches(0)[0]
    seen = SimpleNamespace()
    rollout = method.rollout
    method.rollout = lambda b: setattr(seen, "student", b.cond["label"]) or rollout(b)
    dsm = sid.dsm
    monkeypatch.setattr(
        sid, "dsm", lambda *a, **k: setattr(seen, "fake", a[4]["label"]) or dsm(*a, **k)
    )
    method.fake_score_loss(batch)
    assert torch.equal(seen.student, seen.fake)
    assert (seen.fake == 5).float().mean().item() == pytest.approx(0.1, abs=0.02)
    method.student_loss(batch, False)
    assert torch.equal(seen.student, batch.cond["label"])
    cond = {"text": torch.zeros(6, 2, 3)}
    net = Denoiser(nn.Identity(), SMALL, null_cond={"text": torch.ones(1, 2, 3)})
    assert drop_conditions(net, cond, 0.999999, torch.empty(6))["text"].mean() == 1


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_9_guidance_without_a_null_condition_is_refused(drop):
    teacher = Denoiser(Labelled(), SMALL, "x0", shape=(1,))
    engine = run_method(
        "sid", teacher, steps=1, batch_size=4, cond={"label": lambda i: i % 3}, train=False,
        guidance=2.0, drop=drop,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"needs an unconditional branch.*every guidance to 1"):
        engine.train_step()


def test_the_noise_levels_are_those_of_the_code():
    u = EDM(levels=1001).grid()  # sigma(u) at u = i / 1000
    assert [u[i].item() for i in (0, 400, 800)] == pytest.approx([0.002, 0.96542, 24.408], rel=1e-4)
    like = torch.empty(200_000, 1)
    log_sigma = lognormal_times(EDM(), like, -1.2, 1.2).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.01)
    flow = draw_times("lognormal", RectifiedFlow(), like, math.log(2), 1.6)
    assert flow.logit().mean().item() == pytest.approx(math.log(2), abs=0.02)  # SiD-DiT
    assert draw_times("uniform", EDM(), like, 0.0, 0.8).max().item() == EDM().grid()[800]


def test_options_reach_sampler_updates_and_weights(monkeypatch):
    few = sid.Config(student_steps=2, conditioning_time=2.5, renoise="ode", ttur=3, matching=100.0)
    method = sid.SiD(few, gaussian((0.0,), 1.0))
    assert method.sampler().times[0] == 2.5 and method.sampler().renoise == "ode"
    assert [(u.name, u.every) for u in method.updates()] == [("fake_score", 1), ("student", 3)]
    values = [slopes(monkeypatch, alpha=1.2, matching=m)[1] for m in (1.0, 100.0)]
    assert values[1] == pytest.approx(100 * values[0], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"t_low": 0.1, "t_high": 0.5}, ("uniform", 0.1, 0.5)),
        ({"fake_times": "lognormal", "p_mean": -0.4, "p_std": 1.0}, ("lognormal", -0.4, 1.0)),
    ],
)
def test_times_of_the_fake_score(monkeypatch, options, limits):
    assert drawn_times(monkeypatch, options)["fake_score"] == [limits]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"t_low": 0.1, "t_high": 0.5, "fake_times": "lognormal"}, ("uniform", 0.1, 0.5)),
        ({"student_times": "lognormal", "p_mean": -0.4}, ("lognormal", -0.4, 1.2)),
    ],
)
def test_times_of_the_student(monkeypatch, options, limits):
    assert drawn_times(monkeypatch, options)["student"] == [limits]


def drawn_times(monkeypatch, options):
    """What each update asks for."""
    engine = run_method("sid", gaussian((0.0,), 1.0), steps=1, train=False, **options)
    batch, found = engine._micro_batches(0)[0], {}
    for update in engine.method.updates():
        seen = found.setdefault(update.name, [])
        monkeypatch.setattr(
            sid, "draw_times",
            lambda k, s, x, *a, seen=seen: seen.append((k, *a)) or draw_times(k, s, x, *a),
        )  # fmt: skip
        update.loss(batch)
    return found


def test_the_critic_without_weights_is_the_plain_mean(monkeypatch):
    engine = adversarial(gan_weight="none", gan_critic=2.0)
    monkeypatch.setattr(gan, "pooled_logits", lambda f: torch.zeros(8, 4, 4))
    losses = engine.method.fake_score_loss(engine._micro_batches(0)[0])
    assert losses["gan"].item() == pytest.approx(2 * math.log(2), rel=1e-5)


def test_student_starts_from_a_folder(tmp_path):
    save_file(
        {"mean": torch.tensor([7.0]), "std": torch.tensor([2.0])}, tmp_path / "student.safetensors"
    )
    method = run_method(
        "sid", gaussian((0.0,), 1.0), steps=1, train=False, init=str(tmp_path)
    ).method  # fmt: skip
    assert method.student.net.mean.item() == 7 and method.fake_score.net.mean.item() == 0


def distilled(**options):
    engine = run_method(
        "sid", gaussian((1.0, -0.5), 0.4, SMALL), lr=4e-3, batch_size=256, t_low=0.0, t_high=0.8,
        **{"steps": 500} | options,
    )  # fmt: skip
    return student_samples(engine, 20_000)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_distils_a_gaussian(alpha):
    x = distilled(alpha=alpha)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.05)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.05)


def test_distils_a_gaussian_in_two_steps():
    x = distilled(student_steps=2, alpha=1.0, steps=700)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.08)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gan": 0.1, "warmup": 5}, "gan_start=0 lies in the warm-up"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
        ({"drop": 1.0}, "drop=1.0 is not a share"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sid.Config(**options).validate()


def test_needs_follow_the_options():
    assert not sid.SiD.needs(sid.Config()).images
    needs = sid.SiD.needs(sid.Config(gan=0.01))
    assert needs.images and needs.features
