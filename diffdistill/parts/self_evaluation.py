"""A network that judges its own samples, on straight paths z_t = (1 - t) x + t eps.

Yu et al., "Self-Evaluation Unlocks Any-Step Text-to-Image Generation", arXiv 2512.22374.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.parts.flow_map import TwoTimes, flow_time
from diffdistill.schedules import bcast, shifted


class Marked(TwoTimes):
    """`TwoTimes` that can also be told that it sees samples of its own (fake = 1).

    The mark is a vector in the time embedding, zero at the start.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mark = nn.Parameter(torch.zeros(self.second[-1].out_features))

    def forward(
        self, z: Tensor, tau: Tensor, r: Tensor | None = None, fake: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:  # fmt: skip
        """fake: 0 or 1 for each sample, [B]."""
        t = flow_time(self.schedule, self.data_std, tau)
        shift = self.shift(t - (self.following(t) if r is None else r))
        if fake is not None:
            shift = shift + fake.to(shift.dtype)[:, None] * self.mark
        return self.shifted(shift, z, tau, cond)


def drawn_times(like: Tensor, tokens: int, diagonal: int, spread: float) -> tuple[Tensor, Tensor]:
    """(t, s) float64 [B]: t logit-normal and moved to noise, s = t in the first `diagonal` rows.

    Args:
        tokens: L of the network; ln of the time shift is 0.5 at 512 and 1.15 at 4096 of them.
        spread: the other s ~ U((1 - spread) t, t).
    """
    normal = torch.randn(len(like), dtype=torch.float64, device=like.device)
    t = shifted(normal.sigmoid(), math.exp(log_shift(tokens)))
    share = torch.rand(len(like), dtype=torch.float64, device=like.device)
    share[:diagonal] = 0
    return t, t * (1 - spread * share)


def log_shift(tokens: int) -> float:
    """mu, linear in the number of tokens."""
    return 0.5 + 0.65 * (tokens - 512) / 3584


def lead(t: Tensor, s: Tensor) -> Tensor:
    """lambda = sigma_t / alpha_t - sigma_s / alpha_s, float64 [B]."""
    return t / (1 - t) - s / (1 - s)


def blended(x0: Tensor, x_self: Tensor, lam: Tensor) -> Tensor:
    """(x0 + lambda x_self) / (1 + lambda)."""
    share = lam / (1 + lam)
    return torch.lerp(x0, x_self, bcast(share, x0))


def renormalised(y: Tensor, like: Tensor) -> Tensor:
    """y with the norm that each sample of `like` has."""
    norms = [v.flatten(1).norm(dim=1) for v in (like, y)]
    return y * bcast(norms[0] / norms[1].clamp_min(1e-12), y)
