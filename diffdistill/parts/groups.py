"""Several samples of one prompt: batches that hold groups of them, and what a group compares.

A group is a run of `size` rows with one condition, so it lies in one micro-batch, on one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch
from diffdistill.parts.ratio import over_processes

Spread = Literal["group", "batch"]


def in_groups(batch: Batch, size: int) -> Batch:
    """The first 1 / size of the batch's conditions, `size` times each, one after the other.

    Images and pairs of the batch belong to other conditions and are left out.
    """
    if batch.size % size:
        raise ValueError(
            f"a micro-batch of {batch.size} samples is no multiple of method.group={size}. Change "
            "method.group, train.micro_batch or train.batch_size"
        )
    rows = torch.arange(batch.size // size).repeat_interleave(size)
    prompts = batch.prompts and [batch.prompts[i] for i in rows.tolist()]
    cond = {k: v[rows.to(v.device)] for k, v in batch.cond.items()}
    return replace(batch, cond=cond, prompts=prompts, x=None, pair=None)


def group_mean(values: Tensor, size: int) -> Tensor:
    """Each row's mean over its group: [B, ...] -> [B, ...]."""
    return values.unflatten(0, (-1, size)).mean(1).repeat_interleave(size, 0)


@torch.no_grad()
def advantages(rewards: Tensor, size: int, spread: Spread = "group") -> Tensor:
    """(reward - mean of its group) / (std + 1e-6), [B].

    spread: the std of the group, or of all that is left of the batch (of all processes) when each
    group's mean is taken off. A prompt's own offset changes neither.
    """
    centred = rewards - group_mean(rewards, size)
    if spread == "group":
        return centred / (group_mean(centred.square(), size).sqrt() + 1e-6)
    sums = torch.stack([centred.square().sum(), torch.ones_like(centred).sum()])
    square, count = over_processes(sums)
    return centred / ((square / count).sqrt() + 1e-6)


@torch.no_grad()
def matching_reward(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, size: int) -> Tensor:
    """R_dm = log p_teacher(z_t) - log p_fake(z_t) in its group, up to a factor: [B].

    - mean (d + mean d) / 2 . (x - mean x), d = x0_fake - x0_teacher at a time that the group
    shares, means over the group. R_dm falls along d, and the mean of d at both ends is exact
    wherever d is linear (Gaussians), averaged over the noise.
    """
    d = x0_fake - x0_teacher
    steps = (d + group_mean(d, size)) / 2 * (x - group_mean(x, size))
    return -steps.flatten(1).mean(1)


class Balance(nn.Module):
    """Running weights that give several directions the norm of another one.

    They are a buffer: kept in checkpoints, unknown to optimizers and averages.

    Args:
        keep: what a weight keeps of itself.
    """

    weights: Tensor  # [count]; 0: not known yet

    def __init__(self, count: int, keep: float = 0.9):
        super().__init__()
        self.keep = keep
        self.register_buffer("weights", torch.zeros(count))

    @torch.no_grad()
    def forward(self, wanted: Tensor, others: Tensor) -> Tensor:
        """Weights [count] after this batch; a direction that vanishes keeps its own.

        Args:
            wanted: any shape. others: [count, ...].
        """
        squares = torch.stack([wanted.square().sum(), *others.square().flatten(1).sum(1)])
        norm, *norms = over_processes(squares.float()).sqrt()
        now = norm / torch.stack(norms).clamp_min(1e-12)
        mixed = torch.where(self.weights > 0, torch.lerp(now, self.weights, self.keep), now)
        self.weights.copy_(torch.where(torch.stack(norms) > 1e-12, mixed, self.weights))
        return self.weights


def balanced(count: int) -> Callable[[Denoiser], Denoiser]:
    """A role: a copy of the teacher with a `Balance` of so many weights beside its network."""

    def build(teacher: Denoiser) -> Denoiser:
        copy = teacher.clone()
        copy.balance = Balance(count)
        return copy

    return build
