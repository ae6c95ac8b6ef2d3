"""BOOT: data-free distillation; the student's output at one noise level teaches the next lower.

Gu et al., "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping", arXiv
2306.05544.

    y(eps, t)   the student: start noise and a target time -> the signal of the teacher's path there
    z           = alpha_t y(eps, t) + sigma_t eps,   D = D_teacher(z, t)
    target      = D + (rho_s / rho_t) (y(eps, t) - D),   rho = sigma / alpha,   s = t - delta
    bootstrap   |y(eps, s) - sg[target]|^2 / (1 - rho_s / rho_t)^2
    boundary    beta |y(eps, t_max) - D_teacher(sigma eps, t_max)|^2, in every step

Neither images nor stored paths; one step, y(eps, 0). Times are levels of the schedule's grid,
uniform in their index, below which rho falls to 0 (`Levels`).

Deviations: losses average over elements (sum). The student is the teacher's network at one noise
level, `conditioning_time`, and hears the target time in place of its own: clean data sounds like
that level and t_max like one further down the grid (`heard`), where the teacher still says much the
same to pure noise. So its sample is the plain call of every one-step student here. Guidance is
fixed and not an input of the student. `euler` and `heun` step in log rho, and near clean data,
where no teacher's time is left, as ddim does.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, MethodConfig, Update
from diffdistill.parts.checks import check_times
from diffdistill.parts.perceptual import distance
from diffdistill.parts.signal import Solver, grid_time, signal_levels, signal_step, told
from diffdistill.registry import register_method
from diffdistill.schedules import bcast, grid_index


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher, baked into the student; paper: 1 to 8
    delta: float = 0.04  # length of a step, as a share of all levels; paper: 25 steps
    solver: Solver = "ddim"  # heun: one more call of the teacher, less accumulated error
    boundary: float = 0.1  # beta
    distance: Literal["l2", "lpips"] = "l2"  # lpips (CIFAR-10) has no weight
    conditioning_time: float | None = None  # at which the student's network works; None: T - 1
    heard: float = 0.5  # share of the grid below it that stands for the target times, a choice
    t_low: float = 0.0  # range of the teacher's times, as a share of the grid
    t_high: float = 1.0  # below 1 where no signal is left at the noisy end

    def validate(self) -> None:
        check_times(self.t_low, self.t_high)
        if not 0 < self.delta <= 0.5 or not 0 < self.heard <= 1 or self.boundary < 0:
            raise ValueError(
                f"method.delta={self.delta}, heard={self.heard}, boundary={self.boundary}. "
                "Allowed: more than 0 up to 0.5, more than 0 up to 1, and 0 or more"
            )


@register_method("boot")
class BOOT(Method):
    Config = Config
    paper = "BOOT: Data-free Distillation of Diffusion Models with Bootstrapping, arXiv 2306.05544"

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.levels = signal_levels(self.schedule, cfg.delta, cfg.t_low, cfg.t_high)

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    def signal(self, eps, level, cond):
        """y(eps, level)."""
        (at,) = self.sampler().times
        top = grid_index(self.schedule, torch.tensor(at, dtype=torch.float64)).item()
        place = top * (1 - self.cfg.heard * level.double() / (len(self.levels) - 1))
        time = grid_time(self.schedule, place)
        return told(self.student, eps, at, torch.where(level == 0, at, time), cond)

    def loss(self, batch: Batch):
        c, levels, cond = self.cfg, self.levels, batch.cond
        eps = torch.randn(batch.size, *batch.shape, device=batch.device)
        teacher = guided(self.teacher, c.guidance)
        high = levels.draw(batch.size, batch.device)
        low = high - levels.step
        last = torch.full_like(high, len(levels) - 1)
        ratios = levels.ratio(high), levels.ratio(low)
        with torch.no_grad():
            y = self.signal(eps, high, cond)
            target = signal_step(
                c.solver, teacher, self.schedule, y, eps, levels.time(high), ratios,
                levels.time(low), cond,
            )  # fmt: skip
            t = levels.time(last)
            edge = teacher(bcast(self.schedule.sigma(t), eps) * eps, t, cond)
        y, y_edge = self.signal(eps, low, cond), self.signal(eps, last, cond)
        weight = bcast((1 - ratios[1] / ratios[0]) ** -2, y)
        if c.distance == "l2":
            bootstrap = (weight * (y - target).square()).mean()
        else:
            bootstrap = distance(c.distance, y, target, self.teacher)
        return {
            "bootstrap": bootstrap,
            "boundary": c.boundary * distance(c.distance, y_edge, edge, self.teacher),
        }
