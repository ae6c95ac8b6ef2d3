"""Schedules against their formulas, and student times."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffdistill.schedules import (
    DDPM,
    EDM,
    RectifiedFlow,
    TrigFlow,
    add_noise,
    karras,
    shifted,
    student_times,
)  # fmt: skip

BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
SD = DDPM(BAR)


def t64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_alpha_and_sigma_are_the_formulas():
    t = t64(0.3, 0.9)
    for schedule, alpha, sigma in (
        (EDM(), t64(1, 1), t),
        (RectifiedFlow(), t64(0.7, 0.1), t),
        (TrigFlow(), t64(math.cos(0.3), math.cos(0.9)), t64(math.sin(0.3), math.sin(0.9))),
    ):
        torch.testing.assert_close(schedule.alpha(t), alpha)
        torch.testing.assert_close(schedule.sigma(t), sigma)


def test_ddpm_is_the_table_of_stable_diffusion():
    stock = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    bar = stock.alphas_cumprod.double()
    t = torch.arange(1000).double()
    torch.testing.assert_close(SD.alpha(t), bar.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(SD.sigma(t), (1 - bar).sqrt(), rtol=1e-5, atol=1e-6)
    assert SD.alpha(t64(999)).item() == pytest.approx(0.06826, abs=1e-5)
    between = SD.sigma(t64(10.5)) / SD.alpha(t64(10.5))  # log ratio is linear in between
    ends = SD.sigma(t64(10, 11)) / SD.alpha(t64(10, 11))
    assert between.item() == pytest.approx(ends.prod().sqrt().item(), rel=1e-12)


@pytest.mark.parametrize("schedule", [EDM(), SD, RectifiedFlow(), TrigFlow()])
def test_time_of_ratio_is_the_inverse(schedule):
    span = schedule.t_max - schedule.t_min
    t = schedule.t_min + span * t64(0.01, 0.2, 0.5, 0.77, 0.99)
    back = schedule.t_of_ratio(schedule.sigma(t) / schedule.alpha(t))
    assert back.dtype == torch.float64
    torch.testing.assert_close(back, t, rtol=1e-9, atol=1e-9)


def test_rectified_flow_at_pure_noise():
    assert RectifiedFlow().t_of_ratio(t64(math.inf, 1.0)).tolist() == [1.0, 0.5]


def test_start_scale():
    assert EDM().start_scale(80.0) == 80.0
    for schedule in (SD, RectifiedFlow(), TrigFlow()):
        assert schedule.start_scale(schedule.t_max) == 1.0  # not sigma_T


def test_add_noise_broadcasts_per_sample():
    x, eps = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), -1.0)
    z = add_noise(RectifiedFlow(), x, eps, t64(0.25, 0.5))
    assert z.dtype == torch.float32
    assert z[0].unique().tolist() == [2.0] and z[1].unique().tolist() == [1.0]


def test_karras_grid_of_dmd():
    grid = EDM().grid()
    assert len(grid) == 1000 and grid.dtype == torch.float64
    assert (grid.diff() > 0).all()
    for index, sigma in ((0, 0.002), (20, 0.00323), (500, 2.5265), (980, 72.05), (999, 80.0)):
        assert grid[index].item() == pytest.approx(sigma, rel=2e-3), index
    assert grid[500].item() == pytest.approx(2.5265, abs=5e-5)
    assert karras(1).tolist() == [80.0]
    ends = karras(18)
    assert (ends[0].item(), ends[-1].item()) == pytest.approx((80.0, 0.002))


def test_student_times_of_dmd2():
    assert student_times(SD, 1) == (999,)
    assert student_times(SD, 4) == (999, 749, 499, 249)
    assert student_times(SD, 3) == (999, 665, 332)
    grid = EDM().grid()
    assert student_times(EDM(), 4) == tuple(float(grid[i]) for i in (999, 749, 499, 249))
    assert student_times(RectifiedFlow(), 4) == (1.0, 0.75, 0.5, 0.25)  # as stock schedulers step
    shift = student_times(RectifiedFlow(shift=3.0), 2)
    assert shift == (1.0, 0.75)


def test_student_times_from_a_lower_start():
    ddpm = DDPM(torch.linspace(0.999, 0.005, 1000))
    assert student_times(ddpm, 1, 625.0) == (625.0,)
    assert student_times(ddpm, 4, 599.0) == (599.0, 449.0, 299.0, 149.0)
    assert student_times(EDM(), 2, 2.5)[0] == 2.5 > student_times(EDM(), 2, 2.5)[1]
    with pytest.raises(ValueError, match="cannot start at time 1000"):
        student_times(ddpm, 1, 1000.0)


def test_shift_moves_towards_noise():
    u = t64(0.0, 0.5, 1.0)
    assert shifted(u, 3.0).tolist() == [0.0, 0.75, 1.0]
    assert shifted(u, 1.0).tolist() == u.tolist()
