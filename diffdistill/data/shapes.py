"""The procedural world `shapes`: coloured shapes on a soft background, captioned like GenEval.

Everything is a function of (split, index): the scene, its caption, its GenEval record and its
pixels. Nothing is stored and nothing is downloaded.

A scene belongs to one of GenEval's six task types (Ghosh et al., arXiv 2310.11513) and contains
exactly the objects that its caption names. The task cycles with the index, so every slice of six
consecutive scenes is balanced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 32  # pixels, square
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PLURALS = ("circles", "squares", "triangles", "stars", "rings", "crosses")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.10, 0.25, 0.88),
    "purple": (0.55, 0.12, 0.68),
    "black": (0.04, 0.04, 0.05),
    "white": (0.98, 0.98, 0.98),
}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
SPLITS = {"train": 0, "test": 1}
_TILT = 0.35  # radians; the largest rotation either way
_GAP = 1.5  # pixels that stay free between the circumscribed circles of two objects


@dataclass(frozen=True)
class Thing:
    """One object: pixel coordinates of its centre, circumradius in pixels, angle in radians."""

    shape: str
    colour: str
    cx: float
    cy: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    def box(self) -> tuple[float, float, float, float]:
        """Circumscribed box (x0, y0, x1, y1) in pixels."""
        r = self.radius
        return self.cx - r, self.cy - r, self.cx + r, self.cy + r


@dataclass(frozen=True)
class Scene:
    """One scene. `record` is its GenEval record: tag, prompt, include, exclude."""

    things: tuple[Thing, ...]
    background: tuple[float, ...]  # rgb at the top left corner, then rgb change along x and y
    record: dict

    @property
    def caption(self) -> str:
        return self.record["prompt"]

    @property
    def label(self) -> int:
        """Class label: the shape of the first object."""
        return SHAPES.index(self.things[0].shape)


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """GenEval's relations of box a to box b (xyxy): see `diffdistill.eval.geneval`."""
    ca, cb = ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)
    delta = (ca[0] - cb[0], ca[1] - cb[1])
    size = ((a[2] - a[0]) + (b[2] - b[0]), (a[3] - a[1]) + (b[3] - b[1]))
    cut = [np.sign(d) * max(abs(d) - 0.1 * s, 0.0) for d, s in zip(delta, size, strict=True)]
    if max(abs(cut[0]), abs(cut[1])) < 1e-3:
        return set()
    norm = float(np.hypot(*delta))
    u, v = cut[0] / norm, cut[1] / norm
    held = (u < -0.5, u > 0.5, v < -0.5, v > 0.5)
    return {name for name, holds in zip(RELATIONS, held, strict=True) if holds}


def scene(index: int, split: str = "train") -> Scene:
    """The scene with this index. Deterministic; costs about 0.1 ms."""
    rng = _rng(index, split)
    record, wanted = _describe(TASKS[index % len(TASKS)], rng)
    things = _place(wanted, record, rng)
    grey = rng.uniform(0.46, 0.60)
    tint = rng.uniform(-0.04, 0.04, 3)
    slope = rng.uniform(-0.06, 0.06, 2)
    background = (*(grey + tint), slope[0], slope[1])
    return Scene(tuple(things), tuple(float(v) for v in background), record)


def caption(index: int, split: str = "train") -> str:
    """That of the scene with this index, at a tenth of its cost: nothing is placed."""
    return _describe(TASKS[index % len(TASKS)], _rng(index, split))[0]["prompt"]


def _rng(index: int, split: str) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}. Allowed: {', '.join(SPLITS)}")
    return np.random.default_rng([20, SPLITS[split], index])


def _describe(tag: str, rng: np.random.Generator) -> tuple[dict, list[tuple[str, str]]]:
    """GenEval record and the (shape, colour) of every object that the scene must show."""
    names = list(COLOURS)
    first, second = (SHAPES[i] for i in rng.choice(len(SHAPES), 2, replace=False))
    colour, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
    record: dict = {"tag": tag}
    if tag == "single_object":
        record["include"] = [{"class": first, "count": 1}]
        return record | {"prompt": f"a photo of {article(first)}"}, [(first, colour)]
    if tag == "two_object":
        record["include"] = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        prompt = f"a photo of {article(first)} and {article(second)}"
        return record | {"prompt": prompt}, [(first, colour), (second, other)]
    if tag == "counting":
        n = int(rng.integers(2, 5))
        record["include"] = [{"class": first, "count": n}]
        record["exclude"] = [{"class": first, "count": n + 1}]
        prompt = f"a photo of {NUMBERS[n]} {PLURALS[SHAPES.index(first)]}"
        colours = [names[i] for i in rng.choice(len(names), n)]
        return record | {"prompt": prompt}, [(first, c) for c in colours]
    if tag == "colors":
        record["include"] = [{"class": first, "count": 1, "color": colour}]
        return record | {"prompt": f"a photo of {article(colour)} {first}"}, [(first, colour)]
    if tag == "position":
        relation = RELATIONS[rng.integers(4)]
        record["include"] = [
            {"class": second, "count": 1},
            {"class": first, "count": 1, "position": [relation, 0]},
        ]
        prompt = f"a photo of {article(first)} {relation} {article(second)}"
        return record | {"prompt": prompt}, [(second, other), (first, colour)]
    record["include"] = [
        {"class": first, "count": 1, "color": colour},
        {"class": second, "count": 1, "color": other},
    ]
    prompt = f"a photo of {article(colour)} {first} and {article(other)} {second}"
    return record | {"prompt": prompt}, [(first, colour), (second, other)]


