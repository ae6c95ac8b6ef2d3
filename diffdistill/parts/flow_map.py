"""Flow maps of a teacher's ODE, on straight paths: z_t = (1 - t) x + t eps, 1 >= t >= r >= 0.

Boffi, Albergo and Vanden-Eijnden, "How to build a consistency model: Learning flow maps via
self-distillation", arXiv 2505.18825 (there t runs backwards).

    X(z, t, r) = z - (t - r) u(z, t, r),   u(z, t, t) = v(z, t) = dz/dt

    Eulerian     u = v(z, t) - (t - r) (grad_z u . v + du/dt)
    Lagrangian   u = v(X, r) + (t - r) du/dr
    semigroup    u = (1 - g) u(z, t, w) + g u(X(z, t, w), w, r),   w = g t + (1 - g) r

x is the teacher's clean data over their std s. Its network sees rho z at its own time tau, so any
schedule and prediction will do. D = z - t u is the clean estimate that students' samplers ask for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.parts.trig import Denoise, Trig
from diffdistill.schedules import Schedule, bcast

LOW = 1e-3  # v divides by t


class Flow:
    """The time and scale of a teacher on straight paths.

    Attributes:
        low, high: the range of t at which networks are asked.
    """

    def __init__(self, trig: Trig):
        """`trig` with sigma_data 1: the same data and noise on a circle, x_t = z_t / norm."""
        assert trig.sigma_data == 1
        self.trig, self.low = trig, LOW
        self.high = math.tan(trig.high) / (1 + math.tan(trig.high))

    def data(self, x: Tensor) -> Tensor:
        return self.trig.data(x)

    def clean(self, denoise: Denoise, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D(z_t, t): [B, ...]; t float64 [B]."""
        norm = ((1 - t).square() + t.square()).sqrt()
        return self.trig.clean(denoise, z / bcast(norm, z), torch.atan2(t, 1 - t), cond)

    def velocity(self, denoise: Denoise, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(z - D) / t: dz/dt, or u if the denoiser hears a second time."""
        return (z - self.clean(denoise, z, t, cond)) / bcast(t, z)

    def own(self, t: Sequence[float]) -> list[float]:
        """The teacher's times."""
        at = torch.tensor(t, dtype=torch.float64)
        return self.trig.own(torch.atan2(at, 1 - at))[0].tolist()


def flow_time(schedule: Schedule, data_std: float, tau: Tensor) -> Tensor:
    """t of a teacher's time, float64."""
    a, b = schedule.alpha(tau), schedule.sigma(tau)
    return b / (data_std * a + b)


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t eps."""
    return bcast(1 - t, x) * x + bcast(t, x) * eps


def jump(z: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """X = z - (t - r) u."""
    return z - bcast(t - r, z) * u


def eulerian(v: Tensor, moved: Tensor, t: Tensor, r: Tensor, share: float = 1.0) -> Tensor:
    """Target for u(z, t, r); `moved` is its derivative along (v, 1, 0) in (z, t, r)."""
    return v - share * bcast(t - r, v) * moved


def lagrangian(v_end: Tensor, moved: Tensor, t: Tensor, r: Tensor, share: float = 1.0) -> Tensor:
    """Target for u(z, t, r); `v_end` is v(X, r), `moved` is du/dr."""
    return v_end + share * bcast(t - r, v_end) * moved


def between(t: Tensor, r: Tensor, g: Tensor) -> Tensor:
    """w = g t + (1 - g) r."""
    return g * t + (1 - g) * r


def adaptive(residual: Tensor, power: float, c: float) -> Tensor:
    """S / sg(S + c)^power with S the sum of squares of each sample, [B] (arXiv 2505.13447)."""
    square = residual.square().flatten(1).sum(1)
    return square / (square.detach() + c) ** power


# ---- the second time --------------------------------------------------------------------


def even(steps: int) -> list[float]:
    """t of the later steps of a student: an even grid."""
    return [i / steps for i in range(steps - 1, 0, -1)]


def refuse_steps(teacher: Denoiser, steps: int) -> None:
    """Only one jump folds into a pipeline's network. ValueError for more."""
    if steps > 1 and hasattr(teacher.net, "backbone"):
        raise ValueError(
            f"method.student_steps={steps}: the second time of a flow map has no place in a "
            "pipeline's network. Set method.student_steps=1"
        )


class TwoTimes(nn.Module):
    """A copy of a teacher's network that also hears the time r it jumps to.

    An embedding of t - r is added to what the network's `time_embedding` says. Its last layer
    starts at zero, so u(z, t, r) starts as v(z, t). Without r, as samplers call it, r is the next
    of `times`, or 0.

    Args:
        net: called as net(z, tau, **cond); has one sub-module of a name in `EMBEDDINGS` that ends
            in a linear layer, as diffusers' UNets and transformers have.
        times: t of the sampler's steps, falling.
        look: without r, it lies this share of the way from the next step back to t.
    """

    WAVES = 16
    EMBEDDINGS = ("time_embedding", "timestep_embedder")

    def __init__(
        self, net: nn.Module, schedule: Schedule, data_std: float, times: Sequence[float],
        look: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.net = copy.deepcopy(net)
        self.schedule, self.data_std, self.times = schedule, data_std, tuple(times)
        self.look = look
        width = self._linear(self._embedding()).out_features
        self.second = nn.Sequential(
            nn.Linear(2 * self.WAVES, width), nn.SiLU(), nn.Linear(width, width)
        )
        nn.init.zeros_(self.second[-1].weight)
        nn.init.zeros_(self.second[-1].bias)

    def forward(self, z: Tensor, tau: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        t = flow_time(self.schedule, self.data_std, tau)
        return self.shifted(self.shift(t - (self.following(t) if r is None else r)), z, tau, cond)

    def shifted(self, shift: Tensor, z: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """The network's output with `shift` [B, width] added to its time embedding."""
        handle = self._embedding().register_forward_hook(
            lambda m, i, out: out + shift.to(out.dtype)
        )
        try:
            return self.net(z, tau, **cond)
        finally:
            handle.remove()

    def shift(self, h: Tensor) -> Tensor:
        """What a jump of length h [B] adds to the time embedding, [B, width]."""
        k = torch.arange(self.WAVES, dtype=h.dtype, device=h.device)
        angles = h[:, None] * k
        features = torch.cat([angles.cos(), angles.sin()], 1)
        return self.second(features.to(self.second[-1].weight.dtype))

    def following(self, t: Tensor) -> Tensor:
        """The largest of `times` below t, else 0; `look` of the way back to t."""
        times = torch.tensor([*self.times[1:], 0.0], dtype=t.dtype, device=t.device)
        lower = times < t[:, None] - 1e-6
        return torch.lerp((times * lower).amax(1), t, self.look)

    @property
    def backbone(self) -> nn.Module:
        """The stock network of a one-step student: its only jump is a constant in a bias."""
        assert len(self.times) == 1, "the network hears different jumps"
        fused = copy.deepcopy(self.net)
        linear = self._linear(self._embedding(fused))
        with torch.no_grad():
            h = torch.tensor(self.times, dtype=torch.float64, device=linear.bias.device)
            linear.bias += self.shift(h - self.following(h))[0]
        return fused.backbone

    def _embedding(self, net: nn.Module | None = None) -> nn.Module:
        named = (net or self.net).named_modules()
        found = [m for n, m in named if n.split(".")[-1] in self.EMBEDDINGS]
        if len(found) != 1:
            raise ValueError(
                f"a second time needs a network with one sub-module {' or '.join(self.EMBEDDINGS)},"
                f" this one has {len(found)}. Use a UNet of diffusers or an SD3 transformer"
            )
        return found[0]

    @staticmethod
    def _linear(embedding: nn.Module) -> nn.Linear:
        return [m for m in embedding.modules() if isinstance(m, nn.Linear)][-1]
