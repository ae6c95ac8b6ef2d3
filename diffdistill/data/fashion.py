"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 28 x 28 grey images of ten kinds of clothing."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("~/.cache/diffdistill/fashion-mnist"))
_FILES = {"train": "train", "test": "t10k"}


def folder() -> Path:
    """Where the four idx files are: DIFFDISTILL_FASHION, Debian's package, or the cache."""
    own = os.environ.get("DIFFDISTILL_FASHION")
    for path in [Path(own)] if own else FOLDERS:
        if (path.expanduser() / "train-images-idx3-ubyte.gz").is_file():
            return path.expanduser()
    raise ValueError(
        "Fashion-MNIST is not on this machine (looked in "
        f"{own or ', '.join(map(str, FOLDERS))}). Install Debian's package dataset-fashion-mnist, "
        "or run torchvision.datasets.FashionMNIST(root, download=True) and set "
        "DIFFDISTILL_FASHION to the folder of its four .gz files (30 MB)."
    )


def load(split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 28, 28], labels int64 [N]; split is train (60,000) or test (10,000)."""
    stem = folder() / _FILES[split]
    images = _read(Path(f"{stem}-images-idx3-ubyte.gz"), 16).reshape(-1, 1, 28, 28)
    labels = _read(Path(f"{stem}-labels-idx1-ubyte.gz"), 8)
    if len(images) != len(labels):
        raise ValueError(
            f"{stem}: {len(images)} images but {len(labels)} labels; files are damaged"
        )
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _read(path: Path, header: int) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header).copy()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}. Install the data set again.") from error


def fingerprint(images: Tensor) -> str:
    """Hash of a set of images, for result records."""
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]
