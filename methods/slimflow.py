"""SlimFlow: annealing reflow and flow-guided distillation, into a smaller one-step student.

Zhu, Liu and Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", arXiv
2407.12718, and its code. With z_t = (1 - t) x + t eps and D = z - t v:

    pairs      (eps, x) of the teacher's ODE, once; the teacher is not asked again
    reflow     eps' = sqrt(1 - beta^2) eps + beta xi,  beta falls from 1 to 0 in `anneal_steps`
               |v(z_t, t) - (eps' - x)|^2 = |D(z_t, t) - x|^2 / t^2,  z_t of eps',  t uniform
    distil     after `reflow_steps`: the student goes on from its raw weights; flow = its average
               d(G(eps), x) + d(G(e), sg[D_flow((1 - t) y + t e, t)]),  e fresh,  t ~ U(0.2, 0.8)
               G(eps) = D(eps, 1),  y = sg[G(e)], or D_flow(e, 1) with first_step=teacher

| switch                        | is                                                            |
|-------------------------------|---------------------------------------------------------------|
| anneal=none                   | reflow, without annealing                                     |
| anneal=constant, beta=1       | 1-rectified flow on the teacher's samples                     |
| flow_guided=0                 | naive distillation of the 2-rectified flow                    |
| reflow_steps=0, flow_guided=0 | plain distillation into the same network, from random weights |
| student_steps=k               | k-step distillation, for Euler                                |

Deviations: the student is the teacher's kind of network with its preconditioning and range of
times (paper: a network for v, t from 0 to 0.999); at the noisy end it is given pure noise, as when
sampling (code: one part in a thousand of x in the pair loss); each pair is flipped on its own
(code: whole batches); no dropout of its own; LPIPS resizes without aligned corners.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch, Method, MethodConfig, Needs, Sampler, Transition, Update
from diffdistill.parts.checks import check_times
from diffdistill.parts.perceptual import distance
from diffdistill.parts.reflow import (
    Anneal,
    euler,
    flow_times,
    mirrored,
    on_path,
    perturbed,
    randomness,
)
from diffdistill.parts.rollout import start_noise
from diffdistill.parts.shrink import smaller, untrained
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise, bcast, times


@dataclass
class Config(MethodConfig):
    width: float = 0.5  # of the teacher's channels; 1 with depth=1: a copy of the teacher
    depth: float = 1.0  # of the teacher's layers at each level
    guidance: float = 1.0  # of the teacher, baked into the pairs
    pairs: int = 10_000  # trajectories made before training; paper: 50k and more
    solver_steps: int = 0  # of the teacher per trajectory; 0: its default
    flip: bool = False  # pairs along the width while reflowing; for symmetric data, as CIFAR-10
    reflow_steps: int = 4000  # engine steps of the first stage; code: some 800k
    anneal: Anneal = "linear"  # of beta; paper
    anneal_steps: int = 2000  # K; code: 300k
    beta: float = 1.0  # of anneal=constant
    flow_guided: float = 1.0  # weight of the flow-guided loss
    first_step: Literal["student", "teacher"] = "student"  # teacher: the flow itself; code: student
    t_low: float = 0.2  # range of the flow's second step
    t_high: float = 0.8
    distance: Literal["l2", "l1", "lpips", "lpips+l2", "lpips+l1"] = "l2"  # code: lpips
    lpips_size: int = 64  # pixels, to which images are resized; code
    student_steps: int = 1

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if not 0 < self.width <= 1 or not 0 < self.depth <= 1 or not 0 <= self.beta <= 1:
            raise ValueError(
                f"method.width={self.width}, depth={self.depth}, beta={self.beta}. Allowed: more "
                "than 0 up to 1 for the first two, 0 to 1 for beta"
            )
        if min(self.pairs, self.anneal_steps, self.lpips_size, self.student_steps) < 1 or (
            min(self.reflow_steps, self.solver_steps, self.flow_guided) < 0
        ):
            raise ValueError(
                f"method.pairs={self.pairs}, anneal_steps={self.anneal_steps}, lpips_size="
                f"{self.lpips_size}, student_steps={self.student_steps}; reflow_steps="
                f"{self.reflow_steps}, solver_steps={self.solver_steps}, flow_guided="
                f"{self.flow_guided}. Allowed: 1 or more for the first four, else 0 or more"
            )
        if self.flow_guided > 0 and self.reflow_steps == 0:
            raise ValueError(
                "method.reflow_steps=0 leaves no flow to guide with. Set method.flow_guided=0"
            )
        if self.anneal in ("linear", "cosine") and 0 < self.reflow_steps <= self.anneal_steps:
            raise ValueError(
                f"method.anneal_steps={self.anneal_steps} is not below method.reflow_steps="
                f"{self.reflow_steps}: the flow would end before it is a reflow. Set fewer"
            )


@register_method("slimflow")
class SlimFlow(Method):
    Config = Config
    paper = "SlimFlow: Training Smaller One-Step Diffusion Models, arXiv 2407.12718"

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        shrinks = min(cfg.width, cfg.depth) < 1
        self.size = smaller(teacher, cfg.width, cfg.depth) if shrinks else None

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(pairs=cfg.pairs, pair_steps=cfg.solver_steps)

    def roles(self):
        small = partial(untrained, config=self.size) if self.size else "teacher"
        return {"student": small} | ({"flow": small} if self.cfg.flow_guided > 0 else {})

    def attach(self, roles) -> None:
        super().attach(roles)
        if getattr(self.student, "trainable_names", None) is not None:
            raise ValueError(
                "lora.student adapts a trained network, but method slimflow trains a whole "
                "one. Leave it out"
            )

    def updates(self):
        at = self.cfg.reflow_steps
        reflow = Update("reflow", ("student",), self.reflow_loss, stop=at)
        distil = Update("distil", ("student",), self.distil_loss, start=at)
        return (reflow, distil) if at else (distil,)

    def transitions(self):
        at = self.cfg.reflow_steps
        freeze = (Transition(at, "student", "flow", averaged=True),)
        fresh = (Transition(at, "student", "student"),)  # its optimizer and its average
        return (*(freeze if self.cfg.flow_guided > 0 else ()), *fresh) if at else ()

    def sampler(self) -> Sampler:
        return euler(self.schedule, self.cfg.student_steps)

    def reflow_loss(self, batch: Batch):
        c, pair = self.cfg, batch.pair
        beta = randomness(c.anneal, batch.step, c.anneal_steps, c.beta)
        x, eps = pair.x, perturbed(pair.eps, beta)
        if c.flip:
            x, eps = mirrored(x, eps)
        t, own = flow_times(self.schedule, x)
        gap = self.student(add_noise(self.schedule, x, eps, own), own, pair.cond) - x
        return {"velocity": (gap / bcast(t, gap)).square().mean(), "_beta": x.new_tensor(beta)}

    def distil_loss(self, batch: Batch):
        pair = batch.pair
        z, own, t = on_path(self.schedule, self.sampler(), pair.x, pair.eps)
        gap = self.student(z, own, pair.cond) - pair.x
        losses = {"pair": self.distance(pair.x + gap / bcast(t, gap), pair.x)}  # eps - v
        if self.cfg.flow_guided > 0:
            eps = torch.randn(batch.size, *batch.shape, device=batch.device)
            x = self.one_step(self.student, eps, batch.cond)
            target = self.two_steps(x.detach(), eps, batch.cond)
            losses["flow"] = self.cfg.flow_guided * self.distance(x, target)
        return losses

    @torch.no_grad()
    def two_steps(self, x, eps, cond):
        """The end of two Euler steps from `eps`; the first one goes towards x, or is the flow's."""
        if self.cfg.first_step == "teacher":
            x = self.one_step(self.flow, eps, cond)
        _, own = flow_times(self.schedule, x, self.cfg.t_low, self.cfg.t_high)
        return self.flow(add_noise(self.schedule, x, eps, own), own, cond)

    def one_step(self, denoise, eps, cond):
        first = self.sampler().times[0]
        return denoise(start_noise(self.schedule, eps, first), times(first, eps), cond)

    def distance(self, x, target):
        return distance(self.cfg.distance, x, target, self.teacher, self.cfg.lpips_size)
