"""Score matching and distribution matching, shared by every score-distillation method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.parts.groups import group_mean
from diffdistill.schedules import Schedule, add_noise, bcast

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
Times = Literal["uniform", "lognormal"]


def dsm(
    denoiser: Denoiser,
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    min_weight: float = 0.0,
    max_weight: float = math.inf,
    factor: Tensor | None = None,
    predict: Denoise | None = None,
) -> Tensor:
    """Denoising score matching with the weight that trained the network (DMD, Sec. 3.2).

    mean over batch and elements of w(t) |D(alpha x + sigma eps, t) - x|^2; x is detached. For eps
    networks w is the SNR: `max_weight` is the gamma of min-SNR weighting (arXiv 2303.09556), and
    `min_weight` the floor of truncated-SNR weighting (there 1; arXiv 2202.00512, Sec. 4). `factor`
    [B] multiplies w; `predict` is regressed instead of D itself (the guided D, say).
    """
    x = x.detach()
    z = add_noise(denoiser.schedule, x, eps, t)
    weight = bcast(denoiser.loss_weight(t).clamp(min_weight, max_weight), x)
    weight = weight if factor is None else weight * bcast(factor, x)
    return (weight * ((predict or denoiser)(z, t, cond) - x).square()).mean()


@torch.no_grad()
def matching_direction(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, group: int = 1) -> Tensor:
    """v = (x0_fake - x0_teacher) / mean |x - x0_teacher|, the mean per sample; descend along v.

    DMD, Eq. 7 and 8. Eq. 8 has one more factor alpha_t than all released code; we follow the code.
    With `group`, so many rows that follow each other share the mean of theirs (arXiv 2603.28460).
    """
    dims = tuple(range(1, x.ndim))
    scale = (x - x0_teacher).abs().mean(dims, keepdim=True).clamp_min(1e-6)
    if group > 1:
        scale = group_mean(scale, group)
    return (x0_fake - x0_teacher) / scale


def vsd_surrogate(x: Tensor, v: Tensor) -> Tensor:
    """0.5 mean (x - sg[x - v])^2: a loss whose gradient in x is v / numel."""
    return 0.5 * (x - (x - v).detach()).square().mean()


def uniform_times(schedule: Schedule, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Times drawn uniformly from the schedule's grid, by index, in [low, high] of its range.

    float64 [B]. For 1000 levels, low 0.02 and high 0.98 give the indices 20 .. 980 (DMD).
    """
    grid = schedule.grid()
    n = len(grid)
    first, last = round(low * n), min(round(high * n), n - 1)
    index = torch.randint(first, last + 1, (len(like),), device=like.device)
    return grid.to(like.device)[index]


def lognormal_times(schedule: Schedule, like: Tensor, mean: float, std: float) -> Tensor:
    """Times with ln(sigma / alpha) ~ N(mean, std^2), as EDM trains. float64 [B].

    A logit-normal time of a flow, t = sigmoid(N(mean, std^2)), is the same draw.
    """
    normal = torch.randn(len(like), dtype=torch.float64, device=like.device)
    return schedule.t_of_ratio((mean + std * normal).exp())


def draw_times(kind: Times, schedule: Schedule, like: Tensor, *limits: float) -> Tensor:
    """`uniform_times` (limits: low, high) or `lognormal_times` (limits: mean, std)."""
    draw = lognormal_times if kind == "lognormal" else uniform_times
    return draw(schedule, like, *limits)
