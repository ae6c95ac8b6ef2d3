"""Reference statistics in the files of other projects: npz in and out, torchmetrics' state.

    EDM         mu [d], sigma [d, d]
    clean-fid   mu, sigma in {name}_{mode}_custom_na.npz; feats [N, d] in ..._kid.npz
    ADM         mu, sigma of pool3, mu_s, sigma_s of the spatial tap, arr_0 uint8 [N, H, W, 3]

Covariances have the divisor N - 1. EDM2's .pkl is refused: to read it is to execute it.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffdistill.eval import fid

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

_KEYS = ("mu", "sigma", "mu_s", "sigma_s")
MODES = ("clean", "legacy_tensorflow", "legacy_pytorch")


@dataclass(frozen=True)
class Statistics:
    """Gaussians of a reference set: float64.

    Attributes:
        n: images behind them; 0 where the file does not say.
        mu_s, sigma_s: of the spatial features, for sFID.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int = 0
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None

    def __post_init__(self):
        for mu, sigma in ((self.mu, self.sigma), (self.mu_s, self.sigma_s)):
            if (mu is None) != (sigma is None):
                raise ValueError("statistics have a mean or a covariance alone. Give both")
            if mu is not None and (mu.ndim != 1 or sigma.shape != (len(mu), len(mu))):
                raise ValueError(f"mu is {mu.shape}, sigma {sigma.shape}. Give [d] and [d, d]")


def of_features(features: np.ndarray, spatial: np.ndarray | None = None) -> Statistics:
    """From features [N, d], and for sFID from those of the spatial tap."""
    rest = (None, None) if spatial is None else fid.mean_and_cov(spatial)
    return Statistics(*fid.mean_and_cov(features), len(features), *rest)


def load(path: Path | str) -> Statistics:
    """Statistics of an npz of EDM, clean-fid, ADM or `save`."""
    data = _arrays(Path(path), (*_KEYS, "n"))
    if missing := [key for key in ("mu", "sigma") if key not in data]:
        raise ValueError(f"{path} has no {missing[0]}. Give an npz with mu and sigma")
    n = int(data.pop("n", 0))
    return Statistics(n=n, **{key: np.asarray(v, np.float64) for key, v in data.items()})


def save(path: Path | str, statistics: Statistics) -> Path:
    """Write an npz that EDM, clean-fid and ADM's evaluator read, too."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics go into a file .npz, not {path.name}")
    arrays = {key: getattr(statistics, key) for key in _KEYS}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in arrays.items() if value is not None}
    np.savez_compressed(path, n=statistics.n, **kept)
    return path


def cleanfid_name(name: str, mode: str = "clean") -> str:
    """File name under which clean-fid finds custom statistics in its folder stats/."""
    if mode not in MODES:
        raise ValueError(f"clean-fid mode {mode!r}. Give one of: {', '.join(MODES)}")
    return f"{name}_{mode}_custom_na.npz".lower()


def save_cleanfid(
    folder: Path | str, name: str, features: np.ndarray, mode: str = "clean"
) -> tuple[Path, Path]:
    """Both files of clean-fid's custom statistics: for its FID and for its KID."""
    first = save(Path(folder) / cleanfid_name(name, mode), of_features(features))
    second = first.with_name(f"{first.stem}_kid.npz")
    np.savez_compressed(second, feats=features)
    return first, second


def load_images(path: Path | str) -> Tensor:
    """`arr_0` of an npz of ADM, uint8 [N, H, W, 3] -> [N, 3, H, W]."""
    images = _arrays(Path(path), ("arr_0",)).get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{path} has no images. Give an npz with arr_0, uint8 [N, H, W, 3]")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def save_images(path: Path | str, images: Tensor) -> Path:
    """uint8 [N, 3, H, W] -> an npz for ADM's evaluator."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}. Give uint8 [N, 3, H, W]")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    return path


# ---- torchmetrics -----------------------------------------------------------------------


def to_torchmetrics(
    metric: FrechetInceptionDistance, statistics: Statistics, side: str = "real"
) -> None:
    """Set one side of a FrechetInceptionDistance: sum N m, outer sum (N - 1) C + N m m^T, N.

    Build it with `reset_real_features=False`, so that the reference stays.
    """
    n, mu = statistics.n, statistics.mu
    if n < 2:
        raise ValueError("torchmetrics needs the number of images behind the statistics. Give n")
    outer = (n - 1) * statistics.sigma + n * np.outer(mu, mu)
    total, products, count = _states(metric, side)
    if total.shape != mu.shape:
        raise ValueError(f"the metric has {len(total)} features, the statistics {len(mu)}")
    total.copy_(torch.from_numpy(n * mu))
    products.copy_(torch.from_numpy(outer))
    count.fill_(n)


def from_torchmetrics(metric: FrechetInceptionDistance, side: str = "real") -> Statistics:
    """What one side of a FrechetInceptionDistance has seen."""
    total, products, count = (state.cpu().numpy() for state in _states(metric, side))
    n = int(count)
    if n < 2:
        raise ValueError(f"the metric has seen {n} images of the {side} side. Update it first")
    mu = total / n
    return Statistics(mu, (products - n * np.outer(mu, mu)) / (n - 1), n)


def _states(metric: FrechetInceptionDistance, side: str) -> list[Tensor]:
    if side not in ("real", "fake"):
        raise ValueError(f"side {side!r} of a metric. Give real or fake")
    names = ("features_sum", "features_cov_sum", "features_num_samples")
    return [getattr(metric, f"{side}_{name}") for name in names]


# ---- npz --------------------------------------------------------------------------------


def _arrays(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the keys that an npz has; the rest is not read."""
    if not path.is_file():
        raise ValueError(f"statistics {path} do not exist. Give an npz file")
    if path.suffix != ".npz":
        raise ValueError(
            f"{path.name} is not an npz. A .pkl (EDM2) is not read, because reading it executes "
            "it: open it where you trust it, and store mu and sigma with numpy.savez"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys if key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}. Make or download it again") from error