def _place(wanted: list[tuple[str, str]], record: dict, rng: np.random.Generator) -> list[Thing]:
    """Positions, sizes, angles by rejection: nothing overlaps, a position prompt holds."""
    low, high = ((5.2, 7.5), (5.0, 6.5), (4.6, 5.6), (4.6, 5.2))[len(wanted) - 1]
    relation = record["include"][-1].get("position", [None])[0]
    while True:
        radii = rng.uniform(low, high, len(wanted))
        centres = [rng.uniform(r + 0.5, SIZE - r - 0.5, 2) for r in radii]
        apart = all(
            np.hypot(*(centres[i] - centres[j])) > radii[i] + radii[j] + _GAP
            for i in range(len(wanted))
            for j in range(i)
        )
        if not apart:
            continue
        angles = rng.uniform(-_TILT, _TILT, len(wanted)) - np.pi / 2  # points and tips look up
        rgb = [np.clip(np.add(COLOURS[c], rng.uniform(-0.03, 0.03, 3)), 0, 1) for _, c in wanted]
        things = [
            Thing(s, c, float(p[0]), float(p[1]), float(r), float(a), tuple(map(float, v)))
            for (s, c), p, r, a, v in zip(wanted, centres, radii, angles, rgb, strict=True)
        ]
        if relation is None:
            return things
        gap = centres[1] - centres[0]
        along = abs(gap[0]) if relation in ("left of", "right of") else abs(gap[1])
        if relations(things[1].box(), things[0].box()) == {relation} and along > 0.8 * np.hypot(
            *gap
        ):
            return things


