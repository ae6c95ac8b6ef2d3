"""Sampling of autoregressive teachers, group by group, with keys and values kept.

    multinomial     the code at which the cumulative distribution passes Phi(first noise channel)
    flow_map        T_p of the whole noise vector (`parts.categorical`)

Both are functions of the noise eps [B, n, C], so an image depends on its own noise alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.tokens import TokenModel, log_probs

Pick = Callable[[Tensor, Tensor, Tensor], Tensor]  # log p [B, g, V], eps [B, g, C], codebook


def multinomial(log_p: Tensor, eps: Tensor, _codebook: Tensor) -> Tensor:
    """Tokens int64 [B, g] from p by inversion; eps [B, g, C] is unit noise."""
    u = torch.special.ndtr(eps[..., :1].double()).to(log_p.dtype)
    p = log_p.exp()
    index = torch.searchsorted(p.cumsum(-1), u).squeeze(-1).clamp(max=p.shape[-1] - 1)
    possible = p.gather(-1, index[..., None]).squeeze(-1) > 0  # rounding at the upper end
    return torch.where(possible, index, p.argmax(-1))


@torch.no_grad()
def sample_tokens(
    model: TokenModel,
    eps: Tensor,
    cond: Cond,
    guidance: float,
    pick: Pick = multinomial,
    *,
    prefix: Tensor | None = None,
    first: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Tokens int64 [B, n] of groups first .. stop - 1 from the teacher, the rest as in `prefix`.

    Args:
        eps: unit noise [B, n, C].
        prefix: tokens int64 [B, n]; groups below `first` are read by the teacher.
    """
    stop = len(model.groups) if stop is None else stop
    tokens = torch.zeros(eps.shape[:2], dtype=torch.int64, device=eps.device)
    tokens = tokens if prefix is None else prefix.clone()
    caches = [model.net.cache() for _ in range(2)]
    for group in range(first, stop):
        rows = model.rows(group)
        begin = 0 if group == first else rows.start  # the prefix is read in one pass
        inputs = model.read(model.vectors(tokens))[:, max(begin - 1, 0) : rows.stop - 1]
        logits = model.guide(inputs, cond, guidance, range(begin, rows.stop), caches)
        at = slice(rows.start, rows.stop)
        log_p = log_probs(logits[:, rows.start - begin :], model.choice)
        tokens[:, at] = pick(log_p, eps[:, at], model.codebook)
    return tokens
