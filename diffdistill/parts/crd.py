"""Centered reward distillation: implicit rewards, what is left of them in a group, snapshots.

Zhu et al., "Diffusion Reinforcement Learning via Centered Reward Distillation", arXiv 2603.14128.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.parts.groups import group_mean
from diffdistill.schedules import Schedule, bcast

Regression = Literal["mse", "bce"]


def flow_error(schedule: Schedule, t: Tensor, x0: Tensor, target: Tensor) -> Tensor:
    """Error of the velocity eps - x0 of the rectified flow with equal sigma / alpha; float64.

    (alpha + sigma) / sigma (target - x0): at the same z, a velocity is wrong where x0 is.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    target, x0 = target.double(), x0.double()
    return bcast((alpha + sigma) / sigma, x0) * (target - x0)


def implicit_reward(error: Tensor, error_old: Tensor, adaptive: bool = True) -> Tensor:
    """- mean (|error|^2 / w - |error_old|^2 / w_old), an estimate of log p / p_old: [B].

    Both errors at the same noisy samples, else their difference is noise. Gradients flow into
    `error` alone.

    Args:
        adaptive: w = mean |error| of the sample, at least 1e-5, without gradient; else 1.
    """

    def size(e: Tensor) -> Tensor:
        square = e.square().flatten(1).mean(1)
        weight = e.detach().abs().flatten(1).mean(1).clamp_min(1e-5) if adaptive else 1.0
        return square / weight

    return size(error_old.detach()) - size(error)


def rating(advantage: Tensor, clip: float) -> Tensor:
    """Advantages from [-clip, clip] to [0, 1]."""
    return advantage.clamp(-clip, clip) / (2 * clip) + 0.5


def centred_loss(
    implicit: Tensor,
    rated: Tensor,
    size: int,
    beta: float,
    kind: Regression = "mse",
    temperature: float | None = None,
) -> Tensor:
    """Implicit rewards are to differ within a group as the rated ones do; a scalar.

    mse: mean (beta r_c - a_c)^2;  bce: with sigmoid(a_c) as the probability of beta r_c. What the
    group's samples share, log Z of the prompt, drops out of both.

    Args:
        implicit, rated: r and a, [B].
        size: of a group, see `groups`.
        temperature: None: the centre is the group's mean. Else both weighted ones,
            softmax(a / temperature) and softmax(-a / temperature), and the mean of the two losses.
    """
    a = rated.to(implicit.dtype).detach()

    def loss(weights: Tensor) -> Tensor:
        """weights: [B], which sum to `size` in each group."""
        target = a - group_mean(weights * a, size)
        found = beta * (implicit - group_mean(weights * implicit.detach(), size))
        if kind == "bce":
            return F.binary_cross_entropy_with_logits(found, target.sigmoid())
        return (found - target).square().mean()

    if temperature is None:
        return loss(torch.ones_like(a))
    logits = a.unflatten(0, (-1, size)) / temperature
    near, far = (size * (sign * logits).softmax(1).flatten() for sign in (1, -1))
    return (loss(near) + loss(far)) / 2


def ramp(step: int, start: float, first: float, slope: float, last: float) -> float:
    """`first` up to step `start`, then rising by `slope` a step up to `last`."""
    return min(first + slope * max(0.0, step - start), last)
