"""Frechet distance between the Gaussians of two feature sets (Heusel et al., arXiv 1706.08500).

    FD = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2),   covariances with divisor N - 1

Three routes to the last trace, equal to 1e-6 also for rank-deficient covariances:

    eigh     sum of the square roots of the eigenvalues of A C2 A, A = C1^(1/2)
    nuclear  nuclear norm of X Y^T, centred features scaled by 1/sqrt(N - 1): C1 = X^T X, C2 = Y^T Y
    eigvals  real part of the sum of the square roots of the eigenvalues of C1 C2 (torchmetrics)

Features with fewer rows than columns on both sides take `nuclear`, which is faster and has less
rounding; all else takes `eigh`.

Called FID only with Inception features. Biased: two samples of one Gaussian differ by about
d(d+1)/(2N) + 2d/N, so distances with different N cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ROWS = 4096  # converted to float64 at a time


class Moments:
    """Streaming mean and covariance; sums in float64."""

    def __init__(self, dim: int):
        self.n = 0
        self.sum = np.zeros(dim)
        self.outer = np.zeros((dim, dim))

    def update(self, features: np.ndarray) -> None:
        """Add features [n, dim]."""
        f = np.asarray(features, np.float64)
        if f.ndim != 2 or f.shape[1] != len(self.sum):
            raise ValueError(f"features have shape {f.shape}. Give [n, {len(self.sum)}]")
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def merge(self, other: Moments) -> None:
        """Add what another process has seen."""
        self.n += other.n
        self.sum += other.sum
        self.outer += other.outer

    @property
    def mean(self) -> np.ndarray:
        self._need(1)
        return self.sum / self.n

    @property
    def cov(self) -> np.ndarray:
        self._need(2)
        m = self.mean
        return (self.outer - self.n * np.outer(m, m)) / (self.n - 1)

    def _need(self, n: int) -> None:
        if self.n < n:
            raise ValueError(f"only {self.n} samples were seen. Give at least {n}")


def frechet_distance(
    mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray, *, route: str = "eigh"
) -> float:
    """FD from means [d] and covariances [d, d]; `route`: eigh or eigvals."""
    mu1, cov1, mu2, cov2 = (np.asarray(v, np.float64) for v in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"means {mu1.shape} and {mu2.shape} differ. Use one feature network")
    if route == "eigh":
        cross = _eigh(cov1, cov2)
    elif route == "eigvals":
        cross = np.sqrt(np.linalg.eigvals(cov1 @ cov2).astype(complex)).real.sum()
    else:
        raise ValueError(f"route {route!r} from covariances. Give eigh or eigvals")
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_distance_of_features(
    a: np.ndarray, b: np.ndarray, *, route: str | None = None
) -> float:
    """FD of two feature sets [N, d] and [M, d]; N may be smaller than d.

    Beyond the inputs it takes a few float64 [d, d], or with `nuclear` a float64 copy of the sets.
    """
    for f in (a, b):
        _check(f)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features {a.shape} and {b.shape} differ in d. Use one feature network")
    if route is None:
        route = "nuclear" if max(len(a), len(b)) < a.shape[1] else "eigh"
    if route != "nuclear":
        return frechet_distance(*mean_and_cov(a), *mean_and_cov(b), route=route)
    (mu1, x), (mu2, y) = _centred(a), _centred(b)
    cross = torch.linalg.svdvals(torch.from_numpy(x @ y.T)).sum().item()
    return float(np.square(mu1 - mu2).sum() + np.square(x).sum() + np.square(y).sum() - 2 * cross)


def mean_and_cov(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two passes in float64, a block of rows at a time: exact also for few samples."""
    f = np.asarray(features)
    _check(f)
    mean = f.mean(0, dtype=np.float64)
    cov = np.zeros((f.shape[1], f.shape[1]))
    for i in range(0, len(f), _ROWS):
        block = f[i : i + _ROWS] - mean
        cov += block.T @ block
    return mean, cov / (len(f) - 1)


def minimum_and_mean(distances: Sequence[float]) -> dict[str, float]:
    """What papers report of repeated evaluations: EDM the minimum of 3, SiD mean and std of 10.

    Never mix them. The std has divisor n - 1.
    """
    if len(distances) < 2:
        raise ValueError(f"{len(distances)} evaluation. Give 2 or more, with different seeds")
    values = np.asarray(distances, np.float64)
    return {
        "min": float(values.min()), "mean": float(values.mean()),
        "std": float(values.std(ddof=1)), "trials": len(values),
    }  # fmt: skip


def bias_notes(n: int, d: int, m: int = 0) -> list[str]:
    """A sentence where the bias is large: under 10 samples per dimension on either side.

    Args:
        n, m: generated and reference images; m = 0 is not known.
    """
    if (least := min(n, m or n)) >= 10 * d:
        return []
    return [
        f"a Frechet distance of {least} samples in {d} dimensions has a large bias. Compare it "
        "only with others of as many, and look at the kernel distance, too"
    ]


def _check(features: np.ndarray) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {features.shape}. Give [N, d] with N of at least 2")


def _centred(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(0, dtype=np.float64)
    return mean, (features - mean) / np.sqrt(len(features) - 1)


def _eigh(cov1: np.ndarray, cov2: np.ndarray) -> float:
    values, vectors = (v.numpy() for v in torch.linalg.eigh(torch.from_numpy(cov1)))
    root = (vectors * np.sqrt(_positive(values))) @ vectors.T
    product = torch.from_numpy(root @ cov2 @ root)
    return np.sqrt(_positive(torch.linalg.eigvalsh(product).numpy())).sum()


def _positive(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of a semi-definite matrix without their rounding noise."""
    noise = np.finfo(np.float64).eps * len(values) * np.abs(values).max(initial=0)
    return np.where(values > noise, values, 0)
