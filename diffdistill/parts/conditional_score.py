"""Score distillation token by token, with an autoregressive teacher as exact conditional score.

Liu et al., "Distilled Decoding 2", arXiv 2510.21003. With z = (1 - t) q + t eps for each token,
a = E[q | z, q_<i] by the teacher (closed form, `parts.categorical`), b the same by the guidance
network's velocity, b = z - t v. A teacher that reads indices must learn to read vectors first:
`reading_error`, then its ordinary loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond
from diffdistill.parts.categorical import denoised, kept
from diffdistill.parts.matching import score_identity
from diffdistill.tokens import TokenModel, log_probs

Divergence = Literal["sid", "dmd"]
Conditional = tuple[Tensor, Tensor]  # log p [B, n, k] and codes [V, C] or [B, n, k, C]


def reading_error(model: TokenModel, teacher: TokenModel) -> Tensor:
    """sum_j |enter(c_j) - e_j|^2 / V: a new input layer against the teacher's index embedding."""
    table = teacher.net.enter.weight.detach()
    return (model.net.enter(model.codebook.to(table.dtype)) - table).square().sum(-1).mean()


def carry(source: nn.Module, target: nn.Module) -> None:
    """All parameters that two kinds of one network share."""
    values = dict(source.named_parameters())
    for name, p in target.named_parameters():
        if name in values:
            p.copy_(values[name])


@torch.no_grad()
def conditionals(teacher: TokenModel, q: Tensor, cond: Cond, guidance: float) -> Conditional:
    """The teacher's p(. | q_<i) at every position, guided and truncated, from vectors [B, n, C]."""
    log_p = log_probs(teacher.logits(q, cond, guidance), teacher.choice)
    return kept(log_p, teacher.codebook, teacher.choice.top_k)


def noised(q: Tensor, low: float, high: float, draws: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """z, t and eps of `draws` independent noisings of each token: [m, B, n, C], t [m, B, n]."""
    t = low + (high - low) * torch.rand(draws, *q.shape[:-1], device=q.device, dtype=q.dtype)
    eps = torch.randn(draws, *q.shape, device=q.device, dtype=q.dtype)
    return (1 - t)[..., None] * q + t[..., None] * eps, t, eps


def velocity_loss(model: TokenModel, f: Tensor, z: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Mean over draws and tokens of |v_model(z, t, f) - v|^2, summed over channels.

    Args:
        f: features [B, n, d], shared by the m draws of z, t and v ([m, B, n, ...]).
    """
    f = f.expand(len(z), *f.shape)
    return (model.velocity(z, t, f) - v).square().sum(-1).mean()


def teacher_velocity(z: Tensor, t: Tensor, p: Conditional) -> Tensor:
    """v_Phi = (z - D) / t = E[eps - q | z], the ground-truth score as a velocity."""
    return (z - denoised(z, t, *p)) / t[..., None]


def conditional_loss(
    q: Tensor, a: Tensor, b: Tensor, *, alpha: float, floor: float, divergence: Divergence
) -> Tensor:
    """omega (a - b) . [(a - q) - alpha (a - b)], summed over channels, mean over tokens.

    omega = 1 / (mean_c |a - q| + floor) without gradient: the teacher is often certain, then a = q
    and the plain normaliser explodes. alpha above 1, SiD's default for images, diverges here. At
    alpha = 1 the mean is 0 for every generator: it does not measure progress.

    "dmd" has the gradient omega (b - a) in q alone (arXiv 2311.18828).
    """
    omega = 1 / ((a - q).detach().abs().mean(-1, keepdim=True) + floor)
    if divergence == "dmd":
        return (omega * (b - a)).detach().mul(q).sum(-1).mean()
    return (omega * score_identity(q, a, b, alpha)).sum(-1).mean()
