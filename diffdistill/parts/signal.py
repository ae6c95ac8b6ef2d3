"""Signals of a teacher's ODE: what is left of its path when the start noise is taken away.

Gu et al., "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping", arXiv
2306.05544. On the path that starts at the noise eps, with rho = sigma / alpha:

    Y_t = (z_t - sigma_t eps) / alpha_t,   dY / d log rho = -(D(z_t, t) - Y),   Y = x0 at rho = 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.parts.rollout import start_noise
from diffdistill.schedules import Schedule, add_noise, bcast, times

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
Solver = Literal["ddim", "euler", "heun"]


@dataclass(frozen=True)
class Levels:
    """Levels 0, 1, ... of a student's signals, from clean data to noise.

    The teacher's times begin at level `step`. Below, rho falls evenly to 0 at level 0: one step
    down from any time of the teacher ends at a level, and the lowest time leads to clean data.

    Attributes:
        times: of levels step, step + 1, ...; float64, ascending.
        ratios: rho of all levels.
        step: levels that one bootstrapping step goes down.
    """

    times: Tensor
    ratios: Tensor
    step: int

    def __len__(self) -> int:
        return len(self.ratios)

    def time(self, level: Tensor) -> Tensor:
        """The teacher's time at each level, float64; NaN below `step`."""
        time = self.times.to(level.device)[(level - self.step).clamp(min=0)]
        return time.masked_fill(level < self.step, torch.nan)

    def ratio(self, level: Tensor) -> Tensor:
        return self.ratios.to(level.device)[level]

    def draw(self, count: int, device: torch.device | str) -> Tensor:
        """Uniform levels at which the teacher can be asked: int64 [count]."""
        return torch.randint(self.step, len(self), (count,), device=device)


def signal_levels(schedule: Schedule, delta: float, low: float, high: float) -> Levels:
    """The levels of a range of the schedule's grid.

    Args:
        delta: length of a step, as a share of all levels.
        low, high: the range of the grid's index, as shares.

    Raises:
        ValueError: the range ends where there is no signal.
    """
    grid = schedule.grid()
    n = len(grid)
    found = grid[min(round(low * n), n - 1) : min(round(high * n), n - 1) + 1]
    ratios = schedule.sigma(found) / schedule.alpha(found)
    if not ratios[-1] < 1e4:
        raise ValueError(
            f"at time {found[-1]:g} of this teacher there is noise only, so no step can start "
            f"there. method.t_high={high} must be lower, such as 0.98"
        )
    step = max(1, round(delta * (len(found) - 1) / (1 - delta)))
    below = torch.arange(step, dtype=torch.float64) / step * ratios[0]
    return Levels(found, torch.cat([below, ratios]), step)


def signal_step(
    solver: Solver,
    denoise: Denoise,
    schedule: Schedule,
    y: Tensor,
    eps: Tensor,
    t: Tensor,
    ratios: tuple[Tensor, Tensor],
    s: Tensor,
    cond: Cond,
) -> Tensor:
    """The signal one step down from y at time t, in float32.

    ddim:  D + (rho_s / rho_t) (y - D)
    euler: y + log(rho_t / rho_s) (D - y)
    heun:  the same with the mean slope of both ends; one call more

    Args:
        eps: the start noise of the path, from which the teacher's input is rebuilt.
        ratios: rho at t and at the end of the step, float64 [B].
        s: time of the end; rows with NaN, where the teacher cannot be asked, take ddim's step,
            which is the only one that can end at rho = 0.
    """
    before, after = ratios

    def slope(signal: Tensor, time: Tensor) -> Tensor:
        return denoise(add_noise(schedule, signal, eps, time), time, cond).float() - signal

    first = slope(y, t)
    by_ddim = y + bcast(1 - after / before, y) * first
    if solver == "ddim":
        return by_ddim
    inside = ~s.isnan()
    length = bcast(torch.where(inside, (before / after).log(), 0.0), y)
    step = length * first
    if solver == "heun":
        step = (step + length * slope(y + step, torch.where(inside, s, t))) / 2
    return torch.where(bcast(inside, y) > 0, y + step, by_ddim)


def grid_time(schedule: Schedule, index: Tensor) -> Tensor:
    """Time at a fractional index of the schedule's grid, linear between two; float64 [B]."""
    grid = schedule.grid().to(index.device)
    low = index.floor().long()
    return torch.lerp(grid[low], grid[(low + 1).clamp(max=len(grid) - 1)], index - low)


def told(denoiser: Denoiser, eps: Tensor, at: float, time: Tensor, cond: Cond) -> Tensor:
    """What a network says to pure noise if it is told another time: a clean estimate.

    Everything else (scale of its input and output) is that of time `at`, so that with time = at
    this is denoiser(start noise, at), the first call of a student's sampler.

    Args:
        time: that the network is told, float64 [B].
    """
    schedule = denoiser.schedule
    z, now = start_noise(schedule, eps, at), times(at, eps)
    if denoiser.sigma_data is not None:  # EDM: D = c_skip z + c_out F(c_in z)
        (skip, out, scale), (skip_at, out_at, scale_at) = (
            tuple(bcast(c, z) for c in _preconditioning(denoiser, when)) for when in (time, now)
        )
        z_told = scale_at / scale * z
        inner = (denoiser(z_told, time, cond) - skip * z_told) / out
        return skip_at * z + out_at * inner
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    low, high = denoiser.to_x0(zero, z, time), denoiser.to_x0(one, z, time)
    return denoiser.to_x0((denoiser(z, time, cond) - low) / (high - low), z, now)


def _preconditioning(denoiser: Denoiser, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of EDM (arXiv 2206.00364, Tab. 1), float64 [B]."""
    sigma, data = denoiser.schedule.sigma(t), denoiser.sigma_data or 1.0
    total = sigma.square() + data**2
    return data**2 / total, sigma * data * total.rsqrt(), total.rsqrt()
