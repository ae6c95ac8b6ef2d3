"""Colours of detected objects by a CLIP, GenEval's rule (Ghosh et al., arXiv 2310.11513).

1. Outside its mask an object's image becomes grey, #999999; it is cropped to its box. Without a
   mask it is only cropped.
2. Text of a colour: the mean of three normalised embeddings ("a photo of a red cup", "a photo of a
   red-colored cup", "a photo of a red object"), normalised again.
3. The colour is the one with the largest cosine. The published code runs CLIP under autocast, ours
   in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.eval import weights
from diffdistill.eval.clip import OpenClip
from diffdistill.eval.geneval import Detection
from diffdistill.eval.geneval_prompts import COLOURS

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL = "ViT-L-14-quickgelu"  # OpenAI's weights want quick GELU
GREY = 0x99
_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class Clip(Protocol):
    """Any CLIP, such as `clip.OpenClip`: embeddings float64 [N, d], normalised or not."""

    name: str  # model:hash of the weights

    def embed(self, pictures: Sequence[Image]) -> np.ndarray: ...

    def text(self, prompts: Sequence[str]) -> np.ndarray: ...


class ColourClassifier:
    """Names the colour of objects. Text embeddings are kept per class."""

    def __init__(self, clip: Clip, colours: Sequence[str] = COLOURS):
        self.clip, self.colours = clip, colours
        self.name = clip.name
        self._texts: dict[str, Tensor] = {}

    def classify(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """The colour of every object in a uint8 image [3, H, W]."""
        if not objects:
            return []
        features = _unit(self.clip.embed([crop(image, d) for d in objects]))
        texts = torch.stack([self._text(d.cls) for d in objects])  # [N, colours, d]
        best = (texts @ features[:, :, None])[..., 0].argmax(1)
        return [self.colours[k] for k in best.tolist()]

    def _text(self, cls: str) -> Tensor:
        if cls not in self._texts:
            prompts = [t.format(c, cls) for c in self.colours for t in _TEMPLATES]
            parts = _unit(self.clip.text(prompts))
            mean = parts.unflatten(0, (len(self.colours), len(_TEMPLATES))).mean(1)
            self._texts[cls] = F.normalize(mean, dim=-1)
        return self._texts[cls]


def _unit(embeddings: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(embeddings), dim=-1)


def crop(image: Tensor, found: Detection) -> Image:
    """What the classifier sees of an object in a uint8 image [3, H, W]."""
    from PIL import Image

    if found.mask is not None:
        image = torch.where(found.mask, image, torch.full_like(image, GREY))
    h, w = image.shape[-2:]
    x0, y0 = (min(max(round(v), 0), n - 1) for v, n in zip(found.box[:2], (w, h), strict=True))
    x1, y1 = (max(round(v), low + 1) for v, low in zip(found.box[2:], (x0, y0), strict=True))
    return Image.fromarray(image[:, y0:y1, x0:x1].permute(1, 2, 0).contiguous().numpy())


def load(
    path: str | Path | None = None,
    *,
    allow_download: bool = False,
    model: str = MODEL,
    device: str | torch.device = "cpu",
) -> ColourClassifier:
    """The colour classifier with a CLIP of open_clip.

    Args:
        path: file of its weights; default: OpenAI's ViT-L-14, see `weights.find`.
        model: open_clip's name of the architecture; GenEval's rule has the default.
    """
    file = weights.find("clip-vitl14", path, allow_download=allow_download)
    return ColourClassifier(OpenClip(model, file, device=device))
