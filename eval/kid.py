"""Kernel distance (Binkowski et al., arXiv 1801.01401): unbiased MMD^2, k(x,y) = (x.y/d + 1)^3.

Mean and standard deviation over random subsets; sets that are small together are taken whole.
Called KID only with Inception features, and then often given times 1000. Can be slightly negative,
and is not clipped. All in float64: in float32 the difference of the large kernel means keeps only
three or four digits.
"""

from __future__ import annotations

import numpy as np

_WHOLE = 4000  # N + M below this: one estimate from all pairs
_ROWS = 64


def kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    *,
    scale: float = 1.0,
) -> tuple[float, float]:
    """(mean, std) over the subsets, times `scale`; std is 0 when the sets are taken whole."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kernel distance of {len(x)} and {len(y)} features. Give at least 2 each")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"features {x.shape} and {y.shape} differ in d. Use one feature network")
    if len(x) + len(y) < _WHOLE:
        return scale * _mmd2(x, y), 0.0
    m = min(subset_size, len(x), len(y))
    rng = np.random.default_rng(seed)
    values = [
        _mmd2(x[rng.choice(len(x), m, replace=False)], y[rng.choice(len(y), m, replace=False)])
        for _ in range(subsets)
    ]
    return scale * float(np.mean(values)), scale * float(np.std(values))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    root = np.sqrt(x.shape[1])
    x, y = (np.insert(np.asarray(f, np.float64) / root, 0, 1, axis=1) for f in (x, y))
    n, m = len(x), len(y)
    return float(
        (_sum(x, x) - _diagonal(x)) / (n * (n - 1))
        + (_sum(y, y) - _diagonal(y)) / (m * (m - 1))
        - 2 * _sum(x, y) / (n * m)
    )


def _sum(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of (a_i.b_j)^3 over all pairs, a block of rows at a time: it stays in the cache.

    Of a set with itself only the blocks on and above the diagonal are computed.
    """
    same, total = a is b, 0.0
    for i in range(0, len(a), _ROWS):
        part = a[i : i + _ROWS]
        k = part @ (b[i:] if same else b).T
        squares = k * k  # a power of 3 costs ten times as much
        total += (1 + same) * np.vdot(squares, k)
        if same:
            total -= np.einsum("ij,ij", squares[:, : len(part)], k[:, : len(part)])
    return total


def _diagonal(a: np.ndarray) -> float:
    return (np.square(a).sum(1) ** 3).sum()
