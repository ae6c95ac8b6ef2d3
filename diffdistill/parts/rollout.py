"""Few-step student sampling, and its simulation during training.

One definition serves previews, export tests and the students' training inputs, so a student is
trained on what it will see:

    u_1 = start noise;   x_i = D(u_i, t_i);   u_{i+1} = alpha(t_{i+1}) x_i + sigma(t_{i+1}) eps'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, eps_of
from diffdistill.method import Batch, Sampler
from diffdistill.parts.interval import noise_from
from diffdistill.schedules import DDPM, Schedule, add_noise, bcast, times

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
Students = Denoise | Sequence[Denoise]  # several: the sampler's `experts` says whose turn it is


def expert(students: Students, sampler: Sampler, index: int) -> Denoise:
    """The student that is called at step `index`."""
    return students[sampler.experts[index]] if isinstance(students, Sequence) else students


def start_noise(schedule: Schedule, eps: Tensor, t: float) -> Tensor:
    """The first network input: EDM t * eps, all others eps as it is (not sigma_T eps)."""
    return schedule.start_scale(t) * eps


def renoise(
    schedule: Schedule, x0: Tensor, z: Tensor, t: float, s: float, sampler: Sampler, eps: Tensor
) -> Tensor:
    """From the estimate x0 at (z, t) to the next input at time s. `eps` is unused if "ode"."""
    if sampler.renoise == "tcd":
        low = (1 - sampler.eta) * torch.tensor(s)
        low = max(float(low.floor() if isinstance(schedule, DDPM) else low), schedule.t_min)
        return noise_from(schedule, _ddim(schedule, x0, z, t, low), eps, times(s, z), low)
    if sampler.renoise == "ancestral":
        kept, added = ancestral(schedule, times(t, z), times(s, z), sampler.eta)
        implied = eps_of(schedule, x0, z, times(t, z))
        still = bcast(schedule.alpha(times(s, z)), z) * x0 + bcast(kept, z) * implied
        return still + bcast(added, z) * eps
    if sampler.renoise == "ode":
        return _ddim(schedule, x0, z, t, s)
    return add_noise(schedule, x0, eps, times(s, z))


def finish(schedule: Schedule, x0: Tensor, z: Tensor, t: float, sampler: Sampler) -> Tensor:
    """The sample behind the last estimate x0 at (z, t): itself, but for "tcd"."""
    return _ddim(schedule, x0, z, t, schedule.t_min) if sampler.renoise == "tcd" else x0


def ancestral(schedule: Schedule, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Shares of the implied and of new noise at s < t; their squares add up to sigma_s^2.

    new = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)
    """
    sigma = schedule.sigma(s)
    ratio = schedule.alpha(t) * sigma / (schedule.alpha(s) * schedule.sigma(t))
    new = eta * sigma * (1 - ratio.square()).clamp_min(0).sqrt()
    return (sigma.square() - new.square()).clamp_min(0).sqrt(), new


def _ddim(schedule: Schedule, x0: Tensor, z: Tensor, t: float, s: float) -> Tensor:
    return add_noise(schedule, x0, eps_of(schedule, x0, z, times(t, z)), times(s, z))


def sample(
    denoise: Students,
    schedule: Schedule,
    noises: Sequence[Tensor],
    cond: Cond,
    sampler: Sampler,
) -> Tensor:
    """The student's samples. noises: unit-variance start noise, then one per further step."""
    z = start_noise(schedule, noises[0], sampler.times[0])
    for i, t in enumerate(sampler.times):
        x0 = expert(denoise, sampler, i)(z, times(t, z), cond)
        if i + 1 < len(sampler.times):
            z = renoise(schedule, x0, z, t, sampler.times[i + 1], sampler, noises[i + 1])
    return finish(schedule, x0, z, t, sampler)


@torch.no_grad()
def backward_simulation(
    denoise: Students, schedule: Schedule, eps: Tensor, cond: Cond, sampler: Sampler, index: int
) -> Tensor:
    """The student's own input at step `index` (DMD2, Sec. 4.5), with fresh noise; no gradient."""
    z = start_noise(schedule, eps, sampler.times[0])
    for i, (t, s) in enumerate(zip(sampler.times[:index], sampler.times[1:], strict=False)):
        x0 = expert(denoise, sampler, i)(z, times(t, z), cond)
        z = renoise(schedule, x0, z, t, s, sampler, torch.randn_like(eps))
    return z


def student_output(
    denoise: Denoise,
    schedule: Schedule,
    batch: Batch,
    sampler: Sampler,
    source: str = "backward_sim",
    index: int | None = None,
) -> Tensor:
    """One clean estimate of the student at a random one of its steps (DMD2, Sec. 4.5).

    The step index agrees on all processes, unless `index` gives it. source "noised_data" noises
    real data instead of simulating. Gradients flow through the last call only.
    """
    eps = torch.randn(batch.size, *batch.shape, device=batch.device)
    index = batch.randint(len(sampler.times)) if index is None else index
    t = times(sampler.times[index], eps)
    if source == "noised_data" and index > 0:
        z = add_noise(schedule, batch.x, eps, t)
    else:
        z = backward_simulation(denoise, schedule, eps, batch.cond, sampler, index)
    return denoise(z, t, batch.cond)


def seen_samples(
    batch: Batch, generate: Callable[[Batch], tuple[Tensor, Cond]]
) -> tuple[Tensor, Cond]:
    """What the student's update of this step left in the memo (its samples from before that
    update, and their conditions), else fresh ones; no gradient."""
    if "x" in batch.memo:
        return batch.memo.pop("x")
    with torch.no_grad():
        return generate(batch)
