"""Discriminators on denoiser features: DMD2's head, SiDA's channel mean, and their losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser


class Head(nn.Sequential):
    """[B, C, h, w] -> logit [B, 1] (DMD2): strided convolutions to 4 x 4, then one logit."""

    def __init__(self, channels: int, size: int):
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), *_norm(channels)]
            size = (size + 2 - 4) // 2 + 1
        layers += [nn.Conv2d(channels, channels, size, size, 0), *_norm(channels)]
        super().__init__(*layers, nn.Conv2d(channels, 1, 1), nn.Flatten())

    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature.float())


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    """GroupNorm 32 (DMD2), fewer groups for narrow networks.

    The last map is 1 x 1: a group of few channels would be normalised to a constant.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8))
    return nn.GroupNorm(groups, channels), nn.SiLU()


@torch.no_grad()
def gan_head(teacher: Denoiser) -> Head:
    """A head that fits the features of this teacher (and of every copy of it)."""
    device = next(teacher.parameters()).device
    z = torch.zeros(2, *teacher.shape, device=device)
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    feature = teacher.features(z, t, teacher.null_cond(z))
    return Head(feature.shape[1], feature.shape[-1])


def generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-logit): the student wants to be called real."""
    return F.softplus(-fake_logits).mean()


def critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(logit of fakes) + mean softplus(-logit of reals)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def r1(logits_of: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """0.5 mean |grad_z logit|^2 at real inputs (Mescheder et al., arXiv 1801.04406, Eq. 9).

    Differentiates twice; attention needs precision.attention=math for that.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(logits_of(z).sum(), z, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def r1_approximate(real_logits: Tensor, shifted_logits: Tensor) -> Tensor:
    """mean (logit of x - logit of x + small noise)^2 (Lin et al., arXiv 2501.08316)."""
    return (real_logits - shifted_logits).square().mean()


@torch.no_grad()
def accuracy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Share of logits on the right side of zero; near 1 for long means the GAN is lost."""
    return 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())


def pooled_logits(feature: Tensor) -> Tensor:
    """Channel means as logits, no parameters (SiDA, arXiv 2410.14919): [B, C, h, w] -> [B, h, w].

    Tokens [B, N, C] give their mean over positions, [B, C] (SiD-DiT, arXiv 2509.25127).
    """
    return feature.mean(1)


def generator_losses(fake_logits: Tensor) -> Tensor:
    """softplus(-logit), the mean over each sample's map: [B, ...] -> [B]."""
    return F.softplus(-fake_logits).flatten(1).mean(1)


def critic_losses(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """BCE of reals plus BCE of fakes, per sample [B]: a weight must meet its own sample."""
    return generator_losses(real_logits) + generator_losses(-fake_logits)
