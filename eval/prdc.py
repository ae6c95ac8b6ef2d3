"""Precision and recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et
al., arXiv 2002.09797), from balls around every sample that reach to its k-th nearest neighbour.

Values move with the number of samples: keep both sets the same size in comparisons.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_EXACT = "donot_use_mm_for_euclid_dist"  # d(a, b) = d(b, a) to the bit, so `<` is meaningful


def prdc(real: np.ndarray, fake: np.ndarray, k: int = 5, *, chunk: int = 1000) -> dict[str, float]:
    """precision, recall, density, coverage of `fake` [N, d] against `real` [M, d]; float32."""
    x, y = (torch.as_tensor(np.ascontiguousarray(f, np.float32)) for f in (real, fake))
    if min(len(x), len(y)) <= k:
        raise ValueError(
            f"precision and recall with k={k} of {len(x)} real and {len(y)} generated features. "
            f"Give more than {k} of each"
        )
    radius_x, radius_y = _radii(x, k, chunk), _radii(y, k, chunk)
    holders = torch.zeros(len(y), dtype=torch.int64)  # real balls that hold this fake
    recalled, covered = [], []
    for xs, rs in zip(x.split(chunk), radius_x.split(chunk), strict=True):
        d = torch.cdist(xs, y, compute_mode=_EXACT)
        inside = d < rs[:, None]
        holders += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((d < radius_y).any(1))
    return {
        "precision": (holders > 0).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": holders.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of every row to its k-th nearest other row."""
    near = [
        torch.cdist(rows, x, compute_mode=_EXACT).topk(k + 1, largest=False).values[:, k]
        for rows in x.split(chunk)  # the nearest row is the row itself
    ]
    return torch.cat(near)
