"""Finds the objects of the `shapes` world in pixels, by analysis and synthesis; nothing is learned.

1. Background: a plane in RGB, fitted so that objects do not count (iteratively reweighted).
2. Opacity and colour of every pixel: (pixel - background) projected on the direction to each of
   the eight colours; the direction with the smallest residual wins.
3. Objects: connected pixels of one colour with opacity above one half.
4. Shape: centre, area and angle follow from moments of the opacity (angle: the moment z^m of an
   outline with m-fold symmetry). Each of the six shapes is drawn with them, and the drawing that
   agrees best is the class.

The score is that agreement: soft intersection over union of opacity and drawing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.data.shapes import COLOURS, SHAPES, SIZE, inside
from diffdistill.eval.geneval import Detection

THRESHOLD = 0.75  # of the score, every task: real scenes and their autoencoder reconstructions pass
_NAMES = tuple(COLOURS)
_PALETTE = torch.tensor(list(COLOURS.values()))
_FAR = 0.3  # RGB distance of an object's core to its nearest colour, above which it has no colour
_CONTRAST = 0.15  # RGB distance to the background, below which a pixel shows nothing
_AREA = 12  # pixels; the smallest object of the world has 26
_WIDTHS = (1.0, 1.5, 2.0)  # pixels of an edge: sharp to slightly blurred
_FORMS = {  # area / radius^2, symmetry, angle of the moment z^symmetry of an upright one
    "circle": (math.pi * 0.86**2, 0, 0.0),
    "square": (1.44**2, 4, math.pi),
    "triangle": (0.75 * math.sqrt(3), 3, 0.0),
    "star": (2.1 * math.sin(math.pi / 5), 5, 0.0),
    "ring": (math.pi * (0.95**2 - 0.5**2), 0, 0.0),
    "cross": (2 * 1.9 * 0.58 - 0.58**2, 4, 0.0),
}


def detect(images: Tensor, *, batch: int = 256) -> list[list[Detection]]:
    """Objects of every image, uint8 [N, 3, 32, 32]; best first."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}. "
            f"The shapes detector reads uint8 [N, 3, {SIZE}, {SIZE}]"
        )
    return [found for part in images.split(batch) for found in _detect(part.cpu().float() / 255)]


def _detect(x: Tensor) -> list[list[Detection]]:
    ground = background(x)
    alpha, colour = opacity(x, ground)
    where, masks = components((alpha > 0.5) * (colour + 1))
    found: list[list[Detection]] = [[] for _ in x]
    if not len(where):
        return found
    soft, core = _matte(x[where], ground[where], masks, (alpha > 0.5)[where])
    scores, centre, radii = _fit(soft)
    score, cls = scores.max(1)
    radius = radii.gather(1, cls[:, None])[:, 0]
    distance, nearest = (core[:, None] - _PALETTE).norm(dim=-1).min(1)
    for i, k in enumerate(where.tolist()):
        (cx, cy), r = centre[i].tolist(), float(radius[i])
        name = _NAMES[nearest[i]] if distance[i] < _FAR else None
        box = (cx - r, cy - r, cx + r, cy + r)
        found[k].append(Detection(SHAPES[cls[i]], float(score[i]), box, name, masks[i]))
    return [sorted(f, key=lambda d: -d.score) for f in found]


def background(x: Tensor) -> Tensor:
    """The plane colour + slope of every image [N, 3, H, W], without its objects."""
    axis = torch.linspace(-1, 1, SIZE)
    gy, gx = torch.meshgrid(axis, axis, indexing="ij")
    basis = torch.stack([torch.ones(SIZE, SIZE), gx, gy]).flatten(1)  # [3, HW]
    flat = x.flatten(2)
    fit = flat.median(-1, keepdim=True).values.expand_as(flat)
    for scale in (0.12, 0.06, 0.03, 0.03):
        weight = (1 + (flat - fit).square().sum(1, keepdim=True) / scale**2) ** -2
        gram = (weight * basis) @ basis.T  # [N, 3, 3]
        plane = torch.linalg.solve(gram + 1e-6 * torch.eye(3), basis @ (weight * flat).mT)
        fit = plane.mT @ basis
    return fit.view_as(x)


