"""GenEval: does the image show what the prompt says? (Ghosh et al., arXiv 2310.11513)

A record has tag, prompt, include and, for counting, exclude. Every clause of include names a class
and a count, and optionally a color or a position [relation, index of an earlier clause]. Any
detector will do that turns images into lists of `Detection`; colours are its own, or those of a
classifier that looks at the objects that are asked for.

Score of a task: share of correct images. Overall: unweighted mean over the tasks.

The prompts are in `geneval_prompts`, the detectors in `detectors`, the colour classifier in
`colours`, folders of images in `geneval_folder`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from diffdistill.data.shapes import relations

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One found object. `colour` is None where it is none of the known colours."""

    cls: str
    score: float
    box: Box  # x0, y0, x1, y1 in pixels
    colour: str | None = None
    mask: Tensor | None = None  # bool [H, W]


Classify = Callable[[Sequence[Detection]], Sequence[str | None]]  # colours of objects of one class


class Detector(Protocol):
    """What finds objects. `name` and `digest` make the key of a result."""

    @property
    def name(self) -> str: ...  # back end, with the thresholds where they are not its own

    @property
    def digest(self) -> str: ...  # hash of its weights

    @property
    def classes(self) -> Sequence[str]: ...  # everything that it can find

    @property
    def colours(self) -> Sequence[str]: ...  # those that it names itself; usually none

    @property
    def threshold(self) -> float: ...

    @property
    def counting_threshold(self) -> float: ...

    def detect(self, images: Tensor, classes: Sequence[str] | None = None) -> list[list[Detection]]:
        """Objects of every image, uint8 [N, 3, H, W]. Others than `classes` may be left out."""
        ...


class Verdict(NamedTuple):
    correct: bool
    reason: str  # empty when correct


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, inclusive pixel convention (+1) as in the reference code."""

    def area(box: Box) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (area(a) + area(b) - shared)


def select(
    detections: Iterable[Detection], *, threshold: float, top: int = 16, max_overlap: float = 1.0
) -> dict[str, list[Detection]]:
    """Per class, most confident first: score > threshold, at most `top`, then suppression."""
    found: dict[str, list[Detection]] = defaultdict(list)
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > threshold and len(found[d.cls]) < top:
            found[d.cls].append(d)
    if max_overlap < 1:
        for cls, ranked in found.items():
            kept: list[Detection] = []
            for d in ranked:
                if all(overlap(k.box, d.box) < max_overlap for k in kept):
                    kept.append(d)
            found[cls] = kept
    return {cls: ranked for cls, ranked in found.items() if ranked}


def verdict(
    record: Mapping,
    detections: Iterable[Detection],
    *,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    top: int = 16,
    max_overlap: float = 1.0,
    classify: Classify | None = None,
) -> Verdict:
    """Judge one image; the defaults are those of the reference detector, Mask2Former.

    Args:
        classify: names the colours of the objects of a clause that asks for one; default: the
            colours of the detections.
    """
    limit = counting_threshold if record["tag"] == "counting" else threshold
    found = select(detections, threshold=limit, top=top, max_overlap=max_overlap)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in record["include"]:
        objects, reason = _match(clause, found, matched, classify)
        matched.append(objects)
        reasons += [reason] if reason else []
    for clause in record.get("exclude", ()):
        count = len(found.get(clause["class"], ()))
        if count >= clause["count"]:
            reasons.append(f"{clause['class']}: {count} found, fewer than {clause['count']} asked")
    return Verdict(not reasons, "; ".join(reasons))


def _match(
    clause: Mapping,
    found: Mapping[str, list[Detection]],
    matched: Sequence[list[Detection] | None],
    classify: Classify | None,
) -> tuple[list[Detection] | None, str]:
    """The objects that fulfil a clause, or None; and what is wrong."""
    cls, count = clause["class"], clause["count"]
    objects = found.get(cls, [])[:count]
    if len(objects) < count:
        return None, f"{cls}: {len(objects)} found, {count} asked"
    if "color" in clause:
        colours = list(classify(objects) if classify else (d.colour for d in objects))
        if colours.count(clause["color"]) < count:
            seen = ", ".join(c or "no known colour" for c in colours)
            return None, f"{cls}: {clause['color']} asked, found {seen}"
    if "position" in clause:
        relation, index = clause["position"]
        targets = matched[index]
        if targets is None:
            return None, f"{cls}: nothing to be {relation}"
        for held in (relations(d.box, t.box) for d in objects for t in targets):
            if relation not in held:
                seen = " and ".join(sorted(held)) or "in no relation to"
                return None, f"{cls}: {relation} {targets[0].cls} asked, is {seen} it"
    return objects, ""


def task_scores(outcomes: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Share of correct images per task, from (tag, correct)."""
    per_task: dict[str, list[bool]] = defaultdict(list)
    for tag, correct in outcomes:
        per_task[tag].append(correct)
    return {tag: sum(right) / len(right) for tag, right in per_task.items()}


def overall(tasks: Mapping[str, float]) -> float:
    """Unweighted mean of the task scores."""
    return sum(tasks.values()) / len(tasks)
