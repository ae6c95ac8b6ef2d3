"""States of a teacher's ODE on its way from noise to data, as inputs of a student.

Tang et al., "Image-Free Timestep Distillation via Continuous-Time Consistency with
Trajectory-Sampled Pairs", arXiv 2511.20410, and its code; in TrigFlow (`parts.trig`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.parts.trig import Denoise, Trig
from diffdistill.schedules import bcast, shifted


class Trajectory(NamedTuple):
    """One ODE path per sample.

    Attributes:
        x, velocity: at each time, [K, B, ...].
        t: falling, float64 [K, B].
        end: at time 0, [B, ...].
    """

    x: Tensor
    velocity: Tensor
    t: Tensor
    end: Tensor


def route(steps: int, shift: float = 2.5) -> Tensor:
    """TrigFlow times from pi / 2 down, float64 [steps]: evenly spaced flow times, shifted twice.

    As the schedule of SANA's flow solver sets them: the ends of its shifted grid of 1000 levels,
    evenly spaced, and shifted again.
    """
    ends = shifted(torch.tensor([1.0, 1e-3], dtype=torch.float64), shift)
    flow = shifted(torch.linspace(*ends.tolist(), steps, dtype=torch.float64), shift)
    return torch.atan2(flow, 1 - flow)


def stratified(route: Tensor, like: Tensor, low: float, high: float) -> Tensor:
    """T_0 = t_0 and T_i ~ U(t_i, t_{i-1}) for each sample, inside [low, high]; float64 [K, B]."""
    edges = route.to(like.device).clamp(low, high)[:, None].expand(-1, len(like))
    share = torch.rand(len(route) - 1, len(like), dtype=torch.float64, device=like.device)
    return torch.cat([edges[:1], torch.lerp(edges[1:], edges[:-1], share)])


@torch.no_grad()
def trajectory(trig: Trig, denoise: Denoise, eps: Tensor, cond: Cond, times: Tensor) -> Trajectory:
    """DDIM from sigma_d eps at times[0] to 0.

    x_{i+1} = cos(dt) x_i - sin(dt) V_i,  V_i = dx/dt at (x_i, T_i)

    Args:
        times: falling, float64 [K, B].
    """
    x, states, velocities = trig.sigma_data * eps, [], []
    for t, s in pairwise([*times, torch.zeros_like(times[0])]):
        velocity = trig.velocity(denoise, x, t, cond)
        states.append(x)
        velocities.append(velocity)
        x = bcast((t - s).cos(), x) * x - bcast((t - s).sin(), x) * velocity
    return Trajectory(torch.stack(states), torch.stack(velocities), times, x)


def acceptable(end: Tensor, black: Sequence[float]) -> Tensor:
    """1.0 for paths to keep, else 0.0, [B]: kept with probability mean (end - black)^2, at most 1.

    Args:
        end: the teacher's samples, in units of a unit std.
        black: of a failed (black) sample, one value per channel, in the same units.
    """
    reference = torch.tensor(black, dtype=end.dtype, device=end.device)
    reference = reference.view(-1, *[1] * (end.ndim - 2))
    distance = (end - reference).square().flatten(1).mean(1)
    return (torch.rand(len(end), device=end.device) < distance).to(end.dtype)


def calm(step: int, start: int | None, length: int, end: float, r: float) -> float:
    """r, moved linearly to `end` in `length` steps from `start` on; None: r."""
    if start is None:
        return r
    share = min(1.0, max(0.0, (step - start) / length))
    return math.fsum((r * (1 - share), end * share))
