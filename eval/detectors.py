"""Object detectors for GenEval behind one interface, `geneval.Detector`.

| back end | model | masks | thresholds (counting) |
|---|---|---|---|
| m2f-swin-s | Mask2Former, Swin-S, COCO instances (arXiv 2112.01527) | yes | 0.3 (0.9) |
| m2f-swin-l | the same with Swin-L: a second opinion | yes | 0.3 (0.9) |
| owlv2 | OWLv2, 80 text queries (arXiv 2306.09683); overlaps above 0.5 removed | no | 0.2 (0.2) |
| gdino | Grounding DINO, one class at a time (arXiv 2303.05499) | no | 0.35 (0.35) |
| shapes | `shapes_detector`, for images of that world | yes | 0.75 (0.75) |

Only the first is close to the published detector, which has its architecture and data but other
weights; its thresholds are the published ones. Those of owlv2 and gdino are not calibrated. Numbers
of two back ends never share a table; the key of a result names back end and weights.

Weights are a local folder, or are downloaded when that is asked for. Classes are mapped by index.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.data.shapes import COLOURS as SHAPES_COLOURS
from diffdistill.data.shapes import SHAPES
from diffdistill.eval import shapes_detector, weights
from diffdistill.eval.geneval import Detection
from diffdistill.eval.geneval_prompts import CLASSES
from diffdistill.eval.networks import exact
from diffdistill.registry import unknown

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for Mask2Former
_TEXT = ("*.json", "*.txt")  # what is downloaded beside the weights


class Source(NamedTuple):
    """Where weights come from."""

    hub: str  # repository on the Hugging Face hub
    size: str
    kind: str  # model_type of config.json
    threshold: float
    counting_threshold: float


SOURCES = {
    "m2f-swin-s": Source(
        "facebook/mask2former-swin-small-coco-instance", "0.3 GB", "mask2former", 0.3, 0.9
    ),
    "m2f-swin-l": Source(
        "facebook/mask2former-swin-large-coco-instance", "0.9 GB", "mask2former", 0.3, 0.9
    ),
    "owlv2": Source("google/owlv2-base-patch16-ensemble", "0.6 GB", "owlv2", 0.2, 0.2),
    "gdino": Source("IDEA-Research/grounding-dino-tiny", "0.7 GB", "grounding-dino", 0.35, 0.35),
}
BACKENDS = (*SOURCES, "shapes")


@dataclass(frozen=True, kw_only=True)
class _Network(ABC):
    """What the back ends that are networks have in common."""

    net: Any
    backend: str
    digest: str = "none"
    threshold: float
    counting_threshold: float
    device: str | torch.device = "cpu"
    classes: Sequence[str] = CLASSES
    colours: Sequence[str] = field(default=(), init=False)

    @property
    def name(self) -> str:
        limits, own = (self.threshold, self.counting_threshold), SOURCES[self.backend][-2:]
        return self.backend if limits == own else f"{self.backend}@{limits[0]:g},{limits[1]:g}"

    def detect(self, images: Tensor, classes: Sequence[str] | None = None) -> list[list[Detection]]:
        """Objects of every image, uint8 [N, 3, H, W], one image at a time; best first."""
        _check(images)
        with exact():
            found = [self._detect(image, classes or self.classes) for image in images]
        return [sorted(f, key=lambda d: -d.score) for f in found]

    @abstractmethod
    def _detect(self, image: Tensor, classes: Sequence[str]) -> list[Detection]: ...


@dataclass(frozen=True, kw_only=True)
class Mask2Former(_Network):
    """`net`: Mask2FormerForUniversalSegmentation, or what has its inputs and outputs."""

    backend: str = "m2f-swin-s"
    threshold: float = SOURCES["m2f-swin-s"].threshold
    counting_threshold: float = SOURCES["m2f-swin-s"].counting_threshold
    sides: tuple[int, int] = (800, 1333)  # pixels: wanted shortest side, largest longest one

    def _detect(self, image: Tensor, classes: Sequence[str]) -> list[Detection]:
        pixels, inner = _resize_and_pad(image.to(self.device), self.sides)
        out = self.net(pixel_values=pixels[None])
        return instances(
            out.class_queries_logits[0],
            out.masks_queries_logits[0],
            padded=pixels.shape[-2:],
            inner=inner,
            size=image.shape[-2:],
            classes=self.classes,
        )


def _resize_and_pad(
    image: Tensor, sides: tuple[int, int], multiple: int = 32
) -> tuple[Tensor, tuple[int, int]]:
    """Network input [3, H', W'] of a uint8 image, zeros right and below; size without them.

    Not the image processor of transformers: from version 5 it stretches the image to the multiple.
    """
    h, w = image.shape[-2:]
    scale = min(sides[0] / min(h, w), sides[1] / max(h, w))
    inner = (int(h * scale + 0.5), int(w * scale + 0.5))
    x = F.interpolate(image[None].float() / 255, inner, mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (_MEAN, _STD))
    below, right = (-n % multiple for n in inner)
    return F.pad((x - mean) / std, (0, right, 0, below)), inner


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: Sequence[int],
    inner: Sequence[int],
    size: Sequence[int],
    classes: Sequence[str] = CLASSES,
    top: int = 100,
) -> list[Detection]:
    """Objects from the raw outputs of Mask2Former, as in mmdet; empty masks are dropped.

    score = p q: p the probability of the class, q the mean of sigmoid(logit) inside the mask.

    Args:
        class_logits: [Q, C + 1]; the last is "no object".
        mask_logits: [Q, h, w], of the padded image.
        padded, inner, size: height and width of the network's input, of the image in its top left
            corner, and of the original image.
    """
    p = class_logits.float().softmax(-1)[:, :-1]
    best = p.flatten().topk(min(top, p.numel()))
    query, label = best.indices // p.shape[1], best.indices % p.shape[1]
    used, row = query.unique(return_inverse=True)
    logits = F.interpolate(mask_logits[None, used].float(), tuple(padded), mode="bilinear")
    logits = logits[..., : inner[0], : inner[1]]
    logits = F.interpolate(logits, tuple(size), mode="bilinear")[0]
    masks = logits > 0
    quality = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    scores, masks = best.values * quality[row], masks.cpu()
    found = []
    for i, k, score in zip(row.tolist(), label.tolist(), scores.tolist(), strict=True):
        rows, columns = (masks[i].any(axis).nonzero() for axis in (1, 0))
        if len(rows):
            (x0, x1), (y0, y1) = ((int(v[0]), int(v[-1]) + 1) for v in (columns, rows))
            found.append(Detection(classes[k], score, (x0, y0, x1, y1), mask=masks[i]))
    return found


@dataclass(frozen=True, kw_only=True)
class Owlv2(_Network):
    """`net`: Owlv2ForObjectDetection. Every class is one query; a box has its best class."""

    processor: Any  # Owlv2Processor
    backend: str = "owlv2"
    threshold: float = SOURCES["owlv2"].threshold
    counting_threshold: float = SOURCES["owlv2"].counting_threshold
    overlap: float = 0.5  # intersection over union above which the weaker box of a class goes

    def _detect(self, image: Tensor, classes: Sequence[str]) -> list[Detection]:
        from torchvision.ops import batched_nms

        queries = self.processor.tokenizer(
            [f"a photo of a {c}" for c in self.classes],
            padding="max_length",
            max_length=self.net.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        pixels = self.processor.image_processor(image, return_tensors="pt").pixel_values
        out = self.net(
            input_ids=queries.input_ids,
            attention_mask=queries.attention_mask,
            pixel_values=pixels.to(self.device),
        )
        logits, label = out.logits[0].float().max(-1)  # before the sigmoid, which saturates
        scores = logits.sigmoid()
        side = max(image.shape[-2:])  # the image was padded to a square
        boxes = _corners(out.pred_boxes[0], (side, side), image.shape[-2:])
        able = scores > min(self.threshold, self.counting_threshold)
        scores, label, boxes = scores[able], label[able], boxes[able]
        kept = batched_nms(boxes, scores, label, self.overlap)
        return _listed(boxes[kept], scores[kept], [self.classes[k] for k in label[kept].tolist()])


@dataclass(frozen=True, kw_only=True)
class GroundingDino(_Network):
    """`net`: GroundingDinoForObjectDetection. One pass per class: its prompt is "CLASS.".

    A joint prompt would give merged phrases. With a single class there is no phrase to find, so
    the text threshold has nothing to decide; the score of a box is that of its best token.
    """

    processor: Any  # GroundingDinoProcessor
    backend: str = "gdino"
    threshold: float = SOURCES["gdino"].threshold
    counting_threshold: float = SOURCES["gdino"].counting_threshold

    def _detect(self, image: Tensor, classes: Sequence[str]) -> list[Detection]:
        found = []
        pixels = self.processor.image_processor(image, return_tensors="pt").to(self.device)
        for cls in classes:
            text = self.processor.tokenizer(f"{cls}.", return_tensors="pt").to(self.device)
            out = self.net(**pixels, **text)
            scores = out.logits[0].float().sigmoid().amax(-1)
            able = scores > min(self.threshold, self.counting_threshold)
            boxes = _corners(out.pred_boxes[0][able], image.shape[-2:], image.shape[-2:])
            found += _listed(boxes, scores[able], [cls] * len(boxes))
        return found


@dataclass(frozen=True)
class Shapes:
    """The analytic detector of the world `shapes`; its weights are its source code."""

    name: str = field(default="shapes", init=False)
    threshold: float = shapes_detector.THRESHOLD
    counting_threshold: float = shapes_detector.THRESHOLD
    classes: Sequence[str] = field(default=SHAPES, init=False)
    colours: Sequence[str] = field(default=tuple(SHAPES_COLOURS), init=False)

    @property
    def digest(self) -> str:
        return weights.digest(shapes_detector.__file__)[:8]

    def detect(self, images: Tensor, classes: Sequence[str] | None = None) -> list[list[Detection]]:
        """Objects of every image, uint8 [N, 3, 32, 32]; best first."""
        return shapes_detector.detect(images)


def _corners(boxes: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """cx, cy, w, h relative to `scale` (height, width) -> x0, y0, x1, y1 in pixels, inside."""
    centre, extent = boxes.float().split(2, -1)
    wh = torch.tensor([scale[1], scale[0]], device=boxes.device)
    ends = [(centre + side * extent / 2) * wh for side in (-1, 1)]
    limit = torch.tensor([size[1], size[0]], device=boxes.device)
    return torch.cat([torch.minimum(end.clamp(min=0), limit) for end in ends], -1)


def _listed(boxes: Tensor, scores: Tensor, classes: Sequence[str]) -> list[Detection]:
    rows = zip(classes, scores.tolist(), boxes.tolist(), strict=True)
    return [Detection(cls, score, tuple(box)) for cls, score, box in rows]


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}. Detectors read uint8 [N, 3, H, W]"
        )


def load(
    backend: str = "m2f-swin-s",
    path: str | Path | None = None,
    *,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
    threshold: float | None = None,
    counting_threshold: float | None = None,
) -> Mask2Former | Owlv2 | GroundingDino | Shapes:
    """A detector by the id of its back end.

    Args:
        path: folder of the weights as transformers saves it (config.json, model.safetensors and,
            for owlv2 and gdino, preprocessor and tokenizer).
        allow_download: without `path`: fetch it from the Hugging Face hub, or use the hub's cache.
        threshold, counting_threshold: a score must be higher; other values than the back end's own
            become part of its name.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown("detector", backend, BACKENDS))
    if backend == "shapes":
        if (path, threshold, counting_threshold) != (None, None, None):
            raise ValueError("the detector shapes has no weights and fixed thresholds. Give none")
        return Shapes()
    source = SOURCES[backend]
    folder = _folder(backend, path, allow_download)
    limits = {
        "threshold": source.threshold if threshold is None else threshold,
        "counting_threshold": (
            source.counting_threshold if counting_threshold is None else counting_threshold
        ),
    }
    shared = {"backend": backend, "digest": weights.digest(folder)[:8], "device": device}
    net = _load(folder, source.kind, backend).to(device)
    if source.kind == "mask2former":
        return Mask2Former(net=net, **shared, **limits)
    from transformers import AutoProcessor

    make = Owlv2 if source.kind == "owlv2" else GroundingDino
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"{folder} lacks a preprocessor or a tokenizer of the detector {backend}: {error}. "
            f"Fetch {source.hub} again"
        ) from error
    return make(net=net, processor=processor, **shared, **limits)


