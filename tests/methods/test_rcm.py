"""Known-answer tests of rCM, numbered as in the specification."""

import math
from itertools import pairwise

import pytest
import torch

from diffdistill.denoiser import guided
from diffdistill.engine import OptimConfig
from diffdistill.method import Batch
from diffdistill.methods import rcm
from diffdistill.parts.consistency import Consistency, ConsistencyConfig, normalised, tangent
from diffdistill.parts.score import matching_direction
from diffdistill.parts.trig import Trig, conditional_velocity, mix
from diffdistill.schedules import EDM, TrigFlow
from diffdistill.testing import gaussian, mixture, run_method, student_samples, tiny_denoiser

X, T = torch.full((1, 1), 0.9, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def student(x, t):
    return 0.8 * x + 0.25 * (3 * t).sin()[:, None]


def teacher_velocity(x, t):
    """N(0.3, 0.7^2) with sigma_d = 1."""
    c, s = t.cos()[:, None], t.sin()[:, None]
    return -0.3 * s + s * c * (1 - 0.49) * (x - 0.3 * c) / (c**2 * 0.49 + s**2)


def moved(derivative="exact"):
    step = Consistency(Trig(TrigFlow()), ConsistencyConfig(derivative=derivative), "rcm")
    return step.derivative(student, X, T, teacher_velocity(X, T))


# ---- 1 and 2 the tangent ----------------------------------------------------------------


def g(r=1.0, form="rcm"):
    return tangent(student(X, T), teacher_velocity(X, T), X, T, moved(), r, 1.0, form)


def test_1_full_tangent_is_that_of_scm():
    assert teacher_velocity(X, T).item() == pytest.approx(-0.05141187, abs=1e-8)
    assert moved().item() == pytest.approx(-0.35627358, abs=1e-8)
    for form in ("rcm", "scm"):
        assert g(form=form).item() == pytest.approx(-0.28840506, abs=1e-8)
    assert normalised(g()).item() == pytest.approx(-0.74253682, abs=1e-8)
    assert normalised(g(), "root").item() == pytest.approx(-0.67385559, abs=1e-8)


def test_1_warm_up():
    assert g(0.5).item() == pytest.approx(-0.42185778, abs=1e-8)


def test_1_wrong_warm_ups():
    """sCM's own, and the released code's, which leaves dF/dt at full strength."""
    assert g(0.5, "scm").item() == pytest.approx(-0.26194993, abs=1e-8)
    code = (g(0.5) - 0.5 * moved()).item()
    assert code == pytest.approx(-0.24372099, abs=1e-8)


def test_2_semi_continuous():
    assert moved("semi").item() == pytest.approx(-0.35628353, abs=1e-8)


# ---- 3 to 5 matching --------------------------------------------------------------------


def method(**options):
    """Of the teacher N(0.3, 0.7^2); generator law N(0.8, 0.4^2) with its exact score."""
    found = rcm.RCM(rcm.Config(**options), gaussian((0.3,), 0.7, TrigFlow()))
    fake = gaussian((0.8,), 0.4, TrigFlow())
    found.attach({"student": gaussian((0.8,), 0.4, TrigFlow()), "fake_score": fake})
    return found


def at(value, n=1):
    return torch.full((n,), value, dtype=torch.float64)


def test_3_matching_at_a_point():
    m, s = method(), at(0.9)
    x = torch.tensor([[1.1]], requires_grad=True)
    z = mix(x.detach(), torch.tensor([[-0.5]]), s)
    d_fake, d_teacher = (m.trig.clean(d, z, s, {}).detach() for d in (m.fake_score, m.teacher))
    v = matching_direction(x, d_teacher, d_fake)
    loss = (x - (x - v).detach()).square().sum()
    loss.backward()
    found = [q.item() for q in (z, d_fake, d_teacher, v, loss, x.grad)]
    assert found == pytest.approx(
        [0.29210751, 0.76978679, 0.34006799, 0.56547006, 0.31975638, 1.13094011], abs=2e-6
    )


def test_3_the_loss_of_the_method_is_that():
    m = method(dmd=0.5, rollout=1)
    x, noise = torch.tensor([[1.1]], requires_grad=True), torch.tensor([[-0.5]])
    m.consistency_loss = lambda batch: {}
    m.generate = lambda batch: x
    m.times = lambda like: at(0.9)
    m.trig.noise = lambda like: noise
    losses = m.student_loss(Batch(1, (1,), {}))
    assert losses["matching"].item() == pytest.approx(0.5 * 0.31975638, abs=1e-6)
    (slope,) = torch.autograd.grad(losses["matching"], x)
    assert slope.item() == pytest.approx(0.5 * 1.13094011, abs=2e-6)


def test_4_the_gap_points_from_the_generator_to_the_teacher():
    m, n = method(), 400_000
    s = at(0.9, n)
    z = mix(0.8 + 0.4 * torch.randn(n, 1), torch.randn(n, 1), s)
    with torch.no_grad():
        gap = m.trig.clean(m.fake_score, z, s, {}) - m.trig.clean(m.teacher, z, s, {})
    assert gap.mean().item() == pytest.approx(0.38209810, abs=3e-3)
    v = 0.49 * math.cos(0.9) ** 2 + math.sin(0.9) ** 2
    assert 0.5 * math.sin(0.9) ** 2 / v == pytest.approx(0.38209810, abs=1e-8)


def test_5_the_fake_scores_loss():
    m = method()
    x, noise = torch.tensor([[1.1]]), torch.tensor([[-0.5]])
    m.generate, m.times = lambda batch: x, lambda like: at(0.9)
    m.trig.noise = lambda like: noise
    assert m.fake_score_loss(Batch(1, (1,), {}))["dsm"].item() == pytest.approx(
        0.17770629, abs=1e-6
    )
    d = m.trig.clean(m.fake_score, mix(x, noise, at(0.9)), at(0.9), {})
    identity = (x - d).square().sum().item() / math.sin(0.9) ** 2
    assert identity == pytest.approx(0.17770629, abs=1e-6)
    target = conditional_velocity(x, noise, at(0.9)).item()
    assert target == pytest.approx(-0.5 * math.cos(0.9) - 1.1 * math.sin(0.9), abs=1e-6)


# ---- 6 rollout, 7 turns, 8 guidance -----------------------------------------------------


def make(**options):
    torch.manual_seed(0)  # of the network
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 3
    return run_method(
        "rcm", tiny_denoiser(EDM(), "eps"), steps=15, batch_size=8, x=x, train=False,
        cond={"label": lambda i: labels[i]}, **options,
    )  # fmt: skip


def test_6_rollout_times_fall_and_only_the_last_call_has_a_gradient():
    engine = make()
    m, batch, calls = engine.method, engine._micro_batches(0)[0], []
    plain = m.trig.clean

    def clean(denoise, x, t, cond):
        calls.append((t, torch.is_grad_enabled()))
        return plain(denoise, x, t, cond)

    m.trig.clean = clean
    counts = set()
    for _ in range(30):
        calls.clear()
        assert m.generate(batch).requires_grad
        times, graded = zip(*calls, strict=True)
        counts.add(len(calls))
        assert graded == (False,) * (len(calls) - 1) + (True,)
        assert (times[0] == m.trig.high).all() and m.trig.high > 1.55
        assert all((b <= a).all() for a, b in pairwise(times))
        if len(calls) > 1:
            assert times[1].unique().numel() > 1  # each sample has its own
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_6_any_number_of_steps_of_the_exact_function(steps):
    trig, n = Trig(TrigFlow()), 400_000

    def exact(z, t, cond):
        c, s = t.cos()[:, None], t.sin()[:, None]
        gap = (z - 0.3 * c) / (c**2 * 0.49 + s**2).sqrt()
        return (0.3 + 0.7 * gap).float()

    times = [at(trig.high, n)]
    for _ in range(steps - 1):
        times.append(trig.draw(times[0], 0.0, 1.6).minimum(times[-1]))
    x = trig.simulate(exact, torch.randn(n, 1), {}, times)
    x = trig.clean(exact, x, times[-1], {})
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.3, 0.7), abs=4e-3)


