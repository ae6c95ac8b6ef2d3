"""Scores of samples by a function of the user's: CLIP similarity and other rewards."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from diffdistill.denoiser import Cond, Denoiser

Score = Callable[[Tensor, Cond], Tensor]


@functools.cache
def load_score(name: str) -> Score:
    """`FILE.py:FUNCTION`, called as score(images, cond) -> [B]; images in [-1, 1], differentiable.

    Raises:
        ValueError: no such file or function.
    """
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{name!r} is no score function. Give FILE.py:FUNCTION of a file")
    spec = importlib.util.spec_from_file_location(f"diffdistill_score_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r}. Give FILE.py:FUNCTION")
    return found


def score_of(score: Score, teacher: Denoiser, x: Tensor, cond: Cond) -> Tensor:
    """Score of samples [B], decoded first if they are latents; gradients flow into x."""
    return score(teacher.decode(x) if teacher.decode else x, cond)


def clamped(similarity: Tensor, enough: float) -> Tensor:
    """mean max(0, enough - similarity) (SwiftBrush v2, arXiv 2408.14176)."""
    return F.relu(enough - similarity).mean()
