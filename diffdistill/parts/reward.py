"""Scores of samples: CLIP similarity and other rewards, of the user's or of an embedded world."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser
from diffdistill.method import MethodConfig
from diffdistill.schedules import times

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
Score = Callable[[Tensor, Cond], Tensor]
Input = Literal["pixels", "latents", "noisy_latents"]
FORMS = "Give FILE.py:FUNCTION or package.module:function"


@functools.cache
def load_function(name: str) -> Callable[..., Any]:
    """A callable by its name, `FILE.py:FUNCTION` or `package.module:function`.

    Raises:
        ValueError: no such file, module or function.
    """
    where, _, function = name.rpartition(":")
    path = Path(where).expanduser()
    if path.suffix == ".py" and path.is_file():
        spec = importlib.util.spec_from_file_location(f"diffdistill_score_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    elif all(part.isidentifier() for part in where.split(".")) and path.suffix != ".py":
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{where}.".startswith(f"{error.name}."):
                raise
            raise ValueError(f"{name!r}: there is no module {where!r}. {FORMS}") from error
    else:
        raise ValueError(f"{name!r} is no function. {FORMS} of a file or module that exists")
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{where} has no function {function!r}. {FORMS}")
    return found


def load_score(name: str) -> Score:
    """A function by name, called as score(images, cond) -> [B]; images in [-1, 1], differentiable.

    Raises:
        ValueError: no such function.
    """
    return load_function(name)


def score_of(score: Score, teacher: Denoiser, x: Tensor, cond: Cond) -> Tensor:
    """Score of samples [B], decoded first if they are latents; gradients flow into x."""
    images = teacher.decode(x) if teacher.decode else x
    with torch.random.fork_rng(devices=[]):  # as in Reward
        return score(images, cond)


def clamped(similarity: Tensor, enough: float) -> Tensor:
    """mean max(0, enough - similarity) (SwiftBrush v2, arXiv 2408.14176; Hyper-SD, 2404.13686)."""
    return F.relu(enough - similarity).mean()


# ---- rewards of reinforcement learning --------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """reward(x, t, prompts) -> float32 [N], higher is better.

    Attributes:
        score: called as score(x, t, prompts); t float64 [N], prompts as in the data.
        needs: what x is. "pixels": images in [0, 1]; "latents": clean estimates of the student;
            "noisy_latents": its noisy samples at time t, for a reward of noisy states.
        differentiable: gradients flow into x. Preference learning needs none.
    """

    name: str
    score: Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
    needs: Input = "pixels"
    differentiable: bool = False

    def __call__(self, x: Tensor, t: Tensor, prompts: Sequence[Any]) -> Tensor:
        gradients = torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled())
        # a judge that is built at its first call draws weights: a resumed run builds it again
        with gradients, torch.random.fork_rng(devices=[]):
            values = torch.as_tensor(self.score(x, t, prompts), device=x.device).float()
        if values.shape != (len(x),):
            raise ValueError(
                f"reward {self.name} gives {tuple(values.shape)} for {len(x)} samples. It must "
                "give one number for each"
            )
        return values


def load_reward(name: str) -> Reward:
    """One of `WORLDS`, or a function by its name.

    A function's own attributes `needs` and `differentiable` say what it takes; without them it
    takes pixels and no gradient.

    Raises:
        ValueError: no such function, or it declares a need that does not exist.
    """
    if name in WORLDS:
        return WORLDS[name]
    if ":" not in name:
        raise ValueError(f"reward {name!r} is unknown. {FORMS}, or one of: {', '.join(WORLDS)}")
    score = load_function(name)
    needs = getattr(score, "needs", "pixels")
    if needs not in get_args(Input):
        raise ValueError(f"{name}: needs={needs!r}. Allowed: {', '.join(get_args(Input))}")
    return Reward(name, score, needs, bool(getattr(score, "differentiable", False)))


def rewards_of(
    reward: Reward,
    denoise: Denoise,
    teacher: Denoiser,
    z: Tensor,
    t: float,
    cond: Cond,
    prompts: Sequence[Any],
) -> Tensor:
    """Rewards [N] of noisy samples z at time t: as they are, or of what `denoise` makes of them."""
    at = times(t, z)
    if reward.needs == "noisy_latents":
        return reward(z, at, prompts)
    x = denoise(z, at, cond)
    if reward.needs == "pixels":
        x = ((teacher.decode(x) if teacher.decode else x) / 2 + 0.5).clamp(0, 1)
    return reward(x, at, prompts)


def rewards_of_samples(
    reward: Reward, teacher: Denoiser, x: Tensor, cond: Cond, prompts: Sequence[Any]
) -> Tensor:
    """Rewards [N] of finished samples."""
    return rewards_of(
        reward, lambda z, t, cond: z, teacher, x, teacher.schedule.t_min, cond, prompts
    )


@dataclass
class FeedbackConfig(MethodConfig):
    """Options of methods whose student also climbs rewards (Hyper-SD, arXiv 2404.13686).

    The paper's rewards are LAION's aesthetic score and ImageReward, its levels are not published.
    """

    # differentiable reward: the level beyond which it is silent
    rewards: dict[str, float] = field(default_factory=dict)
    feedback: float = 1.0  # weight of their loss

    def validate(self) -> None:
        for name in self.rewards:
            if not load_reward(name).differentiable:
                raise ValueError(
                    f"method.rewards has {name}, which gives no gradient. Allowed: differentiable "
                    "rewards, such as shapes_clip, fashion_class, or a function whose attribute "
                    "`differentiable` is True"
                )
        if self.feedback <= 0:
            raise ValueError(
                f"method.feedback={self.feedback}. Allowed: more than 0; none: method.rewards={{}}"
            )

    def feedback_loss(
        self, teacher: Denoiser, x: Tensor, cond: Cond, prompts: Sequence[Any]
    ) -> Tensor:
        """feedback sum_d mean relu(a_d - r_d(x)) over rewards r_d and their levels a_d.

        A sample whose reward is above the level gets no gradient: this stops over-optimisation.
        """
        values = {
            name: rewards_of_samples(load_reward(name), teacher, x, cond, prompts)
            for name in self.rewards
        }
        return self.feedback * sum(
            (clamped(values[name], level) for name, level in self.rewards.items()),
            torch.zeros((), device=x.device),
        )


@functools.cache
def _clip() -> Any:
    from diffdistill.eval.features import ShapesClip

    return ShapesClip()


def shapes_clip(x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine of picture and caption in the CLIP of the world `shapes`."""
    _check_shapes("shapes_clip", x)
    net, model = _clip(), _clip().model.to(x.device)
    ids = net.tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return F.cosine_similarity(model.encode_image(2 * x - 1), model.encode_text(ids.to(x.device)))


