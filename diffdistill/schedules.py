"""Noise schedules: z = alpha(t) x0 + sigma(t) eps, with t = t_max pure noise.

Times are float64 tensors until they enter a network. Every schedule answers the same four
questions: alpha, sigma, the time of a noise-to-signal ratio, and the scale of its starting noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """What methods may ask of a schedule. Times are float64 [B] (or scalar) tensors."""

    t_min: float
    t_max: float

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def t_of_ratio(self, ratio: Tensor) -> Tensor: ...
    def start_scale(self, t: float) -> float: ...
    def grid(self) -> Tensor: ...


@dataclass(frozen=True)
class EDM:
    """Variance exploding, t = sigma (Karras et al., arXiv 2206.00364).

    `grid` holds `levels` Karras sigmas in ascending order (rho 7).
    """

    t_min: float = 0.002
    t_max: float = 80.0
    levels: int = 1000
    rho: float = 7.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double()

    def start_scale(self, t: float) -> float:
        return float(t)

    def grid(self) -> Tensor:
        return karras(self.levels, self.t_min, self.t_max, self.rho).flip(0)


class DDPM:
    """Discrete variance-preserving schedule with integer times 0 .. T-1.

    Fractional times interpolate log(sigma / alpha) between neighbours of the table.
    """

    def __init__(self, alphas_cumprod: Tensor):
        bar = alphas_cumprod.double().cpu()
        self._log_ratio = 0.5 * (torch.log1p(-bar) - bar.log())
        self.t_min, self.t_max = 0.0, float(len(bar) - 1)

    def _ratio(self, t: Tensor) -> Tensor:
        table = self._log_ratio.to(t.device)
        t = t.double().clamp(self.t_min, self.t_max)
        low = t.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], t - low).exp()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.rsqrt(1 + self._ratio(t).square())

    def sigma(self, t: Tensor) -> Tensor:
        ratio = self._ratio(t)
        return ratio * torch.rsqrt(1 + ratio.square())

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        table = self._log_ratio.to(ratio.device)
        log_ratio = ratio.double().log().clamp(table[0], table[-1])
        high = torch.searchsorted(table, log_ratio).clamp(1, len(table) - 1)
        low = high - 1
        return low + (log_ratio - table[low]) / (table[high] - table[low])

    def start_scale(self, t: float) -> float:
        return 1.0

    def grid(self) -> Tensor:
        return torch.arange(len(self._log_ratio), dtype=torch.float64)


@dataclass(frozen=True)
class RectifiedFlow:
    """z = (1 - t) x0 + t eps, t in [0, 1]. `shift` moves sampled times towards noise (SD3)."""

    shift: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0
    levels: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        ratio = ratio.double()
        return torch.where(ratio.isinf(), torch.ones_like(ratio), ratio / (1 + ratio))

    def start_scale(self, t: float) -> float:
        return 1.0

    def grid(self) -> Tensor:
        u = torch.arange(1, self.levels + 1, dtype=torch.float64) / self.levels
        return shifted(u, self.shift).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class TrigFlow:
    """z = cos t x0 + sin t eps, t in [0, pi/2] (Lu and Song, arXiv 2410.11081)."""

    t_min: float = 1e-3  # at 0 the weight of a velocity network is infinite
    t_max: float = 1.5707963267948966
    levels: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        return t.double().cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double().sin()

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double().atan()

    def start_scale(self, t: float) -> float:
        return 1.0

    def grid(self) -> Tensor:
        return torch.linspace(self.t_min, self.t_max, self.levels, dtype=torch.float64)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Time shift s u / (1 + (s - 1) u) of flow models (Esser et al., arXiv 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def karras(steps: int, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Karras sigmas, descending, float64 [steps] (arXiv 2206.00364, Eq. 5)."""
    if steps == 1:
        return torch.tensor([t_max], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (t_max ** (1 / rho) + ramp * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho


def student_times(schedule: Schedule, steps: int, first: float | None = None) -> tuple[float, ...]:
    """The times at which a K-step student is called: the grid from its noisy end, every T/K.

    DDPM with T = 1000 gives 999, 749, 499, 249 for four steps (DMD2); EDM the same indices of
    the Karras grid. `first` replaces the noisy end: DDPM from 599 gives 599, 449, 299, 149.
    """
    grid = schedule.grid()
    if first is None:
        top = len(grid)
    elif schedule.t_min < first <= schedule.t_max:
        top = int(torch.searchsorted(grid, first)) + 1
    else:
        raise ValueError(
            f"a student cannot start at time {first}. Allowed: above {schedule.t_min}, up to "
            f"{schedule.t_max}"
        )
    times = tuple(float(grid[top * (steps - i) // steps - 1]) for i in range(steps))
    return times if first is None else (float(first), *times[1:])


def grid_index(schedule: Schedule, t: Tensor) -> Tensor:
    """Position of each time in the schedule's grid: int64, shape of t."""
    return torch.searchsorted(schedule.grid().to(t.device), t)


def bcast(values: Tensor, like: Tensor) -> Tensor:
    """[B] or scalar -> [B, 1, 1, ...] in the dtype of `like`."""
    values = values.to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def add_noise(schedule: Schedule, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z = alpha(t) x + sigma(t) eps. x, eps [B, ...]; t [B] or scalar."""
    return bcast(schedule.alpha(t), x) * x + bcast(schedule.sigma(t), x) * eps


def times(value: float, like: Tensor) -> Tensor:
    """A float64 time tensor [B] on the device of `like`, filled with one value."""
    return torch.full((len(like),), value, dtype=torch.float64, device=like.device)
