"""Losses on the difference of two denoisers: the student's fake score and the teacher.

f = D_teacher(z_t), g = D_fake(z_t), x the student's sample, z_t = alpha x + sigma eps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffdistill.schedules import Schedule, bcast

Normaliser = Literal["l1", "none", "alpha", "alpha2", "inv_sigma", "inv_sigma2", "snr", "sqrt_snr"]
Distance = Literal["pseudo_huber", "l2", "lp"]


def vp_alpha2(schedule: Schedule, t: Tensor) -> Tensor:
    """alpha^2 of the variance-preserving schedule of equal sigma / alpha; float64 [B]."""
    alpha2, sigma2 = schedule.alpha(t).square(), schedule.sigma(t).square()
    return alpha2 / (alpha2 + sigma2)


@torch.no_grad()
def vsd_direction(schedule: Schedule, t: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """sigma^2 (eps_teacher - eps_fake) = alpha sigma (g - f), in variance-preserving units.

    SwiftBrush (arXiv 2312.05239), code. Not normalised; non-finite elements are 0.
    """
    alpha2 = vp_alpha2(schedule, t)
    return torch.nan_to_num(bcast((alpha2 * (1 - alpha2)).sqrt(), f) * (g - f))


def score_identity(x: Tensor, f: Tensor, g: Tensor, alpha: float) -> Tensor:
    """Delta ((f - x) - alpha Delta) per element, Delta = f - g (SiD, arXiv 2404.04057).

    Its gradient is right only if it flows into x, f and g, and through z_t into the networks. At
    alpha = 1 the expected value is 0 for every student: it does not measure progress.
    """
    gap = f - g
    return gap * ((f - x) - alpha * gap)


@torch.no_grad()
def sample_weight(kind: Normaliser, schedule: Schedule, t: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """Weight of each sample, [B, 1, ...], without gradient.

    "l1" is 1 / mean |x - f| (SiD). The others are those of SiD-DiT (arXiv 2509.25127), in flow
    units, alpha + sigma = 1.
    """
    if kind == "l1":
        dims = tuple(range(1, x.ndim))
        return 1 / (x - f).abs().mean(dims, keepdim=True).clamp_min(1e-5)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
    weights = {
        "none": torch.ones_like(sigma), "alpha": alpha, "alpha2": alpha**2,
        "inv_sigma": 1 / sigma, "inv_sigma2": sigma**-2,
        "snr": (alpha / sigma) ** 2, "sqrt_snr": alpha / sigma,
    }  # fmt: skip
    return bcast(weights[kind], x)


def slope(kind: Distance, y: Tensor, c: float, power: int) -> tuple[Tensor, Tensor]:
    """A distance d(y) [B] of whole samples, and its gradient d'(y), a function of y.

    pseudo_huber: sqrt(|y|^2 + c^2) - c;  l2: |y|^2;  lp: sum y^power, power even.
    """
    flat = y.flatten(1)
    if kind == "lp":
        return flat.pow(power).sum(1), power * y.pow(power - 1)
    square = flat.square().sum(1)
    if kind == "l2":
        return square, 2 * y
    root = (square + c**2).sqrt()
    return root - c, y / bcast(root, y)


def implicit_loss(derivative: Tensor, residual: Tensor) -> Tensor:
    """-d'(y) . r per sample [B]: the gradient of E d(y) at frozen sampling (SIM, arXiv 2410.16794).

    y = g - f, r = g - x. For every fixed field u and every student with score s,
    E u(z_t) . (s(z_t) - grad log q(z_t | x)) = 0. Differentiate in the student at u = d'(y):
    E u . ds = -d E u . (s - grad log q), where the right side moves through x and z_t only. The
    left side is the wanted gradient; between denoisers, r stands for s - grad log q.
    """
    return -(derivative * residual).flatten(1).sum(1)
