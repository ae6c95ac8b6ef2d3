"""Known-answer tests of SANA-Sprint; the consistency half is tested with sCM."""

import math

import pytest
import torch
from torch import nn

from diffdistill.engine import OptimConfig
from diffdistill.method import Batch
from diffdistill.methods import sana_sprint
from diffdistill.parts.ladd import LocalBatchNorm, TokenHead, mismatched, token_heads
from diffdistill.parts.pixel_gan import hinge_critic, hinge_generator
from diffdistill.parts.trig import mix
from diffdistill.schedules import EDM, RectifiedFlow
from diffdistill.testing import mixture, run_method, student_samples, tiny_denoiser


def make(steps=3, **options):
    torch.manual_seed(0)  # of the network
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 3
    return run_method(
        "sana_sprint", tiny_denoiser(EDM(), "eps"), steps=steps, batch_size=8, x=x, train=False,
        lr=1e-3, cond={"label": lambda i: labels[i]}, **options,
    )  # fmt: skip


class Fixed(nn.Module):
    """A discriminator that says what it is told."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, features):
        return features[0].flatten(1) * 0 + self.value


# ---- the adversarial half ---------------------------------------------------------------


def test_10_an_undecided_discriminator():
    engine = make()
    m, batch = engine.method, engine._micro_batches(0)[0]
    m._roles["discriminator"] = Fixed(0.0)
    assert m.critic_loss(batch)["gan"].item() == 1
    assert m.student_loss(batch)["gan"].item() == 0
    m._roles["discriminator"] = Fixed(0.25)
    assert m.critic_loss(batch)["gan"].item() == pytest.approx((0.75 + 1.25) / 2)
    assert m.student_loss(batch)["gan"].item() == pytest.approx(-0.5 * 0.25)
    logits = torch.tensor([[2.0, -0.5]])
    assert hinge_critic(logits, logits).item() / 2 == pytest.approx((0.75 + 1.75) / 2)
    assert hinge_generator(logits).item() == -0.75


def test_10_the_students_gradient_passes_the_teacher_and_stays_out_of_it():
    engine = make()
    m, batch = engine.method, engine._micro_batches(0)[0]
    engine._unfreeze_only(("student", "log_weight"))
    m.student_loss(batch)["gan"].backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    assert all(p.grad is None for p in m.discriminator.parameters())
    assert m.student.net.out.weight.grad.abs().max() > 0
    engine._unfreeze_only(("discriminator",))
    m.student.zero_grad(set_to_none=True)
    m.critic_loss(batch)["gan"].backward()
    assert all(p.grad is None for p in (*m.teacher.parameters(), *m.student.parameters()))
    assert m.discriminator.heads[0].last.parametrizations.weight.original.grad.abs().max() > 0


def test_wrong_sign_of_the_students_hinge_is_seen():
    """Descending must raise the logit: here T(x) is the mean of the feature itself."""
    engine = make()
    m, batch = engine.method, engine._micro_batches(0)[0]
    x0 = batch.x.clone().requires_grad_()
    m.features = lambda x, cond: [x]
    m.generate = lambda x0, cond: x0
    m._roles["discriminator"] = lambda features: features[0].flatten(1)
    m.consistency.from_teacher = lambda s, g, x0, *a: (0 * x0, torch.zeros(8))
    loss = m.student_loss(Batch(8, (1, 8, 8), batch.cond, x=x0))["gan"]
    (slope,) = torch.autograd.grad(loss, x0)
    assert (slope < 0).all(), "wrong sign: fakes would learn to look fake"


def test_the_heads_as_the_paper_has_them():
    torch.manual_seed(0)
    head = TokenHead(6)
    x = torch.randn(16, 6, 4, 4)
    logits = head(x)
    assert logits.shape == (16, 16)
    moved = head(x.flatten(2).roll(3, 2))  # circular: a shift of the tokens shifts the logits
    torch.testing.assert_close(moved, logits.roll(3, 1), rtol=1e-4, atol=1e-5)
    norm = LocalBatchNorm(6, virtual=8)
    y = norm(x.flatten(2))
    groups = y.view(2, 8, 6, 16)
    torch.testing.assert_close(groups.mean((1, 3)), torch.zeros(2, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(groups.std((1, 3)), torch.ones(2, 6), rtol=0, atol=1e-2)
    torch.testing.assert_close(y[:8], norm(x[:8].flatten(2)))  # the other group has no say
    assert norm(x[:11].flatten(2)).mean().abs() < 1e-5  # a rest joins the last group
    weight = head.last.weight.flatten()
    assert weight.norm().item() == pytest.approx(1, abs=1e-3)  # spectral norm


def test_heads_for_several_layers_and_their_refusals():
    teacher = tiny_denoiser(EDM(), "eps")
    heads = token_heads(teacher, ("inp", "mid"))
    z, t = torch.randn(3, 1, 8, 8), torch.ones(3, dtype=torch.float64)
    features = teacher.tap(z, t, teacher.null_cond(z), ("inp", "mid"))[1]
    assert heads(features).shape == (3, 128)
    with pytest.raises(ValueError, match=r"no layers \['blocks.7'\]"):
        token_heads(teacher, ("blocks.7",))
    with pytest.raises(ValueError, match="too small for the discriminator"):
        token_heads(tiny_denoiser(EDM(), "eps", size=2), ())


def test_fakes_and_real_samples_with_anothers_condition():
    x, fakes = torch.arange(3.0)[:, None], -torch.ones(3, 1)
    both, cond = mismatched(x, fakes, {"label": torch.tensor([5, 6, 7])})
    assert both.flatten().tolist() == [-1, -1, -1, 2, 0, 1]
    assert cond["label"].tolist() == [5, 6, 7, 5, 6, 7]
    engine = make(mismatch=False)
    seen = []
    features = engine.method.features
    engine.method.features = lambda x, cond: seen.append(len(x)) or features(x, cond)
    engine.method.critic_loss(engine._micro_batches(0)[0])
    assert seen == [8, 8]


def test_half_of_the_samples_start_from_pure_noise():
    engine = make(max_time=0.5)
    m, times = engine.method, []
    clean = m.trig.clean
    m.trig.clean = lambda d, x, t, cond: times.append(t) or clean(d, x, t, cond)
    x0, cond = torch.randn(4000, 1, 8, 8), {"label": torch.zeros(4000, dtype=torch.long)}
    with torch.no_grad():
        m.generate(x0, cond)
    share = (times[0] == m.trig.high).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.04) and m.trig.high < math.pi / 2
    m.cfg.max_time = 1.0
    assert (m.times(x0) < m.trig.high).any()
    with torch.no_grad():
        m.generate(x0[:8], {"label": cond["label"][:8]})
    assert (times[1] == m.trig.high).all()


def test_the_teacher_is_asked_at_its_own_time_and_scale():
    """cos s x + sin s sigma_d eps in the teacher's units: (1 - tau) x' + tau eps."""
    teacher = tiny_denoiser(RectifiedFlow(), "flow")
    m = sana_sprint.SanaSprint(sana_sprint.Config(), teacher)
    x, eps = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    s = torch.full((4,), 0.9, dtype=torch.float64)
    z = mix(m.trig.data(x), 0.5 * eps, s)
    cond = {"label": torch.zeros(4, dtype=torch.long)}
    found = m.trig.features(teacher, z, s, cond)[0]
    tau = math.sin(0.9) / (math.sin(0.9) + math.cos(0.9))
    want = teacher.features((1 - tau) * x + tau * eps, torch.full_like(s, tau), cond)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


# ---- turns and training -----------------------------------------------------------------


def test_the_two_take_turns_and_each_moves_alone():
    engine = make(steps=4)
    logs = [engine.train_step() for _ in range(4)]
    assert ["student/gan" in log for log in logs] == [True, False, True, False]
    assert ["discriminator/gan" in log for log in logs] == [False, True, False, True]
    assert {n: r.updates for n, r in engine.roles.items()} == {
        "student": 2, "log_weight": 2, "discriminator": 2,
    }  # fmt: skip


def trained(steps, **options):
    """Without features in one dimension, the adversarial half is a constant."""
    teacher = mixture([(0.3,)], 0.7, EDM(t_max=20.0))
    x = 0.3 + 0.7 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(7))

    class Half(sana_sprint.SanaSprint):
        def roles(self):
            return {**super().roles(), "discriminator": lambda teacher: nn.Linear(1, 1)}

        def features(self, x, cond):
            return x

    engine = run_method(
        Half, teacher, steps=steps, batch_size=256, x=x, data_std=0.5, p_mean=-1.0, p_std=1.4,
        tangent_warmup=40, gan=1e-3,
        optim={
            "default": OptimConfig(lr=8e-3, weight_decay=0.0, decay="linear"),
            "discriminator": OptimConfig(lr=1e-3),
        },
        **options,
    )  # fmt: skip
    return student_samples(engine, 20_000)


def test_distils_a_gaussian():
    x = trained(700)
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.3, 0.7), abs=0.06)


def test_wrong_sign_of_the_tangent_runs_away(monkeypatch):
    plain = sana_sprint.consistency.normalised
    monkeypatch.setattr(sana_sprint.consistency, "normalised", lambda g, *a: -plain(g, *a))
    x = trained(150)
    assert abs(x.mean().item() - 0.3) + abs(x.std().item() - 0.7) > 0.4


def test_sampler_and_options():
    teacher = tiny_denoiser(RectifiedFlow(), "flow")
    m = sana_sprint.SanaSprint(sana_sprint.Config(student_steps=4), teacher)
    angles = [math.atan2(t, 1 - t) for t in m.sampler().times[1:]]
    assert m.sampler().times[0] == 1 and angles == pytest.approx([1.3, 1.1, 0.6])
    assert m.trig.sigma_data == 0.5 and m.trig.data(torch.ones(1)).item() == 0.5
    assert sana_sprint.SanaSprint.needs(m.cfg).features
    for options in ({"gan": 0.0}, {"max_time": 1.5}):
        with pytest.raises(ValueError, match="above 0"):
            sana_sprint.Config(**options).validate()
