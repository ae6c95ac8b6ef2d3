"""Score matching and distribution matching, shared by every score-distillation method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.schedules import Schedule, add_noise, bcast

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]


def dsm(
    denoiser: Denoiser,
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    max_weight: float = math.inf,
) -> Tensor:
    """Denoising score matching with the weight that trained the network (DMD, Sec. 3.2).

    mean over batch and elements of w(t) |D(alpha x + sigma eps, t) - x|^2; x is detached. For eps
    networks w is the SNR, and `max_weight` is the gamma of min-SNR weighting (arXiv 2303.09556).
    """
    x = x.detach()
    z = add_noise(denoiser.schedule, x, eps, t)
    weight = bcast(denoiser.loss_weight(t).clamp(max=max_weight), x)
    return (weight * (denoiser(z, t, cond) - x).square()).mean()


@torch.no_grad()
def matching_direction(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """v = (x0_fake - x0_teacher) / mean |x - x0_teacher|, the mean per sample; descend along v.

    DMD, Eq. 7 and 8. Eq. 8 has one more factor alpha_t than all released code; we follow the code.
    """
    dims = tuple(range(1, x.ndim))
    scale = (x - x0_teacher).abs().mean(dims, keepdim=True).clamp_min(1e-6)
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
