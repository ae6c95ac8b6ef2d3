"""Stable Diffusion 3 pipelines: latents, up to three text encoders, SD3Transformer2DModel, flow."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.progress import progress
from diffdistill.schedules import RectifiedFlow


class SD3Net(nn.Module):
    """SD3Transformer2DModel as net(z, t, text, pooled) -> velocity eps - x0, shape of z.

    z [B, C, h, w]; t in [0, 1], float64 [B]; text [B, L, d]; pooled [B, p].
    """

    def __init__(self, transformer: SD3Transformer2DModel):
        super().__init__()
        self.transformer = transformer

    @property
    def backbone(self) -> nn.Module:
        """What the pipeline calls."""
        return self.transformer

    def forward(self, z: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(
            z, encoder_hidden_states=text, pooled_projections=pooled, timestep=(1000 * t).float(),
            return_dict=False,
        )[0]  # fmt: skip


def token_map(output: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
    """The image tokens of a joint block's output (text, image) as a map [B, C, h, w]."""
    return tokens_as_map(output[1], z)


def tokens_as_map(tokens: Tensor, z: Tensor) -> Tensor:
    """[B, N, C] -> [B, C, h, w], with the aspect ratio of z."""
    height = round((tokens.shape[1] * z.shape[-2] / z.shape[-1]) ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def sd3_denoiser(
    transformer: SD3Transformer2DModel, shift: float, null_cond: dict[str, Tensor]
) -> Denoiser:
    """The teacher interface of an SD3 transformer. `shift` is that of its flow schedule."""
    c = transformer.config
    return Denoiser(
        SD3Net(transformer),
        RectifiedFlow(shift),
        "flow",
        shape=(c.in_channels, c.sample_size, c.sample_size),
        null_cond=null_cond,
        feature_layer=f"transformer.transformer_blocks.{c.num_layers // 2 - 1}",
        feature_map=token_map,
    )


@torch.no_grad()
def encode_prompts(
    pipe: StableDiffusion3Pipeline, prompts: list[str], batch: int = 256
) -> dict[str, Tensor]:
    """text [N, L, d] and pooled [N, p], float32, as the pipeline computes them by default."""
    parts = []
    for start in progress(range(0, len(prompts), batch), "encode prompts", unit="batch"):
        part = prompts[start : start + batch]
        text, _, pooled, _ = pipe.encode_prompt(
            part, None, None, device=pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        parts.append((text.float(), pooled.float()))
    text, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"text": text, "pooled": pooled}
