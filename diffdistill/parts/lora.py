"""A low-rank adapter on a frozen network: a second network at almost no memory."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from diffdistill.denoiser import Denoiser

Layers = Literal["qv", "all"]


def lora_copy(teacher: Denoiser, rank: int, alpha: float, layers: Layers = "qv") -> Denoiser:
    """The teacher plus alpha / rank B A on its layers, with B = 0 (Hu et al., arXiv 2106.09685).

    A module tree of its own over the teacher's storage, so both can be called at any time: no
    adapter is switched, and the teacher never sees one. Only A and B train.

    Args:
        layers: "qv" (query and value projections of every attention) or "all" linear and
            convolutional layers.

    Raises:
        ValueError: the teacher has no such layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    shared = {id(p): p for p in (*teacher.net.parameters(), *teacher.net.buffers())}
    fake = teacher.clone(copy.deepcopy(teacher.net, shared))
    kinds = nn.Linear if layers == "qv" else (nn.Linear, nn.Conv2d)
    ends = ("to_q", "to_v") if layers == "qv" else ""
    targets = [n for n, m in fake.net.named_modules() if isinstance(m, kinds) and n.endswith(ends)]
    if not targets:
        raise ValueError(
            f"the teacher has no layers for LoRA ({layers}). Set method.lora_layers=all, or "
            "method.lora_rank=0 for a full copy."
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), fake.net)
    fake.trainable_names = {n for n, _ in fake.named_parameters() if "lora_" in n}
    return fake
