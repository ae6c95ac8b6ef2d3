"""Students that start from other students: their weights, or a blend of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffdistill.denoiser import Denoiser

FILES = (
    ("unet/diffusion_pytorch_model.safetensors", "unet."),
    ("transformer/diffusion_pytorch_model.safetensors", "transformer."),
    ("student.safetensors", ""),
)


def blend(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """share a + (1 - share) b, tensor by tensor. ValueError: the networks differ."""
    odd = [k for k in {*a, *b} if k not in a or k not in b or a[k].shape != b[k].shape]
    if odd:
        raise ValueError(f"cannot blend two networks that differ in {sorted(odd)[:3]}")
    return {k: share * v + (1 - share) * b[k] for k, v in a.items()}


def read(folder: str) -> dict[str, Tensor]:
    """The network in a student or pipeline folder, named as in `Denoiser.net`."""
    for name, prefix in FILES:
        if (Path(folder) / name).is_file():
            return {prefix + k: v for k, v in load_file(Path(folder) / name).items()}
    names = ", ".join(name for name, _ in FILES)
    raise ValueError(f"{folder} has none of {names}. Give a student's or a pipeline's folder.")


def start_from(
    folder: str, other: str | None = None, share: float = 0.5
) -> Callable[[Denoiser], Denoiser]:
    """A role that starts from `folder`, or from share `folder` + (1 - share) `other`."""

    def build(teacher: Denoiser) -> Denoiser:
        state = read(folder) if other is None else blend(read(folder), read(other), share)
        student = teacher.clone()
        own = student.net.state_dict()
        odd = [k for k in {*own, *state} if k not in own or k not in state]
        odd += [k for k in own if k in state and own[k].shape != state[k].shape]
        if odd:
            raise ValueError(f"{folder} and the teacher differ in {sorted(odd)[:3]}")
        with torch.no_grad():
            student.net.load_state_dict(state)
        return student

    return build
