"""Averages of trainable parameters, updated in place on the device.

decay      avg <- beta avg + (1 - beta) p
halflife   beta = 0.5 ** (batch / halflife), halflife in images (Karras et al., EDM2)
power      beta = (1 - 1/n) ** (gamma + 1)  (Karras et al., arXiv 2312.02696, Eq. 121)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass
class EmaConfig:
    kind: Literal["decay", "halflife", "power"] = "decay"
    value: float = 0.999  # decay; half-life in images; gamma
    warmup: bool = True  # decay only: beta = min(value, (1 + n) / (10 + n)), n = updates done


class Ema:
    """One average of the trainable parameters of one role."""

    def __init__(self, cfg: EmaConfig, module: nn.Module):
        self.cfg = cfg
        self.average = {n: p.detach().clone() for n, p in trainable(module)}

    def beta(self, updates: int, batch_size: int) -> float:
        """Decay of the update that follows `updates` earlier ones."""
        if self.cfg.kind == "halflife":
            return 0.5 ** (batch_size / self.cfg.value)
        if self.cfg.kind == "power":
            return (1 - 1 / (updates + 1)) ** (self.cfg.value + 1)
        if self.cfg.warmup:
            return min(self.cfg.value, (1 + updates) / (10 + updates))
        return self.cfg.value

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int, batch_size: int) -> None:
        weight = 1 - self.beta(updates, batch_size)
        current = dict(trainable(module))
        names = list(self.average)
        torch._foreach_lerp_(
            [self.average[n] for n in names], [current[n].detach() for n in names], weight
        )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take these values as the average."""
        for name, value in self.average.items():
            value.copy_(state[name])

    def swap(self, module: nn.Module) -> None:
        """Exchange the average and the live weights; call twice to undo."""
        with torch.no_grad():
            for name, p in trainable(module):
                live = p.detach().clone()
                p.copy_(self.average[name])
                self.average[name].copy_(live)


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the engine may train. A frozen base under LoRA is not among them.

    The engine turns `requires_grad` on and off during a run, so what is trainable is recorded
    once, when the role is built.
    """
    names = getattr(module, "trainable_names", None)
    return [(n, p) for n, p in module.named_parameters() if names is None or n in names]
