"""A low-rank adapter on a frozen network: a second network at almost no memory."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from diffdistill.denoiser import Denoiser

Layers = Literal["qv", "attention", "all"]
NAMED = {"qv": ("to_q", "to_v"), "attention": ("to_q", "to_k", "to_v", "to_out.0")}


def lora_copy(
    base: Denoiser, rank: int, alpha: float, layers: Layers = "qv", *, gaussian: bool = False
) -> Denoiser:
    """`base` plus alpha / rank B A on its layers, with B = 0 (Hu et al., arXiv 2106.09685).

    A module tree of its own over the storage of `base`, so both can be called at any time: no
    adapter is switched, and `base` never sees one. Only A and B train. The adapter sits on the
    `backbone` of the network, if there is one: there an export looks for it.

    Args:
        layers: "qv" (query and value projections of every attention), all four of an "attention",
            or "all" linear and convolutional layers.
        gaussian: A ~ N(0, 1 / rank^2), as diffusers starts a student's adapter; else uniform, as
            PEFT does.

    Raises:
        ValueError: `base` has no such layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    shared = {id(p): p for p in (*base.net.parameters(), *base.net.buffers())}
    other = base.clone(copy.deepcopy(base.net, shared))
    place = getattr(other.net, "backbone", other.net)
    kinds, ends = (nn.Linear, nn.Conv2d) if layers == "all" else nn.Linear, NAMED.get(layers, "")
    found = [n for n, m in place.named_modules() if isinstance(m, kinds) and n.endswith(ends)]
    if not found:
        raise ValueError(
            f"the network has no layers for LoRA ({layers}). Leave lora.ROLE out; of "
            "swiftbrush: set method.lora_layers=all, or method.lora_rank=0 for a full copy"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(ends) or found,
        init_lora_weights="gaussian" if gaussian else True,
    )  # fmt: skip
    inject_adapter_in_model(config, place)
    other.trainable_names = {n for n, _ in other.named_parameters() if "lora_" in n}
    return other
