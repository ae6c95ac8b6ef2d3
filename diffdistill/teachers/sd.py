"""Stable Diffusion 1.x / 2.x pipelines: latents, a text encoder, UNet2DConditionModel."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffdistill.data.images import to_uint8
from diffdistill.denoiser import Denoiser
from diffdistill.progress import progress
from diffdistill.schedules import DDPM


class SDNet(nn.Module):
    """UNet2DConditionModel as net(z, t, text): z [B, 4, h, w], t float64 [B], text [B, L, d]."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    @property
    def backbone(self) -> nn.Module:
        """What the pipeline calls."""
        return self.unet

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(z, t.float(), encoder_hidden_states=text).sample


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def sd_denoiser(
    unet: UNet2DConditionModel, alphas_cumprod: Tensor, prediction_type: str, null_text: Tensor
) -> Denoiser:
    """The teacher interface of a Stable Diffusion UNet. null_text: [1, L, d], the empty prompt."""
    size = unet.config.sample_size
    return Denoiser(
        SDNet(unet),
        DDPM(alphas_cumprod),
        PREDICTIONS[prediction_type],
        shape=(unet.config.in_channels, size, size),
        null_cond={"text": null_text},
        feature_layer="unet.mid_block",
    )


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: list[str], batch: int = 256) -> Tensor:
    """Text embeddings [N, L, d], float32, as the pipeline itself computes them."""
    ids = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt",
        max_length=pipe.tokenizer.model_max_length,
    ).input_ids  # fmt: skip
    device = pipe.text_encoder.device
    given = progress(ids.split(batch), "encode prompts", unit="batch")
    parts = [pipe.text_encoder(part.to(device))[0] for part in given]
    return torch.cat(parts).float()


@torch.no_grad()
def encode_images(pipe: StableDiffusionPipeline, images: Tensor, batch: int = 256) -> Tensor:
    """Posterior means of uint8 [N, 3, H, W], scaled as the UNet expects: float32 latents."""
    vae = pipe.vae
    given = progress(images.split(batch), "encode images", unit="batch")
    encoded = (vae.encode(p.to(vae.device).float() / 127.5 - 1) for p in given)
    deterministic = isinstance(vae, AutoencoderDC)
    parts = [e.latent if deterministic else e.latent_dist.mean for e in encoded]
    return (torch.cat(parts) - shift_of(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe: StableDiffusionPipeline, latents: Tensor, batch: int = 256) -> Tensor:
    """Latents -> uint8 [N, 3, H, W]."""
    vae = pipe.vae
    parts = [decode(vae, part.to(vae.device, vae.dtype)) for part in latents.split(batch)]
    return to_uint8(torch.cat(parts))


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents, scaled as the network knows them, -> images in [-1, 1]; differentiable.

    The autoencoder comes to the latents: methods that decode while they train keep it there.
    """
    if vae.device != latents.device:
        vae.to(latents.device)
    return vae.decode(latents / vae.config.scaling_factor + shift_of(vae)).sample


def shift_of(vae: AutoencoderKL) -> float:
    """What SD3 and Flux subtract from latents; Stable Diffusion's autoencoder has none."""
    return vae.config.get("shift_factor") or 0.0
