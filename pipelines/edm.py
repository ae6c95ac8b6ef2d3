"""Class-conditional EDM pipeline: the teacher with Heun's method, students with their own steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffdistill.denoiser import Denoiser, guided
from diffdistill.parts.guidance import within
from diffdistill.parts.ode import Churn, heun
from diffdistill.pipelines.classes import ClassPipeline
from diffdistill.pipelines.scheduler import FewStepScheduler, HeunEDMScheduler
from diffdistill.schedules import EDM
from diffdistill.schedules import times as times_like
from diffdistill.teachers.unet import edm_denoiser


class EDMPipeline(ClassPipeline):
    """A UNet2DModel with EDM preconditioning; the scheduler decides how it samples.

    Args:
        scheduler: FewStepScheduler (a student), HeunEDMScheduler (a teacher).
        size, fold, sigma_data: of `diffdistill.teachers.unet.EDMNet`.
        num_classes: labels are 0 .. num_classes - 1; label num_classes means "no class".
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: FewStepScheduler | HeunEDMScheduler,
        size: int = 32,
        fold: int = 2,
        sigma_data: float = 0.5,
        num_classes: int = 10,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            size=size, fold=fold, sigma_data=sigma_data, num_classes=num_classes
        )

    def denoiser(self) -> Denoiser:
        """D(z, sigma, label) of the network."""
        c, low = self.config, getattr(self.scheduler.config, "sigma_min", EDM.t_min)
        return edm_denoiser(
            self.unet, size=c.size, fold=c.fold, sigma_data=c.sigma_data, sigma_min=low
        )

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
            labels: classes; num_classes itself draws without a class.
            num_inference_steps: None: as trained (student), as configured (teacher).
            guidance_scale: None, 0 and 1 mean no guidance (one pass per call instead of two).
            generator: one per image makes every image independent of the batch.
            latents: unit-variance start noise [N, C, H, W], instead of a draw.
            output_type: "pil", "pt" ([N, C, H, W] in 0..1) or "np" ([N, H, W, C] in 0..1).
        """
        net = self.denoiser()
        label, eps = self._start(
            labels, self.config.num_classes, net.shape, generator, latents, output_type
        )
        self.scheduler.set_timesteps(num_inference_steps)
        scale = 1.0 if guidance_scale in (None, 0, 1) else float(guidance_scale)  # type: ignore[arg-type]
        denoise, cond = guided(net, scale), {"label": label}
        if isinstance(self.scheduler, HeunEDMScheduler):
            x = self._heun(net, denoise, net.schedule, eps, cond, generator)
        else:
            x = eps * self.scheduler.init_noise_sigma
            for t in self.progress_bar(self.scheduler.timesteps.tolist()):
                x0 = denoise(x, times_like(t, x), cond)
                x = self.scheduler.step(x0, t, x, generator=generator, return_dict=False)[0]
        return self._finish(x, output_type, return_dict)

    def passes(self, steps: int | None, guidance_scale: float | None) -> int:
        """Network passes per image of a teacher; guided calls are two. Nothing is evaluated."""
        count = 0

        def calls(passes: int):
            def denoise(z: Tensor, _t: Tensor, _cond: object) -> Tensor:
                nonlocal count
                count += passes
                return z

            return denoise

        self.scheduler.set_timesteps(steps)
        twice = 1 if guidance_scale in (None, 0, 1) else 2
        eps, unused = torch.zeros(1, 1), torch.Generator()
        self._heun(calls(1), calls(twice), self.denoiser().schedule, eps, {}, unused)
        return count

    def _heun(self, plain, guided_denoise, schedule, eps, cond, generator) -> Tensor:
        """The teacher's sampler, with what its scheduler says about churn and guidance."""
        c = self.scheduler.config
        draw = lambda y: randn_tensor(  # noqa: E731
            y.shape, generator=generator, device=y.device, dtype=y.dtype
        )
        churn = Churn(c.s_churn, c.s_tmin, c.s_tmax, c.s_noise, draw)
        denoise = within(plain, guided_denoise, c.guidance_tmin, c.guidance_tmax)
        return heun(denoise, schedule, eps, cond, len(self.scheduler.timesteps), churn=churn)
