"""Open a teacher or a student by name or folder; sample it with one generator per image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.scheduler import HeunEDMScheduler, untrained_steps

INFO = "diffdistill.json"
FAMILIES = {"StableDiffusionPipeline": "sd", "EDMPipeline": "edm"}
STOCK = {"sd": (50, 7.5), "edm": (18, 1.0)}  # steps, guidance of a folder without diffdistill.json


class StudentStableDiffusionPipeline(StableDiffusionPipeline):
    """A student whose `pipe(prompt)` is the distilled sampler. Made by `load_student`."""

    student: dict[str, Any]

    def __call__(self, prompt=None, **kwargs):  # type: ignore[override]
        """As StableDiffusionPipeline; num_inference_steps and guidance_scale default as trained."""
        check_steps(self.student, kwargs.get("num_inference_steps"))
        kwargs["num_inference_steps"] = self.student["steps"]
        kwargs.setdefault("guidance_scale", self.student["guidance"])
        return super().__call__(prompt, **kwargs)


class Generator:
    """A pipeline with its `diffdistill.json`: conditions and seeds in, uint8 images out."""

    def __init__(self, pipe: DiffusionPipeline, info: dict[str, Any]):
        self.pipe, self.info = pipe, info
        pipe.set_progress_bar_config(disable=True)

    def sample(
        self,
        conditions: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int = 128,
    ) -> Tensor:
        """uint8 [N, C, H, W]. Image i is a function of (conditions[i], seeds[i]) alone.

        Args:
            conditions: prompts (family sd) or labels (family edm).
            steps, guidance: None: those of `info`. A student accepts its own steps only.
        """
        self._check(conditions, seeds)
        steps, guidance = self._call(steps, guidance)
        parts = []
        starts = range(0, len(seeds), batch)
        for start in tqdm(starts, desc="sample", unit="batch", disable=None, leave=False):
            rows = slice(start, start + batch)
            images = self.pipe(
                list(conditions[rows]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(int(s)) for s in seeds[rows]],
                output_type="pt",
            ).images
            if not images.isfinite().all():
                raise ValueError(
                    f"{self.info['name']} draws values that are not finite. Its weights are "
                    "damaged or diverged; if they are float16, try float32"
                )
            parts.append((255 * images.float() + 0.5).clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(parts)

    def nfe(self, steps: int | None = None, guidance: float | None = None) -> int:
        """Network passes per image."""
        steps, guidance = self._call(steps, guidance)
        if isinstance(self.pipe.scheduler, HeunEDMScheduler):
            return self.pipe.passes(steps, guidance)
        self.pipe.scheduler.set_timesteps(steps)
        twice = guidance > 1 if self.info["family"] == "sd" else guidance not in (0, 1)
        return len(self.pipe.scheduler.timesteps) * (2 if twice else 1)

    def _call(self, steps: int | None, guidance: float | None) -> tuple[int, float]:
        if self.info["kind"] == "student":
            check_steps(self.info, steps)
        elif steps is not None and steps < 1:
            raise ValueError(f"steps is {steps}. Give 1 or more.")
        return steps or self.info["steps"], self.info["guidance"] if guidance is None else guidance

    def _check(self, conditions: Sequence, seeds: Sequence[int]) -> None:
        if not seeds or len(conditions) != len(seeds):
            raise ValueError(
                f"{len(conditions)} conditions, {len(seeds)} seeds. Give one seed each."
            )
        wanted, name = {"sd": (str, "prompts"), "edm": (int, "labels")}[self.info["family"]]
        if odd := [c for c in conditions if not isinstance(c, wanted)]:
            raise ValueError(f"{self.info['name']} is driven by {name}, but was given {odd[0]!r}.")


def load_pipeline(name_or_folder: str | Path, *, device: str | torch.device = "cpu") -> Generator:
    """An embedded teacher by name, or any teacher or student folder. Nothing is downloaded.

    A folder without diffdistill.json is a teacher with the defaults of stock diffusers.
    """
    folder = _folder(name_or_folder)
    info = read_info(folder)
    cls = StableDiffusionPipeline if info["family"] == "sd" else EDMPipeline
    return Generator(_load(cls, folder).to(device), info)


def load_student(
    folder: str | Path, *, device: str | torch.device = "cpu"
) -> StudentStableDiffusionPipeline | EDMPipeline:
    """The student as a diffusers pipeline: `pipe(prompt)` or `pipe(label)` needs nothing more."""
    path = _folder(folder)
    info = read_info(path)
    if info["kind"] != "student":
        raise ValueError(f"{path} is a {info['kind']}, not a student. Use load_pipeline for it.")
    if info["family"] == "edm":
        return _load(EDMPipeline, path).to(device)
    pipe = _load(StudentStableDiffusionPipeline, path).to(device)
    pipe.student = info
    return pipe


def read_info(folder: Path) -> dict[str, Any]:
    """The folder's diffdistill.json, or what its model_index.json tells."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json. A run keeps its "
            f"student in RUN/student."
        )
    if (folder / INFO).is_file():
        return json.loads((folder / INFO).read_text())
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{folder} holds a {kind}. Supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    steps, guidance = STOCK[family]
    return {
        "kind": "teacher", "name": folder.resolve().name, "world": None, "protocol": None,
        "family": family, "steps": steps, "guidance": guidance,
    }  # fmt: skip


def check_steps(info: dict[str, Any], steps: int | None) -> None:
    """A student refuses a step count that it was not trained for."""
    if steps not in (None, info["steps"]):
        raise ValueError(untrained_steps(steps, info["steps"]))


def _folder(name: str | Path) -> Path:
    from diffdistill import assets

    path = Path(name).expanduser()
    if path.is_dir():
        return path
    known = assets.names("teachers")
    if str(name) in known:
        return assets.path("teachers", str(name))
    raise ValueError(
        f"{str(name)!r} is neither a folder nor an embedded teacher ({', '.join(known)}). For a "
        "pipeline on the Hugging Face hub, download it first: hf download ID --local-dir FOLDER"
    )


def _load(cls: type[DiffusionPipeline], folder: Path):
    pipe = cls.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