def _load(folder: Path, kind: str, backend: str) -> Any:
    """The network of a folder; another kind, other classes or missing weights are errors."""
    import transformers

    classes = {
        "mask2former": transformers.Mask2FormerForUniversalSegmentation,
        "owlv2": transformers.Owlv2ForObjectDetection,
        "grounding-dino": transformers.GroundingDinoForObjectDetection,
    }
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != kind:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')}. The detector {backend} is "
            f"of type {kind}; its weights are those of {SOURCES[backend].hub}"
        )
    net, info = classes[kind].from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    lacking = sorted({n for n, _ in net.named_parameters()} & set(info["missing_keys"]))
    if lacking:
        raise ValueError(
            f"{folder} lacks {len(lacking)} weights of the detector {backend}, {lacking[0]} first. "
            f"Fetch {SOURCES[backend].hub} again"
        )
    if kind == "mask2former" and net.config.num_labels != len(CLASSES):
        raise ValueError(
            f"{folder} knows {net.config.num_labels} classes. The detector {backend} needs a "
            f"checkpoint of the {len(CLASSES)} COCO instance classes: {SOURCES[backend].hub}"
        )
    return net.float().eval().requires_grad_(False)


def _folder(backend: str, path: str | Path | None, allow_download: bool) -> Path:
    """The folder with config.json and weights; it is downloaded only if that is asked for."""
    hub, size = SOURCES[backend][:2]
    folder = Path(path).expanduser() if path is not None else None
    if folder is None and allow_download:
        folder = _download(hub, size)
    if folder and (folder / "config.json").is_file() and any(_files(folder)):
        return folder
    what = f"{folder} has no config.json and model.safetensors" if folder else "nothing is given"
    raise ValueError(
        f"the weights of the detector {backend} are missing: {what}. They are the folder {hub} of "
        f"https://huggingface.co, {size}. Give the path of a copy, or allow the download with "
        f"{weights.FLAG}"
    )


def _download(hub: str, size: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub, allow_patterns=[*_TEXT, "*.safetensors"]))
        if not any(_files(folder)):  # published before safetensors
            folder = Path(snapshot_download(hub, allow_patterns=[*_TEXT, "pytorch_model*.bin"]))
    except OSError as error:
        raise ValueError(
            f"cannot download {hub}, {size}: {error}. Give the path of a copy"
        ) from error
    return folder


def _files(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
