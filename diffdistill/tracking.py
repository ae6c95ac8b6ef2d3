"""Where numbers and pictures of a run go: metrics.jsonl and TensorBoard always, W&B on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.errors import writable_file

PICTURES = (1, 3, 4)  # channels that a PNG file can have here


class Tracker:
    """Writes scalars and image grids. Only the main process holds one."""

    def __init__(self, folder: Path, *, wandb: bool = False, config: Mapping | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._wandb = None
        if wandb:
            try:
                import wandb as client
            except ImportError as error:
                raise ValueError(
                    "log.wandb=true needs: pip install 'diffdistill[wandb]'"
                ) from error
            self._wandb = client.init(project="diffdistill", dir=folder, config=dict(config or {}))

    def rewind(self, step: int) -> None:
        """Forget what an interrupted run wrote after the checkpoint that it continues from."""
        file = self.folder / "metrics.jsonl"
        if file.is_file():
            lines = file.read_text().splitlines()
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            aside = file.with_suffix(".partial")
            aside.write_text("".join(f"{line}\n" for line in kept))
            aside.replace(file)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point in each tracker."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | dict(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def images(self, step: int, name: str, images: Tensor, columns: int) -> Path:
        """Save a grid as samples/<name>_<step>.png. images: uint8 [N, C, H, W]."""
        path = self.folder / "samples" / f"{name}_{step:06d}.png"
        picture = save_grid(images, columns, path)
        self._board.add_image(name, picture, step)
        if self._wandb is not None:
            import wandb as client

            self._wandb.log({name: client.Image(str(path))}, step=step)
        return path

    def close(self) -> None:
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def grid(images: Tensor, columns: int, *, zoom: int = 1, gap: int = 2) -> Tensor:
    """Tile uint8 [N, C, H, W] into one uint8 [3, H', W'] picture on white."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    out = torch.full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        out[:, y : y + h, x : x + w] = image
    return out


def picture_file(file: str | Path, option: str) -> Path:
    """A file that a grid can be written to. ValueError: no place for one, or no such format."""
    from PIL import Image

    formats = {end for end, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if (end := Path(file).suffix.lower()) not in formats and not Path(file).is_dir():
        raise ValueError(
            f"{str(file)!r} ends with {end!r}, no format of pictures. Name a file such as grid.png "
            f"with {option}."
        )
    return writable_file(file, option)


def save_grid(images: Tensor, columns: int, path: Path, *, zoom: int = 0) -> Tensor:
    """Write a grid as PNG; small images are enlarged to about 96 pixels. Returns the picture."""
    from PIL import Image

    zoom = zoom or max(1, 96 // images.shape[-1])
    picture = grid(images, columns, zoom=zoom)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return picture
