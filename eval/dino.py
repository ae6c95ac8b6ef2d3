"""DINOv2 (Oquab et al., arXiv 2304.07193): class tokens for FD-DINOv2 and for diversity.

Images are squashed to 224 x 224, with ImageNet's mean and std. Two ways to resize are published:
dgm-eval (Stein et al., arXiv 2306.04675) by PIL bicubic on 8 bits, EDM2 by antialiased bicubic on
floats; they differ little, and stay two protocols.

The position embedding, trained at 518 px, is resampled as the authors' own code does: with a scale
of (16 + 0.1) / 37, where transformers takes 16 / 37.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.eval import pixels, weights
from diffdistill.eval.networks import Extractor

SIZE = 224
RESIZES = ("pil", "torch")  # dgm-eval, EDM2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OFFSET = 0.1


def dinov2(
    folder: Path | str,
    *,
    resize: str = "pil",
    device: str | torch.device = "cpu",
    batch: int = 64,
) -> Extractor:
    """A Dinov2Model in the format of transformers; features are the normalised class tokens."""
    from transformers import Dinov2Model

    if resize not in RESIZES:
        raise ValueError(f"resize {resize!r} for DINOv2. Give one of: {', '.join(RESIZES)}")
    model = Dinov2Model.from_pretrained(str(folder), local_files_only=True)
    model.embeddings.position_embeddings = nn.Parameter(_positions(model))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_MEAN, _STD))

    def prepare(images: Tensor) -> Tensor:
        return (_resized(images, resize) / 255 - mean) / std

    name = f"dinov2-{model.config.hidden_size}:{weights.digest(folder)[:8]}"
    how = {"pil": "pil-bicubic-8bit-224", "torch": "bicubic-antialias-224"}[resize]
    return Extractor(name, how, prepare, _ClassToken(model), device=device, batch=batch)


class _ClassToken(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pooler_output


def _resized(images: Tensor, how: str) -> Tensor:
    """0..255 -> float32 0..255 at 224 x 224."""
    if how == "pil":
        from PIL.Image import Resampling

        small = (p.resize((SIZE, SIZE), Resampling.BICUBIC) for p in pixels.pictures(images))
        return pixels.stack(small).float()
    x = pixels.rgb(images).float()
    return F.interpolate(x, (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True)


def _positions(model: nn.Module) -> Tensor:
    """Position embedding at 224 px: [1, 1 + n, d], the class token's first."""
    stored = model.embeddings.position_embeddings.detach()
    side = round((stored.shape[1] - 1) ** 0.5)
    n = SIZE // model.config.patch_size
    if n == side:
        return stored
    grid = stored[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (n + _OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], 1)
