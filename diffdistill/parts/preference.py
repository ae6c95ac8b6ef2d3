"""Reinforcement on the stochastic steps of a few-step student, and its sampler from within.

By pairs (Chen et al., "Flash-DMD", arXiv 2511.20549) or by advantages (PPO, arXiv 1707.06347).
From z_t a student x = G(z_t, t) goes to

    z_s = alpha_s x + sigma_s eps,   p(z_s | z_t) = N(alpha_s x, sigma_s^2)

so the log-ratio of two students is known in closed form wherever sigma_s > 0: at every step with a
successor, and not at the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.method import Sampler
from diffdistill.schedules import Schedule, add_noise, times

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
Normalise = Literal["std", "softmax", "none"]


@torch.no_grad()
def finished(
    denoise: Denoise, schedule: Schedule, x0: Tensor, cond: Cond, sampler: Sampler, index: int
) -> Tensor:
    """The sample that the student makes of its own estimate x0 at step `index`, with fresh noise.

    No gradient flows, not even if no step is left.
    """
    x0 = x0.detach()
    for s in sampler.times[index + 1 :]:
        t = times(s, x0)
        x0 = denoise(add_noise(schedule, x0, torch.randn_like(x0), t), t, cond)
    return x0


@torch.no_grad()
def candidates(schedule: Schedule, x0: Tensor, s: float, count: int) -> Tensor:
    """`count` draws of z_s = alpha_s x0 + sigma_s eps per sample: [count, B, ...]."""
    t = times(s, x0)
    return torch.stack([add_noise(schedule, x0, torch.randn_like(x0), t) for _ in range(count)])


@torch.no_grad()
def best_and_worst(
    rewards: Tensor, normalise: Normalise, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample the index of the best candidate, of the worst, and whether they count, each [B].

    A pair counts if the normalised rewards differ by more than the threshold; equals never do.

    Args:
        rewards: [K, B]; compared within each of the B columns.
        normalise: "std": (r - mean) / std of the K; "softmax": their softmax; "none".
    """
    if normalise == "softmax":
        rewards = rewards.softmax(0)
    elif normalise == "std":
        centred = rewards - rewards.mean(0)
        rewards = centred / (centred.square().mean(0).sqrt() + 1e-6)
    (high, win), (low, lose) = rewards.max(0), rewards.min(0)
    return win, lose, high - low > threshold


def log_ratio_gap(
    schedule: Schedule,
    x0: Tensor,
    x0_reference: Tensor,
    win: Tensor,
    lose: Tensor,
    s: float,
    *,
    per_element: bool = False,
) -> Tensor:
    """H [B]: log p / p_ref of the winner minus that of the loser, both at time s.

    [|z - a r|^2 - |z - a x|^2] / (2 sigma^2) at z = win minus the same at z = lose, in which only
    a (win - lose) . (x - r) / sigma^2 remains. Gradients flow into x0 alone.

    Args:
        per_element: divide by the number of elements of a sample.
    """
    _, scale = _step(schedule, s)
    product = (win - lose).detach() * (x0 - x0_reference.detach())
    return scale * (product.flatten(1).mean(1) if per_element else product.flatten(1).sum(1))


def preference_loss(gap: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta H) per sample [B]."""
    return F.softplus(-beta * gap)


def log_ratio(schedule: Schedule, x0: Tensor, x0_old: Tensor, drawn: Tensor, s: float) -> Tensor:
    """log p / p_old of a draw at time s, over the elements of a sample: [B].

    [|z - a o|^2 - |z - a x|^2] / (2 sigma^2) = a (x - o) . (z - a (x + o) / 2) / sigma^2. At
    x = o its gradient in x is `transition_score`. Gradients flow into x0 alone.
    """
    alpha, scale = _step(schedule, s)
    old = x0_old.detach()
    product = (x0 - old) * (drawn.detach() - alpha / 2 * (x0 + old))
    return scale * product.flatten(1).mean(1)


@torch.no_grad()
def transition_score(schedule: Schedule, x0: Tensor, drawn: Tensor, s: float) -> Tensor:
    """grad of log p(z_s) in the student's estimate: a (z - a x) / sigma^2, shape of x0."""
    alpha, scale = _step(schedule, s)
    return scale * (drawn - alpha * x0)


def _step(schedule: Schedule, s: float) -> tuple[float, float]:
    """alpha, and alpha / sigma^2."""
    at = torch.tensor(s, dtype=torch.float64)
    alpha = float(schedule.alpha(at))
    return alpha, alpha / float(schedule.sigma(at).square())


def clipped_gain(advantage: Tensor, log_ratio: Tensor, clip: float) -> Tensor:
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A) per sample [B], rho = exp(log ratio)."""
    rho = log_ratio.exp()
    return torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)
