"""One number, and everything that must be known to compare it with another one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = re.compile(r"step_(\d+)(?:_(\d+)step)?")  # an evaluation in the eval/ of a run
KEY = ("metric", "protocol", "feature_net", "resize", "n", "m", "reference")  # of comparability


@dataclass(frozen=True)
class Record:
    """A result. Two records are comparable only if the fields of `KEY` agree."""

    metric: str
    value: float
    protocol: str
    feature_net: str  # name:hash of the weights
    n: int  # generated images
    m: int  # reference images; 0: no reference, or its file does not say
    reference: str  # hash of the reference statistics; "" without
    resize: str = "none"
    seeds: str = "i"  # sample i is drawn from a generator seeded with i
    labels: str = ""  # distribution of prompts or labels
    device: str = "cpu"
    dtype: str = "float32"
    steps: int | None = None  # None here and below: not known
    nfe: int | None = None  # network passes per image
    guidance: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must agree for two numbers to share a column."""
    return tuple(record.get(name) for name in KEY)


def picked(records: Iterable[Mapping[str, Any]], metrics: Iterable[str]) -> list[Mapping[str, Any]]:
    """The records of some metrics, in the order of these."""
    records = list(records)
    return [r for metric in metrics for r in records if r["metric"] == metric]


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return key(a) == key(b)


def on_screen(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each number, with its n and protocol."""
    wide = max((len(r["metric"]) for r in records), default=0)
    lines = (
        f"  {r['metric']:<{wide}}  {r['value']:10.4f}   (n={r['n']}, {r['protocol']})"
        for r in records
    )
    return "\n".join(lines)


def evaluations(run: Path) -> dict[int, dict[int, dict[str, Any]]]:
    """Of a run folder: further count of student steps (0: its own) -> engine step -> evaluation."""
    found: dict[int, dict[int, dict[str, Any]]] = {0: {}}
    for file in sorted((run / "eval").glob("step_*.json")):
        if named := FILE.fullmatch(file.stem):
            of = found.setdefault(int(named[2] or 0), {})
            of[int(named[1])] = json.loads(file.read_text())
    return found
