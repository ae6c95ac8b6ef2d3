"""Flow maps: LSD, ESD and PSD from data, LMD and EMD from a teacher, MeanFlow.

Boffi, Albergo and Vanden-Eijnden, "How to build a consistency model: Learning flow maps via
self-distillation", arXiv 2505.18825. Geng et al., "Mean Flows for One-step Generative Modeling",
2505.13447. Sabour, Fidler and Kreis, "Align Your Flow", 2506.14603 (EMD).

    z_t = (1 - t) x + t eps,   X(z, t, r) = z - (t - r) u(z, t, r),   t >= r
    diagonal    u(z, t, t) -> v,  v = eps - x or the guided teacher's velocity
    eulerian    u -> v - (t - r) (grad_z u . v + du/dt)
    lagrangian  u -> v(X, r) + (t - r) du/dr
    semigroup   u -> (1 - g) u(z, t, w) + g u(X(z, t, w), w, r),  w = g t + (1 - g) r
    loss        S / sg(S + c)^p,  S = |u - sg[target]|^2

| identity   | velocity | is                 | identity   | velocity | is           |
| eulerian   | data     | MeanFlow           | lagrangian | self     | LSD          |
| eulerian   | self     | ESD                | lagrangian | teacher  | LMD          |
| eulerian   | teacher  | EMD (Align Your F.)| semigroup  | self     | PSD          |

Nothing is re-noised between the steps of a few-step student: it jumps along the ODE.

Deviations: every derivative is detached (published LSD and ESD let gradients flow through the time
derivative; the zeros are the same). No learned weight w(t, r); MeanFlow's guidance and AYF's
autoguidance and GAN are not here. Guidance is the teacher's and fixed. The second time enters
beside the network's time embedding (`TwoTimes`); one-step students fold it into a bias, more steps
have no stock diffusers network and are refused for pipelines.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffdistill.denoiser import Denoiser, guided
from diffdistill.method import Batch, Method, Needs, Sampler, Update
from diffdistill.parts import flow_map
from diffdistill.parts.consistency import Normalise, normalised
from diffdistill.parts.jvp import Derivative, DerivativeConfig, warm
from diffdistill.parts.trig import Trig
from diffdistill.registry import register_method
from diffdistill.schedules import student_times


@dataclass
class Config(DerivativeConfig):
    identity: Literal["eulerian", "lagrangian", "semigroup"] = "eulerian"
    velocity: Literal["teacher", "data", "self"] = "teacher"
    guidance: float = 1.0  # of the teacher, u + g (c - u)
    student_steps: int = 1
    diagonal: float = 0.25  # share of the batch with r = t; Boffi, MeanFlow on ImageNet: 0.75
    times: Literal["uniform", "lognormal"] = "uniform"  # of t and r; MeanFlow: logit-normal
    p_mean: float = -0.4  # of ln(t / (1 - t)), if lognormal; MeanFlow
    p_std: float = 1.0
    gamma: Literal["half", "uniform"] = "half"  # of the semigroup: PSD-M, PSD-U
    normalise: Normalise = "none"  # of target - u; AYF: l2
    c: float = 0.1  # of that normaliser
    power: float = 1.0  # p of the loss; Boffi and AYF: 0, MeanFlow: 0.75 and 1
    floor: float = 1e-3  # c of the loss; MeanFlow

    def validate(self) -> None:
        super().validate()
        if self.velocity == "data" and self.identity != "eulerian":
            raise ValueError(
                f"method.velocity=data with method.identity={self.identity}: the data's velocity "
                "is known at noised data only. Use eulerian, or method.velocity=self"
            )
        if self.diagonal == 0 and (self.velocity == "self" or self.identity == "semigroup"):
            raise ValueError(
                f"method.diagonal=0 with method.identity={self.identity}, velocity={self.velocity}:"
                " nothing says what the velocity is. Set method.diagonal above 0"
            )
        if self.velocity != "teacher" and self.guidance != 1:
            raise ValueError(
                f"method.guidance={self.guidance} guides the teacher, which method.velocity="
                f"{self.velocity} does not ask. Set method.guidance=1"
            )
        if not 0 <= self.diagonal <= 1 or self.student_steps < 1 or min(self.c, self.floor) <= 0:
            raise ValueError(
                f"method.diagonal={self.diagonal}, student_steps={self.student_steps}, c={self.c}, "
                f"floor={self.floor}. Allowed: 0 to 1, 1 or more, and more than 0"
            )


@register_method("flow_maps")
class FlowMaps(Method):
    Config = Config
    paper = "Learning flow maps via self-distillation, arXiv 2505.18825"

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        self.flow = flow_map.Flow(Trig.of(teacher, cfg.data_std, 1.0))
        self.jvp = Derivative(cfg)
        flow_map.refuse_steps(teacher, cfg.student_steps)

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return Needs(images=True)

    def roles(self):
        first, std = self.flow.high, self.flow.trig.data_std
        times = (first, *flow_map.even(self.cfg.student_steps))

        def two_times(teacher: Denoiser) -> Denoiser:
            return teacher.clone(flow_map.TwoTimes(teacher.net, self.schedule, std, times))

        return {"student": two_times}

    def updates(self):
        return (Update("student", ("student",), self.loss),)

    def sampler(self) -> Sampler:
        (first,) = student_times(self.schedule, 1)
        later = flow_map.even(self.cfg.student_steps)
        return Sampler((first, *self.flow.own(later)), "ode")

    def u(self, z, t, r, cond):
        return self.flow.velocity(self.student, z, t, {**cond, "r": r})

    def velocity(self, z, t, cond):
        """v of the teacher, or of the student itself."""
        t = t.clamp(min=self.flow.low)
        if self.cfg.velocity == "teacher":
            return self.flow.velocity(guided(self.teacher, self.cfg.guidance), z, t, cond)
        return self.u(z, t, t, cond)

    def draw(self, like):
        """Two times, the larger one first; float64 [2, B]."""
        both = torch.rand(2, len(like), dtype=torch.float64, device=like.device)
        if self.cfg.times == "lognormal":
            both = (self.cfg.p_mean + self.cfg.p_std * torch.randn_like(both)).sigmoid()
        low, high = self.flow.low, self.flow.high
        return both.clamp(low, high).sort(0, descending=True).values

    def loss(self, batch: Batch):
        c, cond, x = self.cfg, batch.cond, self.flow.data(batch.x)
        m, eps, (t, r) = round(c.diagonal * batch.size), torch.randn_like(x), self.draw(x)
        r[:m] = t[:m]
        z = flow_map.interpolate(x, eps, t)
        with torch.no_grad():
            v = self.velocity(z, t, cond) if c.velocity == "teacher" else eps - x
            share = warm(batch.step, c.tangent_warmup)
            rest = {k: w[m:] for k, w in cond.items()}
            far = self.target(z[m:], v[m:], t[m:], r[m:], rest, share) if m < len(z) else v[m:]
        u = self.u(z, t, r, cond)
        move = torch.cat([v[:m], far]) - u.detach()
        residual = u - u.detach() - normalised(move, c.normalise, c.c)
        size = move.flatten(1).norm(dim=1).mean()
        return {"map": flow_map.adaptive(residual, c.power, c.floor).mean(), "_residual": size}

    def target(self, z, v, t, r, cond, share=1.0):
        """Off the diagonal; v is the teacher's or the data's velocity."""
        c = self.cfg
        fn = lambda z, t, r: self.u(z, t, r, cond)  # noqa: E731
        if c.identity == "semigroup":
            g = torch.rand_like(t) if c.gamma == "uniform" else torch.full_like(t, 0.5)
            w = flow_map.between(t, r, g)
            first = fn(z, t, w)
            second = fn(flow_map.jump(z, first, t, w), w, r)
            return torch.lerp(first, second, flow_map.bcast(g, z))
        middle = torch.linspace(0.4, 0.8, len(z), dtype=t.dtype, device=t.device)
        ones, (low, high) = torch.ones_like(t), (self.flow.low, self.flow.high)
        if c.identity == "eulerian":
            v = self.velocity(z, t, cond) if c.velocity == "self" else v
            along, domain = (v, ones, None), (r, high)
        else:
            along, domain = (None, None, ones), (low, t)
        probe = ((z, middle, middle / 2), (v, ones, None))
        moved = self.jvp(fn, (z, t, r), along, domain, probe)
        if c.identity == "eulerian":
            return flow_map.eulerian(v, moved, t, r, share)
        end = self.velocity(flow_map.jump(z, fn(z, t, r), t, r), r, cond)
        return flow_map.lagrangian(end, moved, t, r, share)
