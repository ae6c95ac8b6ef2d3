"""Weights that follow other weights: the fake score's pull towards the student.

Chen et al., "Flash-DMD", arXiv 2511.20549, after SenseFlow, arXiv 2506.00523.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffdistill.ema import trainable


@torch.no_grad()
def ema_pull(follower: nn.Module, leader: nn.Module, decay: float) -> None:
    """follower <- decay follower + (1 - decay) leader, where the leader trains; it stays as it is.

    A leader that is an adapter on a frozen network counts with the weights that the two make
    together, and the follower's other weights are left alone.

    Raises:
        ValueError: what the leader trains is nothing that the follower has.
    """
    own, values = dict(trainable(follower)), trained_weights(leader)
    shared = [name for name in values if name in own]
    if not shared:
        raise ValueError(
            "the fake score has no parameter that the student trains, so it cannot be pulled "
            "towards it. Both must be copies of the teacher's network"
        )
    for name in shared:
        own[name].lerp_(values[name].to(own[name]), 1 - decay)


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """What a network trains, by the names of the network without adapters (PEFT's LoRA)."""
    values: dict[str, Tensor] = {n: p for n, p in trainable(module) if ".lora_" not in n}
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            (adapter,) = layer.active_adapters
            values[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight(adapter)
    return values


def copier() -> Callable[[nn.Module, nn.Module], None]:
    """For a Transition: the target takes what the source trains."""
    return lambda source, target: ema_pull(target, source, 0.0)
