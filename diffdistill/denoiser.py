"""One interface to every teacher and student: x0 = D(z, t, cond).

EDM, eps, v and flow networks differ only behind this call. With z = alpha x0 + sigma eps:

    x0    out
    eps   (z - sigma out) / alpha                     eps
    v     (alpha z - sigma out) / (alpha^2 + sigma^2)     v = alpha eps - sigma x0
    flow  (z - sigma out) / (alpha + sigma)               u = eps - x0

Time stays float64 until it enters the network, conversions run in float32 outside autocast (an
eps network divides by alpha = 0.068 at the last step of Stable Diffusion).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.schedules import Schedule, bcast

ASKED = ("t_min", "t_max", "alpha", "sigma", "t_of_ratio", "start_scale", "grid")  # of a schedule
Cond = Mapping[str, Tensor]
Prediction = Literal["x0", "eps", "v", "flow"]
FeatureMap = Callable[[Any, Tensor], Tensor]


def first_output(output: Any, _z: Tensor) -> Tensor:
    """What a layer gives, or the first of several outputs: [B, C, h, w] in a UNet."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Runtime:
    """How networks are executed; chosen once per run (`diffdistill.runtime`), stored in it."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    attention: Literal["auto", "math"] = "auto"  # math: in passes that keep a graph

    @contextlib.contextmanager
    def context(self, device: torch.device):
        """Autocast and attention back end for one network call."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        with contextlib.ExitStack() as stack:
            if self.dtype in dtypes:
                stack.enter_context(torch.autocast(device.type, dtypes[self.dtype]))
            if self.attention == "math" and torch.is_grad_enabled():
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


class _Reached(Exception):
    """Leaves a network as soon as the wanted feature is known."""


