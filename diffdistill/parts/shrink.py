"""A smaller network of a teacher's kind: fewer channels and layers, and nothing learned yet."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from diffdistill.denoiser import Denoiser

LAYERS = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
)  # fmt: skip


def smaller(teacher: Denoiser, width: float, depth: float) -> dict[str, Any]:
    """Config of a smaller UNet of the teacher's class.

    Raises:
        ValueError: the teacher's network is no UNet of diffusers, or cannot be that much smaller.
    """
    unet = dict(teacher.net.named_children()).get("unet")
    config = getattr(unet, "config", {})
    if "block_out_channels" not in config:
        raise ValueError(
            f"a smaller student (width {width:g}, depth {depth:g}) can be made for UNets of "
            f"diffusers, but this teacher's network is a {type(teacher.net).__name__}. Set "
            "method.width=1 method.depth=1 for a student of the teacher's size"
        )
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    changes = shrinkage(config, width, depth)
    if all(config[k] == v for k, v in changes.items()):
        raise ValueError(
            f"width {width:g} and depth {depth:g} leave this teacher's UNet as it is: channels "
            f"{list(config['block_out_channels'])} in steps of {config['norm_num_groups']}, layers "
            f"{config['layers_per_block']}. Set a lower method.width or method.depth"
        )
    return config | changes


def shrinkage(config: Mapping[str, Any], width: float, depth: float) -> dict[str, Any]:
    """What changes in the config of a UNet2DModel or UNet2DConditionModel.

    Channels are rounded to what the groups of its norms and the heads of its attention divide, and
    are at least one such unit; the number of heads stays, where the new channels allow it. Layers
    of a level are rounded, and at least one.

    Args:
        width, depth: shares of the channels of each level, and of its layers, that are kept.
    """
    wide, groups = config["block_out_channels"], config["norm_num_groups"] or 1
    units, heads = [groups] * len(wide), config["attention_head_dim"]
    if "cross_attention_dim" in config:  # there it is the number of heads
        heads = config["num_attention_heads"] or heads
        each = heads if isinstance(heads, list | tuple) else [heads] * len(wide)
        units = [math.lcm(groups, h) for h in each]
    channels = [max(u, u * round(width * c / u)) for c, u in zip(wide, units, strict=True)]
    changes: dict[str, Any] = {"block_out_channels": type(wide)(channels)}
    if "cross_attention_dim" not in config and heads is not None:  # channels of a head
        changes["attention_head_dim"] = math.gcd(heads, *channels)
    if config.get("time_embedding_dim"):
        changes["time_embedding_dim"] = 2 * round(width * config["time_embedding_dim"] / 2)
    return changes | {k: _share(config[k], depth) for k in LAYERS if config.get(k)}


def untrained(teacher: Denoiser, config: Mapping[str, Any]) -> Denoiser:
    """The teacher's interface around a UNet of its class with this config and random weights."""
    net = copy.copy(teacher.net)
    net._modules = {**net._modules, "unet": type(teacher.net.unet).from_config(dict(config))}
    if teacher.runtime.channels_last:
        net.unet.to(memory_format=torch.channels_last)
    return teacher.clone(net)


def _share(layers: Any, depth: float) -> Any:
    if isinstance(layers, list | tuple):
        return type(layers)(_share(n, depth) for n in layers)
    return max(1, round(depth * layers))
