"""TrigFlow around teachers of any schedule and prediction (Lu and Song, arXiv 2410.11081).

    x_t = cos t x + sin t z,   z = sigma_d eps,   t in [0, pi/2],   dx_t/dt = sigma_d F(x_t, t)
    D   = cos t x_t - sin t sigma_d F

A teacher sees u = a x' + b eps at a time tau of its own. With x = sigma_d / s x', s the std of x':

    b / a = s tan t  ->  tau,   u = rho x_t,   rho = sqrt((a s)^2 + b^2) / sigma_d
    D = sigma_d / s D'(u, tau),   F = (cos t x_t - D) / (sigma_d sin t)

So a consistency function f(x_t, t) = D is the clean estimate of a network of the same schedule, and
students sample as all others here. Times stay where the teacher knows them; at its lowest one the
division costs float32 a relative 1e-7 / sin t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.method import Sampler
from diffdistill.schedules import Schedule, bcast

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]

ENDS = (1e-4, math.pi / 2 - 1e-6)  # 1 / sin t and tan t are finite
HAIR = 1e-9  # schedules clamp at their ends, where a derivative would be 0


class Trig:
    """The time and scale of a teacher in TrigFlow, and back.

    Args:
        schedule: of the teacher and its students.
        data_std: s, in the units of the teacher's clean estimate.
        sigma_data: sigma_d. None: s, so that x is the teacher's own x'.
        first: the teacher's time at which students start; there is no later one. None: its last.

    Attributes:
        low, high: the range of t.
    """

    def __init__(
        self,
        schedule: Schedule,
        data_std: float = 1.0,
        sigma_data: float | None = None,
        first: float | None = None,
    ):
        self.schedule, self.data_std = schedule, data_std
        self.sigma_data = data_std if sigma_data is None else sigma_data
        last = schedule.t_max if first is None else min(first, schedule.t_max)
        ends = torch.tensor([schedule.t_min, last], dtype=torch.float64)
        low, high = (schedule.sigma(ends) / schedule.alpha(ends) / data_std).atan().tolist()
        self.low, self.high = max(low * (1 + HAIR), ENDS[0]), min(high * (1 - HAIR), ENDS[1])

    @classmethod
    def of(
        cls,
        teacher: Denoiser,
        data_std: float | None,
        sigma_data: float | None = None,
        first: float | None = None,
    ) -> Trig:
        """data_std None: what the teacher says (EDM), else 1 (scaled latents)."""
        return cls(teacher.schedule, data_std or teacher.sigma_data or 1.0, sigma_data, first)

    def own(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's time tau and the scale rho of its input; float64 [B]."""
        tau = self.schedule.t_of_ratio(self.data_std * t.tan())
        a, b = self.schedule.alpha(tau), self.schedule.sigma(tau)
        return tau, ((a * self.data_std).square() + b.square()).sqrt() / self.sigma_data

    def data(self, x: Tensor) -> Tensor:
        """x of the teacher's x'."""
        return self.sigma_data / self.data_std * x

    def clean(self, denoise: Denoise, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D(x_t, t): [B, ...]; t float64 [B]."""
        tau, rho = self.own(t)
        return self.data(denoise(bcast(rho, x) * x, tau, cond))

    def features(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, layers: Sequence[str] = ()
    ) -> list[Tensor]:
        """Activations of `denoiser` at (x_t, t), as `Denoiser.tap` gives them."""
        tau, rho = self.own(t)
        return denoiser.tap(bcast(rho, x) * x, tau, cond, layers)[1]

    def network(self, denoise: Denoise, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """F(x_t, t), of unit variance; may be differentiated in x and t."""
        gap = bcast(t.cos(), x) * x - self.clean(denoise, x, t, cond)
        return gap / bcast(self.sigma_data * t.sin(), x)

    def velocity(self, denoise: Denoise, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """dx_t/dt = sigma_d F of the ODE of `denoise`."""
        return self.sigma_data * self.network(denoise, x, t, cond)

    @torch.no_grad()
    def simulate(self, denoise: Denoise, eps: Tensor, cond: Cond, at: Sequence[Tensor]) -> Tensor:
        """The student's own input x_t at the last of falling times `at`, each [B]; no gradient."""
        x = self.sigma_data * eps
        for t, s in pairwise(at):
            x = mix(self.clean(denoise, x, t, cond), self.noise(x), s)
        return x

    def noise(self, like: Tensor) -> Tensor:
        """z = sigma_d eps, fresh."""
        return self.sigma_data * torch.randn_like(like)

    def draw(self, like: Tensor, mean: float, std: float) -> Tensor:
        """t = arctan(e^n / sigma_d), n ~ N(mean, std^2), inside [low, high]; float64 [B]."""
        normal = torch.randn(len(like), dtype=torch.float64, device=like.device)
        ratio = (mean + std * normal).exp() / self.sigma_data
        return ratio.atan().clamp(self.low, self.high)

    def sampler(self, first: float, later: Sequence[float]) -> Sampler:
        """Steps at the teacher's time `first`, then at the TrigFlow times `later`; fresh noise.

        Raises:
            ValueError: the times do not fall, or lie outside of the teacher's range.
        """
        t = torch.tensor(later, dtype=torch.float64)
        times = (first, *self.own(t)[0].tolist())
        falling = all(a > b for a, b in pairwise(times))
        if not falling or not all(self.low <= s <= self.high for s in later):
            raise ValueError(
                f"a student cannot take steps at the TrigFlow times {list(later)}, the teacher's "
                f"{[round(s, 3) for s in times[1:]]}, after its time {first:g}. "
                f"Allowed: falling, between {self.low:.4f} and {self.high:.4f}. Set "
                "method.mid_times or method.conditioning_time"
            )
        return Sampler(times)


def mix(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = cos t x + sin t z."""
    return bcast(t.cos(), x) * x + bcast(t.sin(), x) * z


def conditional_velocity(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """cos t z - sin t x: its mean given x_t is dx_t/dt of the data's ODE."""
    return bcast(t.cos(), x) * z - bcast(t.sin(), x) * x
