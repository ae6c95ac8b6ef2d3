"""What a method is: a config, the roles it trains, and one loss per update.

    class MyMethod(Method):
        Config = MyConfig
        def roles(self): return {"student": "teacher", "fake_score": "teacher"}
        def updates(self): return (Update("fake_score", ("fake_score",), self.fake_loss), ...)

The engine (`diffdistill.engine`) owns optimizers, devices, precision, EMA, logging, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.schedules import Schedule, student_times
from diffdistill.tokens import TokenModel

Losses = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """Stored teacher trajectories: start noise (unit variance), end point, condition.

    Of an autoregressive teacher: noise [B, n, C] and the tokens that it leads to, int [B, n].
    """

    eps: Tensor
    x: Tensor
    cond: Cond


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `x` is None for methods that see no images; `extra` is for worlds."""

    size: int
    shape: tuple[int, ...]  # of one sample
    cond: Cond
    x: Tensor | None = None
    pair: Pair | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    memo: dict[str, Any] = field(default_factory=dict)  # from one update of a step to the next
    shared: torch.Generator | None = None  # random numbers that agree on all processes
    prompts: Sequence[Any] | None = None  # prompts or labels as given, if the method needs them
    step: int = 0  # of the engine

    def randint(self, n: int) -> int:
        """An integer in [0, n), the same on every process."""
        return int(torch.randint(n, (), generator=self.shared))


@dataclass(frozen=True)
class Update:
    """One optimisation of some roles. All semantics: `diffdistill.engine`."""

    name: str  # prefix in logs: "fake_score/dsm"
    trains: tuple[str, ...]  # roles whose parameters move
    loss: Callable[[Batch], Losses]
    every: int = 1  # runs when step % every == offset
    repeat: int = 1  # times per step; from the second on, fresh micro-batches
    start: int = 0  # first step at which it is active
    stop: int | None = None  # first step at which it is not
    offset: int = 0  # below `every`: updates of equal `every` can take turns
    after: Callable[[], None] | None = None  # called behind the optimizer step, without gradients

    def __post_init__(self) -> None:
        if self.every < 1 or self.repeat < 1 or not 0 <= self.offset < self.every:
            raise ValueError(
                f"update {self.name!r}: every={self.every}, repeat={self.repeat}, "
                f"offset={self.offset}. Allowed: 1 or more, 1 or more, 0 to every - 1"
            )


@dataclass(frozen=True)
class Transition:
    """At the start of step `at`, role `to` takes the weights of role `source` (or "teacher").

    `copy(source, to)` says how, if not parameter by parameter. `averaged`: the weights of the
    source's first average (`diffdistill.ema`), where the run keeps one.
    """

    at: int
    source: str
    to: str
    reset_optimizer: bool = True  # its averages start from the new weights, too
    copy: Callable[[nn.Module, nn.Module], None] | None = None
    averaged: bool = False


@dataclass(frozen=True)
class Needs:
    """What a method needs, checked before anything is loaded."""

    images: bool = False  # real images (or latents of them)
    pairs: int = 0  # stored teacher trajectories
    pair_steps: int = 0  # solver steps of each; 0: the teacher's default
    teacher: Literal["denoiser", "tokens"] = "denoiser"
    features: bool = False  # a feature_layer for a discriminator
    prompts: bool = False  # `Batch.prompts`, for rewards


@dataclass(frozen=True)
class Sampler:
    """How the student is called: x0 estimates at `times`, re-noised in between.

    renoise "fresh": z = alpha x0 + sigma eps' with new noise (LCM, DMD2, consistency models).
    renoise "ode": the implied noise is kept (DDIM).
    renoise "tcd": the share 1 - eta of the next time is reached by DDIM, the rest by new noise; the
    last step ends at the schedule's lowest time (Trajectory consistency, arXiv 2402.19159).
    renoise "ancestral": DDIM with noise, eta = 1 as in DDPM (arXiv 2010.02502, Eq. 16).
    experts: which of the method's students each step asks; none: the only one.
    """

    times: tuple[float, ...]
    renoise: Literal["fresh", "ode", "tcd", "ancestral"] = "fresh"
    experts: tuple[int, ...] = ()
    eta: float = 1.0  # of "tcd" and "ancestral"; up to 1, for "tcd" above 0


@dataclass(frozen=True)
class TokenSampler:
    """How a student of an autoregressive teacher is called, once for each start.

    starts: groups that are data at each call; the rest is noise. One step: (0,).
    split: groups below it are read off the logits, the others are the student's own vectors.
    draw: how the logits are read.
    """

    starts: tuple[int, ...] = (0,)
    split: int = 0
    draw: Literal["argmax", "multinomial"] = "argmax"


@dataclass
class MethodConfig:
    """Base of every method's config."""

    def validate(self) -> None:
        """Cross-field checks. Raises ValueError before anything is loaded."""


RoleInit = str | Callable[[Any], nn.Module]  # of the teacher


class Method:
    """Base class. Subclasses define Config, roles, updates; nothing here is called by `super`."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper: ClassVar[str] = ""  # "Title, arXiv id", for cards and lists
    students: ClassVar[tuple[str, ...]] = ("student",)  # averaged and exported
    any_steps: ClassVar[bool] = False  # student_steps only says how it is sampled: `evaluate.steps`
    cfg: Any
    teacher: Any  # Denoiser or TokenModel, as `needs` says
    schedule: Schedule

    def __init__(self, cfg: Any, teacher: Denoiser | TokenModel):
        self.cfg, self.teacher, self.schedule = cfg, teacher, teacher.schedule
        self._roles: dict[str, nn.Module] = {}

    def attach(self, roles: Mapping[str, nn.Module]) -> None:
        """Called once by the house: roles become attributes (`self.student`, ...)."""
        self._roles = dict(roles)

    def __getattr__(self, name: str) -> Any:
        roles = self.__dict__.get("_roles", {})
        if name in roles:
            return roles[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or role {name!r}")

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        return Needs()

    def roles(self) -> dict[str, RoleInit]:
        """role -> "teacher" (a trainable copy), or a function of the teacher that builds it."""
        return {"student": "teacher"}

    def updates(self) -> tuple[Update, ...]:
        raise NotImplementedError(f"{type(self).__name__} defines no updates()")

    def transitions(self) -> tuple[Transition, ...]:
        """Weights that move between roles at given steps (stages, phases)."""
        return ()

    def sampler(self) -> Sampler | TokenSampler:
        """From the config: `student_steps`, and `conditioning_time`, `renoise` if it has them."""
        steps = getattr(self.cfg, "student_steps", 1)
        first = getattr(self.cfg, "conditioning_time", None)
        renoise = getattr(self.cfg, "renoise", "fresh")
        return Sampler(student_times(self.schedule, steps, first), renoise)
