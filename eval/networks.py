"""Feature networks of published evaluations behind one interface.

    .name                "network:first 8 digits of the SHA-256 of its weights"
    .resize              how images get to the size of the network
    .features(images)    uint8 [N, 1|3, H, W] -> float64 [N, d]

Networks run in eval mode and float32, without autocast and TF32. Give a name of `NETWORKS` with a
path, or any callable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.eval import weights
from diffdistill.registry import unknown


@runtime_checkable
class Network(Protocol):
    """What the metrics take."""

    name: str

    def features(self, images: Tensor) -> np.ndarray: ...


class Extractor:
    """A network from two functions.

    Args:
        prepare: uint8 images -> float32 input of the network; on the CPU.
        net: that input -> [n, d].
    """

    def __init__(
        self,
        name: str,
        resize: str,
        prepare: Callable[[Tensor], Tensor],
        net: Callable[[Tensor], Tensor],
        *,
        device: str | torch.device = "cpu",
        batch: int = 64,
    ):
        self.name, self.resize, self.device, self.batch = name, resize, device, batch
        self.prepare, self.net = prepare, net
        if isinstance(net, nn.Module):
            net.eval().requires_grad_(False).to(device)

    def features(self, images: Tensor) -> np.ndarray:
        """uint8 [N, C, H, W] -> float64 [N, d]."""
        return np.concatenate([out.double().numpy() for out in self.run(images)])

    def run(self, images: Tensor) -> Iterator[Any]:
        """What the network gives for one batch after the other, on the CPU."""
        for part in images.split(self.batch):
            with exact():
                out = self.net(self.prepare(part).to(self.device))
            yield out.cpu() if isinstance(out, Tensor) else {k: v.cpu() for k, v in out.items()}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No gradients, no autocast, no TF32; settings are put back."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        with (
            torch.no_grad(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


def network(
    net: str | Network | Callable[[Tensor], Tensor],
    path: Path | str | None = None,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    allow_download: bool = False,
) -> Network:
    """A network by name and weights path, or from a callable uint8 [n, C, H, W] -> [n, d].

    Args:
        net: a name of `NETWORKS`, or a callable; what has `features` and `name` passes unchanged.
        path: of its weights; default: the cache, see `weights.find`.
        name: for the records; a callable that is no module has no weights to tell it by.
    """
    if isinstance(net, str):
        if net not in NETWORKS:
            raise ValueError(unknown("feature network", net, NETWORKS))
        source, build = NETWORKS[net]
        if source:
            path = weights.find(source, path, allow_download=allow_download)
        return build(path, device)
    if isinstance(net, Network):
        return net
    if name is None and not isinstance(net, nn.Module):
        raise ValueError("a feature network that is a function needs a name for the records")
    label = name or f"{type(net).__name__}:{_state_digest(net)}"
    return Extractor(label, "none", lambda images: images, net, device=device)


def _state_digest(net: nn.Module) -> str:
    import hashlib

    total = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        total.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:8]


def _inception(variant: str) -> Callable[[Path, Any], Network]:
    def build(path: Path, device: Any) -> Network:
        from diffdistill.eval.inception import inception

        return inception(variant, path, device=device)

    return build


def _dino(path: Path, device: Any) -> Network:
    from diffdistill.eval.dino import dinov2

    return dinov2(path, device=device)


def _clip(path: Path, device: Any) -> Network:
    from diffdistill.eval.clip import cmmd_network

    return cmmd_network(path, device=device)


def _offline(path: Path | None, device: Any) -> Network:
    from diffdistill.eval.offline import efficientnet_lite0

    return efficientnet_lite0(path, device=device)


NETWORKS = {  # name -> weights, and what makes the network from a path and a device
    "inception-clean": ("inception-torchscript", _inception("clean")),
    "inception-legacy_tensorflow": ("inception-torchscript", _inception("legacy_tensorflow")),
    "inception-legacy_pytorch": ("inception-pytorch", _inception("legacy_pytorch")),
    "inception-adm": ("inception-pytorch", _inception("adm")),
    "dinov2-vitl14": ("dinov2-vitl14", _dino),
    "dinov2-vitb14": ("dinov2-vitb14", _dino),
    "clip-vitl14-336": ("clip-vitl14-336", _clip),
    "efficientnet-lite0": ("", _offline),  # from a package
}