def shapes_verdict(x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where the picture shows what the caption says, else 0: GenEval's verdict, exact."""
    from diffdistill.data.images import to_uint8
    from diffdistill.data.shapes import record_of
    from diffdistill.eval import geneval, shapes_detector

    _check_shapes("shapes_verdict", x)
    limit = {f"{kind}threshold": shapes_detector.THRESHOLD for kind in ("", "counting_")}
    found = zip(prompts, shapes_detector.detect(to_uint8(2 * x - 1)), strict=True)
    return torch.tensor([geneval.verdict(record_of(p), d, **limit).correct for p, d in found])


@functools.cache
def _classifier() -> Any:
    from diffdistill.eval.features import FashionClassifier

    return FashionClassifier.load()


def fashion_class(x: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
    """Probability of the class that was asked for, by the classifier of the world `fashion`.

    That network judges protocol fashion-v1, too: look at its numbers with this in mind.
    """
    if x.shape[1:] != (1, 28, 28):
        raise ValueError(
            "reward fashion_class looks at 28 x 28 grey images of the fashion world, not at "
            f"{tuple(x.shape[1:])}. Choose another reward"
        )
    labels = torch.as_tensor(list(prompts), device=x.device)
    logits = _classifier().to(x.device)(2 * x - 1)
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


WORLDS = {
    "shapes_clip": Reward("shapes_clip", shapes_clip, differentiable=True),
    "shapes_verdict": Reward("shapes_verdict", shapes_verdict),
    "fashion_class": Reward("fashion_class", fashion_class, differentiable=True),
}


def _check_shapes(name: str, x: Tensor) -> None:
    if x.shape[1:] != (3, 32, 32):
        raise ValueError(
            f"reward {name} looks at 32 x 32 RGB images of the shapes world, not at "
            f"{tuple(x.shape[1:])}. Choose another reward"
        )
