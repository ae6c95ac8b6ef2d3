"""Train the small AutoencoderKL of an embedded world: L1 + L2 reconstruction, light KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from diffdistill.denoiser import Runtime
from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.progress import progress


@dataclass
class Config(MethodConfig):
    kl_weight: float = 1e-4  # on the KL per latent element
    detail: float = 0.0  # extra weight of pixels that differ from the image's median colour


class Codec(nn.Module):
    """AutoencoderKL called under a runtime; forward gives reconstruction and posterior."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae, self.runtime = vae, Runtime()

    def freeze_encoder(self) -> None:
        """From now on only the decoder is trainable, on noise-free latents."""
        decoder = ("vae.decoder.", "vae.post_quant_conv.")
        self.trainable_names = {n for n, _ in self.named_parameters() if n.startswith(decoder)}

    def forward(self, x):
        with self.runtime.context(x.device):
            posterior = self.vae.encode(x).latent_dist
            out = self.vae.decode(posterior.sample()).sample
        return out.float(), posterior


class Autoencoder(Method):
    Config = Config
    name = "autoencoder"

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self._roles = {}

    def updates(self):
        return (Update("autoencoder", ("student",), self.loss),)

    def loss(self, batch: Batch):
        out, posterior = self.student(batch.x)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = out - batch.x
        median = batch.x.flatten(2).median(-1).values[:, :, None, None]
        away = (batch.x - median).abs().amax(1, keepdim=True) > 0.2
        weight = 1 + self.cfg.detail * away
        return {
            "l1": (weight * error.abs()).mean(),
            "l2": (weight * error.square()).mean(),
            "kl": self.cfg.kl_weight * kl,
        }


@torch.no_grad()
def encode(vae: nn.Module, images: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Posterior means of uint8 [N, C, H, W] images, times the scaling factor: float32."""
    parts = [
        vae.encode(part.float() / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
        for part in progress(images.split(batch), "encode images", unit="batch")
    ]
    return torch.cat(parts)
