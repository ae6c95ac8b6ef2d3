"""Class-conditional pipelines over image tokens: the autoregressive teacher, and its students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffdistill.parts.autoregressive import sample_tokens
from diffdistill.pipelines.scheduler import untrained_steps
from diffdistill.pipelines.token_nets import TokenNet
from diffdistill.pipelines.vq import VQTokenizer
from diffdistill.tokens import Choice, TokenModel, check_choice


def token_model(net: TokenNet, tokenizer: VQTokenizer, choice: Choice | None = None) -> TokenModel:
    """The interface that methods see, around a network and its tokenizer."""
    return TokenModel(
        net, tokenizer.codebook, tokenizer.groups, inputs=tokenizer.inputs, decode=tokenizer.decode,
        choice=choice,
    )  # fmt: skip


class _TokenPipeline(DiffusionPipeline):
    """Labels, noise and pictures, for teacher and students alike."""

    def _start(
        self,
        labels: int | Sequence[int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
    ) -> tuple[Tensor, Tensor]:
        """Labels int64 [N] and unit noise [N, n, C], after checks."""
        if output_type not in ("pil", "pt", "np"):
            raise ValueError(f"output_type is {output_type!r}. Allowed: pil, pt, np")
        values = [labels] if isinstance(labels, int) else [int(v) for v in labels]
        top = self.transformer.config.classes
        if bad := sorted({v for v in values if not 0 <= v <= top}):
            raise ValueError(
                f"labels {bad} do not exist. Allowed: 0 to {top - 1} ({top}: no class)"
            )
        if isinstance(generator, list) and len(generator) != len(values):
            raise ValueError(
                f"{len(generator)} generators for {len(values)} labels. Give one each."
            )
        label = torch.tensor(values, device=self._execution_device)
        net = self.transformer.config
        shape = (len(label), sum(self.tokenizer.groups), net.channels)
        if latents is None:
            eps = randn_tensor(shape, generator=generator, device=label.device, dtype=torch.float32)
        elif latents.shape == shape:
            eps = latents.to(label.device, torch.float32)
        else:
            raise ValueError(f"latents are {tuple(latents.shape)}. They must be {shape}.")
        return label, eps

    def _finish(self, vectors: Tensor, output_type: str, return_dict: bool):
        dtype = self.tokenizer.dtype
        x = self.tokenizer.decode(vectors.to(dtype)).float()
        x = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            x = x.permute(0, 2, 3, 1).numpy()
        images = self.numpy_to_pil(x) if output_type == "pil" else x
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class AutoregressivePipeline(_TokenPipeline):
    """A teacher: raster order (LlamaGen) or scales (VAR), one pass per group of tokens.

    Args:
        guidance: default of `guidance_scale`, in u + s (c - u); 1 is off. With rule "linear" s
            grows from 1 to this over the groups (VAR, whose `cfg` is this minus 1).
        rule, top_k, top_p, temperature: see `diffdistill.tokens.Choice`.
    """

    model_cpu_offload_seq = "transformer->tokenizer"

    def __init__(
        self,
        transformer: TokenNet,
        tokenizer: VQTokenizer,
        guidance: float = 1.0,
        rule: str = "constant",
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        check_choice({"rule": rule, "top_k": top_k, "top_p": top_p, "temperature": temperature})
        self.register_modules(transformer=transformer, tokenizer=tokenizer)
        self.register_to_config(
            guidance=guidance, rule=rule, top_k=top_k, top_p=top_p, temperature=temperature
        )

    @property
    def steps(self) -> int:
        return len(self.tokenizer.groups)

    def model(self) -> TokenModel:
        """The interface that methods see."""
        c = self.config
        choice = Choice(c.rule, c.top_k, c.top_p, c.temperature)
        return token_model(self.transformer, self.tokenizer, choice)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image per label.

        Args:
            labels: classes; `classes` itself draws without a class.
            num_inference_steps: None or the number of groups.
            guidance_scale: None: the pipeline's own; 0 and 1 mean no guidance.
            generator: one per image makes every image independent of the batch.
            latents: unit noise [N, n, C] instead of a draw; its first channel decides the tokens.
            output_type: "pil", "pt" ([N, c, H, W] in 0..1) or "np" ([N, H, W, c] in 0..1).
        """
        if num_inference_steps not in (None, self.steps):
            raise ValueError(untrained_steps(num_inference_steps, self.steps))
        label, eps = self._start(labels, generator, latents, output_type)
        guidance = self.config.guidance if guidance_scale is None else float(guidance_scale)
        model = self.model()
        tokens = sample_tokens(model, eps, {"label": label}, guidance or 1.0)
        return self._finish(model.vectors(tokens), output_type, return_dict)
