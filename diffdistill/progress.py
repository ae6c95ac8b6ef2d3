"""Progress bars: for what takes more than two seconds, on a terminal, of the main process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T] | None, what: str, *, unit: str = "it", total: int | None = None
) -> tqdm[T]:
    """The items, with a bar that leaves no trace. Without items: a bar of `total` to update."""
    quiet = True if int(os.environ.get("RANK", "0")) else None  # None: if this is no terminal
    return tqdm(items, what, total=total, unit=unit, delay=2, leave=False, disable=quiet)
