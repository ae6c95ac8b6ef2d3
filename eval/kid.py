"""Kernel distance (Binkowski et al., arXiv 1801.01401): unbiased MMD^2, k(x,y) = (x.y/d + 1)^3.

Mean and standard deviation over random subsets; sets that are small together are taken whole.
Called KID only with Inception features. Can be slightly negative, and is not clipped.
"""

from __future__ import annotations

import numpy as np

_WHOLE = 4000  # N + M below this: one estimate from all pairs


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, std) over the subsets; std is 0 when the sets are taken whole."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kernel distance of {len(x)} and {len(y)} features. Give at least 2 each")
    if len(x) + len(y) < _WHOLE:
        return _mmd2(x, y), 0.0
    m = min(subset_size, len(x), len(y))
    rng = np.random.default_rng(seed)
    values = [
        _mmd2(x[rng.choice(len(x), m, replace=False)], y[rng.choice(len(y), m, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(among(x) + among(y) - 2 * kernel(x, y).mean())
