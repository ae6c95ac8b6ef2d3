"""Latent adversarial distillation: heads on token features of a frozen network.

Sauer et al., arXiv 2403.12015, after StyleGAN-T's heads (Sauer et al., arXiv 2301.09515); as
SANA-Sprint has them (arXiv 2503.09641).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from diffdistill.denoiser import Denoiser


class LocalBatchNorm(nn.Module):
    """[B, C, N], each channel normalised over the positions of `virtual` samples (StyleGAN-T).

    A rest of the batch joins the last group. No running statistics.
    """

    def __init__(self, channels: int, virtual: int = 8):
        super().__init__()
        self.virtual = virtual
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = max(1, len(x) // self.virtual)
        cuts = [self.virtual] * (groups - 1)
        parts = x.split([*cuts, len(x) - sum(cuts)])
        y = torch.cat([F.batch_norm(p, None, None, training=True) for p in parts])
        return y * self.weight[:, None] + self.bias[:, None]


def _block(channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv), LocalBatchNorm(channels), nn.LeakyReLU(0.2))


class TokenHead(nn.Module):
    """[B, C, ...] -> one logit per position, [B, N]."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = _block(channels, 1), _block(channels, 9)
        self.last = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Tensor:
        x = self.first(feature.float().flatten(2))
        return self.last((x + self.second(x)) / math.sqrt(2)).flatten(1)


class TokenHeads(nn.Module):
    """One head per feature; all logits of a sample side by side, [B, positions of all]."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(c) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([h(f) for h, f in zip(self.heads, features, strict=True)], 1)


@torch.no_grad()
def token_heads(teacher: Denoiser, layers: Sequence[str]) -> TokenHeads:
    """Heads that fit these layers of the teacher (none: its feature_layer). For a role.

    Raises:
        ValueError: the teacher has no such layer, or too few positions for a kernel of nine.
    """
    known = {n for n, _ in teacher.net.named_modules()}
    if stray := [name for name in layers if name not in known]:
        raise ValueError(
            f"the teacher's network has no layers {stray}. Give method.feature_layers from its "
            f"modules: {', '.join(sorted(n for n in known if n.count('.') in (1, 2))[:40])}"
        )
    device = next(teacher.parameters()).device
    z = torch.zeros(2, *teacher.shape, device=device)
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    _, features = teacher.tap(z, t, teacher.null_cond(z), layers)
    if few := [tuple(f.shape[2:]) for f in features if f[0, 0].numel() < 5]:
        raise ValueError(
            f"feature maps of {few} are too small for the discriminator. Set method.gan=0 or "
            "method.feature_layers to layers with 5 positions or more"
        )
    return TokenHeads([f.shape[1] for f in features])


def mismatched(x: Tensor, fakes: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Fakes, and real samples with the condition of another; their conditions."""
    both = {k: torch.cat([v, v]) for k, v in cond.items()}
    return torch.cat([fakes, x.roll(1, 0)]), both
