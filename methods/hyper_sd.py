"""Hyper-SD's trajectory segmented consistency distillation; TCD and PCM are options of it.

Ren et al., "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis", arXiv
2404.13686. Zheng et al., "Trajectory Consistency Distillation", 2402.19159 (stages [1]). Wang et
al., "Phased Consistency Models", 2405.18407 (stages [K], end=edge).

    Psi(z, t -> s) = alpha_s D(z, t) + sigma_s eps(D, z, t), a step of DDIM
    n, e        a point of the solver's grid, and one below it in its segment
    z_n         = alpha x + sigma eps;   z' = Psi_guided teacher(z_n, t_n -> t_{n-1})
    student     mse |p - y|^2 + gan softplus(-T(p)),  p = Psi_student(z_n, t_n -> t_e),
                y = sg Psi_target(z', t_{n-1} -> t_e)
    critic      softplus(T(p)) + softplus(-T(y)), both noised on from t_e to a time up to t_n, T a
                head on the frozen teacher's features
    target      <- decay target + (1 - decay) student
    feedback    sum_d relu(a_d - r_d(x)) over rewards, x the student's estimate at one of the later
                half of its own steps; added to the student's loss in the last stage

in stages of ever fewer segments. Each starts with new optimizer states and with its target at the
student; after the first the teacher of z' is the student of the stage before, without guidance,
which it has learned. Samples by DDIM between the segments' edges (eta=0), or as TCD.

The paper's last stage, which makes a student of one step, is a run of its own: method=dmd with
init=RUN/student of a run of this one, rewards and regression (recipe hyper_sd_last_shapes).

Deviations: p and y are compared in variance-preserving units (the same for Stable Diffusion).
Guidance is fixed (paper: random). Not published are the weights of the losses, the number of steps
of each stage, the levels a_d, the late steps of the feedback, and how noise is perturbed, which is
taken as one more normal number per channel. Feedback and consistency train the same weights (paper:
two adapters, merged). The feedback of an instance segmenter (SOLO on COCO's masks) is left out.
LoRA is lora.student.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, Needs, Sampler, Transition, Update
from diffdistill.parts import gan, segments
from diffdistill.parts.interval import noise_from
from diffdistill.parts.ode import ddim_step
from diffdistill.parts.pull import copier, ema_pull
from diffdistill.parts.reward import FeedbackConfig
from diffdistill.parts.rollout import student_output
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise


@dataclass
class Config(FeedbackConfig):
    guidance: float = 1.0  # of the teacher in the solver's step, u + g (c - u)
    student_steps: int = 1
    eta: float = 0.0  # noise between steps, 0: none (DDIM), up to 1; TCD's scheduler: 0.3
    solver_steps: int = 50  # N, points of the solver's grid; LCM, TCD, PCM
    stages: tuple[int, ...] = (8, 4, 2, 1)  # segments in each; paper
    stage_steps: int = 500  # of the engine, for each stage but the last: train.steps is to be more
    end: segments.End = "random"  # where in the segment: a random point, or its lower edge (PCM)
    trajectory: Literal["previous", "teacher"] = "previous"  # whose step z' is after stage one
    target_decay: float = 0.95  # 0: the target is the student; LCM: 0.95
    mse: float = 1.0
    gan: tuple[float, ...] = ()  # weight in each stage; none: no critic; paper: much for 2 and 1
    offset_noise: float = 0.0  # std of one more number per channel

    def validate(self) -> None:
        super().validate()
        counts = (self.student_steps, *self.stages)
        if not self.stages or min(counts) < 1 or max(counts) > self.solver_steps:
            raise ValueError(
                f"method.stages={list(self.stages)}, student_steps={self.student_steps}. "
                f"Allowed: one stage or more, numbers from 1 to solver_steps={self.solver_steps}"
            )
        if self.gan and (len(self.gan) != len(self.stages) or min(self.gan) < 0):
            raise ValueError(
                f"method.gan={list(self.gan)} for method.stages={list(self.stages)}. Allowed: "
                "a weight of 0 or more for each stage, or none at all"
            )
        shares = 0 <= self.eta <= 1 and 0 <= self.target_decay < 1
        if not shares or self.stage_steps < 1 or self.offset_noise < 0:
            raise ValueError(
                f"method.eta={self.eta}, target_decay={self.target_decay}, stage_steps="
                f"{self.stage_steps}, offset_noise={self.offset_noise}. Allowed: 0 to 1, 0 to "
                "below 1, 1 or more, and 0 or more"
            )


@register_method("hyper_sd")
class HyperSD(Method):
    Config = Config
    paper = "Hyper-SD: Trajectory Segmented Consistency Model, arXiv 2404.13686"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True, features=any(cfg.gan), prompts=bool(cfg.rewards))

    def roles(self):
        c, roles = self.cfg, {"student": "teacher"}
        roles |= {"target": "teacher"} if c.target_decay > 0 else {}
        heirs = c.trajectory == "previous" and len(c.stages) > 1
        roles |= {"previous": "teacher"} if heirs else {}
        return roles | ({"discriminator": gan.gan_head} if any(c.gan) else {})

    def updates(self):
        c, follow = self.cfg, self.follow if self.cfg.target_decay > 0 else None
        first, last = (0, *self.starts()), (*self.starts(), None)
        updates = [
            Update("student", ("student",), partial(self.student_loss, k=k), start=a, stop=b,
                   after=follow)
            for k, (a, b) in enumerate(zip(first, last, strict=True))
        ]  # fmt: skip
        if any(c.gan):
            begin = next(a for a, weight in zip(first, c.gan, strict=True) if weight > 0)
            critic = Update("critic", ("discriminator",), self.critic_loss, start=begin)
            updates.append(critic)
        return tuple(updates)

    def starts(self):
        """First steps of the stages after the first."""
        return [self.cfg.stage_steps * k for k in range(1, len(self.cfg.stages))]

    def transitions(self):
        anew = partial(Transition, source="student", to="student", copy=lambda source, to: None)
        heirs = [name for name in self.roles() if name in ("target", "previous")]
        take = partial(Transition, source="student", copy=copier())
        moves = ((*(take(at, to=name) for name in heirs), anew(at)) for at in self.starts())
        return sum(moves, ())

    def follow(self) -> None:
        ema_pull(self.target, self.student, self.cfg.target_decay)

    def sampler(self) -> Sampler:
        c = self.cfg
        grid = segments.solver_grid(self.schedule, c.solver_steps, torch.empty(0))
        times = tuple(grid[segments.trailing(c.solver_steps, c.student_steps)].tolist())
        return Sampler(times, "tcd", eta=c.eta) if c.eta > 0 else Sampler(times, "ode")

    def jump(self, denoise, z, t, s, cond):
        """Psi(z, t -> s)."""
        return ddim_step(self.schedule, denoise(z, t, cond), z, t, s)

    def pair(self, solver, z, t, before, end, cond):
        """(p, y); gradients reach the student through p."""
        with torch.no_grad():
            lower = self.jump(solver, z, t, before, cond)
            target = self.target if self.cfg.target_decay > 0 else self.student
            y = self.jump(target, lower, before, end, cond)
        return self.jump(self.student, z, t, end, cond), y

    def student_loss(self, batch: Batch, k: int):
        """In stage k."""
        c, x, cond = self.cfg, batch.x, batch.cond
        grid = segments.solver_grid(self.schedule, c.solver_steps, x)
        n = torch.randint(1, len(grid), (len(x),), device=x.device)
        e = segments.end_points(n, segments.edges(c.solver_steps, c.stages[k]), c.end)
        learned = k > 0 and c.trajectory == "previous"
        solver = self.previous if learned else guided(self.teacher, c.guidance)
        z = add_noise(self.schedule, x, self.noise(x), grid[n])
        p, y = self.pair(solver, z, grid[n], grid[n - 1], grid[e], cond)
        gap = segments.unit_scale(self.schedule, p - y, grid[e])
        losses = {"consistency": c.mse * gap.square().mean()}
        if c.rewards and k == len(c.stages) - 1:
            late = self.late(batch)
            losses["feedback"] = c.feedback_loss(self.teacher, late, cond, batch.prompts)
        if any(c.gan):
            at = grid[e], grid[segments.random_points(e + 1, n)]
            batch.memo["pair"] = p.detach(), y, at
            if c.gan[k] > 0:
                logits = self.discriminator(self.features(p, at, cond))
                losses["gan"] = c.gan[k] * gan.generator_loss(logits)
        return losses

    def noise(self, x):
        """Normal, perturbed by `offset_noise`."""
        eps, size = torch.randn_like(x), self.cfg.offset_noise
        offset = size * torch.randn_like(x[(..., *[slice(1)] * (x.ndim - 2))]) if size else 0
        return eps + offset

    def late(self, batch: Batch):
        """The student's estimate at one of the later half of its own steps, from pure noise."""
        steps = self.cfg.student_steps
        index = steps // 2 + batch.randint(steps - steps // 2)
        return student_output(self.student, self.schedule, batch, self.sampler(), index=index)

    def critic_loss(self, batch: Batch):
        fake, real, at = batch.memo.pop("pair")
        with torch.no_grad():
            features = [self.features(v, at, batch.cond) for v in (real, fake)]
        logits = [self.discriminator(f) for f in features]
        return {"gan": gan.critic_loss(*logits), "_accuracy": gan.accuracy(*logits)}

    def features(self, z, at, cond):
        """Of the teacher at the second of two times, noised on from the first, where z is."""
        end, s = at
        noisy = noise_from(self.schedule, z, torch.randn_like(z), s, end)
        return self.teacher.features(noisy, s, cond)
