"""Known-answer tests of latent consistency distillation on Gaussian data."""

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.methods import lcm
from diffdistill.parts.ode import ddim
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, bcast, student_times
from diffdistill.testing import gaussian, run_method, student_samples

SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))


def engine_of(schedule, solver_steps=200, **options):
    g = torch.Generator().manual_seed(0)
    x = 0.7 + 0.3 * torch.randn(4096, 1, generator=g)
    return run_method(
        "lcm", gaussian((0.7,), 0.3, schedule), steps=1, batch_size=4096, x=x, train=False,
        solver_steps=solver_steps, **options,
    )  # fmt: skip


def exact(schedule):
    """f*(z, t) = m + s (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2), constant along the ODE."""

    def f(z, t, cond):
        alpha, sigma = bcast(schedule.alpha(t), z), bcast(schedule.sigma(t), z)
        return 0.7 + 0.3 * (z - alpha * 0.7) / (0.09 * alpha**2 + sigma**2).sqrt()

    return f


@pytest.mark.parametrize("schedule", [EDM(), SD])
def test_the_exact_consistency_function_has_no_loss_and_the_teacher_has(schedule):
    engine = engine_of(schedule)
    batch = engine._micro_batches(0)[0]
    torch.manual_seed(0)
    teacher_loss = engine.method.loss(batch)["consistency"].item()
    engine.method.consistency = exact(schedule)
    torch.manual_seed(0)
    loss = engine.method.loss(batch)["consistency"].item()
    assert loss < 2e-5
    assert teacher_loss > 10 * loss


def test_the_target_carries_no_gradient():
    engine = engine_of(EDM())
    seen = []
    original = engine.method.consistency

    def watched(z, t, cond):
        out = original(z, t, cond)
        seen.append(out.requires_grad)
        return out

    engine.method.consistency = watched
    engine._unfreeze_only(("student",))
    engine.method.loss(engine._micro_batches(0)[0])
    assert seen == [False, True]


@pytest.mark.parametrize("schedule", [EDM(), SD, RectifiedFlow()])
def test_boundary_condition(schedule):
    """f is the identity at the lowest time, and D itself at every time of the sampler."""
    engine = engine_of(schedule)
    z = torch.randn(5, 1)
    at = lambda t: torch.full((5,), t, dtype=torch.float64)  # noqa: E731
    torch.testing.assert_close(engine.method.consistency(z, at(float(schedule.grid()[0])), {}), z)
    for t in engine.method.sampler().times:
        f, x0 = engine.method.consistency(z, at(t), {}), engine.method.student(z, at(t), {})
        torch.testing.assert_close(f, x0, atol=1e-4, rtol=0)


def test_the_lowest_target_is_the_boundary_so_a_constant_student_has_loss():
    engine = engine_of(SD, solver_steps=50)
    seen = []
    original = engine.method.consistency
    engine.method.consistency = lambda z, t, cond: (seen.append(t), original(z, t, cond))[1]
    batch = engine._micro_batches(0)[0]
    engine.method.loss(batch)
    assert seen[0].min() == 0 and seen[1].min() == 19
    engine.method.student.net.forward = lambda z, t: torch.full_like(z, 0.7)
    assert engine.method.loss(batch)["consistency"] > 1e-3


def test_sampler_times_are_solver_times():
    assert engine_of(SD, solver_steps=50).method.sampler().times == (999.0, 759.0, 499.0, 259.0)
    with pytest.raises(ValueError, match="solver_steps=2"):
        lcm.Config(student_steps=4, solver_steps=2).validate()


def test_no_time_is_above_the_students_first():
    engine = engine_of(SD, solver_steps=20, conditioning_time=799.0)
    assert engine.method.sampler().times == (799.0, 599.0, 399.0, 199.0)
    seen = []
    f = engine.method.consistency
    engine.method.consistency = lambda z, t, cond: seen.append(t) or f(z, t, cond)
    engine.train_step()
    assert torch.cat(seen).max() == 799 and torch.cat(seen).min() == 0


def test_wrong_unguided_step_when_guidance_is_asked_for():
    """guidance needs an unconditional branch: asking for it without one is an error."""
    engine = engine_of(EDM(), guidance=3.0)
    with pytest.raises(ValueError, match="needs an unconditional branch"):
        engine.method.loss(engine._micro_batches(0)[0])


class TableNet(torch.nn.Module):
    """x0 = gain[t] z + shift[t] on the solver's grid: exact for Gaussian data, and trainable."""

    def __init__(self, schedule, steps, mean, std):
        super().__init__()
        self.register_buffer("grid", torch.tensor(student_times(schedule, steps)).double())
        gain = std**2 / (std**2 + self.grid.square())
        self.gain = torch.nn.Parameter(gain.float())
        self.shift = torch.nn.Parameter(((1 - gain) * mean).float())

    def forward(self, z, t):
        i = (t[:, None] - self.grid).abs().argmin(1)
        return self.gain[i, None] * z + self.shift[i, None]


@pytest.mark.parametrize("wrong", [False, True])
def test_one_step_becomes_the_solvers_sample_and_a_wrong_solver_step_does_not(wrong, monkeypatch):
    """The fixed point is the DDIM map of the grid: one student step = n teacher steps."""
    schedule, n = EDM(t_max=5.0), 8
    teacher = Denoiser(TableNet(schedule, n, 0.7, 0.3), schedule, "x0", shape=(1,))
    x = 0.7 + 0.3 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    want = ddim(teacher, schedule, torch.randn(20_000, 1), {}, n)
    if wrong:  # the point stays where it was: no trajectory is followed
        monkeypatch.setattr(lcm, "ddim_step", lambda schedule, x0, z, t, s: z)
    engine = run_method(
        "lcm", teacher, steps=1200, batch_size=256, x=x, solver_steps=n, student_steps=1, huber=1.0
    )
    out = student_samples(engine, 20_000)
    close = abs(out.std().item() - want.std().item()) < 0.02
    assert close is not wrong
    if not wrong:
        assert out.mean().item() == pytest.approx(want.mean().item(), abs=0.02)
