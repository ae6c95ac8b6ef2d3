"""Named protocols: prompts or labels, seeds, sample count, feature network, reference and floor.

Two numbers of the same metric can be compared if they were made under one protocol. `PROTOCOLS` are
those of the embedded worlds: their reference statistics are assets/reference/<protocol>.npz, the
teacher's own rows <protocol>.json beside, and <protocol>-guidance.json its curve over guidance
scales, if it has been measured. `FOLDERS` are those of papers, for folders of images.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Sequence
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

SCALES = (1.0, 1.4, 2.0, 3.0, 4.5, 7.0)  # of guidance, on a teacher's curve
STORED = 5000  # reference features that are kept, for the kernel distance and neighbour metrics


@dataclass(frozen=True)
class Protocol:
    """How a pipeline is judged.

    Attributes:
        conditions: the prompt or label of sample i; its seed is i.
        metrics: in the order in which they are reported.
        repeats: images of a prompt that its diversity is measured on; 0: as many as all have.
        real: images of a split, uint8; the reference is "train", the floor compares "test" with it.
    """

    id: str
    n: int
    metrics: tuple[str, ...]
    labels: str  # distribution of the conditions, in words
    net: Callable[[], Any]
    conditions: Callable[[int], list[Any]]
    real: Callable[[str], Tensor]
    repeats: int = 0

    def repeated(self, conditions: Sequence[Hashable]) -> list[int]:
        """Rows of the first `repeats` samples of each condition that has so many; or none."""
        rows: dict[Hashable, list[int]] = {}
        for row, condition in enumerate(conditions):
            rows.setdefault(condition, []).append(row)
        count = self.repeats or min(map(len, rows.values()))
        kept = [r for same in rows.values() if len(same) >= count > 1 for r in same[:count]]
        return sorted(kept)


def _shapes_real(split: str) -> Tensor:
    count = 10_000 if split == "train" else 3000
    scenes = shapes.Shapes(split).scenes(range(count))
    return torch.cat([shapes.render(scenes[i : i + 1000]) for i in range(0, count, 1000)])


AGAINST_REAL = ("fd", "kd", "precision", "recall", "density", "coverage")
WITHIN_A_PROMPT = ("diversity", "vendi_prompt")
PROTOCOLS = {
    "shapes-v1": Protocol(
        "shapes-v1",
        n=3000,
        metrics=(*AGAINST_REAL, "clip", "geneval", *WITHIN_A_PROMPT),
        labels="captions of test scenes 0..n-1, six tasks in turn",
        net=ShapesClip,
        conditions=lambda n: [shapes.caption(i, "test") for i in range(n)],
        real=_shapes_real,
        repeats=8,
    ),
    "fashion-v1": Protocol(
        "fashion-v1",
        n=5000,
        metrics=(*AGAINST_REAL, "accuracy", *WITHIN_A_PROMPT),
        labels="label i % 10",
        net=FashionClassifier.load,
        conditions=lambda n: [i % 10 for i in range(n)],
        real=lambda split: fashion.load(split)[0],
    ),
}


def unnamed(pipeline: str, command: str = "") -> str:
    """What to do about a pipeline that names no protocol."""
    flag = f"{command} --protocol NAME".strip()
    return (
        f"{pipeline} names no protocol. Give {flag}, one of: {', '.join(PROTOCOLS)}. These are of "
        "the embedded worlds; for images of anything else draw a folder (diffdistill sample "
        "--folder DIR) and evaluate that"
    )


def get(name: str) -> Protocol:
    if name in FOLDERS:
        raise ValueError(
            f"protocol {name} judges a folder of images, not a pipeline. Draw the images first "
            "with diffdistill sample --folder DIR, and give that folder"
        )
    if name not in PROTOCOLS:
        raise ValueError(unknown("protocol", name, [*PROTOCOLS, *FOLDERS]))
    return PROTOCOLS[name]


# ---- folders of images ------------------------------------------------------------------


@dataclass(frozen=True)
class FolderProtocol:
    """How papers judge a folder of images; see `folder`.

    Attributes:
        network: a name of `networks.NETWORKS`; "": the user names one.
        metrics: names of `metrics.METRICS` that are taken by default.
        n: images; 0: all of the folder.
        m: images behind the reference; 0: as its file says.
        reference: what must be given, in words.
        labels: expected distribution of the prompts or labels, in words.
        view: function of `pixels` and its size, applied before the network's own resize; or none.
        side: px of the square images; 0: any size.
        lossy: whether JPEG is as good as PNG, for the images and for those of the reference.
        subset: of a larger folder a random subset is taken, as in EDM; else the set is fixed.
    """

    network: str
    metrics: tuple[str, ...] = ("fid",)
    n: int = 0
    m: int = 0
    reference: str = "an npz with mu and sigma"
    labels: str = "not known"
    view: tuple[str, int] | None = None
    side: int = 0
    lossy: tuple[bool, bool] = (False, True)
    subset: bool = False


_PNG = (False, False)
_TF1, _CLEAN = "inception-legacy_tensorflow", "inception-clean"
FOLDERS = {
    "edm-cifar10": FolderProtocol(
        _TF1, n=50_000, m=50_000, side=32, lossy=_PNG, subset=True,
        reference="EDM's cifar10-32x32.npz",
        labels="drawn uniformly from the generator of the image, where there are any",
    ),
    "edm-imagenet64": FolderProtocol(
        _TF1, n=50_000, m=1_281_167, side=64, lossy=_PNG, subset=True, labels="drawn uniformly",
        reference="EDM's imagenet-64x64.npz, which is not the baseline's",
    ),
    "edm2-imagenet512": FolderProtocol(
        _TF1, n=50_000, m=1_281_167, side=512, lossy=_PNG, subset=True, labels="drawn uniformly",
        reference="mu and sigma of fid in EDM2's img512.pkl, stored as npz",
    ),
    "adm-imagenet256": FolderProtocol(
        "inception-adm", ("is", "fid", "sfid", "prdc-adm"), n=50_000, m=1_281_167, side=256,
        lossy=_PNG, reference="ADM's VIRTUAL_imagenet256_labeled.npz",
        labels="50 images of each class",
    ),
    "coco2014-30k": FolderProtocol(
        _CLEAN, n=30_000, m=40_504, view=("lanczos", 256),
        reference="statistics of all 40,504 images of val2014 under this protocol",
        labels="the fixed list of 30,000 captions of val2014",
    ),
    "coco2014-10k-sdxl": FolderProtocol(
        _CLEAN, n=10_000, m=10_000, view=("lanczos", 512),
        reference="statistics of DMD2's 10,000 images under this protocol",
        labels="10,000 captions of val2014",
    ),
    "coco2014-10k-sdxl-patch": FolderProtocol(
        _CLEAN, n=10_000, m=10_000, view=("patch", 299),
        reference="statistics of DMD2's 10,000 images under this protocol",
        labels="10,000 captions of val2014",
    ),
    "coco2017-5k": FolderProtocol(
        _CLEAN, n=5000, m=5000, view=("lanczos", 256),
        reference="statistics of the 5,000 images of val2017 under this protocol",
        labels="one caption of each image of val2017",
    ),
    "mjhq30k-cleanfid": FolderProtocol(
        _CLEAN, n=30_000, m=30_000, side=1024,
        reference="statistics of MJHQ-30K's images under this protocol",
        labels="the 30,000 prompts of meta_data.json",
    ),
    "mjhq30k-sana": FolderProtocol(
        "inception-legacy_pytorch", n=30_000, m=30_000, view=("short_side", 512),
        lossy=(True, True),
        reference="statistics of MJHQ-30K's images under this protocol",
        labels="the 30,000 prompts of meta_data.json",
    ),
    "hpsv2-3200": FolderProtocol(
        "", ("hpsv2.1",), n=3200,
        labels="the 3,200 prompts of HPSv2's benchmark, 800 of each style",
    ),
    # one's own data; a name says where the statistics come from: images (--write-reference), a file
    "custom-folder": FolderProtocol("", subset=True),
    "custom-stats": FolderProtocol("", subset=True),
}  # fmt: skip


def folder_protocol(name: str | None) -> FolderProtocol:
    if name is None:
        raise ValueError(f"a folder of images needs a protocol. Give one of: {', '.join(FOLDERS)}")
    if name not in FOLDERS:
        raise ValueError(unknown("protocol of folders", name, FOLDERS))
    return FOLDERS[name]


# ---- references -------------------------------------------------------------------------


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


def rated(protocol: str) -> dict[str, dict[str, Any]]:
    """What ships of each teacher that the protocol judges: name -> its `weights` and `rows`."""
    found = {}
    for file in sorted(assets.path("reference").glob("*.json")):
        stored = json.loads(file.read_text())
        if not file.stem.endswith("-guidance") and stored["rows"][0]["protocol"] == protocol:
            found[file.stem] = stored
    return found


def curve(teacher: str) -> dict[str, Any]:
    """A teacher's stored curve over guidance scales, as `write_curve` makes it; or nothing."""
    file = assets.path("reference", f"{teacher}-guidance.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def teacher_rows(protocol: str) -> list[dict[str, Any]]:
    """Evaluations of the protocol's teachers at 1, 2, 4 and full steps, with their weights."""
    every = rated(protocol).values()
    return [row | {"weights": stored["weights"]} for stored in every for row in stored["rows"]]


def write_teacher_rows(teacher: str) -> Path:
    """Evaluate an embedded teacher at 1, 2, 4 and its default number of steps.

    An autoregressive teacher has only its own number.
    """
    from diffdistill.pipelines.loading import load_pipeline

    generator = load_pipeline(teacher)
    full = generator.info["steps"]
    few = () if generator.info["family"] == "tokens" else (1, 2, 4)
    rows = [_row(generator, steps=steps) for steps in (*few, full)]
    path = assets.path("reference", f"{teacher}.json")
    made_with = generator.info["weights"]
    path.write_text(json.dumps({"weights": made_with, "rows": rows}, indent=1) + "\n")
    return path


def write_curve(teacher: str, scales: Sequence[float] = SCALES) -> Path:
    """Evaluate an embedded teacher at its default number of steps over guidance scales.

    Each scale is stored as soon as it is measured; what this file and the teacher rows hold of the
    same weights and reference is kept. So the same command continues, and more scales add to it.
    """
    from diffdistill.eval.evaluate import write
    from diffdistill.pipelines.loading import load_pipeline

    if odd := [scale for scale in scales if not 1 <= scale < math.inf]:
        raise ValueError(f"guidance {odd[0]:g}. Allowed: 1 (none) or more")
    generator = load_pipeline(teacher)
    steps, made_with = generator.info["steps"], generator.info["weights"]
    path = assets.path("reference", f"{teacher}-guidance.json")
    rows: dict[float, dict[str, Any]] = {}
    for file in (assets.path("reference", f"{teacher}.json"), path):
        stored = json.loads(file.read_text()) if file.is_file() else {"weights": None}
        if stored["weights"] == made_with:
            for row in stored["rows"]:
                first = row["records"][0]
                same = first["reference"] == reference(row["protocol"]).digest
                if row["steps"] == steps and same:
                    rows[first["guidance"]] = row
    for scale in sorted({float(s) for s in scales}):
        if scale not in rows:
            rows[scale] = _row(generator, guidance=scale)
        write(path, {"weights": made_with, "rows": [rows[g] for g in sorted(rows)]})
    return path


def _row(generator: Any, **how: Any) -> dict[str, Any]:
    """The teacher's evaluation, as it ships."""
    from diffdistill.eval.evaluate import evaluate

    row = evaluate(generator, **how)
    row.pop("verdicts", None)
    values = {r["metric"]: round(r["value"], 4) for r in row["records"]}
    print(row["protocol"], how, values, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """python -m diffdistill.eval.protocols [--rows | --curve] [NAME ...]"""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m diffdistill.eval.protocols",
        description="Remake references, or teacher rows, or teachers' curves over guidance.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="protocols; with --rows or --curve teachers; default: all",
    )  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--rows", action="store_true", help="evaluate teachers")
    kind.add_argument("--curve", action="store_true", help="over guidance scales; it continues")
    default = ",".join(f"{scale:g}" for scale in SCALES)
    parser.add_argument("--guidance", default=default, help=f"of the curve; default: {default}")
    args = parser.parse_args(argv)
    try:
        scales = [float(text) for text in args.guidance.split(",")]
    except ValueError:
        raise ValueError(f"--guidance {args.guidance}. Give numbers, such as {default}") from None
    what, known = ("teacher", assets.names("teachers")) if args.rows or args.curve else (
        "protocol", [*PROTOCOLS]
    )  # fmt: skip
    for name in args.names or known:
        if name not in known:
            raise ValueError(unknown(what, name, known))
        if args.curve:
            print(write_curve(name, scales))
        elif args.rows:
            print(write_teacher_rows(name))
        else:
            print(write_reference(name), reference(name).floor)


if __name__ == "__main__":
    import sys

    from diffdistill.errors import guarded

    sys.exit(guarded(main))
