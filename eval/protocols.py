"""Named protocols: prompts or labels, seeds, sample count, feature network, reference and floor.

Two numbers of the same metric can be compared if they were made under one protocol. The reference
statistics are assets/reference/<protocol>.npz, and the teacher's own rows <protocol>.json beside.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill import assets
from diffdistill.data import fashion, shapes
from diffdistill.eval import fid
from diffdistill.eval.features import FashionClassifier, ShapesClip
from diffdistill.registry import unknown

STORED = 5000  # reference features that are kept, for the kernel distance and neighbour metrics


@dataclass(frozen=True)
class Protocol:
    """How a pipeline is judged.

    Attributes:
        conditions: the prompt or label of sample i; its seed is i.
        metrics: in the order in which they are reported.
        real: images of a split, uint8; the reference is "train", the floor compares "test" with it.
    """

    id: str
    n: int
    teacher: str
    metrics: tuple[str, ...]
    labels: str  # distribution of the conditions, in words
    net: Callable[[], Any]
    conditions: Callable[[int], list[Any]]
    real: Callable[[str], Tensor]


def _shapes_real(split: str) -> Tensor:
    count = 10_000 if split == "train" else 3000
    scenes = shapes.Shapes(split).scenes(range(count))
    return torch.cat([shapes.render(scenes[i : i + 1000]) for i in range(0, count, 1000)])


PROTOCOLS = {
    "shapes-v1": Protocol(
        "shapes-v1",
        n=3000,
        teacher="shapes-sd",
        metrics=("fd", "kd", "precision", "recall", "density", "coverage", "clip", "geneval"),
        labels="captions of test scenes 0..n-1, six tasks in turn",
        net=ShapesClip,
        conditions=lambda n: [shapes.scene(i, "test").caption for i in range(n)],
        real=_shapes_real,
    ),
    "fashion-v1": Protocol(
        "fashion-v1",
        n=5000,
        teacher="fashion-edm",
        metrics=("fd", "kd", "precision", "recall", "density", "coverage", "accuracy"),
        labels="label i % 10",
        net=FashionClassifier.load,
        conditions=lambda n: [i % 10 for i in range(n)],
        real=lambda split: fashion.load(split)[0],
    ),
}


def get(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images under one feature network."""

    mu: np.ndarray
    cov: np.ndarray
    m: int  # images behind mu and cov
    features: np.ndarray  # float32 [<= 5000, d]
    feature_net: str
    floor: float  # FD of the test split, at the protocol's n
    digest: str


@functools.cache
def reference(name: str) -> Reference:
    """The shipped reference of a protocol."""
    path = assets.path("reference", f"{name}.npz")
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the reference statistics of protocol {name}. They ship with the "
            "package; restore the file, or run python -m diffdistill.eval.protocols."
        )
    with np.load(path, allow_pickle=False) as file:
        data = {k: file[k] for k in file.files}
    return Reference(
        data["mu"], data["cov"], int(data["m"]), data["features"].astype(np.float32),
        str(data["feature_net"]), float(data["floor"]),
        hashlib.sha256(path.read_bytes()).hexdigest()[:12],
    )  # fmt: skip


def write_reference(name: str, path: Path | None = None) -> Path:
    """Make the reference of a protocol from its real images."""
    protocol = get(name)
    net = protocol.net()
    features = net.features(protocol.real("train"))
    mu, cov = fid.mean_and_cov(features)
    test = net.features(protocol.real("test"))[: protocol.n]
    floor = fid.frechet_distance(mu, cov, *fid.mean_and_cov(test))
    path = path or assets.path("reference", f"{name}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, mu=mu, cov=cov, m=len(features), features=features[:STORED].astype(np.float16),
        feature_net=net.name, floor=floor,
    )  # fmt: skip
    return path


def teacher_rows(name: str) -> list[dict[str, Any]]:
    """Evaluations of the protocol's teacher at 1, 2, 4 and full steps, as shipped."""
    path = assets.path("reference", f"{name}.json")
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def write_teacher_rows(name: str) -> Path:
    """Evaluate the protocol's teacher at 1, 2, 4 and its default number of steps."""
    from diffdistill.eval.evaluate import evaluate
    from diffdistill.pipelines.loading import load_pipeline

    generator = load_pipeline(get(name).teacher)
    rows = []
    for steps in (1, 2, 4, generator.info["steps"]):
        row = evaluate(generator, steps=steps)
        row.pop("verdicts", None)
        rows.append(row)
        print(name, steps, {r["metric"]: round(r["value"], 4) for r in row["records"]}, flush=True)
    path = assets.path("reference", f"{name}.json")
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return path


def main() -> None:
    """python -m diffdistill.eval.protocols [PROTOCOL ...]: remake references and teacher rows."""
    import sys

    for name in sys.argv[1:] or PROTOCOLS:
        print(write_reference(name), reference(name).floor)
        print(write_teacher_rows(name))


if __name__ == "__main__":
    main()