def opacity(x: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity 0..1 and palette index [N, H, W] of what lies on the background."""
    away = x - ground
    best, index, alpha = None, None, None
    for i, colour in enumerate(_PALETTE):
        to = colour.view(3, 1, 1) - ground
        a = ((away * to).sum(1) / to.square().sum(1)).clamp(0, 1)
        residual = (away - a[:, None] * to).square().sum(1)
        if best is None:
            best, alpha, index = residual, a, torch.zeros_like(a, dtype=torch.int64)
            continue
        closer = residual < best
        best = torch.where(closer, residual, best)
        alpha = torch.where(closer, a, alpha)
        index = index.masked_fill(closer, i)
    return alpha * (away.norm(dim=1) > _CONTRAST), index


def components(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Image index [K] and mask [K, H, W] of every 4-connected region of equal `kind` > 0."""
    _, h, w = kind.shape
    label = torch.arange(1, kind.numel() + 1).view_as(kind) * (kind > 0)
    joined = [(kind[:, 1:] == kind[:, :-1]), (kind[:, :, 1:] == kind[:, :, :-1])]
    while True:
        before = label.clone()
        for axis, same in enumerate(joined, 1):
            a, b = label.narrow(axis, 0, h - 1), label.narrow(axis, 1, h - 1)
            high = torch.maximum(a, b) * same
            b.copy_(torch.maximum(b, high))
            a.copy_(torch.maximum(a, high))
        root = label.flatten()
        label = torch.where(label > 0, root[(root - 1).clamp(0)].view_as(label), label)
        if torch.equal(label, before):
            break
    ids, area = label[label > 0].unique(return_counts=True)
    ids = ids[area >= _AREA]
    where = (ids - 1) // (h * w)
    return where, label[where] == ids[:, None, None]


def _matte(x: Tensor, ground: Tensor, masks: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity [K, H, W] and core colour [K, 3] of every object; `taken`: pixels of any object."""
    away = x - ground
    contrast = away.norm(dim=1) * masks
    core = (contrast > 0.9 * contrast.amax((1, 2), keepdim=True)).float()
    colour = (x * core[:, None]).sum((2, 3)) / core.sum((1, 2))[:, None]
    to = colour[:, :, None, None] - ground
    alpha = ((away * to).sum(1) / to.square().sum(1)).clamp(0, 1)
    near = _grow(masks, 1) | (_grow(masks, 2) & ~_grow(taken & ~masks, 1))
    return alpha * near, colour


def _grow(masks: Tensor, by: int) -> Tensor:
    return F.max_pool2d(masks.float()[:, None], 2 * by + 1, 1, by)[:, 0] > 0


def _fit(soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Agreement [K, 6] with every shape, centre [K, 2] and circumradius [K, 6]."""
    axis = torch.arange(SIZE) + 0.5
    mass = soft.sum((1, 2))
    cx, cy = (soft.sum(1) @ axis) / mass, (soft.sum(2) @ axis) / mass
    dx = (axis - cx[:, None])[:, None, :].expand_as(soft)
    dy = (axis - cy[:, None])[:, :, None].expand_as(soft)
    z = torch.complex(dx, dy)
    scores, radii = [], []
    for shape in SHAPES:
        area, fold, phase = _FORMS[shape]
        r = (mass / area).sqrt()
        turn = torch.zeros_like(r)
        if fold:
            turn = ((soft * z**fold).sum((1, 2)).angle() - phase) / fold
        cos, sin = (v[:, None, None] for v in (turn.cos(), turn.sin()))
        depth = inside(shape, cos * dx + sin * dy, cos * dy - sin * dx, r[:, None, None])
        agreement = []
        for width in _WIDTHS:
            drawn = (depth / width + 0.5).clamp(0, 1)
            shared = torch.minimum(soft, drawn).sum((1, 2))
            agreement.append(shared / (mass + drawn.sum((1, 2)) - shared))
        scores.append(torch.stack(agreement).amax(0))
        radii.append(r)
    return torch.stack(scores, 1), torch.stack([cx, cy], 1), torch.stack(radii, 1)
