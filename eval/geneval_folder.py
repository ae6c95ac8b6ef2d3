"""GenEval on a folder of images: write it, judge it.

    00000/metadata.jsonl          the prompt's record, one line of JSON
    00000/samples/00000.png ...   its images, four in the benchmark; any digits will do

The layout is the published one, so that either side can read the other's folder. Image k of prompt
i is drawn from a generator seeded with 4 i + k; the published generator starts every prompt at 42.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffdistill.eval import geneval, geneval_prompts
from diffdistill.eval.geneval import Detection, Detector

if TYPE_CHECKING:
    from diffdistill.eval.colours import ColourClassifier

IMAGES = 4  # of every prompt
PUBLISHED = {"SD1.5": 0.43, "SDXL": 0.55}  # overall, reference detector, 50 steps, guidance 9
SOURCE = "source.json"  # what made the images; no part of the published layout
_Sample = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts, seeds -> uint8 [N, 3, H, W]


def write(
    folder: str | Path,
    sample: _Sample,
    *,
    source: Mapping[str, Any],
    records: Sequence[Mapping] | None = None,
    count: int = IMAGES,
    batch: int = 16,
) -> int:
    """Draw what is missing in the folder; the number of images drawn.

    Args:
        sample: image n is a function of (prompts[n], seeds[n]) alone.
        source: what makes the images (pipeline, steps, guidance). A folder that was begun with
            another one is refused.
        records: default: the 553 of the benchmark.
        count: images per prompt; the seed of image k of prompt i is count * i + k.
        batch: images per call of `sample`.
    """
    folder = Path(folder)
    records = geneval_prompts.records() if records is None else records
    if not records or count < 1 or batch < 1:
        raise ValueError(
            f"{len(records)} prompts, {count} images of each, {batch} at once. Give 1 or more each"
        )
    begin(folder / SOURCE, {**source, "count": count}, "images of another source")
    todo = []
    for i, record in enumerate(records):
        begin(folder / f"{i:05}" / "metadata.jsonl", json.dumps(record), "another prompt")
        files = [folder / f"{i:05}" / "samples" / f"{k:05}.png" for k in range(count)]
        files[0].parent.mkdir(exist_ok=True)
        lacking = [(f, count * i + k) for k, f in enumerate(files) if not f.exists()]
        todo += [(f, record["prompt"], seed) for f, seed in lacking]
    with tqdm(total=len(todo), desc="sample", unit="image", disable=None) as progress:
        for start in range(0, len(todo), batch):
            files, prompts, seeds = zip(*todo[start : start + batch], strict=True)
            images = sample(prompts, seeds)
            for file, image in zip(files, images, strict=True):
                save(file, image)
            progress.update(len(files))
    return len(todo)


def source(folder: str | Path) -> dict[str, Any]:
    """What made the images, as `write` noted it; nothing of another generator's."""
    file = Path(folder) / SOURCE
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}. Remove it, or draw again") from error


def begin(file: Path, line: str | Mapping[str, Any], other: str) -> None:
    """The line is in the file from now on; something else there is an error."""
    line = line.strip() if isinstance(line, str) else json.dumps(line, sort_keys=True)
    if file.is_file():
        if file.read_text().strip() != line:
            raise ValueError(f"{file} belongs to {other}, not to {line}. Use another folder.")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(line + "\n")
    aside.rename(file)


def save(file: Path, image: Tensor) -> None:
    """uint8 [3, H, W] as PNG, written aside and renamed."""
    from PIL import Image

    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3, image.shape
    aside = file.with_suffix(f".{os.getpid()}.partial")
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(aside, "png")
    aside.rename(file)


def read(folder: str | Path) -> list[tuple[dict, list[Path]]]:
    """Record and image files of every prompt, in the order of their numbers."""
    folder = Path(folder)
    prompts = [p for p in folder.glob("*") if p.name.isdigit() and p.is_dir()]
    if not prompts:
        raise ValueError(
            f"{folder} has no folders 00000, 00001, ...: it is no folder of GenEval. Write it with "
            "diffdistill sample --geneval --folder DIR, or with the published generator."
        )
    found = []
    for prompt in sorted(prompts, key=lambda p: int(p.name)):
        samples = [f for f in prompt.glob("samples/*") if re.fullmatch(r"\d+\.png", f.name)]
        if not samples:
            raise ValueError(f"{prompt} has no samples/*.png. Draw them, or remove the folder.")
        found.append((_record(prompt), sorted(samples, key=lambda f: int(f.stem))))
    return found


def _record(prompt: Path) -> dict:
    file = prompt / "metadata.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} is missing: the prompt of the images beside it. Restore it.")
    try:
        record = json.loads(file.read_text())
        clauses = [*record["include"], *record.get("exclude", ())]
        complete = "tag" in record and "prompt" in record
        complete &= all("class" in c and "count" in c for c in clauses)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no GenEval record: {error!r}. Restore it.") from error
    if not complete:
        raise ValueError(f"{file} is no GenEval record: it lacks tag, prompt, class or count.")
    return record


