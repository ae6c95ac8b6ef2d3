"""Phased DMD: distribution matching in phases of the noise range, one expert for each.

Fan et al., "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within
Subintervals", arXiv 2510.27684.

    1 = t_0 > t_1 > ... > t_K = 0;  expert k carries p(x_{t_{k-1}}) to p(x_{t_k}),  s = t_k
    x0, x_s       of one random step of phase k, x_s = alpha_s x0 + sigma_s eps_hat
    z_t           = a x_s + b eps at any t in (s, 1], see `diffdistill.parts.interval`
    expert k:     grad_x0 = (D_fake(z_t) - D_teacher(z_t)) / mean |x0 - D_teacher(z_t)|
    fake score:   min(1, 10 b^2) w(t) |D_fake(z_t) - target(x_s, eps)|^2, from the teacher's weights
                  at the start of each phase

Neither real images nor a GAN. Experts share the teacher's storage with lora.student. A
teacher of several experts is one denoiser that routes by time; its copy, the fake score, then
holds as many.

Deviations: margin and clamp count in the schedule's grid and in flow units for all schedules;
alternating phases take turns within a step, and for both rates of the updates are as in DMD2.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, MethodConfig, Sampler, Transition, Update
from diffdistill.parts.checks import check_times
from diffdistill.parts.interval import interval_dsm, interval_times, kl_direction, noise_from
from diffdistill.parts.ode import ddim_step
from diffdistill.parts.rollout import backward_simulation
from diffdistill.parts.score import matching_direction, vsd_surrogate
from diffdistill.registry import register_method
from diffdistill.schedules import student_times, times


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, u + g (c - u); paper: 4
    student_steps: int = 4
    phases: int = 2  # K; the steps are dealt out evenly; paper: 2 and 4
    phase_steps: int = 500  # training steps of each phase but the last, which ends with the run
    schedule: Literal["sequential", "alternating"] = "sequential"  # paper; code, a fake score each
    ttur: int = 5  # fake-score updates per student update; paper
    conditioning_time: float | None = None  # of the first step; None: T - 1
    generator_loss: Literal["normalised", "kl"] = "normalised"  # code; Eq. 11
    fake_rollout: Literal["same_exit", "full"] = "same_exit"  # its samples' last step; code: full
    clamp: float = 10.0  # of the fake score's weight; 0: no weight (code)
    margin: float = 0.02  # share of the grid left out above a phase's end; code
    t_low: float = 0.02  # range of the matching times, as a share of the grid; code
    t_high: float = 0.98

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if not 1 <= self.phases <= self.student_steps:
            raise ValueError(
                f"method.phases={self.phases}, method.student_steps={self.student_steps}. Allowed: "
                "1 or more phases, of one step or more each"
            )
        if self.phase_steps < 1 or min(self.clamp, self.margin) < 0:
            raise ValueError(
                f"method.phase_steps={self.phase_steps}, clamp={self.clamp}, margin={self.margin}. "
                "Allowed: 1 or more phase_steps, the others 0 or more"
            )


@register_method("phased_dmd")
class PhasedDMD(Method):
    Config = Config
    paper = "Phased DMD: Score Matching within Subintervals, arXiv 2510.27684"

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        later = range(2, cfg.phases + 1)
        self.students = ("student", *(f"student_{k}" for k in later))
        own = [f"fake_score_{k}" if cfg.schedule == "alternating" else "fake_score" for k in later]
        self.fakes = ("fake_score", *own)

    def roles(self):
        return dict.fromkeys((*self.students, *self.fakes), "teacher")

    def updates(self):
        updates, length = [], self.cfg.phase_steps
        for k, (student, fake) in enumerate(zip(self.students, self.fakes, strict=True)):
            when = {}
            if self.cfg.schedule == "sequential":
                last = k + 1 == self.cfg.phases
                when = {"start": k * length, "stop": None if last else (k + 1) * length}
            loss = partial(self.student_loss, k=k)
            updates.append(Update(student, (student,), loss, every=self.cfg.ttur, **when))
            updates.append(Update(fake, (fake,), partial(self.fake_score_loss, k=k), **when))
        return tuple(updates)

    def transitions(self):
        """Every phase has a fresh fake score."""
        phases = range(1, self.cfg.phases) if self.cfg.schedule == "sequential" else ()
        return tuple(Transition(k * self.cfg.phase_steps, "teacher", "fake_score") for k in phases)

    def sampler(self) -> Sampler:
        n = self.cfg.student_steps
        grid = student_times(self.schedule, n, self.cfg.conditioning_time)
        return Sampler(grid, "ode", tuple(i * self.cfg.phases // n for i in range(n)))

    def end(self, k: int) -> float | None:
        """Time t_k at which phase k ends; None: clean data."""
        sampler = self.sampler()
        ahead = (t for t, e in zip(sampler.times, sampler.experts, strict=True) if e > k)
        return next(ahead, None)

    def rollout(self, batch: Batch, k: int, full: bool = False):
        """(x0, x_s) of a random step of phase k, or of its last; gradients through that step."""
        sampler, s = self.sampler(), self.end(k)
        first, count = sampler.experts.index(k), sampler.experts.count(k)
        index = first + (count - 1 if full else batch.randint(count))
        eps = torch.randn(batch.size, *batch.shape, device=batch.device)
        experts = [getattr(self, name) for name in self.students]
        z = backward_simulation(experts, self.schedule, eps, batch.cond, sampler, index)
        t = times(sampler.times[index], z)
        x0 = experts[k](z, t, batch.cond)
        return x0, x0 if s is None else ddim_step(self.schedule, x0, z, t, times(s, z))

    def student_loss(self, batch: Batch, k: int):
        c, s = self.cfg, self.end(k)
        x0, x_s = self.rollout(batch, k)
        t = interval_times(self.schedule, x_s, s, c.t_low, c.t_high, c.margin)
        z = noise_from(self.schedule, x_s.detach(), torch.randn_like(x_s), t, s)
        with torch.no_grad():
            x0_teacher = guided(self.teacher, c.guidance)(z, t, batch.cond)
            x0_fake = getattr(self, self.fakes[k])(z, t, batch.cond)
        if c.generator_loss == "kl":
            loss = vsd_surrogate(x_s, kl_direction(self.schedule, t, s, x0_teacher, x0_fake))
        else:  # on the clean estimate: x_s has another scale
            loss = vsd_surrogate(x0, matching_direction(x0, x0_teacher, x0_fake))
        return {"matching": loss, "_gap": (x0_fake - x0_teacher).abs().mean()}

    def fake_score_loss(self, batch: Batch, k: int):
        c, s = self.cfg, self.end(k)
        with torch.no_grad():
            _, x_s = self.rollout(batch, k, c.fake_rollout == "full")
        t = interval_times(self.schedule, x_s, s, margin=c.margin)
        fake, eps = getattr(self, self.fakes[k]), torch.randn_like(x_s)
        return {"dsm": interval_dsm(fake, x_s, eps, t, s, batch.cond, c.clamp)}