def test_7_turns():
    engine = make(ttur=4, tangent_warmup=3)
    seen = []
    for update in engine.updates:
        seen += [
            (i, update.name) for i in range(15) if setattr(engine, "step", i) or engine.due(update)
        ]
    engine.step = 0
    assert sorted(i for i, name in seen if name == "student") == [0, 1, 2, 3, 8, 13]
    assert sorted(i for i, name in seen if name == "fake_score") == [4, 5, 6, 7, 9, 10, 11, 12, 14]
    logs = [engine.train_step() for _ in range(9)]
    with_matching = [i for i, log in enumerate(logs) if "student/matching" in log]
    assert with_matching == [3, 8]
    assert engine.roles["student"].updates == 5 and engine.roles["fake_score"].updates == 4


def test_8_the_teacher_is_guided_and_the_fake_score_never():
    engine = make(guidance=3.0, rollout=1)
    m, batch = engine.method, engine._micro_batches(0)[0]
    z, t = torch.randn(8, 1, 8, 8), at(0.9, 8)
    with torch.no_grad():
        plain, null = (
            m.trig.velocity(m.teacher, z, t, c)
            for c in (batch.cond, {"label": torch.full((8,), 3)})
        )
        torch.testing.assert_close(
            m.trig.velocity(m.guided, z, t, batch.cond),
            null + 3 * (plain - null),
            rtol=1e-3,
            atol=1e-4,
        )
    seen = []
    for net in (m.teacher, m.fake_score):
        net.net.register_forward_pre_hook(
            lambda n, a, k: seen.append(len(k["label"])), with_kwargs=True
        )
    m.consistency_loss = lambda batch: {}
    m.student_loss(batch)
    assert seen == [16, 8]
    assert guided(m.teacher, 1.0) is m.teacher


