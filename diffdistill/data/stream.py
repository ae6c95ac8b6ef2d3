"""Micro-batches as a pure function of the step: a permutation per epoch, nothing to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.method import Batch, Pair

Lookup = Callable[[Tensor], Tensor]


class Shuffled:
    """Row indices of the global batch of a step; every epoch is one permutation."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("the data set is empty. Give at least one record.")
        self.size, self.seed = size, seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # draw -> its latest epoch

    def indices(self, step: int, draw: int, rows: range, batch_size: int) -> Tensor:
        start = step * batch_size
        flat = [divmod(start + r, self.size) for r in rows]
        return torch.tensor([self._permutation(epoch, draw)[i] for epoch, i in flat])

    def _permutation(self, epoch: int, draw: int) -> np.ndarray:
        if draw not in self._orders or self._orders[draw][0] != epoch:
            rng = np.random.default_rng([self.seed, draw, epoch])
            self._orders[draw] = epoch, rng.permutation(self.size)
        return self._orders[draw][1]


class TensorStream:
    """Data that is in memory: images or latents, conditions, and teacher pairs on request.

    Args:
        cond: name -> lookup from row indices to a tensor [B, ...].
        x: float [N, ...] or None for methods that see no images.
        pairs: (eps, x, cond lookups) of stored teacher trajectories; x may be tokens (int).
        extra: further lookups, for `Batch.extra`.
        prompts: prompt or label of each row, for `Batch.prompts`.
    """

    def __init__(
        self,
        size: int,
        shape: tuple[int, ...],
        cond: Mapping[str, Lookup],
        *,
        x: Tensor | None = None,
        pairs: tuple[Tensor, Tensor, Mapping[str, Lookup]] | None = None,
        extra: Mapping[str, Lookup] | None = None,
        prompts: Sequence[Any] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.size, self.shape, self.cond, self.device = size, shape, cond, device
        self.x, self.pairs, self.extra, self.prompts = x, pairs, extra or {}, prompts
        self._order = Shuffled(size, seed)
        self._pair_order = Shuffled(len(pairs[0]), seed + 1) if pairs is not None else None

    def batch(self, step: int, draw: int, rows: range, batch_size: int) -> Batch:
        index = self._order.indices(step, draw, rows, batch_size)
        pair = None
        if self.pairs is not None:
            eps, x, cond = self.pairs
            at = self._pair_order.indices(step, draw, rows, batch_size)
            pair = Pair(self._put(eps[at]), self._put(x[at]), self._look(cond, at))
        return Batch(
            size=len(rows),
            shape=self.shape,
            cond=self._look(self.cond, index),
            x=None if self.x is None else self._put(self.x[index]),
            pair=pair,
            extra=self._look(self.extra, index),
            device=self.device,
            shared=torch.Generator(),
            prompts=self.prompts and [self.prompts[i] for i in index.tolist()],
        )

    def _look(self, cond: Mapping[str, Lookup], index: Tensor) -> Cond:
        return {k: fn(index).to(self.device) for k, fn in cond.items()}

    def _put(self, x: Tensor) -> Tensor:
        return x.to(self.device, torch.float32 if x.is_floating_point() else x.dtype)
