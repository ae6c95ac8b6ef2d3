"""Class-conditional pixel-space UNet2DModel with EDM preconditioning (arXiv 2206.00364, Tab. 1).

    D(z, sigma) = c_skip z + c_out F(c_in z, c_noise)

The network works on the image padded to a multiple of 2^levels and folded space-to-depth, which
makes a pass several times cheaper at the same number of parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.schedules import EDM


class EDMNet(nn.Module):
    """UNet2DModel -> clean estimate. `fold` is the space-to-depth factor, `size` the image's."""

    def __init__(self, unet: UNet2DModel, *, size: int, fold: int = 2, sigma_data: float = 0.5):
        super().__init__()
        self.unet, self.size, self.fold, self.sigma_data = unet, size, fold, sigma_data
        self.pad = (unet.config.sample_size * fold - size) // 2

    @property
    def backbone(self) -> nn.Module:
        """What the pipeline calls."""
        return self.unet

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """z [B, C, size, size], t = sigma float64 [B], label int64 [B] -> x0."""
        sigma = t.double()
        total = sigma.square() + self.sigma_data**2
        wide = lambda v: v.to(z.dtype).view(-1, 1, 1, 1)  # noqa: E731
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data * total.rsqrt()
        folded = F.pixel_unshuffle(F.pad(wide(total.rsqrt()) * z, [self.pad] * 4), self.fold)
        c_noise = 100 * sigma.log() / 4  # the sinusoidal embedding expects tens to hundreds
        out = self.unet(folded, c_noise.float(), class_labels=label).sample.float()
        out = F.pixel_shuffle(out, self.fold)
        if self.pad:
            out = out[..., self.pad : -self.pad, self.pad : -self.pad]
        return wide(c_skip) * z + wide(c_out) * out


def edm_denoiser(
    unet: UNet2DModel, *, size: int, fold: int, sigma_data: float, sigma_min: float = EDM.t_min
) -> Denoiser:
    """The teacher interface of a class-conditional EDM UNet; the last class is the null class."""
    null = torch.tensor([unet.config.num_class_embeds - 1])
    return Denoiser(
        EDMNet(unet, size=size, fold=fold, sigma_data=sigma_data),
        EDM(t_min=sigma_min),
        "x0",
        shape=(unet.config.in_channels // fold**2, size, size),
        null_cond={"label": null},
        feature_layer="unet.mid_block",
        sigma_data=sigma_data,
    )
