"""Latent consistency distillation.

Luo et al., "Latent Consistency Models", arXiv 2310.04378, after Song et al., arXiv 2303.01469.

    z_t = alpha_t x + sigma_t eps,  t from a grid of solver times, s the next lower one
    z_s = one DDIM step of the guided teacher from z_t
    loss = huber( f(z_t, t) - sg[ f(z_s, s) ] ),   f(z, t) = c_skip z + c_out D(z, t)
    c_skip = sd^2 / (r^2 + sd^2),  c_out = 1 - c_skip,  r = 10 t (DDPM), 10 sigma / alpha else

Deviations: the target network is the student itself without gradient (EMA rate 0, as shown to be
at least as good by Song and Dhariwal, arXiv 2310.14189), and the guidance scale is fixed and not
embedded (as in LCM-LoRA, arXiv 2311.05556). The factor 10 (the paper's timestep scaling) makes
c_skip vanish at every time at which a student is called, so D itself samples; the paper's c_out,
r / sqrt(r^2 + sd^2), is the same there to 4e-6 but does not sum to one with c_skip elsewhere.
"""

from dataclasses import dataclass

import torch

from diffdistill.denoiser import guided
from diffdistill.method import Batch, Method, MethodConfig, Needs, Sampler, Update
from diffdistill.parts.ode import ddim_step
from diffdistill.registry import register_method
from diffdistill.schedules import DDPM, add_noise, bcast, student_times


@dataclass
class Config(MethodConfig):
    guidance: float = 1.0  # of the teacher in the DDIM step; paper: 7.5 for SD
    student_steps: int = 4
    solver_steps: int = 50  # grid of the DDIM solver; paper
    sigma_data: float = 0.5  # of the boundary condition; paper
    huber: float = 1e-3  # sqrt(d^2 + c^2) - c; paper


@register_method("lcm")
class LCM(Method):
    Config = Config
    paper = "Latent Consistency Models, arXiv 2310.04378"

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True)

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    def sampler(self) -> Sampler:
        return Sampler(student_times(self.schedule, self.cfg.student_steps))

    def loss(self, batch: Batch):
        x, cond = batch.x, batch.cond
        grid = torch.tensor([*student_times(self.schedule, self.cfg.solver_steps)][::-1])
        index = torch.randint(1, len(grid), (len(x),))
        t, s = (grid[i].double().to(x.device) for i in (index, index - 1))
        z = add_noise(self.schedule, x, torch.randn_like(x), t)
        with torch.no_grad():
            z_s = ddim_step(
                self.schedule, guided(self.teacher, self.cfg.guidance)(z, t, cond), z, t, s
            )
            target = self.consistency(z_s, s, cond)
        d = self.consistency(z, t, cond) - target
        return {"consistency": ((d.square() + self.cfg.huber**2).sqrt() - self.cfg.huber).mean()}

    def consistency(self, z, t, cond):
        """f(z, t), exact at the lowest time of the grid."""
        discrete = isinstance(self.schedule, DDPM)
        r = 10 * (t if discrete else self.schedule.sigma(t) / self.schedule.alpha(t))
        c_skip = self.cfg.sigma_data**2 / (r.square() + self.cfg.sigma_data**2)
        return torch.lerp(self.student(z, t, cond), z, bcast(c_skip, z))