class Denoiser(nn.Module):
    """x0 = D(z, t, cond).

    Args:
        net: called as net(z, t, **cond), z [B, *shape] and t float64 [B], a time of `schedule`;
            returns what `prediction` says, shape of z. As a teacher it is unconditional: net(z, t).
        shape: of one sample, without the batch dimension. As a teacher, its samples [C, H, W] are
            pixels in [-1, 1]: so `data.folder` is given to it, and so previews are drawn.
        null_cond: one unconditional sample of `cond` (leading dimension 1), for guidance.
        feature_layer: name of the sub-module of `net` whose output discriminators read.
        feature_map: (output of such a sub-module, z) -> activation [B, C, h, w].
        sigma_data: data std of EDM's loss weight; only for x0 networks.

    Raises:
        ValueError: `schedule` is no schedule, or `prediction` is none of x0, eps, v, flow.
    """

    null: dict[str, Tensor]

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: Prediction = "x0",
        *,
        shape: tuple[int, ...] = (),
        null_cond: Cond | None = None,
        feature_layer: str | None = None,
        feature_map: FeatureMap = first_output,
        sigma_data: float | None = None,
    ):
        super().__init__()
        if prediction not in ("x0", "eps", "v", "flow"):
            raise ValueError(f"prediction is {prediction!r}. Allowed: x0, eps, v, flow")
        if isinstance(schedule, type) or not all(hasattr(schedule, name) for name in ASKED):
            raise ValueError(
                f"schedule is {schedule!r}. Give one of diffdistill.schedules, such as "
                f"schedules.EDM(), or an object with {', '.join(ASKED)}"
            )
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.shape = tuple(shape)
        self.feature_layer = feature_layer
        self.feature_map = feature_map
        self.sigma_data = sigma_data
        self.null = dict(null_cond or {})
        self.runtime = Runtime()
        self.passes = 0  # network evaluations so far, in samples
        self.decode: Callable[[Tensor], Tensor] | None = None  # latents -> images, if latent

    def clone(self, net: nn.Module | None = None) -> Denoiser:
        """The same interface around a copy of the network, or around another network."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.net = copy.deepcopy(self.net) if net is None else net
        return other

    def forward(self, z: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Clean estimate, float32, shape of z. t: float64 [B]."""
        out = self._call(z, t, cond)
        with torch.autocast(z.device.type, enabled=False):
            return self.to_x0(out.float(), z.float(), t)

    def to_x0(self, out: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Network output -> clean estimate."""
        if self.prediction == "x0":
            return out
        alpha, sigma = bcast(self.schedule.alpha(t), z), bcast(self.schedule.sigma(t), z)
        if self.prediction == "eps":
            return (z - sigma * out) / alpha
        if self.prediction == "v":
            return (alpha * z - sigma * out) / (alpha.square() + sigma.square())
        return (z - sigma * out) / (alpha + sigma)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of |D - x|^2 that equals the loss the network was trained with, float64 [B].

        eps, v and flow networks: unit weight on their own output. x0 networks: EDM's
        1 / sigma^2 + 1 / sigma_data^2 (arXiv 2206.00364, Tab. 1), or 1 without `sigma_data`.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.prediction == "eps":
            return (alpha / sigma).square()
        if self.prediction == "v":
            return ((alpha.square() + sigma.square()) / sigma).square()
        if self.prediction == "flow":
            return ((alpha + sigma) / sigma).square()
        if self.sigma_data is None:
            return torch.ones_like(sigma)
        return sigma**-2 + self.sigma_data**-2

    def features(self, z: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Activation [B, C, h, w] of `feature_layer`, float32; the rest of the net is not run."""
        return self.tap(z, t, cond)[1][0]

    def tap(
        self,
        z: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        layers: Sequence[str] = (),
        *,
        whole: bool = False,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(clean estimate, activations [B, C, h, w] of `layers`, float32) of one pass.

        Args:
            layers: names of sub-modules of `net`; none: `feature_layer`.
            whole: run the net to its end; else only up to the layers, and the estimate is None.
        """
        if not (layers := tuple(layers) or ((self.feature_layer,) if self.feature_layer else ())):
            raise ValueError("this teacher names no feature_layer, which a discriminator needs")
        found: dict[str, Tensor] = {}

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                found[name] = self.feature_map(output, z)
                if not whole and len(found) == len(layers):
                    raise _Reached

            return hook

        modules = {name: self.net.get_submodule(name) for name in layers}
        handles = [m.register_forward_hook(hook_of(name)) for name, m in modules.items()]
        out = None
        try:
            out = self._call(z, t, cond)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        features = [found[name].float() for name in layers]
        if out is None:
            return None, features
        with torch.autocast(z.device.type, enabled=False):
            return self.to_x0(out.float(), z.float(), t), features

    def null_cond(self, like: Tensor) -> dict[str, Tensor]:
        """The unconditional condition for a batch of len(like)."""
        return {k: v.to(like.device).expand(len(like), *v.shape[1:]) for k, v in self.null.items()}

    def _call(self, z: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        self.passes += len(z) if _counted else 0
        if self.runtime.channels_last and z.ndim == 4:
            z = z.contiguous(memory_format=torch.channels_last)
        with self.runtime.context(z.device):
            return self.net(z, t, **(cond or {}))


_counted = True


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Inside, calls of denoisers are no passes: what only checks a network is not its training."""
    global _counted
    before, _counted = _counted, False
    try:
        yield
    finally:
        _counted = before


def guided(denoiser: Denoiser, scale: float) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    """Classifier-free guidance D = u + scale (c - u) (Ho and Salimans, arXiv 2207.12598).

    scale 1 is the plain conditional denoiser and costs one pass; any other scale costs two.
    """
    if scale == 1:
        return denoiser
    if not denoiser.null:
        raise ValueError(
            f"guidance {scale} needs an unconditional branch, which this teacher does not have. "
            "Set guidance to 1."
        )

    def guided_denoiser(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        null = denoiser.null_cond(z)
        both = {k: torch.cat([null[k].to(v.dtype), v]) for k, v in cond.items()}
        u, c = denoiser(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return u + scale * (c - u)

    return guided_denoiser


def eps_of(schedule: Schedule, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The noise that a clean estimate implies: (z - alpha x0) / sigma."""
    return (z - bcast(schedule.alpha(t), z) * x0) / bcast(schedule.sigma(t), z)


def score_of(schedule: Schedule, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(z) = -(z - alpha x0) / sigma^2 (Tweedie)."""
    return -eps_of(schedule, x0, z, t) / bcast(schedule.sigma(t), z)


def on_schedule(denoiser: Denoiser, schedule: Schedule) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    """The same denoiser under another schedule: rescale to equal sigma / alpha."""

    def rescaled(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        own = denoiser.schedule
        t_own = own.t_of_ratio(schedule.sigma(t) / schedule.alpha(t))
        scale = own.alpha(t_own) / schedule.alpha(t)
        return denoiser(bcast(scale, z) * z, t_own, cond)

    return rescaled
