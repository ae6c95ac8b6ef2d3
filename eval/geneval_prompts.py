"""The 553 prompts of GenEval, drawn again instead of copied (Ghosh et al., arXiv 2310.11513).

The published list is a function of a seed. `text` repeats its draws in their order and compares
the result with the hash of the published file, so that a NumPy with another random stream is an
error and not another benchmark.
"""

from __future__ import annotations

import functools
import hashlib
import json

import numpy as np

from diffdistill.data.shapes import NUMBERS, RELATIONS, article

SEED = 43
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
CLASSES = (  # of COCO, in its order; 64, 65, 66 are mouse, remote and keyboard there
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
_DRAWS = 100  # of every task but the first


def records() -> list[dict]:
    """The 553 records in the published order: tag, include, exclude (counting only), prompt."""
    return [json.loads(line) for line in text().splitlines()]


@functools.cache
def text() -> str:
    """The published file: one JSON object a line, 85,209 bytes of ASCII."""
    drawn = "".join(json.dumps(record) + "\n" for record in _unique(_draw()))
    if hashlib.sha256(drawn.encode()).hexdigest() != SHA256:
        raise RuntimeError(
            f"NumPy {np.__version__} draws other GenEval prompts than the published ones. "
            "Use NumPy 1.26 to 2.4."
        )
    return drawn


def _unique(drawn: list[dict]) -> list[dict]:
    return list({json.dumps(record): record for record in drawn}.values())


def _draw() -> list[dict]:
    rng = np.random.default_rng(SEED)
    n, coloured = len(CLASSES), len(CLASSES) - 1  # nobody is asked for a red person
    drawn = []
    for i in rng.choice(n, n, replace=False):
        drawn.append(_record("single_object", [_clause(CLASSES[i])], article(CLASSES[i])))
    for _ in range(_DRAWS):
        a, b = (CLASSES[i] for i in rng.choice(n, 2, replace=False))
        what = f"{article(a)} and {article(b)}"
        drawn.append(_record("two_object", [_clause(a), _clause(b)], what))
    for _ in range(_DRAWS):
        a, count = CLASSES[rng.choice(n)], int(rng.integers(2, 4, endpoint=True))
        plural = a + ("es" if a.endswith("s") else "s")
        include, exclude = [_clause(a, count)], [_clause(a, count + 1)]
        drawn.append(_record("counting", include, f"{NUMBERS[count]} {plural}", exclude))
    for _ in range(_DRAWS):
        a, colour = CLASSES[rng.choice(coloured) + 1], COLOURS[rng.choice(len(COLOURS))]
        drawn.append(_record("colors", [_clause(a, color=colour)], f"{article(colour)} {a}"))
    for _ in range(_DRAWS):
        a, b = (CLASSES[i] for i in rng.choice(n, 2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        include = [_clause(b), _clause(a, position=[relation, 0])]
        drawn.append(_record("position", include, f"{article(a)} {relation} {article(b)}"))
    for _ in range(_DRAWS):
        a, b = (CLASSES[i + 1] for i in rng.choice(coloured, 2, replace=False))
        c, d = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        include = [_clause(a, color=c), _clause(b, color=d)]
        what = f"{article(c)} {a} and {article(d)} {b}"
        drawn.append(_record("color_attr", include, what))
    return drawn


def _clause(cls: str, count: int = 1, **more: object) -> dict:
    return {"class": cls, "count": count, **more}


def _record(tag: str, include: list[dict], what: str, exclude: list[dict] | None = None) -> dict:
    record: dict = {"tag": tag, "include": include}
    return record | ({"exclude": exclude} if exclude else {}) | {"prompt": f"a photo of {what}"}
