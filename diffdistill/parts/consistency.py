"""Continuous-time consistency: the tangent of a network along an ODE, and the loss that follows it.

Lu and Song, "Simplifying, Stabilizing & Scaling Continuous-Time Consistency Models", arXiv
2410.11081; the second form is that of Zheng et al., "Large Scale Diffusion Distillation via
Score-Regularized Continuous-Time Consistency", 2510.08431. In TrigFlow (`parts.trig`),

    g = -keep (sigma_d F - dx/dt) - r (cos t sin t x_t + sigma_d tF),   tF = cos t sin t dF/dt
    keep = cos^2 t  ("scm"),   cos t sqrt(1 - r^2 sin^2 t)  ("rcm")

is cos t df/dt of f(x_t, t) = cos t x_t - sin t sigma_d F at r = 1; for r < 1 the fixed point is not
the consistency function. The loss moves F along +g / (|g| + c).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.method import Sampler
from diffdistill.parts.jvp import Derivative, DerivativeConfig
from diffdistill.parts.trig import Denoise, Trig, mix
from diffdistill.schedules import bcast, student_times

Field = Callable[[Tensor, Tensor], Tensor]  # F of (x_t [B, ...], t [B])
Normalise = Literal["l2", "rms", "root", "clip", "none"]
Form = Literal["scm", "rcm"]


@dataclass
class ConsistencyConfig(DerivativeConfig):
    """Options of every method with a tangent in TrigFlow.

    Attributes:
        usual: TrigFlow times of the later steps by the number of steps, if `mid_times` has none.
    """

    usual: ClassVar[Mapping[int, tuple[float, ...]]] = {1: ()}

    student_steps: int = 1
    conditioning_time: float | None = None  # of the first step; None: the teacher's noisy end
    mid_times: tuple[float, ...] = ()  # TrigFlow times of the later steps; none: the paper's
    sigma_data: float | None = None  # sigma_d of TrigFlow; None: s
    normalise: Normalise = "l2"  # of g; rms: FastGen, root: rCM's paper, clip: each to -1 .. 1
    c: float = 0.1  # of the normaliser; paper

    def validate(self) -> None:
        super().validate()
        if (self.sigma_data is not None and self.sigma_data <= 0) or self.c <= 0:
            raise ValueError(
                f"method.sigma_data={self.sigma_data}, c={self.c}. Allowed: more than 0"
            )
        if len(self.later) + 1 != self.student_steps:
            raise ValueError(
                f"method.student_steps={self.student_steps}, method.mid_times="
                f"{list(self.mid_times)}. Allowed: one mid time less than steps; without any, 1 to "
                f"{max(self.usual)} steps"
            )

    def log_weight(self, teacher: Denoiser) -> LogWeight:
        """w(t) from its optimum on: the mean square of a tangent of norm 1 is 1 / elements.

        From 0, ln(elements) away, a short run ends before w is flat, and what it learns last are
        the times that it draws least, among them the student's first.
        """
        unit = self.normalise in ("l2", "root")
        return LogWeight(math.log(math.prod(teacher.shape)) if unit else 0.0)

    @property
    def later(self) -> tuple[float, ...]:
        """TrigFlow times of the steps after the first."""
        return tuple(self.mid_times) or self.usual.get(self.student_steps, ())


class Consistency:
    """One step of continuous-time consistency.

    Args:
        trig: the student's TrigFlow.
        cfg: how the derivative is taken and normalised.
        form: of the tangent's first term; they differ in the warm-up only.
    """

    def __init__(self, trig: Trig, cfg: ConsistencyConfig, form: Form = "scm"):
        self.trig, self.cfg, self.form = trig, cfg, form
        self.jvp = Derivative(cfg)

    def __call__(
        self, denoise: Denoise, cond: Cond, x: Tensor, t: Tensor, velocity: Tensor, r: float
    ) -> tuple[Tensor, Tensor]:
        """`residual` of the network F of a student."""
        return self.residual(lambda x, t: self.trig.network(denoise, x, t, cond), x, t, velocity, r)

    def from_teacher(
        self, denoise: Denoise, teacher: Denoise, x0: Tensor, t: Tensor, cond: Cond, r: float
    ) -> tuple[Tensor, Tensor]:
        """`residual` at noised data x_t, along the teacher's ODE."""
        x = mix(x0, self.trig.noise(x0), t)
        with torch.no_grad():
            velocity = self.trig.velocity(teacher, x, t, cond)
        return self(denoise, cond, x, t, velocity, r)

    def residual(
        self, field: Field, x: Tensor, t: Tensor, velocity: Tensor, r: float
    ) -> tuple[Tensor, Tensor]:
        """(F - sg[F] - normalised g [B, ...], |g| [B]).

        The gradient of half the square of the first is -g dF. Draws no random numbers before the
        pass that is trained: dropout is the same there and in the derivative.

        Args:
            velocity: dx_t/dt of the teacher, or the conditional one of the data; no gradient.
            r: share of the tangent's second term.
        """
        moved = self.derivative(field, x, t, velocity)
        f = field(x, t)
        g = tangent(f.detach(), velocity, x, t, moved, r, self.trig.sigma_data, self.form)
        return f - f.detach() - normalised(g, self.cfg.normalise, self.cfg.c), sizes(g).flatten()

    def derivative(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """tF = cos t sin t dF/dt along the ODE, without a graph; the first call is guarded."""
        low, high = self.trig.low, self.trig.high
        speed = t.cos() * t.sin()
        inner = torch.linspace(0.2, 0.8, len(x), dtype=t.dtype, device=t.device)
        middle = low + (high - low) * inner
        moves = middle.cos() * middle.sin()
        return self.jvp(
            field, (x, t), (bcast(speed, x) * velocity, speed), (low, high),
            probe=((x, middle), (velocity, moves)),
        )  # fmt: skip


def few_steps(trig: Trig, cfg: ConsistencyConfig) -> Sampler:
    """The steps that the options say; the network is the same for any number of them."""
    (first,) = student_times(trig.schedule, 1, cfg.conditioning_time)
    return trig.sampler(first, cfg.later)


def tangent(
    f: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor,
    moved: Tensor,
    r: float,
    sigma_data: float,
    form: Form = "scm",
) -> Tensor:
    """g before it is normalised; `f` is F(x_t, t), `moved` is tF = cos t sin t dF/dt."""
    cos, sin = t.cos(), t.sin()
    keep = cos.square() if form == "scm" else cos * (1 - (r * sin).square()).sqrt()
    pull = bcast(keep, x) * (sigma_data * f - velocity)
    return -pull - r * (bcast(cos * sin, x) * x + sigma_data * moved)


def sizes(g: Tensor) -> Tensor:
    """L2 norm of each sample, float64 [B, 1, ...]."""
    return g.flatten(1).double().norm(dim=1).view(-1, *[1] * (g.ndim - 1))


def normalised(g: Tensor, kind: Normalise = "l2", c: float = 0.1) -> Tensor:
    """g over a norm of each sample, in the dtype of g; the norm is float64.

    l2: g / (|g| + c) (SANA-Sprint, rCM's code);  rms: the same with |g| / sqrt(elements);
    root: g / sqrt(|g|^2 + c) (rCM, paper);  clip: each element to -1 .. 1;  none: g.
    """
    if kind == "none":
        return g
    if kind == "clip":
        return g.clamp(-1, 1)
    size = sizes(g)
    if kind == "rms":
        size = size / g[0].numel() ** 0.5
    return g / ((size.square() + c).sqrt() if kind == "root" else size + c).to(g.dtype)


class LogWeight(nn.Module):
    """w(t), the logarithm of the adaptive weight: linear in cos kt and sin kt, from `start` on."""

    def __init__(self, start: float = 0.0, waves: int = 8):
        super().__init__()
        self.out = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, start)

    def forward(self, t: Tensor) -> Tensor:
        """[B], float32."""
        k = torch.arange(self.out.in_features // 2, dtype=t.dtype, device=t.device)
        angles = t[:, None] * k
        features = torch.cat([angles.cos(), angles.sin()], 1)
        return self.out(features.to(self.out.weight.dtype)).flatten()


def weighted(residual: Tensor, w: Tensor | None) -> Tensor:
    """e^w L - w with L the mean square of each sample, [B]; L if there is no w.

    At its optimum in w, e^w = 1 / L.
    """
    square = residual.square().flatten(1).mean(1)
    return square if w is None else w.exp() * square - w
