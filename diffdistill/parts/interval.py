"""Score matching and noising inside an interval of noise levels (Phased DMD).

Fan et al., "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within
Subintervals", arXiv 2510.27684. From level s to t > s:

    z_t = a x_s + b eps,   a = alpha_t / alpha_s,   b^2 = sigma_t^2 - a^2 sigma_s^2

s = None stands for clean data, where all of this is the ordinary forward process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser, Prediction
from diffdistill.schedules import Schedule, bcast


def kernel(schedule: Schedule, t: Tensor, s: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """(a, b) of p(z_t | x_s), float64, shape of t; s may have one value per sample."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if s is None:
        return alpha, sigma
    alpha_s, sigma_s = _at(schedule, s, t)
    a = alpha / alpha_s
    return a, (sigma.square() - (a * sigma_s).square()).clamp_min(1e-8).sqrt()


def noise_from(
    schedule: Schedule, x_s: Tensor, eps: Tensor, t: Tensor, s: float | Tensor | None
) -> Tensor:
    """z_t = a x_s + b eps."""
    a, b = kernel(schedule, t, s)
    return bcast(a, x_s) * x_s + bcast(b, x_s) * eps


def sub_interval_target(
    schedule: Schedule, x_s: Tensor, eps: Tensor, t: Tensor, s: float | None, prediction: Prediction
) -> Tensor:
    """What a network should predict at noise_from(x_s, eps), on average (Eq. 12).

    Its mean given z_t is that of ordinary training on clean data, since -eps / b is the score of
    p(z_t | x_s). So x0 = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps, and
    eps' = sigma_t / b eps; the others follow.
    """
    alpha, sigma = (bcast(v, x_s) for v in (schedule.alpha(t), schedule.sigma(t)))
    if s is None:
        x0, noise = x_s, eps
    else:
        alpha_s, sigma_s = _at(schedule, s, t)
        _, b = kernel(schedule, t, s)
        x0 = x_s / alpha_s.to(x_s) - bcast(
            schedule.alpha(t) * sigma_s.square() / (alpha_s.square() * b), x_s
        ) * eps  # fmt: skip
        noise = bcast(schedule.sigma(t) / b, x_s) * eps
    if prediction == "x0":
        return x0
    if prediction == "eps":
        return noise
    return noise - x0 if prediction == "flow" else alpha * noise - sigma * x0


def interval_weight(schedule: Schedule, t: Tensor, s: float | None, clamp: float) -> Tensor:
    """min(1, clamp b^2): the targets' variance grows like 1 / b^2 towards s (Eq. 13). float64.

    b is that of flow units, alpha + sigma = 1 (there this is the paper's). clamp 0: no weight.
    """
    _, b = kernel(schedule, t, s)
    if s is None or clamp == 0:
        return torch.ones_like(b)
    flow = b / (schedule.alpha(t) + schedule.sigma(t))
    return (clamp * flow.square()).clamp(max=1)


def interval_dsm(
    denoiser: Denoiser,
    x_s: Tensor,
    eps: Tensor,
    t: Tensor,
    s: float | None,
    cond: Cond,
    clamp: float = 10.0,
) -> Tensor:
    """Score matching from samples x_s at level s, with the weight that trained the network.

    mean min(1, clamp b^2) |out - target|^2 in the network's own prediction; x_s is detached.
    """
    schedule, x_s = denoiser.schedule, x_s.detach()
    z = noise_from(schedule, x_s, eps, t, s)
    target = sub_interval_target(schedule, x_s, eps, t, s, "x0")
    weight = denoiser.loss_weight(t) * interval_weight(schedule, t, s, clamp)
    return (bcast(weight, x_s) * (denoiser(z, t, cond) - target).square()).mean()


@torch.no_grad()
def kl_direction(
    schedule: Schedule, t: Tensor, s: float | None, x0_teacher: Tensor, x0_fake: Tensor
) -> Tensor:
    """d KL(fake_t || teacher_t) / d x_s per sample: a (score_fake - score_teacher) (Eq. 11)."""
    a, _ = kernel(schedule, t, s)
    weight = a * schedule.alpha(t) / schedule.sigma(t).square()
    return bcast(weight, x0_fake) * (x0_fake - x0_teacher)


def interval_times(
    schedule: Schedule,
    like: Tensor,
    s: float | None,
    low: float = 0.0,
    high: float = 1.0,
    margin: float = 0.0,
) -> Tensor:
    """Times drawn uniformly from the grid, above s: float64 [B].

    low, high: range of the grid's index, as shares. margin: share of the grid left out above s.
    """
    grid = schedule.grid().to(like.device)
    n = len(grid)
    first, last = round(low * n), min(round(high * n), n - 1)
    if s is not None:
        beyond = int(torch.searchsorted(grid, torch.tensor(s, device=grid.device), right=True))
        first = max(first, beyond + round(margin * n))
    if first > last:
        raise ValueError(
            f"no noise levels are left above time {s}. Lower method.margin or raise method.t_high."
        )
    return grid[torch.randint(first, last + 1, (len(like),), device=like.device)]


def _at(schedule: Schedule, s: float | Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    level = torch.as_tensor(s, dtype=torch.float64, device=t.device)
    return schedule.alpha(level), schedule.sigma(level)
