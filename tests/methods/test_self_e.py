"""Known-answer tests of Self-E, numbered as in the specification."""

import math

import pytest
import torch
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch, Sampler
from diffdistill.methods import self_e
from diffdistill.parts import flow_map
from diffdistill.parts import self_evaluation as own
from diffdistill.parts.rollout import ancestral, renoise, sample
from diffdistill.schedules import EDM, RectifiedFlow
from diffdistill.testing import run_method, student_samples

NULL = 2  # classes 0 and 1 lie at -1 and 1, the null class is both


class Classes(nn.Module):
    """Exact G of N(+-1, 0.3^2), straight paths, as a velocity; plus a correction that learns."""

    def __init__(self, width=64, std=0.3):
        super().__init__()
        self.std = std
        self.time_embedding = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(3, width)
        self.inner = nn.Sequential(
            nn.Linear(width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def exact(self, z, t, label):
        a, s = (1 - t)[:, None], t[:, None]
        v = a**2 * self.std**2 + s**2
        means = torch.tensor([-1.0, 1.0], dtype=z.dtype)
        gaps = z - a * means
        weight = (-gaps.square() / (2 * v)).softmax(1)
        chosen = nn.functional.one_hot(label.clamp(max=1), 2).to(weight.dtype)
        weight = torch.where((label == NULL)[:, None], weight, chosen)
        return (weight * (means + a * self.std**2 / v * gaps)).sum(1, keepdim=True)

    def forward(self, z, t, label):
        told = self.time_embedding(t.float()[:, None]) + self.label(label)
        learned = self.out(self.inner(torch.cat([told, z.float()], 1)))
        return (z - self.exact(z, t, label)) / t[:, None].clamp_min(1e-3) + learned


def teacher(null=True, std=0.3):
    torch.manual_seed(0)
    return Denoiser(
        Classes(std=std), RectifiedFlow(), "flow", shape=(1,),
        null_cond={"label": torch.tensor([NULL])} if null else None,
    )  # fmt: skip


def method(**options):
    found = self_e.SelfE(self_e.Config(**options), teacher())
    found.attach({name: build(found.teacher) for name, build in found.roles().items()})
    return found


def one(v, n=1):
    return torch.full((n,), v, dtype=torch.float64)


RED = {"label": torch.tensor([1])}

# ---- 1 to 3, 5, 6 the pseudo-target -----------------------------------------------------


def test_1_the_classifier_score_moves_to_the_class():
    m, x_s = method(), torch.tensor([[0.3]])
    with torch.no_grad():
        told = m.clean(m.average, x_s, one(0.5), one(0.5), RED).item()
        null = m.clean(m.student, x_s, one(0.5), one(0.5), {"label": torch.tensor([NULL])}).item()
        delta = m.difference(x_s, one(0.5), RED, late=False).item()
    assert [told, null, delta] == pytest.approx([0.96697248, 0.50904948, -0.45792300], abs=1e-6)
    score = lambda d: (0.5 * d - 0.3) / 0.25  # noqa: E731
    assert 0.25 / 0.5 * (score(null) - score(told)) == pytest.approx(delta, abs=1e-6)
    x = torch.tensor([[0.4]], requires_grad=True)
    x_self = (x - delta).detach()
    assert x_self.item() == pytest.approx(0.85792300, abs=1e-6)
    (slope,) = torch.autograd.grad((x - x_self).square().sum(), x)
    assert slope.item() == pytest.approx(-0.91584600, abs=1e-6)


def test_1_wrong_sign_moves_away_from_the_class():
    m = method(renormalise=False)
    x0, x = torch.tensor([[0.4]]), torch.tensor([[0.4]])
    delta = torch.tensor([[-0.45792300]])
    right = m.target(x0, x, delta, one(0.8), one(0.5)).item()
    wrong = m.target(x0, x, -delta, one(0.8), one(0.5)).item()
    assert wrong < 0.4 < right


def test_2_lambda_and_the_blend():
    assert own.lead(one(0.8), one(0.5)).item() == pytest.approx(3)
    assert own.lead(one(0.7), one(0.7)).item() == 0
    x0, x_self = torch.tensor([[1.2]]), torch.tensor([[0.857923]])
    assert own.blended(x0, x_self, one(3.0)).item() == pytest.approx(0.94344225, abs=1e-7)
    assert own.blended(x0, x_self, one(1e9)).item() == pytest.approx(0.857923, abs=1e-6)


def test_3_the_norm_of_the_data_is_kept():
    x0, x_self = torch.tensor([[1.2, -0.4]]), torch.tensor([[2.0, 0.5]])
    y = own.blended(x0, x_self, one(3.0))
    assert y[0].tolist() == pytest.approx([1.8, 0.275])
    found = own.renormalised(y, x0)
    assert found[0].tolist() == pytest.approx([1.25040239, 0.19103369], abs=1e-7)
    assert found.norm().item() == pytest.approx(x0.norm().item())
    torch.testing.assert_close(own.renormalised(7 * y, x0), found)


def test_5_a_condition_that_says_nothing_leaves_the_sample():
    m, x_s = method(), torch.randn(6, 1)
    null = {"label": torch.full((6,), NULL)}
    with torch.no_grad():
        assert not m.difference(x_s, one(0.5, 6), null, late=False).any()
    x0, x = torch.randn(6, 1), torch.randn(6, 1)
    y = m.target(x0, x, torch.zeros(6, 1), one(0.8, 6), one(0.5, 6))
    torch.testing.assert_close(y, own.renormalised(x0 + 3 * x, x0))


def test_6_the_late_phase():
    m, x_s = method(k=0.9), torch.randn(1, 1)
    with torch.no_grad():
        early = m.difference(x_s, one(0.5), RED, late=False)
        torch.testing.assert_close(m.difference(x_s, one(0.5), RED, late=True), 0.9 * early)
        nn.init.normal_(m.student.net.mark)
        nn.init.normal_(m.student.net.net.out.weight)
        late = m.difference(x_s, one(0.5), RED, late=True)
        assert not torch.allclose(late, m.difference(x_s, one(0.5), RED, late=False))
        m.cfg.k = 1.0
        torch.testing.assert_close(
            m.difference(x_s, one(0.5), RED, late=True),
            m.difference(x_s, one(0.5), RED, late=False),
        )


# ---- 4 the diagonal, 8 times ------------------------------------------------------------


def make(steps=4, **options):
    x = torch.where(torch.arange(64) % 2 == 0, -1.0, 1.0)[:, None] + 0.3 * torch.randn(64, 1)
    labels = torch.arange(64) % 2
    return run_method(
        "self_e", teacher(), steps=steps, batch_size=16, x=x, train=False, lr=1e-3,
        cond={"label": lambda i: labels[i]}, **options,
    )  # fmt: skip


def test_4_on_the_diagonal_it_is_flow_matching_and_nothing_is_judged():
    engine = make(diagonal=1.0, cond_dropout=0.0)
    m, batch = engine.method, engine._micro_batches(0)[0]
    nn.init.normal_(m.student.net.net.out.weight)
    m.difference = None
    before = m.average.passes
    torch.manual_seed(3)
    loss = m.loss(batch)["match"]
    torch.manual_seed(3)
    torch.rand(16)  # the dropout of conditions
    t, s = own.drawn_times(batch.x, 512, 16, 0.0)
    eps = torch.randn_like(batch.x)
    z = flow_map.interpolate(batch.x, eps, t)
    v = m.student.net(z, t, r=s, **batch.cond)
    assert torch.equal(t, s) and m.average.passes == before
    want = (v - (eps - batch.x)).square().mean().float()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_4_without_renormalisation_the_loss_has_two_terms():
    engine = make(diagonal=0.0, cond_dropout=0.0, renormalise=False, ramp=0)
    m, batch, seen = engine.method, engine._micro_batches(0)[0], []
    m.difference = lambda x_s, s, cond, late: seen.append(s) or torch.full_like(x_s, 0.2)
    clean, outs = m.clean, []
    m.clean = lambda *a: outs.append((a[2], a[3], clean(*a))) or outs[-1][2]
    loss = m.loss(batch)["match"]
    t, s, x = outs[0]
    lam = own.lead(t, s)[:, None]
    both = (x - batch.x).square() + lam * (0.2 * torch.ones_like(x)).square()
    # |x - y|^2 (1 + lam) differs from the sum by a constant of x: compare gradients
    (got,) = torch.autograd.grad(loss, x, retain_graph=True)
    x_self = x.detach() - 0.2
    total = (((x - batch.x).square() + lam * (x - x_self).square()) / t[:, None] ** 2).mean()
    (want,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert both.shape == x.shape and torch.equal(seen[0], s)


def test_8_times():
    for tokens, want in ((512, 0.622459), (1024, 0.644020), (4096, 0.759511)):
        moved = 1 / (1 + math.exp(-own.log_shift(tokens)))
        assert moved == pytest.approx(want, abs=1e-6)
    like = torch.empty(40_000, 1)
    t, s = own.drawn_times(like, 512, 20_000, 0.4)
    assert t.median().item() == pytest.approx(0.622459, abs=6e-3)
    assert torch.equal(t[:20_000], s[:20_000]) and (s <= t).all()
    share = (1 - s / t)[20_000:]
    assert share.min() >= 0 and share.max().item() == pytest.approx(0.4, abs=1e-3)
    assert share.mean().item() == pytest.approx(0.2, abs=5e-3)
    m, seen = method(ramp=100), []
    draw = own.drawn_times
    try:
        own.drawn_times = lambda x, tokens, m, spread: seen.append(spread) or draw(x, tokens, m, 0)
        for step in (0, 50, 500):
            m.loss(Batch(4, (1,), {"label": torch.zeros(4).long()}, x=torch.randn(4, 1), step=step))
    finally:
        own.drawn_times = draw
    assert seen == [0, 0.5, 1]


# ---- 7 sampling -------------------------------------------------------------------------


def test_7_the_sampler_with_eta():
    flow = RectifiedFlow()
    kept, new = ancestral(flow, one(0.8), one(0.5), 1.0)
    assert new.item() == pytest.approx(0.48412292, abs=1e-8)
    assert kept.item() ** 2 + new.item() ** 2 == pytest.approx(0.25)
    assert ancestral(flow, one(1.0), one(0.5), 1.0)[1].item() == pytest.approx(0.5)  # all new
    z, x0, eps = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    for t, s in ((1.0, 0.4), (0.8, 0.5)):
        ode = renoise(flow, x0, z, t, s, Sampler((t, s), "ode"), eps)
        still = renoise(flow, x0, z, t, s, Sampler((t, s), "ancestral", eta=0.0), eps)
        torch.testing.assert_close(still, ode)
        torch.testing.assert_close(ode, z - (t - s) * (z - x0) / t)  # Euler


def test_7_the_exact_map_keeps_its_law_with_any_eta():
    schedule, n = EDM(t_max=40.0), 200_000
    exact = lambda z, t, cond: z / (1 + t[:, None].float() ** 2)  # noqa: E731  # N(0, 1)
    for eta in (0.0, 0.5, 1.0):
        times = tuple(40.0 * 0.9**i for i in range(90))
        noises = [torch.randn(n, 1) for _ in times] if eta else [torch.randn(n, 1)] * 90
        x = sample(exact, schedule, noises, {}, Sampler(times, "ancestral", eta=eta))
        assert x.std().item() == pytest.approx(1, abs=0.05)


def test_the_second_time_of_a_step():
    m = method()
    times = (m.flow.high,)
    net = own.Marked(m.teacher.net, RectifiedFlow(), 1.0, times, 0.5)
    assert net.following(one(1.0)).item() == pytest.approx(0.5)
    seen = m.roles()["student"](m.teacher).net
    assert seen.look == 0.5 and method(student_steps=2).student.net.look == 0
    assert method(second=0.25, student_steps=4).average.net.look == 0.25
    assert method(student_steps=4).sampler().times == pytest.approx((1.0, 0.75, 0.5, 0.25))
    assert method(eta=0.3).sampler() == Sampler((1.0,), "ancestral", eta=0.3)


# ---- 9 gradients, training --------------------------------------------------------------


def test_9_gradients_reach_the_student_through_its_estimate_alone():
    engine = make(diagonal=0.5, ramp=0)
    m, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("student",))
    nn.init.normal_(m.student.net.net.out.weight)
    seen = []
    difference = m.difference
    m.difference = lambda x_s, *a: seen.append(x_s) or difference(x_s, *a)
    losses = m.loss(batch, late=True)
    assert set(losses) == {"match", "fake", "_delta"}
    assert not seen[0].requires_grad and len(seen[0]) == 8
    sum(v for n, v in losses.items() if not n.startswith("_")).backward()
    assert m.student.net.net.out.weight.grad.abs().sum() > 0
    assert m.student.net.mark.grad.abs().sum() > 0
    assert all(p.grad is None for p in (*m.average.parameters(), *m.teacher.parameters()))
    late = make(fake_start=2, ramp=0)
    logs = [late.train_step() for _ in range(4)]
    assert ["student/fake" in log for log in logs] == [False, False, True, True]


def test_the_average_follows():
    engine = make(decay=0.75)
    before = [p.clone() for p in engine.roles["average"].params]
    engine.train_step()
    student, average = (engine.roles[n].params for n in ("student", "average"))
    for old, s, a in zip(before, student, average, strict=True):
        torch.testing.assert_close(a, 0.75 * old + 0.25 * s)


def trained(steps, **options):
    labels = torch.arange(4096) % 2
    g = torch.Generator().manual_seed(0)
    x = (2.0 * labels - 1)[:, None] + 0.3 * torch.randn(4096, 1, generator=g)
    return run_method(
        "self_e", teacher(), steps=steps, batch_size=128, x=x, lr=2e-3, ramp=50, decay=0.9,
        cond={"label": lambda i: labels[i]}, cond_dropout=0.1, **options,
    )  # fmt: skip


def spread(engine):
    """Mean and deviation of one-step samples of class 1."""
    x = student_samples(engine, 4000, {"label": torch.ones(4000, dtype=torch.long)})
    return x.mean().item(), x.std().item()


def test_one_step_samples_stay_with_their_class():
    mean, std = spread(trained(400))
    assert mean == pytest.approx(1.0, abs=0.35) and std < 0.6


def test_wrong_sign_of_the_judgement_leaves_the_class(monkeypatch):
    right = self_e.SelfE.difference
    kept = spread(trained(150, diagonal=0.25))[0]
    monkeypatch.setattr(self_e.SelfE, "difference", lambda self, *a: -4 * right(self, *a))
    assert spread(trained(150, diagonal=0.25))[0] < kept - 0.1


def test_what_it_needs():
    with pytest.raises(ValueError, match="unconditional branch"):
        self_e.SelfE(self_e.Config(), teacher(null=False))
    assert self_e.SelfE.needs(self_e.Config()).images
    for options in ({"eta": 2.0}, {"student_steps": 0}, {"second": -1.0}):
        with pytest.raises(ValueError, match="0 to 1, the last two 1 or more"):
            self_e.Config(**options).validate()
    piped = teacher()
    piped.net.backbone = piped.net.inner
    with pytest.raises(ValueError, match="has no place in a pipeline's network"):
        self_e.SelfE(self_e.Config(student_steps=2), piped)


def test_the_difference_carries_no_gradient(monkeypatch):
    seen, engine = [], make(steps=1)
    whole = engine.method.difference
    monkeypatch.setattr(
        engine.method, "difference",
        lambda *given: seen.append(torch.is_grad_enabled()) or whole(*given),
    )  # fmt: skip
    engine.train_step()
    assert seen and not any(seen)