# ---- training ---------------------------------------------------------------------------


def trained(steps, **options):
    teacher = mixture([(0.3,)], 0.7, EDM(t_max=20.0))
    x = 0.3 + 0.7 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(7))
    engine = run_method(
        "rcm", teacher, steps=steps, batch_size=256, x=x, data_std=0.5, ttur=1,
        optim={"default": OptimConfig(lr=6e-3, weight_decay=0.0, decay="linear")}, **options,
    )  # fmt: skip
    return student_samples(engine, 20_000)


def test_distils_a_gaussian():
    x = trained(500, tangent_warmup=100)
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.3, 0.7), abs=0.08)


def test_wrong_sign_of_the_matching_runs_away(monkeypatch):
    swapped = lambda x, teacher, fake: matching_direction(x, fake, teacher)  # noqa: E731
    monkeypatch.setattr(rcm, "matching_direction", swapped)
    x = trained(150, dmd=1.0)
    assert abs(x.mean().item() - 0.3) + abs(x.std().item() - 0.7) > 0.4


def test_units_of_the_data():
    """With data of std 0.5 the TrigFlow of the student has data of std 1."""
    m = rcm.RCM(rcm.Config(), tiny_denoiser(EDM(), "eps"))
    assert m.trig.sigma_data == 1 and m.trig.data_std == 1
    m = rcm.RCM(rcm.Config(), mixture([(0.0,)], 0.5, EDM()))
    assert m.trig.data(torch.ones(1)).item() == 1
    m = rcm.RCM(rcm.Config(data_std=0.5), gaussian((0.0,), 0.5))
    assert m.trig.data(torch.ones(1)).item() == 2
    assert m.trig.own(at(1.0))[0].item() == pytest.approx(0.5 * math.tan(1.0))


def test_sampler_is_the_papers():
    teacher = gaussian((0.0,), 1.0)
    times = rcm.RCM(rcm.Config(student_steps=4), teacher).sampler().times
    assert [round(math.atan(t), 6) for t in times[1:]] == [1.3, 1.0, 0.6]


@pytest.mark.parametrize("options", [{"rollout": 0}, {"ttur": 0}, {"dmd": -1.0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="1 or more, 1 or more, and 0 or more"):
        rcm.Config(**options).validate()
    assert rcm.RCM.needs(rcm.Config()).images
