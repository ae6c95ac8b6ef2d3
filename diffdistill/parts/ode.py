"""Solvers for the teacher's probability-flow ODE in x0 form, and the stochastic one of EDM."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, eps_of
from diffdistill.parts.rollout import start_noise
from diffdistill.schedules import Schedule, add_noise, bcast, karras, student_times, times

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]


def ddim_step(schedule: Schedule, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z_s = alpha_s x0 + sigma_s eps(x0, z_t) (Song et al., arXiv 2010.02502). t, s: [B]."""
    return add_noise(schedule, x0, eps_of(schedule, x0, z, t), s)


@torch.no_grad()
def ddim(denoise: Denoise, schedule: Schedule, eps: Tensor, cond: Cond, steps: int) -> Tensor:
    """Teacher sample from unit noise `eps` in `steps` passes at evenly spaced grid times."""
    grid = student_times(schedule, steps)
    z = start_noise(schedule, eps, grid[0])
    for t, s in zip(grid, (*grid[1:], None), strict=True):
        x0 = denoise(z, times(t, z), cond)
        if s is not None:
            z = ddim_step(schedule, x0, z, times(t, z), times(s, z))
    return x0


@dataclass(frozen=True)
class Churn:
    """Noise that a stochastic sampler adds before each step (arXiv 2206.00364, Alg. 2).

    Attributes:
        amount: S_churn; divided by the steps, at most sqrt(2) - 1 is added to a step's ratio r.
        low, high: S_tmin and S_tmax, the ratios at which noise is added.
        scale: S_noise, of the added noise.
        draw: unit noise like its argument.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0
    draw: Callable[[Tensor], Tensor] = torch.randn_like

    def __call__(self, y: Tensor, ratio: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The noisier state and its ratio."""
        if not 0.999 * self.low <= ratio <= 1.001 * self.high:
            return y, ratio
        higher = ratio * (1 + min(self.amount / steps, math.sqrt(2) - 1))
        added = (higher.square() - ratio.square()).sqrt().item() * self.scale
        return y + added * self.draw(y), higher


@torch.no_grad()
def heun(
    denoise: Denoise,
    schedule: Schedule,
    eps: Tensor,
    cond: Cond,
    steps: int,
    t_max: float = 80.0,
    churn: Churn | None = None,
) -> Tensor:
    """Second-order sampling on Karras sigmas (arXiv 2206.00364, Alg. 1): 2 steps - 1 passes.

    Any schedule: the ODE is solved in z / alpha, where it reads dy/dr = eps with r = sigma/alpha.
    With `churn` it is no map of `eps` any more (Alg. 2).
    """
    low, high = (
        float(schedule.sigma(t) / schedule.alpha(t))
        for t in torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    )
    ratios = karras(steps, max(low, 0.002), min(high, t_max))
    y = eps * ratios[0].item()
    for r, q in zip(ratios, [*ratios[1:], None], strict=True):
        if churn is not None and churn.amount > 0:
            y, r = churn(y, r, steps)
        slope, x0 = _slope(denoise, schedule, y, r, cond)
        if q is None:
            return x0
        trial = y + (q - r).to(y.dtype) * slope
        second, _ = _slope(denoise, schedule, trial, q, cond)
        y = y + (q - r).to(y.dtype) * (slope + second) / 2
    return y


def _slope(
    denoise: Denoise, schedule: Schedule, y: Tensor, ratio: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    t = schedule.t_of_ratio(ratio.expand(len(y)).to(y.device))
    z = bcast(schedule.alpha(t), y) * y
    x0 = denoise(z, t, cond)
    return (y - x0) / ratio.to(y.dtype), x0
