"""What pipelines over class labels share: labels, start noise and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ClassPipeline(DiffusionPipeline):
    """Base of pipelines that draw one image per label."""

    def _start(
        self,
        labels: int | Sequence[int],
        classes: int,
        shape: Sequence[int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
    ) -> tuple[Tensor, Tensor]:
        """Labels int64 [N] and unit noise float32 [N, *shape], after checks.

        Raises:
            ValueError: a label above `classes` (which stands for no class), generators that are not
                one per label, latents of another shape, or an unknown output type.
        """
        if output_type not in ("pil", "pt", "np"):
            raise ValueError(f"output_type is {output_type!r}. Allowed: pil, pt, np")
        values = [labels] if isinstance(labels, int) else [int(v) for v in labels]
        if bad := sorted({v for v in values if not 0 <= v <= classes}):
            raise ValueError(
                f"labels {bad} do not exist. Allowed: 0 to {classes - 1} ({classes}: no class)"
            )
        count = len(values)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} labels. Give one each.")
        label, shape = torch.tensor(values, device=self._execution_device), (count, *shape)
        if latents is None:
            eps = randn_tensor(shape, generator=generator, device=label.device, dtype=torch.float32)
        elif latents.shape == shape:
            eps = latents.to(label.device, torch.float32)
        else:
            raise ValueError(f"latents are {tuple(latents.shape)}. They must be {shape}.")
        return label, eps

    def _finish(
        self, x: Tensor, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        """Images [N, C, H, W] in [-1, 1] as the caller wants them."""
        images = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)
