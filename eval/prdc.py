"""Precision and recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et
al., arXiv 2002.09797), from balls around every sample that reach to its k-th nearest neighbour.

Values move with the number of samples: keep both sets the same size in comparisons. ADM and SiD
take k = 3 and points on the border as inside (`strict=False`); prdc and dgm-eval k = 5 and not.

Squared distances are |x|^2 + |y|^2 - 2 x.y in float64. A point whose distance equals the radius
to ten digits is on the border, so that rounding decides nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TIE = 1e-10


def prdc(
    real: np.ndarray, fake: np.ndarray, k: int = 5, *, strict: bool = True, chunk: int = 128
) -> dict[str, float]:
    """precision, recall, density, coverage of `fake` [N, d] against `real` [M, d].

    `strict`: inside a ball is nearer than its radius (<); else on its border, too (<=).
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision and recall with k={k} of {len(real)} real and {len(fake)} generated "
            f"features. Give more than {k} of each"
        )
    x, y = _centred(real, fake)
    radius_x, radius_y = _nearest(x, k + 1, chunk), _nearest(y, k + 1, chunk)
    less, tie = (torch.lt, 1 + _TIE) if strict else (torch.le, 1 - _TIE)
    norm_x, norm_y = (tie * f.square().sum(1) for f in (x, y))
    holders = torch.zeros(len(y), dtype=torch.int64)  # real balls that hold this fake
    nearest, margin = [], []  # of every real: its nearest fake; how far from a fake's ball
    for i in range(0, len(x), chunk):
        part = slice(i, i + chunk)
        d = torch.addmm(norm_y, x[part], y.T, alpha=-2).add_(norm_x[part, None])
        holders += less(d, radius_x[part, None]).sum(0, dtype=torch.int32)
        nearest.append(d.amin(1))
        margin.append(d.sub_(radius_y).amin(1))
    covered = less(torch.cat(nearest), radius_x)
    recalled = less(torch.cat(margin), torch.zeros(()))
    return {
        "precision": (holders > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": holders.double().mean().item() / k,
        "coverage": covered.double().mean().item(),
    }


def authenticity(train: np.ndarray, fake: np.ndarray, *, chunk: int = 256) -> float:
    """AuthPct (Alaa et al., arXiv 2102.08921), in percent: 100 means that nothing is memorised.

    A fake is authentic if its nearest train image is farther from it than that image is from its
    own nearest train image.
    """
    if len(train) < 2 or not len(fake):
        raise ValueError(f"authenticity of {len(fake)} features. Give some, and 2 or more of train")
    x, y = _centred(train, fake)
    own = _nearest(x, 2, chunk)
    norm_x = x.square().sum(1)
    authentic = 0
    for part in y.split(chunk):
        d, index = torch.addmm(norm_x, part, x.T, alpha=-2).min(1)
        norm = part.square().sum(1)
        authentic += int((d + norm > own[index] + _TIE * (norm + norm_x[index])).sum())
    return 100 * authentic / len(y)


def _centred(*sets: np.ndarray) -> list[Tensor]:
    """float64, shifted to one centre: small norms keep small distances exact."""
    if len({f.shape[1:] for f in sets}) > 1:
        raise ValueError(f"features {[f.shape for f in sets]} differ in d. Use one feature network")
    mean = sets[0].mean(0, dtype=np.float64)
    return [torch.from_numpy(f - mean) for f in sets]


def _nearest(x: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of every row to its k-th nearest row; the first is the row itself."""
    norm = x.square().sum(1)
    near = []
    for part in x.split(chunk):
        d = torch.addmm(norm, part, x.T, alpha=-2).topk(k, largest=False).values[:, k - 1]
        near.append(d + part.square().sum(1))
    return torch.cat(near).clamp_min(0)
