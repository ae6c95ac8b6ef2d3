"""Classifier-free guidance at any scale: random, zero or negative; and dropping conditions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser, guided
from diffdistill.schedules import bcast

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]


def with_guidance(denoiser: Denoiser, scale: float | Tensor) -> Denoise:
    """D = u + scale (c - u) at any scale; a tensor [B] holds one scale per sample.

    1 is the conditional branch and 0 the null branch, for one pass each.
    """
    if isinstance(scale, Tensor):
        null = unconditional(denoiser)
        return lambda z, t, cond: torch.lerp(
            null(z, t, cond), denoiser(z, t, cond), bcast(scale, z)
        )
    return unconditional(denoiser) if scale == 0 else guided(denoiser, scale)


def within(plain: Denoise, guided: Denoise, low: float, high: float) -> Denoise:
    """`guided` at times in [low, high], else `plain` (arXiv 2404.07724); a batch has one time."""
    return lambda z, t, cond: (guided if low <= t[0].item() <= high else plain)(z, t, cond)


def unconditional(denoiser: Denoiser) -> Denoise:
    """D with the null condition, whatever the condition. ValueError: the teacher has none."""
    check_null(denoiser)
    return lambda z, t, cond: denoiser(z, t, null_like(denoiser, cond, z))


def check_null(denoiser: Denoiser) -> None:
    """ValueError: the teacher has no null condition."""
    if not denoiser.null:
        raise ValueError(
            "this guidance needs an unconditional branch, which this teacher does not have. Set "
            "every guidance to 1."
        )


def null_like(denoiser: Denoiser, cond: Cond, like: Tensor) -> dict[str, Tensor]:
    """The null condition for a batch of len(like), in the types of `cond`."""
    return {k: v.to(cond[k].dtype) for k, v in denoiser.null_cond(like).items()}


def drop_conditions(denoiser: Denoiser, cond: Cond, share: float, like: Tensor) -> Cond:
    """The condition of each sample is replaced by the null one with probability `share`."""
    if cond:
        check_null(denoiser)
    dropped = torch.rand(len(like), device=like.device) < share
    null = null_like(denoiser, cond, like)
    wide = {k: dropped.view(-1, *[1] * (v.ndim - 1)) for k, v in cond.items()}
    return {k: torch.where(wide[k], null[k], v) for k, v in cond.items()}
