"""Sampling of autoregressive teachers group by group, of their students in one or two passes.

    multinomial             the code at which the cumulative probability passes Phi(eps[0])
    categorical.flow_map    T_p of the whole noise vector

Both are functions of the noise eps [B, n, C], so an image depends on its own noise alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.denoiser import Cond
from diffdistill.method import TokenSampler
from diffdistill.tokens import TokenModel, log_probs

Pick = Callable[[Tensor, Tensor, Tensor], Tensor]  # log p [B, g, V], eps [B, g, C], codebook


def multinomial(log_p: Tensor, eps: Tensor, _codebook: Tensor) -> Tensor:
    """Tokens int64 [B, g] from p by inversion; eps [B, g, C] is unit noise."""
    u = torch.special.ndtr(eps[..., :1].double()).to(log_p.dtype)
    p = log_p.exp()
    index = torch.searchsorted(p.cumsum(-1), u).squeeze(-1).clamp(max=p.shape[-1] - 1)
    possible = p.gather(-1, index[..., None]).squeeze(-1) > 0  # rounding at the upper end
    return torch.where(possible, index, p.argmax(-1))


def next_token_loss(model: TokenModel, tokens: Tensor, label: Tensor, dropout: float) -> Tensor:
    """Cross entropy of every token given the earlier groups, a scalar.

    Args:
        tokens: int64 [B, n]. label: int64 [B].
        dropout: share of samples that see no class, for guidance.
    """
    drop = torch.rand(len(label), device=label.device) < dropout
    label = label.masked_fill(drop, model.net.config.classes)
    logits = model.logits(model.vectors(tokens), {"label": label})
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


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


def generate(
    student: TokenModel, eps: Tensor, cond: Cond, sampler: TokenSampler, start: Tensor | None = None
) -> Tensor:
    """Vectors [B, n, C] of a student from unit noise. Gradients flow.

    A jump student (arXiv 2412.17153, code): each call reads what is decoded so far, and behind it
    the noise of the beginning, for the trajectory is tied to it. A diffusion student (2510.21003):
    q = eps - v(eps, 1, f(eps_<i)).

    Args:
        start: vectors of the groups below sampler.starts[0], if that is not 0.
    """
    if student.net.config.kind == "diffusion":
        f = student.features(eps, cond)
        return eps - student.velocity(eps, torch.ones_like(eps[..., 0]), f)
    level, x = student.level[:, None], eps if start is None else start
    for first in sampler.starts:
        x = torch.where(level < first, x, eps)
        logits, vectors = student.jump(x, first, cond)
        answer = torch.where(
            level < sampler.split, read_out(student, logits, eps, sampler), vectors
        )
        x = torch.where(level < first, x, answer)
    return x


def read_out(student: TokenModel, logits: Tensor, eps: Tensor, sampler: TokenSampler) -> Tensor:
    """Codes that the logits [B, n, V] of a student name: vectors [B, n, C]."""
    if sampler.draw == "multinomial":
        return student.vectors(multinomial(logits.float().log_softmax(-1), eps, student.codebook))
    return student.vectors(logits.argmax(-1))


@torch.no_grad()
def generate_with_teacher(
    student: TokenModel,
    teacher: TokenModel,
    eps: Tensor,
    cond: Cond,
    sampler: TokenSampler,
    groups: range,
    guidance: float,
) -> Tensor:
    """The student's sample with some groups drawn again by the teacher: vectors [B, n, C].

    The groups before `groups` become the nearest codes. Behind them a jump student answers once
    more, from its noise; a diffusion student's first answer stays.
    """
    level, one = student.level[:, None], replace(sampler, starts=(0,))
    x = generate(student, eps, cond, one) if groups.start else eps
    tokens = sample_tokens(
        teacher, eps, cond, guidance, prefix=student.nearest(x), first=groups.start,
        stop=groups.stop,
    )  # fmt: skip
    done = student.vectors(tokens)
    if student.net.config.kind == "jump" and groups.stop < len(student.groups):
        last = replace(sampler, starts=(groups.stop,))
        return generate(student, eps, cond, last, start=done)
    return torch.where(level < groups.stop, done, x)
