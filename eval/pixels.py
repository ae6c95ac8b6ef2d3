"""Pixels of an evaluation: uint8 NCHW in, with quantising, cropping and resizing as protocols say.

The resizes to the 299 px of Inception are what makes one FID incomparable to another:

    pil_bicubic   clean-fid's `clean`: PIL, antialiased, float32, clipped, not quantised
    bilinear      pytorch-fid and clean-fid's `legacy_pytorch`: half-pixel centres, no antialias
    tf1_bilinear  the 2015 TensorFlow graph: no half-pixel centres, no antialias
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.data.images import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

RULES = ("round", "dmd2")


def quantise(x: Tensor, rule: str = "round") -> Tensor:
    """[-1, 1] -> 0..255. `round`: nearest level. `dmd2`: truncation, half a level darker.

    The second is only for repeating the numbers of DMD2's test scripts.
    """
    if rule not in RULES:
        raise ValueError(f"quantiser {rule!r}. Give one of: {', '.join(RULES)}")
    if rule == "dmd2":
        return (127.5 * (x.float() + 1)).clamp(0, 255).to(torch.uint8).cpu()
    return to_uint8(x)


def rgb(images: Tensor) -> Tensor:
    """Grey images are repeated to three channels (EDM)."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        given = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images are {given}. Give uint8 [N, 1 or 3, height, width]")
    return images.expand(-1, 3, -1, -1)


# ---- before the feature network: what protocols do to both sides --------------------------


def centre_crop(images: Tensor, size: int | None = None) -> Tensor:
    """The central square of `size`, or of the short side."""
    size = size or min(images.shape[-2:])
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def lanczos(images: Tensor, size: int) -> Tensor:
    """Central square, then PIL Lanczos: COCO protocols, 256 or 512."""
    return _pil(centre_crop(rgb(images)), (size, size), "LANCZOS")


def short_side(images: Tensor, size: int) -> Tensor:
    """Short side to `size` by antialiased bilinear, then the central square: mjhq30k-sana."""
    high, wide = images.shape[-2:]
    short = min(high, wide)
    to = (int(size * high / short), int(size * wide / short))
    return centre_crop(_pil(rgb(images), to, "BILINEAR"), size)


def patch(images: Tensor, size: int = 299) -> Tensor:
    """Central patch at full resolution, for patch FID; smaller images pass uncropped."""
    return centre_crop(rgb(images), size) if min(images.shape[-2:]) >= size else rgb(images)


# ---- to the size of the network ---------------------------------------------------------


def pil_bicubic(images: Tensor, size: int = 299) -> Tensor:
    """0..255 -> float32 0..255, each channel resized on its own by clean-fid."""
    from cleanfid.resize import make_resizer

    resize = make_resizer("PIL", False, "bicubic", (size, size))
    arrays = rgb(images).permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([resize(a) for a in arrays])).permute(0, 3, 1, 2)


def bilinear(images: Tensor, size: int = 299) -> Tensor:
    """0..255 -> float32 0..255, half-pixel centres, no antialias."""
    return F.interpolate(rgb(images).float(), (size, size), mode="bilinear", align_corners=False)


def tf1_bilinear(images: Tensor, size: int = 299) -> Tensor:
    """0..255 -> float32 0..255: output pixel i samples at i * in / size, no antialias."""
    x = rgb(images).float()
    for axis in (2, 3):
        last = x.shape[axis] - 1
        at = torch.arange(size, dtype=torch.float32) * (x.shape[axis] / size)
        low = at.long()
        share = (at - low).view(-1, *[1] * (3 - axis))
        a, b = (x.index_select(axis, i.clamp_max(last)) for i in (low, low + 1))
        x = torch.lerp(a, b, share)
    return x


# ---- PIL --------------------------------------------------------------------------------


def pictures(images: Tensor) -> list[Image]:
    """uint8 [N, 1|3, H, W] -> N RGB pictures."""
    from PIL import Image

    return [Image.fromarray(a) for a in rgb(images).permute(0, 2, 3, 1).cpu().numpy()]


def stack(images: Iterable[Image]) -> Tensor:
    """Pictures of one size -> uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)


def _pil(images: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """Resize to `size` = (high, wide) by a filter of PIL."""
    from PIL import Image

    kind = Image.Resampling[resample]
    return stack(picture.resize(size[::-1], kind) for picture in pictures(images))
