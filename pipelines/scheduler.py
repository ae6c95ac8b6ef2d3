"""Schedulers for students that no stock diffusers scheduler reproduces, and for the EDM teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.method import Sampler
from diffdistill.parts.rollout import finish
from diffdistill.parts.rollout import renoise as renoise_step
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, karras
from diffdistill.schedules import times as times_like

PREDICTIONS = {"sample": "x0", "epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}
SCALE = {"edm": 1, "ddpm": 1, "flow": 1000}  # of the times that pipelines hand to the network


@dataclass
class FewStepOutput(BaseOutput):
    """prev_sample: the next network input, or the sample after the last step."""

    prev_sample: Tensor
    denoised: Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """The sampler a student was trained with; it knows no other.

    Args:
        times: the network is called at these times, noisiest first: sigmas ("edm"), indices of
            the beta table ("ddpm") or times in (0, 1] ("flow"; pipelines see them times 1000).
        renoise: as in `diffdistill.method.Sampler`.
        prediction_type: what `step` is given: the x0 estimate ("sample"), epsilon, v_prediction,
            flow_prediction.
        betas: the teacher's table, for "ddpm".
        eta: of renoise "tcd" and "ancestral".
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        times: list[float] = (80.0,),  # type: ignore[assignment]
        kind: str = "edm",
        renoise: str = "fresh",
        prediction_type: str = "sample",
        betas: list[float] | None = None,
        eta: float = 1.0,
    ):
        for name, value, allowed in (
            ("kind", kind, tuple(SCALE)),
            ("renoise", renoise, ("fresh", "ode", "tcd", "ancestral")),
            ("prediction_type", prediction_type, tuple(PREDICTIONS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}. Allowed: {', '.join(allowed)}")
        if (kind == "ddpm") != (betas is not None):
            raise ValueError("betas is the teacher's noise table: give it for ddpm only")
        if list(times) != sorted(set(times), reverse=True) or not times:
            raise ValueError(f"times must be one or more numbers, falling; given {list(times)}")
        self.sampler = Sampler(tuple(float(t) for t in times), renoise, eta=eta)  # type: ignore[arg-type]
        schedule = RectifiedFlow() if kind == "flow" else EDM()
        if betas is not None:
            schedule = DDPM(torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), 0))
        self._denoiser = Denoiser(torch.nn.Identity(), schedule, PREDICTIONS[prediction_type])  # type: ignore[arg-type]
        self.init_noise_sigma = schedule.start_scale(self.sampler.times[0])
        self.set_timesteps()

    @property
    def steps(self) -> int:
        return len(self.sampler.times)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Only the trained number of steps is accepted (None: that one)."""
        if num_inference_steps not in (None, self.steps):
            raise ValueError(untrained_steps(num_inference_steps, self.steps))
        seen = [SCALE[self.config.kind] * t for t in self.sampler.times]
        self.timesteps = torch.tensor(seen, dtype=torch.float64, device=device)

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FewStepOutput | tuple[Tensor, Tensor]:
        """The next network input; after the last step the sample."""
        times, seen = self.sampler.times, self.timesteps.tolist()
        if float(timestep) not in seen:
            raise ValueError(f"this student was not trained at time {float(timestep)}; {seen} only")
        index = seen.index(float(timestep))
        t = times[index]
        x0 = self._denoiser.to_x0(model_output.float(), sample.float(), times_like(t, sample))
        schedule = self._denoiser.schedule
        if index + 1 < len(times):
            eps = sample  # not used by "ode"
            if self.sampler.renoise != "ode":
                eps = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            after = renoise_step(schedule, x0, sample, t, times[index + 1], self.sampler, eps)
        else:
            after = finish(schedule, x0, sample, t, self.sampler)
        after, x0 = after.to(sample.dtype), x0.to(sample.dtype)
        return FewStepOutput(prev_sample=after, denoised=x0) if return_dict else (after, x0)


class HeunEDMScheduler(SchedulerMixin, ConfigMixin):
    """Marks an EDM teacher: Heun's method on Karras sigmas (arXiv 2206.00364, Alg. 1 and 2).

    The steps are taken by `diffdistill.parts.ode.heun`, since each needs two network calls.

    Args:
        steps: default number of steps.
        sigma_min: the last network call is at this noise level. Below it a network must amplify
            the noise that it removes, and small networks do that badly.
        s_churn, s_tmin, s_tmax, s_noise: the stochastic sampler of Alg. 2; s_churn=0 turns it off.
        guidance_tmin, guidance_tmax: noise levels at which guidance acts (arXiv 2404.07724).
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        steps: int = 18,
        sigma_min: float = EDM.t_min,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = EDM.t_max,
        s_noise: float = 1.0,
        guidance_tmin: float = 0.0,
        guidance_tmax: float = EDM.t_max,
    ):
        self.steps, self.sigma_min = steps, sigma_min
        self.init_noise_sigma = EDM().start_scale(EDM().t_max)
        self.set_timesteps()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        steps = num_inference_steps or self.steps
        self.timesteps = karras(steps, self.sigma_min).to(device)


def untrained_steps(given: int | None, trained: int) -> str:
    """The message for a step count that a student was not trained for."""
    return (
        f"num_inference_steps is {given}, but this student was distilled for {trained} "
        f"step{'s' if trained > 1 else ''} and makes bad images at any other number. "
        f"Use num_inference_steps={trained}, or leave it out."
    )
