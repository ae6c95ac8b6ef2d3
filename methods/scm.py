"""Continuous-time consistency: sCD from a teacher, sCT from data alone; one or few steps.

Lu and Song, "Simplifying, Stabilizing & Scaling Continuous-Time Consistency Models", arXiv
2410.11081. In TrigFlow, where f(x_t, t) = D(x_t, t) = cos t x_t - sin t sigma_d F(x_t, t):

    t           = arctan(e^n / sigma_d),  n ~ N(p_mean, p_std^2);   x_t = cos t x + sin t z
    dx/dt       = the guided teacher's velocity (sCD), or cos t z - sin t x (sCT)
    g           = -cos^2 t (sigma_d sg[F] - dx/dt) - r cos t sin t (x_t + sigma_d dF/dt)
    loss        e^w(t) mean |F - sg[F] - g / (|g| + c)|^2 - w(t),   r = min(1, step / H)

The prior weight 1 / (sigma_d tan t) of the paper is in g already. dF/dt is a forward-mode
derivative along (dx/dt, 1), without a graph. |g| is near 1 after its normalisation, so the loss
says nothing about progress; the log has `tangent`, the mean |g| before.

Deviations: AdamW (the paper: RAdam and Adam). The guidance scale is fixed and not an input of the
student. Teachers keep their network and time embedding (paper: retrained with a positional
embedding of t itself, and AdaGN made adaptive double normalisation). Times below or above the
teacher's range are those at its ends, those above conditioning_time are it. w is linear in cos kt
and sin kt and starts at ln D, where the loss of a tangent of norm 1 has its optimum. Three mid
times are those of SANA-Sprint (arXiv 2503.09641), two a choice. The paper's variant with a score
loss (sCD + VSD) is not here; `rcm` is its successor.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, Needs, Sampler, Update
from diffdistill.parts.consistency import (
    Consistency,
    ConsistencyConfig,
    few_steps,
    weighted,
)
from diffdistill.parts.jvp import warm
from diffdistill.parts.trig import Trig, conditional_velocity, mix
from diffdistill.registry import register_method


@dataclass
class Config(ConsistencyConfig):
    usual: ClassVar = {1: (), 2: (1.1,), 3: (1.3, 0.6), 4: (1.3, 1.1, 0.6)}

    velocity: Literal["teacher", "data"] = "teacher"  # sCD, sCT
    guidance: float = 1.0  # of the teacher, u + g (c - u); ImageNet-512: 1 to 2
    p_mean: float = -1.0  # of ln(sigma_d tan t); ImageNet-512: -0.8, SANA-Sprint: 0 to 0.2
    p_std: float = 1.4  # ImageNet, SANA-Sprint: 1.6
    tangent_warmup: int = 500  # H; must end well within the run; paper: 10k, SANA-Sprint: 4000
    adaptive: bool = True  # the learned weight w(t)

    def validate(self) -> None:
        super().validate()
        if self.velocity == "data" and self.guidance != 1:
            raise ValueError(
                f"method.guidance={self.guidance} with method.velocity=data: the data's velocity "
                "has no guidance. Set method.guidance=1 or method.velocity=teacher"
            )


@register_method("scm")
class SCM(Method):
    Config = Config
    paper = "Simplifying, Stabilizing & Scaling Continuous-Time Consistency, arXiv 2410.11081"
    any_steps = True

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.trig = Trig.of(teacher, cfg.data_std, cfg.sigma_data, cfg.conditioning_time)
        self.consistency = Consistency(self.trig, cfg)
        self.sampler()  # refuses times that do not fall

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True)

    def roles(self):
        head = {"log_weight": self.cfg.log_weight} if self.cfg.adaptive else {}
        return {"student": "teacher"} | head

    def updates(self):
        return (Update("student", tuple(self.roles()), self.loss),)

    def sampler(self) -> Sampler:
        return few_steps(self.trig, self.cfg)

    def loss(self, batch: Batch):
        c, trig, cond = self.cfg, self.trig, batch.cond
        x0 = trig.data(batch.x)
        t, z = trig.draw(x0, c.p_mean, c.p_std), trig.noise(x0)
        x = mix(x0, z, t)
        if c.velocity == "data":
            velocity = conditional_velocity(x0, z, t)
        else:
            with torch.no_grad():
                velocity = trig.velocity(guided(self.teacher, c.guidance), x, t, cond)
        r = warm(batch.step, c.tangent_warmup)
        residual, size = self.consistency(self.student, cond, x, t, velocity, r)
        w = self.log_weight(t) if c.adaptive else None
        return {"consistency": weighted(residual, w).mean(), "_tangent": size.mean()}