def geneval_folder(
    folder: str | Path, detector: Detector, colour_classifier: ColourClassifier | None = None
) -> dict[str, Any]:
    """Judge every image of a folder, at its own size and turned as its EXIF data say.

    Args:
        detector: of `detectors.load`.
        colour_classifier: of `colours.load`; not needed where the detector names colours itself
            or no prompt asks for one.

    Returns:
        key: geneval/<back end>/<hash of its weights>; numbers of two keys do not compare.
        feature_net: the same with the colour classifier, for records.Record.
        protocol: geneval for 4 images of each of the 553 prompts, else geneval/n=<images>.
        n, prompts: images and prompts.
        overall: mean of `tasks`, the share of correct images by task.
        correct_images, any_correct: share of correct images; of prompts with a correct image.
        verdicts: of every image: file, index (of the prompt), tag, prompt, correct, reason.
    """
    folder, prompts = Path(folder), read(folder)
    _can_judge([record for record, _ in prompts], detector, colour_classifier)
    verdicts = []
    with tqdm(total=sum(len(f) for _, f in prompts), desc="judge", disable=None) as progress:
        for record, files in prompts:
            wanted = [c["class"] for c in (*record["include"], *record.get("exclude", ()))]
            for file in files:
                image = _image(file)
                found = detector.detect(image[None], classes=sorted({*wanted}))[0]
                verdict = geneval.verdict(
                    record,
                    found,
                    threshold=detector.threshold,
                    counting_threshold=detector.counting_threshold,
                    classify=_classify(colour_classifier, image),
                )
                row = {"file": str(file.relative_to(folder)), "index": int(file.parts[-3])}
                row |= {"tag": record["tag"], "prompt": record["prompt"], **verdict._asdict()}
                verdicts.append(row)
                progress.update()
    return _summary(verdicts, prompts, detector, colour_classifier)


def _can_judge(
    records: Sequence[Mapping], detector: Detector, colours: ColourClassifier | None
) -> None:
    """Every class can be found, every colour can be named; else an error before any work."""
    clauses = [c for r in records for c in (*r["include"], *r.get("exclude", ()))]
    strange = sorted({c["class"] for c in clauses} - {*detector.classes})
    if strange:
        raise ValueError(
            f"the detector {detector.name} does not know {', '.join(strange)}. It knows: "
            f"{', '.join(detector.classes)}. Use another detector, or other prompts."
        )
    known = detector.colours if colours is None else colours.colours
    strange = sorted({c["color"] for c in clauses if "color" in c} - {*known})
    if strange:
        raise ValueError(
            f"nothing here can tell {', '.join(strange)}; the detector {detector.name} "
            f"{'with the colour classifier' if colours else 'alone'} knows: "
            f"{', '.join(known) or 'no colour'}. Give a colour classifier that does."
        )


def _image(file: Path) -> Tensor:
    """uint8 [3, H, W]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {file}: {error}. Draw it again.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _classify(colours: ColourClassifier | None, image: Tensor) -> geneval.Classify | None:
    if colours is None:
        return None

    def classify(objects: Sequence[Detection]) -> list[str]:
        return colours.classify(image, objects)

    return classify


def _summary(
    verdicts: list[dict[str, Any]],
    prompts: list[tuple[dict, list[Path]]],
    detector: Detector,
    colours: ColourClassifier | None,
) -> dict[str, Any]:
    whole = [r for r, _ in prompts] == geneval_prompts.records()
    whole &= all(len(files) == IMAGES for _, files in prompts)
    per_prompt: dict[str, list[bool]] = defaultdict(list)
    for v in verdicts:
        per_prompt[Path(v["file"]).parts[0]].append(v["correct"])
    tasks = geneval.task_scores((v["tag"], v["correct"]) for v in verdicts)
    key = f"geneval/{detector.name}/{detector.digest}"
    return {
        "key": key,
        "feature_net": key + (f"+{colours.name}" if colours else ""),
        "protocol": "geneval" if whole else f"geneval/n={len(verdicts)}",
        "n": len(verdicts),
        "prompts": len(prompts),
        "overall": geneval.overall(tasks),
        "tasks": tasks,
        "correct_images": sum(v["correct"] for v in verdicts) / len(verdicts),
        "any_correct": sum(any(v) for v in per_prompt.values()) / len(prompts),
        "verdicts": verdicts,
    }


def calibration(results: Mapping[str, Any], model: str) -> str:
    """One line: what a published model scores here, beside the number of the reference detector.

    Args:
        results: of images of that model, made with 50 steps and guidance 9.
        model: SD1.5 or SDXL.
    """
    if model not in PUBLISHED:
        raise ValueError(f"no published number for {model!r}. Known: {', '.join(PUBLISHED)}")
    if results["protocol"] != "geneval":
        raise ValueError(
            f"a calibration needs {IMAGES} images of each of the 553 prompts; this folder is "
            f"{results['protocol']} with {results['prompts']} prompts. Draw the missing ones."
        )
    return (
        f"calibration: {model} scores {results['overall']:.3f} with {results['key']}, "
        f"{PUBLISHED[model]:.2f} published with the reference detector"
    )
