"""Diversity: distances between images of one prompt, and the Vendi score of a set.

Few-step students lose the diversity within a prompt first: draw several seeds of each prompt (100
prompts x 8 seeds), and show teacher and student side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.eval import pixels, weights
from diffdistill.eval.networks import exact


def vendi(features: np.ndarray) -> float:
    """Vendi score of order 1 (Friedman & Dieng, arXiv 2210.02410): an effective number of images.

    exp of the entropy of the eigenvalues of K/n, K the cosines of features [n, d]. With n > d the
    eigenvalues of the d x d matrix are taken: they are the same but for zeros.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features have shape {features.shape}. Give [n, d]")
    x = _unit(features) / np.sqrt(len(features))
    values = np.linalg.eigvalsh(x @ x.T if len(x) <= x.shape[1] else x.T @ x)
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def vendi_within(features: np.ndarray, groups: Sequence[Hashable]) -> float:
    """`vendi` of the images of one group, then the mean over groups.

    It grows with the images of a group, so these must be as many in what is compared.
    """
    x = np.asarray(features)
    return float(np.mean([vendi(x[rows]) for rows in _members(groups, len(x))]))


def pairwise_cosine(features: np.ndarray, groups: Sequence[Hashable]) -> float:
    """1 - mean cosine of all pairs of one group, then the mean over groups.

    `groups` names the prompt of each of the features [N, d]; usually class tokens of DINOv2.
    """
    x = _unit(features)
    spread = []
    for rows in _members(groups, len(x)):
        n = len(rows)
        total = np.square(x[rows].sum(0)).sum()  # sum of all cosines, the diagonal's n too
        spread.append(1 - (total - n) / (n * (n - 1)))
    return float(np.mean(spread))


def pairwise(
    images: Tensor, groups: Sequence[Hashable], distance: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Mean of distance(a, b) over all pairs of one group, then over groups.

    `distance`: two uint8 batches [P, C, H, W] -> [P], such as an `LPIPS`.
    """
    spread = []
    for rows in _members(groups, len(images)):
        i, j = torch.combinations(torch.tensor(rows)).unbind(1)
        spread.append(float(distance(images[i], images[j]).double().mean()))
    return float(np.mean(spread))


class LPIPS:
    """LPIPS (Zhang et al., arXiv 1801.03924) of uint8 images, AlexNet.

    The linear heads come with torchmetrics; `path` is torchvision's AlexNet file. `lpips` feeds
    [-1, 1], as the authors do. `lpips-dmd2` is for comparison with DMD2's numbers: Lanczos to 512,
    and [0, 1] fed without normalising.
    """

    VARIANTS = ("lpips", "lpips-dmd2")

    def __init__(self, path: Path, variant: str = "lpips", device: str | torch.device = "cpu"):
        if variant not in self.VARIANTS:
            raise ValueError(f"LPIPS variant {variant!r}. Give one of: {', '.join(self.VARIANTS)}")
        self.name = f"{variant}-alex:{weights.digest(path)[:8]}"
        self.dmd2, self.device = variant == "lpips-dmd2", device
        self.net = _alex(path).to(device)

    def __call__(self, a: Tensor, b: Tensor, batch: int = 32) -> Tensor:
        """Distances of two uint8 batches [P, C, H, W]: float32 [P]."""
        with exact():
            parts = [
                self.net(self._prepared(i), self._prepared(j)).flatten().cpu()
                for i, j in zip(a.split(batch), b.split(batch), strict=True)
            ]
        return torch.cat(parts)

    def _prepared(self, images: Tensor) -> Tensor:
        if self.dmd2:
            return pixels.lanczos(images, 512).to(self.device).float() / 255
        return pixels.rgb(images).to(self.device).float() / 127.5 - 1


def _alex(path: Path) -> nn.Module:
    from torchmetrics.functional.image.lpips import _LPIPS

    net = _LPIPS(net="alex", pnet_rand=True)  # with the linear heads; it downloads nothing
    state = weights.tensors(path)
    own = {name: "features." + name.split(".", 1)[1] for name, _ in net.net.named_parameters()}
    if missing := sorted(set(own.values()) - set(state)):
        raise ValueError(f"{path} has no {missing[0]}. Give torchvision's AlexNet file")
    net.net.load_state_dict({name: state[theirs] for name, theirs in own.items()})
    return net.eval().requires_grad_(False)


def _members(groups: Sequence[Hashable], n: int) -> list[list[int]]:
    """Row numbers of each group."""
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups of {n} images. Give the prompt of each image")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    if small := [group for group, rows in members.items() if len(rows) < 2]:
        raise ValueError(f"prompt {small[0]!r} has one image. Draw 2 or more seeds of each prompt")
    return list(members.values())


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1; features that are zero are alike, and orthogonal to all others."""
    x = np.asarray(features, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if (length == 0).any():
        x = np.concatenate([x, length == 0], 1)
        length = np.where(length == 0, 1.0, length)
    return x / length
