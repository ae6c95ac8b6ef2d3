"""CMMD (Jayasumana et al., arXiv 2401.09603): MMD of CLIP image embeddings, Gaussian kernel.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),  sigma = 10,  x and y of unit length

The biased estimate (all pairs, the diagonal too), times 1000. Embeddings are those of CLIP
ViT-L/14 at 336 px; see `eval/networks.py`. Needs no Gaussian assumption, and few samples.
"""

from __future__ import annotations

import numpy as np

SIGMA = 10.0
_ROWS = 1024


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """From embeddings [N, d] and [M, d], which are normalised here; memory is one block of rows."""
    if x.ndim != 2 or x.shape[1:] != y.shape[1:] or not min(len(x), len(y)):
        raise ValueError(f"embeddings {x.shape} and {y.shape}. Give [N, d] and [M, d]")
    x, y = _unit(x), _unit(y)
    return 1000 * (_mean(x, x) + _mean(y, y) - 2 * _mean(x, y))


def _unit(f: np.ndarray) -> np.ndarray:
    f = np.asarray(f, np.float64)
    return f / np.linalg.norm(f, axis=1, keepdims=True)


def _mean(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of k - 1 over all pairs: the ones cancel in the MMD, and digits are kept.

    Of a set with itself only the blocks on and above the diagonal are computed.
    """
    same, total = a is b, 0.0
    for i in range(0, len(a), _ROWS):
        part = a[i : i + _ROWS]
        rest = b[i:] if same else b
        k = np.expm1((part @ rest.T - 1) / SIGMA**2)  # |x - y|^2 = 2 - 2 x.y
        total += k[:, : len(part)].sum() + 2 * k[:, len(part) :].sum() if same else k.sum()
    return total / (len(a) * len(b))
