"""TBCM: continuous-time consistency on the teacher's own paths from noise; no images.

Tang et al., "Image-Free Timestep Distillation via Continuous-Time Consistency with
Trajectory-Sampled Pairs", arXiv 2511.20410, after its code (hustvl/TBCM). In TrigFlow,

    T_0         = pi / 2, T_i ~ U(t_i, t_{i-1}) along a route t_0 > t_1 > ... of K times
    x_{T_0}     = sigma_d eps,  V_i = the guided teacher's velocity at (x_{T_i}, T_i)
    x_{T_{i+1}} = cos(dt) x_{T_i} - sin(dt) V_i,  dt = T_i - T_{i+1}
    loss        that of sCM (`scm`) at all (x_{T_i}, T_i) but the first, with dx/dt = V_i
    r           = min(1, step / H), later moved to calm_end < 1

A batch of B conditions gives (K - 1) B points, and the pass that is trained is as large. calm_end
below 1 is for stability and shrinks one-step samples: 0.75 to 0.91 of the deviation from the mean
for data of unit std. It is off unless calm_start is given.

Deviations: guidance is fixed (code: drawn from 4, 4.5, 5 and an input of the student); times are
drawn for each sample (code: one prompt per batch); the code's further weight 1 / (sigma_d tan t)
is left out, since a learned weight undoes it. The filter of failed samples takes one value per
channel and is off without them. For the rest see `scm`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, Sampler, Update
from diffdistill.parts import consistency
from diffdistill.parts.jvp import warm
from diffdistill.parts.trajectory import acceptable, calm, route, stratified, trajectory
from diffdistill.parts.trig import Trig
from diffdistill.registry import register_method


@dataclass
class Config(consistency.ConsistencyConfig):
    usual: ClassVar = {1: (), 2: (1.0,), 3: (1.3, 0.6), 4: (1.3, 1.1, 0.6)}

    guidance: float = 1.0  # of the teacher, u + g (c - u); code: 4 to 5
    route_steps: int = 16  # K, teacher steps of a path; code
    shift: float = 2.5  # of the route's flow times; more: noisier; code
    tangent_warmup: int = 500  # H; must end well within the run; code: 4000
    calm_start: int | None = None  # first step at which r falls; code: 15000
    calm_steps: int = 2000  # until it is calm_end
    calm_end: float = 0.75
    black: tuple[float, ...] = ()  # value of a failed sample per channel; none: all pass

    def validate(self) -> None:
        super().validate()
        if self.route_steps < 2 or self.shift <= 0 or self.calm_steps < 1:
            raise ValueError(
                f"method.route_steps={self.route_steps}, shift={self.shift}, calm_steps="
                f"{self.calm_steps}. Allowed: 2 or more, more than 0, and 1 or more"
            )
        if not 0 < self.calm_end <= 1:
            raise ValueError(f"method.calm_end={self.calm_end}. Allowed: more than 0, up to 1")


@register_method("tbcm")
class TBCM(Method):
    Config = Config
    paper = "Image-Free Timestep Distillation via Continuous-Time Consistency, arXiv 2511.20410"
    any_steps = True

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.trig = Trig.of(teacher, cfg.data_std, cfg.sigma_data, cfg.conditioning_time)
        self.consistency = consistency.Consistency(self.trig, cfg)
        self.route = route(cfg.route_steps, cfg.shift)
        self.sampler()  # refuses times that do not fall
        if cfg.black and len(cfg.black) != teacher.shape[0]:
            raise ValueError(
                f"method.black has {len(cfg.black)} values, this teacher's samples have "
                f"{teacher.shape[0]} channels. Give one value for each"
            )

    def roles(self):
        return {"student": "teacher", "log_weight": self.cfg.log_weight}

    def updates(self):
        return (Update("student", ("student", "log_weight"), self.loss),)

    def sampler(self) -> Sampler:
        return consistency.few_steps(self.trig, self.cfg)

    def loss(self, batch: Batch):
        c, trig = self.cfg, self.trig
        eps = torch.randn(batch.size, *batch.shape, device=batch.device)
        times = stratified(self.route, eps, trig.low, trig.high)
        path = trajectory(trig, guided(self.teacher, c.guidance), eps, batch.cond, times)
        pairs = len(times) - 1
        x, velocity, t = (v[1:].flatten(0, 1) for v in path[:3])
        cond = {k: v.repeat(pairs, *[1] * (v.ndim - 1)) for k, v in batch.cond.items()}
        keep = torch.ones_like(t, dtype=x.dtype)
        if c.black:
            unit = [v / trig.data_std for v in c.black]
            keep = acceptable(path.end / trig.sigma_data, unit).repeat(pairs)
        r = warm(batch.step, c.tangent_warmup)
        r = calm(batch.step, c.calm_start, c.calm_steps, c.calm_end, r)
        residual, size = self.consistency(self.student, cond, x, t, velocity, r)
        loss = keep * consistency.weighted(residual, self.log_weight(t))
        return {"consistency": loss.mean(), "_tangent": size.mean(), "_kept": keep.mean()}
