"""GenEval's rules, and the detector that judges the world `shapes`."""

import numpy as np
import pytest
import torch

from diffdistill.data import shapes
from diffdistill.eval import geneval, shapes_detector
from diffdistill.eval.geneval import Detection

LIMIT = shapes_detector.THRESHOLD


@pytest.mark.parametrize(
    ("a", "b", "held"),
    [
        ([0, 0, 10, 10], [100, 0, 110, 10], {"left of"}),
        ([0, 0, 10, 10], [100, 100, 110, 110], {"left of", "above"}),
        ([0, 0, 100, 100], [60, 0, 160, 100], {"left of"}),
        ([0, 0, 100, 100], [40, 0, 140, 100], set()),  # exactly at one half
        ([0, 0, 100, 100], [1, 0, 101, 100], set()),
    ],
)
def test_12_position(a, b, held):
    assert shapes.relations(a, b) == held


@pytest.mark.parametrize(
    ("scores", "correct"),
    [
        ([0.95, 0.93, 0.91], True),
        ([0.95, 0.93, 0.91, 0.92], False),
        ([0.95, 0.93, 0.91, 0.89], True),
        ([0.95, 0.93, 0.85], False),
    ],
)
def test_13_counting_uses_the_high_threshold(scores, correct):
    record = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a photo of three clocks",
    }
    found = [Detection("clock", s, (i, 0, i + 1, 1)) for i, s in enumerate(scores)]
    verdict = geneval.verdict(record, found)
    assert verdict.correct is correct
    assert bool(verdict.reason) is not correct


def test_14_overall_is_the_mean_of_task_means():
    tasks = geneval.task_scores([("a", True), ("b", False), ("b", False), ("b", False)])
    assert geneval.overall(tasks) == 0.5


def test_only_the_most_confident_objects_are_asked_for_their_colour():
    record = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    green, red = (Detection("cup", s, (0, 0, 1, 1), c) for s, c in ((0.9, "green"), (0.8, "red")))
    assert not geneval.verdict(record, [green, red]).correct
    assert geneval.verdict(record, [red]).correct


def judge(records, images):
    found = shapes_detector.detect(images)
    return np.array(
        [
            geneval.verdict(r, f, threshold=LIMIT, counting_threshold=LIMIT).correct
            for r, f in zip(records, found, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def scenes():
    listed = [shapes.scene(i, "test") for i in range(3000)]
    return listed, shapes.render(listed)


def test_the_detector_is_right_on_99_percent_of_real_scenes_in_every_task(scenes):
    listed, images = scenes
    right = judge([s.record for s in listed], images)
    assert min(right[k::6].mean() for k in range(6)) >= 0.99


def other(record):
    """The record of a scene that differs in one fact."""
    first, last = dict(record["include"][0]), dict(record["include"][-1])
    if record["tag"] == "counting":
        n = first["count"] + (1 if first["count"] < 4 else -1)
        clause = {"class": first["class"]}
        return record | {
            "include": [clause | {"count": n}],
            "exclude": [clause | {"count": n + 1}],
        }
    if record["tag"] == "position":
        reverse = ("right of", "left of", "below", "above")
        opposite = dict(zip(shapes.RELATIONS, reverse, strict=True))
        last["position"] = [opposite[last["position"][0]], 0]
        return record | {"include": [first, last]}
    if "color" in last:
        last["color"] = next(c for c in shapes.COLOURS if c != last["color"])
    else:
        used = {c["class"] for c in record["include"]}
        last["class"] = next(s for s in shapes.SHAPES if s not in used)
    return record | {"include": [*record["include"][:-1], last]}


def test_wrong_captions_are_judged_wrong(scenes):
    listed, images = scenes
    right = judge([other(s.record) for s in listed[:1200]], images[:1200])
    assert max(right[k::6].mean() for k in range(6)) <= 0.03


@pytest.mark.parametrize("kind", ["noise", "grey", "blurred"])
def test_wrong_pictures_are_judged_wrong(scenes, kind):
    listed, images = scenes
    n = 300
    if kind == "noise":
        pixels = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    elif kind == "grey":
        pixels = torch.full((n, 3, 32, 32), 140)
    else:
        pixels = torch.nn.functional.avg_pool2d(images[:n].float(), 9, 1, 4)
    right = judge([s.record for s in listed[:n]], pixels.to(torch.uint8))
    assert right.mean() < 0.15


def test_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        shapes_detector.detect(torch.zeros(1, 3, 64, 64))


def test_suppression_is_off_by_default_and_drops_doubles_on_request():
    found = [Detection("cup", s, (0, 0, 9, 9 + i)) for i, s in enumerate((0.9, 0.8, 0.3))]
    assert geneval.overlap(found[0].box, found[1].box) == pytest.approx(100 / 110)
    assert [d.score for d in geneval.select(found, threshold=0.3)["cup"]] == [0.9, 0.8]
    kept = geneval.select(found, threshold=0.3, max_overlap=0.9)
    assert [d.score for d in kept["cup"]] == [0.9]
    assert len(geneval.select(found * 9, threshold=0.1)["cup"]) == 16
