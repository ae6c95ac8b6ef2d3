"""Inception-v3 of 2015 (Szegedy et al., arXiv 1512.00567), in the variants of published FIDs.

    variant            weights      to 299 px                           input
    clean              TorchScript  PIL bicubic, antialiased, float32   (x - 128) / 128
    legacy_tensorflow  TorchScript  in the net: TF1 bilinear            (x - 128) / 128
    legacy_pytorch     .pth         bilinear, half-pixel centres        x / 127.5 - 1
    adm                .pth         TF1 bilinear                        (x - 128) / 128

The first three are clean-fid's modes; `legacy_tensorflow` is also that of EDM, and
`legacy_pytorch` is pytorch-fid. `adm` has the three taps of ADM's evaluator: pool3 [2048], logits
without bias [1008], and the first 7 channels of mixed_6/conv [17 x 17 x 7 = 2023] for sFID. All
are ports of one TensorFlow graph, and FIDs of different variants are not comparable.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.eval import pixels, weights
from diffdistill.eval.networks import Extractor

VARIANTS = ("clean", "legacy_tensorflow", "legacy_pytorch", "adm")
TORCHSCRIPT = "inception-2015-12-05.pt"  # the name that clean-fid's wrapper looks for


class Taps(Extractor):
    """The .pth network, whose activations inside the graph can be had, too."""

    def taps(self, images: Tensor) -> dict[str, np.ndarray]:
        """pool3 [N, 2048], logits [N, 1008] and spatial [N, 2023], in float64."""
        parts = list(self.run(images))
        return {k: np.concatenate([p[k].double().numpy() for p in parts]) for k in parts[0]}

    def features(self, images: Tensor) -> np.ndarray:
        """pool3: float64 [N, 2048]."""
        return self.taps(images)["pool3"]


def inception(
    variant: str, path: Path | str, *, device: str | torch.device = "cpu", batch: int = 64
) -> Extractor:
    """A variant of the table above, from a local weights file."""
    if variant not in VARIANTS:
        raise ValueError(f"Inception variant {variant!r}. Give one of: {', '.join(VARIANTS)}")
    make, resize, prepare = {
        "clean": (_torchscript, "pil-bicubic-299", pixels.pil_bicubic),
        "legacy_tensorflow": (_resizing_torchscript, "tf1-bilinear-299", _floats),
        "legacy_pytorch": (_Graph, "bilinear-299", lambda x: pixels.bilinear(x) / 127.5 - 1),
        "adm": (_Graph, "tf1-bilinear-299", lambda x: (pixels.tf1_bilinear(x) - 128) / 128),
    }[variant]
    name = f"inception-{variant}:{weights.digest(path)[:8]}"
    kind = Taps if make is _Graph else Extractor
    return kind(name, resize, prepare, make(Path(path)), device=device, batch=batch)


def _floats(images: Tensor) -> Tensor:
    return pixels.rgb(images).float()


def _torchscript(path: Path, resize_inside: bool = False) -> nn.Module:
    """clean-fid's wrapper of NVIDIA's TorchScript file: float 0..255 -> pool3 [n, 2048]."""
    from cleanfid.inception_torchscript import InceptionV3W

    if path.name != TORCHSCRIPT:
        raise ValueError(f"{path} must have the name {TORCHSCRIPT}. Rename it or link to it")
    return InceptionV3W(str(path.parent), download=False, resize_inside=resize_inside)


def _resizing_torchscript(path: Path) -> nn.Module:
    return _torchscript(path, resize_inside=True)


class _Graph(nn.Module):
    """torchvision's network with clean-fid's blocks, which pool as the TensorFlow graph does."""

    def __init__(self, path: Path):
        super().__init__()
        from cleanfid import inception_pytorch as ported

        net = ported._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        net.Mixed_5b = ported.FIDInceptionA(192, pool_features=32)
        net.Mixed_5c = ported.FIDInceptionA(256, pool_features=64)
        net.Mixed_5d = ported.FIDInceptionA(288, pool_features=64)
        net.Mixed_6b = ported.FIDInceptionC(768, channels_7x7=128)
        net.Mixed_6c = ported.FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6d = ported.FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6e = ported.FIDInceptionC(768, channels_7x7=192)
        net.Mixed_7b = ported.FIDInceptionE_1(1280)
        net.Mixed_7c = ported.FIDInceptionE_2(2048)
        try:
            net.load_state_dict(weights.tensors(path))
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit Inception ({str(error).splitlines()[1].strip()}). Give "
                f"{weights.SOURCES['inception-pytorch'].files[0]}"
            ) from error
        self.fc = net.fc
        net.dropout, net.fc = nn.Identity(), nn.Flatten()
        self.layers = nn.ModuleDict(dict(net.named_children()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[-1, 1] at 299 px -> pool3 [n, 2048], logits [n, 1008], spatial [n, 2023]."""
        out = {}
        for name, layer in self.layers.items():
            x = layer(x)
            if name == "Mixed_6d":  # mixed_6; its first branch is the 1 x 1 convolution
                out["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # as NHWC
        return {"pool3": x, "logits": x @ self.fc.weight.T, **out}
