"""Sana pipelines: latents, one text encoder with a mask, SanaTransformer2DModel, flow."""

from __future__ import annotations

import inspect

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.progress import progress
from diffdistill.schedules import RectifiedFlow
from diffdistill.teachers.sd3 import tokens_as_map


class SanaNet(nn.Module):
    """SanaTransformer2DModel as net(z, t, text, mask) -> velocity eps - x0, shape of z.

    z [B, C, h, w]; t in [0, 1], float64 [B]; text [B, L, d]; mask int64 [B, L], 1: a token.
    """

    def __init__(self, transformer: SanaTransformer2DModel):
        super().__init__()
        self.transformer = transformer
        self.time_scale = 1000 * transformer.config.timestep_scale

    @property
    def backbone(self) -> nn.Module:
        """What the pipeline calls."""
        return self.transformer

    def forward(self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        out = self.transformer(
            z, encoder_hidden_states=text, encoder_attention_mask=mask,
            timestep=(self.time_scale * t).float(), return_dict=False,
        )[0]  # fmt: skip
        return out[:, : z.shape[1]]  # some predict a variance, too


def sana_denoiser(
    transformer: SanaTransformer2DModel, shift: float, null_cond: dict[str, Tensor]
) -> Denoiser:
    """The teacher interface of a Sana transformer. `shift` is that of its flow schedule."""
    c = transformer.config
    return Denoiser(
        SanaNet(transformer),
        RectifiedFlow(shift),
        "flow",
        shape=(c.in_channels, c.sample_size, c.sample_size),
        null_cond=null_cond,
        feature_layer=f"transformer.transformer_blocks.{max(0, c.num_layers // 2 - 1)}",
        feature_map=tokens_as_map,
    )


@torch.no_grad()
def encode_prompts(
    pipe: SanaPipeline, prompts: list[str], batch: int = 64, *, instructed: bool = True
) -> dict[str, Tensor]:
    """text float32 [N, L, d] and mask int64 [N, L], as the pipeline computes them by default.

    instructed: with the pipeline's default instruction before each prompt; the unconditional
    branch has none.
    """
    default = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    parts = []
    for start in progress(range(0, len(prompts), batch), "encode prompts", unit="batch"):
        text, mask, *_ = pipe.encode_prompt(
            prompts[start : start + batch], do_classifier_free_guidance=False,
            device=pipe.text_encoder.device,
            complex_human_instruction=default if instructed else None,
        )  # fmt: skip
        parts.append((text.float(), mask.long()))
    text, mask = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"text": text, "mask": mask}
