"""Latent consistency distillation.

Luo et al., "Latent Consistency Models", arXiv 2310.04378, after Song et al., arXiv 2303.01469.

    z_t = alpha_t x + sigma_t eps,  t from a grid of solver times, s the next lower one, last t_min
    z_s = one DDIM step of the guided teacher from z_t
    loss = huber( f(z_t, t) - sg[ f(z_s, s) ] ),   f(z, t) = c_skip z + (1 - c_skip) D(z, t)
    c_skip = sd^2 / (r^2 + sd^2),  r = 10 x index of t in the schedule's grid (DDPM: r = 10 t)

so f(z, t_min) = z, and c_skip vanishes at every solver time: D itself is what samples.

Deviations: the target network is the student itself without gradient (EMA rate 0, at least as good
according to Song and Dhariwal, arXiv 2310.14189); the guidance scale is fixed and not embedded (as
in LCM-LoRA, arXiv 2311.05556); c_out is 1 - c_skip, which differs from the paper's
r / sqrt(r^2 + sd^2) by less than 4e-6 at the solver times of Stable Diffusion.
"""

from dataclasses import dataclass

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, MethodConfig, Needs, Sampler, Update
from diffdistill.parts import segments
from diffdistill.parts.ode import ddim_step
from diffdistill.registry import register_method
from diffdistill.schedules import add_noise, bcast, grid_index


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher in the DDIM step, u + g (c - u); paper: 8.5 for SD
    student_steps: int = 4
    solver_steps: int = 50  # grid of the DDIM solver; paper
    conditioning_time: float | None = None  # its noisy end, where students start; None: T - 1
    sigma_data: float = 0.5  # of the boundary condition; paper
    huber: float = 1e-3  # sqrt(d^2 + c^2) - c; paper

    def validate(self) -> None:
        if not 1 <= self.student_steps <= self.solver_steps:
            raise ValueError(
                f"method.student_steps={self.student_steps} is not between 1 and "
                f"method.solver_steps={self.solver_steps}, the times at which it is trained"
            )


@register_method("lcm")
class LCM(Method):
    Config = Config
    paper = "Latent Consistency Models, arXiv 2310.04378"
    any_steps = True

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True)

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    def grid(self, like):
        c = self.cfg
        return segments.solver_grid(self.schedule, c.solver_steps, like, c.conditioning_time)

    def sampler(self) -> Sampler:
        """Every solver_steps / student_steps-th time of the solver's grid, from the noisy end."""
        grid = self.grid(torch.empty(0))
        points = segments.trailing(self.cfg.solver_steps, self.cfg.student_steps)
        return Sampler(tuple(grid[points].tolist()))

    def loss(self, batch: Batch):
        x, cond = batch.x, batch.cond
        grid = self.grid(x)
        index = torch.randint(1, len(grid), (len(x),), device=x.device)
        t, s = grid[index], grid[index - 1]
        z = add_noise(self.schedule, x, torch.randn_like(x), t)
        with torch.no_grad():
            x0 = guided(self.teacher, self.cfg.guidance)(z, t, cond)
            target = self.consistency(ddim_step(self.schedule, x0, z, t, s), s, cond)
        d = self.consistency(z, t, cond) - target
        return {"consistency": ((d.square() + self.cfg.huber**2).sqrt() - self.cfg.huber).mean()}

    def consistency(self, z, t, cond):
        """f(z, t), the identity at the lowest time of the schedule's grid."""
        r = 10 * grid_index(self.schedule, t)
        c_skip = self.cfg.sigma_data**2 / (r.square() + self.cfg.sigma_data**2)
        return torch.lerp(self.student(z, t, cond), z, bcast(c_skip, z))
