"""A solver's grid of times, and its segments.

Ren et al., "Hyper-SD: Trajectory Segmented Consistency Model", arXiv 2404.13686. Point 0 is the
lowest time of the schedule, points 1 .. N are the solver's. Segment edges lie on grid points, and a
point on an edge belongs to the segment below it, so that there always is a lower point to go to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffdistill.schedules import Schedule, bcast, student_times

End = Literal["random", "edge"]


def solver_grid(schedule: Schedule, steps: int, like: Tensor, last: float | None = None) -> Tensor:
    """Times of the points 0 .. steps, rising, float64; `last` replaces the noisy end."""
    rising = [float(schedule.grid()[0]), *reversed(student_times(schedule, steps, last))]
    return torch.tensor(rising, dtype=torch.float64, device=like.device)


def trailing(points: int, parts: int) -> list[int]:
    """Every points / parts-th point, falling, the last one first; 0 is not among them."""
    return [points - i * points // parts for i in range(parts)]


def edges(points: int, parts: int) -> list[int]:
    """Lower edges of the segments, rising: those above 0 are where a student of `parts` steps is
    called, its first step aside."""
    return [0, *reversed(trailing(points, parts)[1:])]


def end_points(index: Tensor, lower: Sequence[int], kind: End) -> Tensor:
    """A point below each of `index` in its segment, int64.

    random: any one, the lower edge included (TCD, Hyper-SD);  edge: the lower edge (PCM).
    """
    rising = torch.tensor(lower, device=index.device)
    edge = rising[torch.searchsorted(rising, index) - 1]
    if kind == "edge":
        return edge
    return random_points(edge, index - 1)


def random_points(low: Tensor, high: Tensor) -> Tensor:
    """Uniform in {low .. high} for each, int64."""
    share = torch.rand(low.shape, dtype=torch.float64, device=low.device)
    return low + (share * (high - low + 1)).long()


def unit_scale(schedule: Schedule, z: Tensor, t: Tensor) -> Tensor:
    """z in variance-preserving units: z / sqrt(alpha^2 + sigma^2)."""
    return z * bcast((schedule.alpha(t).square() + schedule.sigma(t).square()).rsqrt(), z)