def inside(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the outline (about), positive inside, in the object's frame."""
    if shape == "circle":
        return 0.86 * r - torch.hypot(x, y)
    if shape == "ring":
        d = torch.hypot(x, y)
        return torch.minimum(0.95 * r - d, d - 0.5 * r)
    if shape == "square":
        return 0.72 * r - torch.maximum(x.abs(), y.abs())
    if shape == "cross":
        long, wide = 0.95 * r, 0.29 * r
        x, y = x.abs(), y.abs()
        return torch.maximum(torch.minimum(long - x, wide - y), torch.minimum(wide - x, long - y))
    if shape == "triangle":
        edges = [0.5 * r - (x * np.cos(a) + y * np.sin(a)) for a in (np.pi / 3, np.pi, -np.pi / 3)]
        return torch.minimum(torch.minimum(edges[0], edges[1]), edges[2])
    sector = 2 * np.pi / 5  # star: fold the plane into half a sector, one edge remains
    theta = torch.remainder(torch.atan2(y, x) + sector / 2, sector) - sector / 2
    d = torch.hypot(x, y)
    px, py = d * torch.cos(theta), d * torch.sin(theta.abs())
    tip = np.array([1.0, 0.0])
    dent = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([dent[1] - tip[1], tip[0] - dent[0]]) / np.hypot(*(tip - dent))
    return normal[0] * (r - px) - normal[1] * py


def render(scenes: Sequence[Scene]) -> Tensor:
    """Pixels of the scenes: uint8 [N, 3, 32, 32], anti-aliased."""
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    gx, gy = axis.view(1, 1, SIZE), axis.view(1, SIZE, 1)
    ground = torch.tensor([s.background for s in scenes], dtype=torch.float32)
    ramp = ground[:, 3].view(-1, 1, 1) * (gx / SIZE - 0.5) + ground[:, 4].view(-1, 1, 1) * (
        gy / SIZE - 0.5
    )
    image = ground[:, :3, None, None] + ramp[:, None]
    flat = [(i, thing) for i, s in enumerate(scenes) for thing in s.things]
    for shape in SHAPES:  # objects never overlap, so the order of painting does not matter
        mine = [(i, t) for i, t in flat if t.shape == shape]
        for rank in range(4):
            seen: dict[int, int] = {}
            chosen = []
            for i, t in mine:
                seen[i] = seen.get(i, -1) + 1
                if seen[i] == rank:
                    chosen.append((i, t))
            if chosen:
                _paint(image, shape, chosen, gx, gy)
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _paint(image: Tensor, shape: str, chosen: list[tuple[int, Thing]], gx: Tensor, gy: Tensor):
    where = torch.tensor([i for i, _ in chosen])
    p = torch.tensor([[t.cx, t.cy, t.radius, t.angle] for _, t in chosen])[:, :, None, None]
    rgb = torch.tensor([t.rgb for _, t in chosen])[:, :, None, None]
    dx, dy = gx - p[:, 0], gy - p[:, 1]
    cos, sin = torch.cos(p[:, 3]), torch.sin(p[:, 3])
    cover = (inside(shape, cos * dx + sin * dy, cos * dy - sin * dx, p[:, 2]) + 0.5).clamp(0, 1)
    image[where] = torch.lerp(image[where], rgb.expand(-1, -1, SIZE, SIZE), cover[:, None])


class Shapes:
    """The world as a data set: `split` is train or test, any index is valid."""

    name = "shapes"

    def __init__(self, split: str = "train", size: int = 50_000):
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def scenes(self, indices: Sequence[int]) -> list[Scene]:
        return [scene(int(i), self.split) for i in indices]


def vocabulary() -> list[str]:
    """Every word that a caption of this world can contain."""
    fixed = ["a", "an", "photo", "of", "and", "left", "right", "above", "below"]
    return [*fixed, *SHAPES, *PLURALS, *COLOURS, *NUMBERS.values()]


def record_of(caption: str) -> dict:
    """The GenEval record of a caption of this world. ValueError: it is none."""
    colours, kinds = "|".join(COLOURS), "|".join(SHAPES)
    thing = f"an? (?:(?P<colour{{0}}>{colours}) )?(?P<shape{{0}}>{kinds})"
    pair = f"(?: (?P<link>and|{'|'.join(RELATIONS)}) {thing.format(2)})?"
    many = f"(?P<number>{'|'.join(NUMBERS.values())}) (?P<plural>{'|'.join(PLURALS)})"
    found = re.fullmatch(f"a photo of (?:{thing.format(1)}{pair}|{many})", caption)
    if found is None:
        raise ValueError(
            f"{caption!r} is no caption of the shapes world. Give some like 'a photo of a red star'"
        )
    said = found.groupdict()
    if said["number"]:
        n = next(n for n, word in NUMBERS.items() if word == said["number"])
        shape = SHAPES[PLURALS.index(said["plural"])]
        record = {"tag": "counting", "include": [{"class": shape, "count": n}]}
        return record | {"exclude": [{"class": shape, "count": n + 1}], "prompt": caption}
    clauses = [{"class": said[f"shape{i}"], "count": 1} for i in (1, 2) if said[f"shape{i}"]]
    for clause, colour in zip(clauses, (said["colour1"], said["colour2"]), strict=False):
        clause |= {"color": colour} if colour else {}
    tag = "colors" if said["colour1"] else "single_object"
    if said["link"] in RELATIONS:
        tag, clauses = "position", clauses[::-1]
        clauses[1]["position"] = [said["link"], 0]
    elif said["link"]:
        tag = "color_attr" if said["colour1"] else "two_object"
    return {"tag": tag, "include": clauses, "prompt": caption}


FACTS = (1 + len(SHAPES), 5, 1 + len(COLOURS), 1 + len(RELATIONS))
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def facts(record: dict) -> list[list[int]]:
    """What a caption says of its two kinds of objects: [shape, count, colour, relation], 2 x 4.

    The relation is that to the other kind. n stands for the n-th of SHAPES, COLOURS, RELATIONS and
    0 for "nothing said"; a caption of one kind leaves the second row 0.
    """
    said = [[0, 0, 0, 0], [0, 0, 0, 0]]
    for mine, clause in zip(said, record["include"], strict=False):
        mine[0] = 1 + SHAPES.index(clause["class"])
        mine[1] = clause["count"]
        if "color" in clause:
            mine[2] = 1 + list(COLOURS).index(clause["color"])
        if "position" in clause:
            relation, other = clause["position"]
            mine[3] = 1 + RELATIONS.index(relation)
            said[other][3] = 1 + RELATIONS.index(_OPPOSITE[relation])
    return said


def altered_caption(record: dict, rng: np.random.Generator) -> str:
    """The caption with one fact changed, so that it no longer describes the scene."""
    prompt = record["prompt"]
    clauses = record["include"]
    pairs = [
        (clauses[0].get(key), clauses[-1].get(key))
        for key, tag in (("color", "color_attr"), ("class", "position"))
        if record["tag"] == tag
    ]
    if pairs and rng.random() < 0.5:
        a, b = pairs[0]
        words = [{a: b, b: a}.get(w, w) for w in prompt.split()]
    else:
        prompt = prompt.replace("left of", "left_of").replace("right of", "right_of")
        words = prompt.split()
        families = (SHAPES, PLURALS, tuple(COLOURS), tuple(NUMBERS.values()))
        families += (("left_of", "right_of", "above", "below"),)
        spots = [(i, f) for i, w in enumerate(words) for f in families if w in f]
        i, family = spots[rng.integers(len(spots))]
        words[i] = [w for w in family if w != words[i]][rng.integers(len(family) - 1)]
        words = " ".join(words).replace("_", " ").split()
    for i, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return " ".join(words)
