"""Rectified flow on pairs of noise and data, in the schedule of any denoiser.

Liu, Gong and Liu, "Flow Straight and Fast", arXiv 2209.03003, with time from data to noise:

    z_t = (1 - t) x + t eps,   v(z, t) = E[eps - x | z_t] = (z - D(z, t)) / t

A schedule's own state with sigma / alpha = t / (1 - t) is z_t up to its scale, so a denoiser of any
schedule is a flow, and |v - (eps - x)|^2 = |D - x|^2 / t^2.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffdistill.method import Sampler
from diffdistill.parts.flow_map import flow_time
from diffdistill.parts.rollout import start_noise
from diffdistill.schedules import Schedule, add_noise, bcast, student_times

Anneal = Literal["linear", "cosine", "exponential", "constant", "none"]


def randomness(kind: Anneal, step: int, length: int, level: float = 1.0) -> float:
    """beta: the share of fresh noise in a pair (SlimFlow, arXiv 2407.12718, and its code).

    linear and cosine fall from 1 to 0 in `length` steps, exponential is exp(-step / length) and
    never 0, constant is `level`, none is 0.
    """
    share = min(1.0, step / length)
    return {
        "linear": 1 - share,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * share),
        "exponential": math.exp(-step / length),
        "constant": level,
        "none": 0.0,
    }[kind]


def perturbed(eps: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) eps + beta xi with fresh xi: unit variance at any beta."""
    if beta == 0:
        return eps
    return math.sqrt(1 - beta**2) * eps + beta * torch.randn_like(eps)


def mirrored(x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair, with probability 1/2, with both of its images flipped along the width."""
    turn = bcast(torch.rand(len(x), device=x.device) < 0.5, x) > 0
    return torch.where(turn, x.flip(-1), x), torch.where(turn, eps.flip(-1), eps)


def flow_times(
    schedule: Schedule, like: Tensor, low: float = 0.0, high: float = 1.0
) -> tuple[Tensor, Tensor]:
    """t ~ U(low, high) inside the schedule's range, and the schedule's own times; float64 [B]."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    lowest, highest = flow_time(schedule, 1.0, ends).tolist()
    low, high = max(low, lowest), min(high, highest)
    t = low + (high - low) * torch.rand(len(like), dtype=torch.float64, device=like.device)
    return t, own_times(schedule, t)


def own_times(schedule: Schedule, t: Tensor) -> Tensor:
    """The schedule's times of flow times below 1, float64."""
    return schedule.t_of_ratio(t / (1 - t))


def euler(schedule: Schedule, steps: int) -> Sampler:
    """Euler on an even grid of flow times, from the schedule's noisy end."""
    later = torch.arange(steps - 1, 0, -1, dtype=torch.float64) / steps
    return Sampler((*student_times(schedule, 1), *own_times(schedule, later).tolist()), "ode")


def on_path(
    schedule: Schedule, sampler: Sampler, x: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States of pairs at a random one of the sampler's times, these times, and their flow times.

    At the first time the state is the start noise alone, as when sampling: flow time 1.
    """
    index = torch.randint(len(sampler.times), (len(x),), device=x.device)
    own = torch.tensor(sampler.times, dtype=torch.float64, device=x.device)[index]
    first = bcast(index == 0, x) > 0
    start = start_noise(schedule, eps, sampler.times[0])
    z = torch.where(first, start, add_noise(schedule, x, eps, own))
    return z, own, torch.where(index == 0, 1.0, flow_time(schedule, 1.0, own))
