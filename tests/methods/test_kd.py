"""Known-answer tests of ODE-pair regression and of the pair solvers."""

import pytest
import torch

from diffdistill.parts.ode import ddim, heun
from diffdistill.schedules import DDPM, EDM
from diffdistill.testing import gaussian, run_method, student_samples

SMALL = EDM(t_max=5.0)
SD = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))


def pairs_of_a_gaussian(n=2048, mean=0.7, std=0.3):
    eps = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    return eps, mean + std * eps


def test_loss_is_zero_and_flat_at_the_exact_map():
    """Student s^2 sigma / (s^2 + sigma^2) eps + m equals 0.7 + 0.3 eps for the right (m, s)."""
    target, sigma = 0.3, 5.0
    s2 = target * sigma**2 / (sigma - target)
    engine = run_method(
        "kd", gaussian((0.0,), 1.0, SMALL), steps=1, pairs=pairs_of_a_gaussian(), train=False
    )
    net = engine.method.student.net
    with torch.no_grad():  # D(sigma eps) = m + s2 / (s2 + sigma^2) (sigma eps - m)
        gain = s2 / (s2 + sigma**2)
        net.std.fill_(s2**0.5)
        net.mean.fill_(0.7 / (1 - gain))
    loss = engine.method.loss(engine._micro_batches(0)[0])["regression"]
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert loss.item() < 1e-10
    assert all(g.abs().max() < 1e-5 for g in grads)


def test_learns_the_pairs_and_wrong_pairing_does_not():
    eps, x = pairs_of_a_gaussian()
    right = run_method("kd", gaussian((0.0,), 1.0, SMALL), steps=400, pairs=(eps, x))
    samples = student_samples(right, 20_000)
    assert samples.mean().item() == pytest.approx(0.7, abs=0.03)
    assert samples.std().item() == pytest.approx(0.3, abs=0.03)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    wrong = run_method("kd", gaussian((0.0,), 1.0, SMALL), steps=400, pairs=(eps, shuffled))
    assert student_samples(wrong, 20_000).std().item() < 0.15  # regresses to the mean


@pytest.mark.parametrize("schedule", [EDM(), SD])
@pytest.mark.parametrize(("solver", "steps", "tol"), [(heun, 40, 0.01), (ddim, 200, 0.03)])
def test_solvers_map_noise_to_data(solver, steps, tol, schedule):
    """Exact trajectories of N(m, s^2) are x = m + s eps (up to the finite start)."""
    teacher = gaussian((0.7,), 0.3, schedule)
    eps = torch.linspace(-2, 2, 9)[:, None]
    x = solver(teacher, schedule, eps, {}, steps)
    start = schedule.alpha(torch.tensor(schedule.t_max)).item() if schedule is SD else 0
    assert (x - (0.7 + 0.3 * eps)).abs().max() < tol + 0.3 * start


def test_heun_is_second_order():
    teacher, eps = gaussian((0.0,), 0.5), torch.ones(1, 1)
    errors = [abs(heun(teacher, EDM(), eps, {}, n).item() - 0.5) for n in (20, 40)]
    assert errors[0] / errors[1] > 2.5
