"""A folder of images, with captions in FILE.txt or class labels from sub-folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdistill.progress import progress

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_folder(folder: str | None) -> list[Path]:
    """Every image below the folder, sorted."""
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"image folder {folder!r} does not exist. Set data.folder=DIR.")
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"no images in {folder!r} (looked for {', '.join(ENDINGS)}).")
    return files


def read_all(files: list[Path], size: int, *, grey: bool = False) -> Tensor:
    """uint8 [N, 3 or 1, size, size]: centre crop, Lanczos. A damaged file is an error."""
    mode = "L" if grey else "RGB"
    return torch.stack([_read(f, size, mode) for f in progress(files, "read images")])


def _read(file: Path, size: int, mode: str) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {file}: {error}. Remove or replace it.") from error
    return torch.from_numpy(np.array(image).reshape(size, size, -1)).permute(2, 0, 1)


def captions(
    files: list[Path],
    reader: str = "the teacher takes prompts",
    instead: str = "take prompts without images: data=prompts data.prompts=FILE",
) -> list[str]:
    """The text of FILE.txt beside each image. ValueError: one has none."""
    texts = [f.with_suffix(".txt") for f in files]
    if missing := [t for t in texts if not t.is_file()]:
        raise ValueError(
            f"caption {missing[0]} is missing ({len(missing)} in all), and {reader}. Add it, or "
            f"{instead}"
        )
    return [t.read_text().strip() for t in texts]


def labels(files: list[Path], folder: str, classes: int) -> list[int]:
    """Class index of each image: its sub-folder, in alphabetical order.

    Raises:
        ValueError: there are not as many sub-folders with images as classes, or images in none.
    """
    if flat := [f for f in files if f.parent == Path(folder)]:
        raise ValueError(
            f"image {flat[0]} is in no sub-folder ({len(flat)} in all), but the teacher takes "
            f"class labels. Give one sub-folder for each of its {classes} classes, in alphabetical "
            "order (00, 01, ...)."
        )
    names = sorted({f.parent.name for f in files})
    if len(names) != classes:
        raise ValueError(
            f"image folder {folder!r} has {len(names)} sub-folders with images, but the teacher "
            f"has {classes} classes. Give one for each class, in alphabetical order (00, 01, ...)."
        )
    return [names.index(f.parent.name) for f in files]


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255: truncation of 127.5 x + 128, which rounds 127.5 (x + 1).

    What is not finite is an error: it would be a black pixel, which looks like a result.
    """
    if not x.isfinite().all():
        raise ValueError("images are not finite. The network that drew them is damaged or diverged")
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).cpu()
