"""Image tokenizers: one map of codes (VQGAN, LlamaGen), or residual codes of growing scales (VAR).

Esser et al., "Taming Transformers", arXiv 2012.09841; Sun et al., "Autoregressive Model Beats
Diffusion: Llama for Scalable Image Generation", arXiv 2406.06525; Tian et al., "Visual
Autoregressive Modeling", arXiv 2404.02905. Encoder and decoder are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from diffdistill.progress import progress
from diffdistill.tokens import nearest


class VQTokenizer(ModelMixin, ConfigMixin):
    """Images [B, c, size, size] in [-1, 1] <-> tokens [B, n].

    Args:
        size: of the image, which is padded to a multiple of the network's stride.
        widths: channels of each level; every level but the last halves the resolution.
        latent: channels between the networks and the convolutions around the codebook.
        scales: side of each scale's token map, the last one the whole grid; none: one map, raster.
        normalise: codes and features have unit length (LlamaGen).
        fold: space-to-depth factor in front of the encoder.
        kernel: of the convolutions around the codebook.
        attention: at the lowest resolution's blocks; the middle always has it.
        refiners: convolutions phi shared by the scales.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        channels: int = 3,
        widths: Sequence[int] = (32, 64, 64),
        layers: int = 1,
        latent: int = 64,
        codes: int = 128,
        code_channels: int = 8,
        scales: Sequence[int] | None = None,
        normalise: bool = True,
        fold: int = 1,
        kernel: int = 1,
        attention: bool = False,
        refiners: int = 4,
        norm_groups: int = 32,
    ):
        super().__init__()
        stride = fold * 2 ** (len(widths) - 1)
        self.grid = -(-size // stride)
        self.pad = (self.grid * stride - size) // 2
        if (self.grid * stride - size) % 2:
            raise ValueError(f"size {size} cannot be padded evenly to a multiple of {stride}")
        if scales is not None and scales[-1] != self.grid:
            raise ValueError(f"the last of scales {list(scales)} must be the grid, {self.grid}")
        inner = len(widths) - 1
        last = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
        last = last if attention else ("DownEncoderBlock2D", "UpDecoderBlock2D")
        shared = {
            "block_out_channels": tuple(widths), "layers_per_block": layers,
            "norm_num_groups": norm_groups,
        }  # fmt: skip
        self.encoder = Encoder(
            channels * fold**2, latent, double_z=False,
            down_block_types=("DownEncoderBlock2D",) * inner + last[:1], **shared,
        )  # fmt: skip
        self.decoder = Decoder(
            latent, channels * fold**2,
            up_block_types=last[1:] + ("UpDecoderBlock2D",) * inner, **shared,
        )  # fmt: skip
        self.quant_conv = nn.Conv2d(latent, code_channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(code_channels, latent, kernel, padding=kernel // 2)
        self.book = nn.Parameter(torch.randn(codes, code_channels))
        self.phi = nn.ModuleList(
            nn.Conv2d(code_channels, code_channels, 3, padding=1)
            for _ in range(refiners if scales is not None else 0)
        )

    @property
    def groups(self) -> tuple[int, ...]:
        """Tokens in each group."""
        if self.config.scales is None:
            return (1,) * self.grid**2
        return tuple(s * s for s in self.config.scales)

    @property
    def codebook(self) -> Tensor:
        """The vectors that the decoder consumes, [V, C]."""
        return F.normalize(self.book, dim=1) if self.config.normalise else self.book

    # ---- images to tokens ---------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """Images -> the map that is quantised, [B, C, grid, grid]."""
        x = F.pixel_unshuffle(F.pad(x, [self.pad] * 4), self.config.fold)
        f = self.quant_conv(self.encoder(x))
        return F.normalize(f, dim=1) if self.config.normalise else f

    @torch.no_grad()
    def tokens(self, x: Tensor, batch: int = 256) -> Tensor:
        """Images [N, c, size, size] in [-1, 1] -> tokens, int64 [N, n], on the images' device."""
        given = progress(x.split(batch), "encode images", unit="batch")
        parts = (self.features(part.to(self.book)) for part in given)
        return torch.cat([self.quantise(f)[0] for f in parts]).to(x.device)

    def quantise(self, f: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Map f [B, C, g, g] -> tokens [B, n], running sums f_hat, and what was quantised.

        The sums carry gradients to the codes. What was quantised ([B, s, s, C] of each group) has
        none: dead codes are seeded from it.
        """
        if self.config.scales is None:
            rest = f.permute(0, 2, 3, 1)
            index = nearest(rest.detach(), self.codebook)
            return index.flatten(1), [self.codebook[index].permute(0, 3, 1, 2)], [rest.detach()]
        rest, total = f.detach(), torch.zeros_like(f)
        found, sums, seen = [], [], []
        for k, side in enumerate(self.config.scales):
            small = F.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1)
            index = nearest(small, self.codebook)
            step = self._refine(k, self.codebook[index].permute(0, 3, 1, 2))
            total, rest = total + step, rest - step.detach()
            found.append(index.flatten(1))
            sums.append(total)
            seen.append(small)
        return torch.cat(found, 1), sums, seen

    # ---- tokens to images ---------------------------------------------------------------

    def sums(self, vectors: Tensor) -> list[Tensor]:
        """Code vectors [B, n, C] -> the running map f_hat after each scale, [B, C, grid, grid].

        f_hat_k = f_hat_{k-1} + phi_k(upsampled h_k), phi(h) = (h + conv(h)) / 2 (VAR).
        """
        total, out = 0, []
        for k, part in enumerate(vectors.to(self.book).split(self.groups, dim=1)):
            side = self.config.scales[k]
            total = total + self._refine(k, part.transpose(1, 2).unflatten(2, (side, side)))
            out.append(total)
        return out

    def inputs(self, vectors: Tensor) -> Tensor:
        """What a transformer reads for positions 1 .. n - 1, [B, n - 1, C].

        Raster: the token before. Scales: the running map, shrunk to the side of the next scale.
        """
        if self.config.scales is None:
            return vectors[:, :-1]
        pairs = zip(self.sums(vectors)[:-1], self.config.scales[1:], strict=True)
        maps = [F.interpolate(f, size=(side, side), mode="area") for f, side in pairs]
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)

    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors [B, n, C], codes or not, -> images [B, c, size, size]."""
        if self.config.scales is None:
            f = vectors.to(self.book).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        else:
            f = self.sums(vectors)[-1]
        return self.decode_map(f)

    def decode_map(self, f: Tensor) -> Tensor:
        """Map [B, C, grid, grid] -> images."""
        x = F.pixel_shuffle(self.decoder(self.post_quant_conv(f)), self.config.fold)
        return x[..., self.pad : x.shape[-2] - self.pad, self.pad : x.shape[-1] - self.pad]

    def _refine(self, k: int, h: Tensor) -> Tensor:
        if h.shape[-1] != self.grid:
            h = F.interpolate(h, size=(self.grid, self.grid), mode="bicubic")
        conv = self.phi[refiner_of(k, len(self.config.scales), len(self.phi))]
        return 0.5 * h + 0.5 * conv(h)


def refiner_of(scale: int, scales: int, refiners: int) -> int:
    """Which phi refines a scale: the one whose tick is nearest to scale / (scales - 1).

    Ticks lie evenly between 1 / 3R and 1 - 1 / 3R for R = 4 refiners, else 1 / 2R and 1 - 1 / 2R.
    In double precision on purpose: some scales lie halfway between two ticks.
    """
    edge = 1 / (3 if refiners == 4 else 2) / refiners
    ticks = np.linspace(edge, 1 - edge, refiners)
    return int(np.argmin(np.abs(ticks - scale / max(1, scales - 1))))
