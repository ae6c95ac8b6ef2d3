"""Frechet distance between the Gaussians of two feature sets (Heusel et al., arXiv 1706.08500).

    FD = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2),   covariances with divisor N - 1

With A = C1^(1/2), the last trace is the sum of the square roots of the eigenvalues of A C2 A.
Called FID only with Inception features. Biased: two samples of one Gaussian differ by about
d(d+1)/(2N) + 2d/N, so distances with different N cannot be compared.
"""

from __future__ import annotations

import numpy as np


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


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(_positive(values))) @ vectors.T


def _positive(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of a semi-definite matrix without their rounding noise."""
    noise = np.finfo(np.float64).eps * len(values) * np.abs(values).max(initial=0)
    return np.where(values > noise, values, 0)


def frechet_distance(
    mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray
) -> float:
    """FD from means [d] and covariances [d, d]."""
    mu1, cov1, mu2, cov2 = (np.asarray(v, np.float64) for v in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"means {mu1.shape} and {mu2.shape} differ. Use one feature network")
    root = _root(cov1)
    cross = np.sqrt(_positive(np.linalg.eigvalsh(root @ cov2 @ root))).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_distance_of_features(a: np.ndarray, b: np.ndarray) -> float:
    """FD of two feature sets [N, d] and [M, d]; N may be smaller than d."""
    (mu1, cov1), (mu2, cov2) = mean_and_cov(a), mean_and_cov(b)
    return frechet_distance(mu1, cov1, mu2, cov2)


def mean_and_cov(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two passes in float64: exact also for few samples."""
    f = np.asarray(features, np.float64)
    if f.ndim != 2 or len(f) < 2:
        raise ValueError(f"features have shape {f.shape}. Give [N, d] with N of at least 2")
    mean = f.mean(0)
    centred = f - mean
    return mean, centred.T @ centred / (len(f) - 1)
