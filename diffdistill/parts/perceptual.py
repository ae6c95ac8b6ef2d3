"""Distances: plain L2 and L1, LPIPS (Zhang et al., arXiv 1801.03924) on decoded images, or sums."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser

VGG = "vgg16-397923af.pth"


def distance(kind: str, a: Tensor, b: Tensor, teacher: Denoiser, size: int = 224) -> Tensor:
    """Mean distance of two batches of clean estimates; gradients flow into `a`.

    Args:
        kind: l2, l1 or lpips, or a sum such as "lpips+l2".
        size: pixels, to which images are resized for LPIPS; DMD, App. B: 224.
    """
    return sum(_distance(one, a, b, teacher, size) for one in kind.split("+"))  # type: ignore


def _distance(kind: str, a: Tensor, b: Tensor, teacher: Denoiser, size: int) -> Tensor:
    if kind == "l2":
        return (a - b).square().mean()
    if kind == "l1":
        return (a - b).abs().mean()
    images = [_resized(teacher.decode(x) if teacher.decode else x, size) for x in (a, b)]
    return _lpips(str(a.device))(*images).mean()


def _resized(x: Tensor, size: int) -> Tensor:
    """[-1, 1] grey or RGB -> RGB of size x size."""
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


@functools.cache
def _lpips(device: str) -> nn.Module:
    """LPIPS-VGG through torchmetrics; its backbone is never downloaded silently."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / VGG
    if not file.is_file():
        raise ValueError(
            f"LPIPS needs the weights {VGG} (torchvision VGG16, 528 MB) at {file}. Fetch them: "
            "python -c 'import torchvision as t; t.models.vgg16(weights=\"IMAGENET1K_V1\")', or "
            "choose the distance l2."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    with torch.random.fork_rng(devices=[]):  # built at its first call, wherever a run resumes
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="none").to(device)
    return metric.net.eval().requires_grad_(False)
