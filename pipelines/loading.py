"""Open a teacher or a student by name or folder; sample it with one generator per image."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from tqdm import tqdm

from diffdistill.card import LABELLED
from diffdistill.pipelines.autoregressive import (
    AutoregressiveFewStepPipeline,
    AutoregressivePipeline,
)
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.scheduler import HeunEDMScheduler, untrained_steps

INFO = "diffdistill.json"
FAMILIES = {
    "StableDiffusionPipeline": "sd", "StableDiffusion3Pipeline": "sd3", "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana", "EDMPipeline": "edm", "AutoregressivePipeline": "tokens",
    "AutoregressiveFewStepPipeline": "tokens",
}  # fmt: skip
# steps and guidance of a folder without diffdistill.json
STOCK = {"sd": (50, 7.5), "sd3": (28, 7.0), "sana": (20, 4.5), "edm": (18, 1.0)}


class AsTrained:
    """`pipe(prompt)` is the distilled sampler. Students made by `load_student` inherit this."""

    student: dict[str, Any]

    def __call__(self, prompt=None, **kwargs):
        """As the stock pipeline; what it is told besides the prompt defaults as trained."""
        return super().__call__(prompt, **as_trained(self.student, kwargs))  # type: ignore[misc]


class SeededStableDiffusion3Pipeline(StableDiffusion3Pipeline):
    """The scheduler's noise comes from the call's generator, too; stock gives it to the start only.

    So an image of a stochastic student does not depend on its batch.
    """

    def __call__(self, prompt=None, **kwargs):  # type: ignore[override]
        """As StableDiffusion3Pipeline."""
        step = self.scheduler.step
        self.scheduler.step = functools.partial(step, generator=kwargs.get("generator"))
        try:
            return super().__call__(prompt, **kwargs)
        finally:
            del self.scheduler.step


class StudentStableDiffusionPipeline(AsTrained, StableDiffusionPipeline):
    """A student of the family sd."""


class StudentStableDiffusion3Pipeline(AsTrained, SeededStableDiffusion3Pipeline):
    """A student of the family sd3."""


class StudentSanaPipeline(AsTrained, SanaPipeline):
    """A student of the family sana that takes flow steps."""


class StudentSanaSprintPipeline(AsTrained, SanaSprintPipeline):
    """A student of the family sana that takes TrigFlow steps."""


CLASSES = {
    "StableDiffusionPipeline": (StableDiffusionPipeline, StudentStableDiffusionPipeline),
    "StableDiffusion3Pipeline": (SeededStableDiffusion3Pipeline, StudentStableDiffusion3Pipeline),
    "SanaPipeline": (SanaPipeline, StudentSanaPipeline),
    "SanaSprintPipeline": (SanaSprintPipeline, StudentSanaSprintPipeline),
    "EDMPipeline": (EDMPipeline, EDMPipeline),
    "AutoregressivePipeline": (AutoregressivePipeline, AutoregressivePipeline),
    "AutoregressiveFewStepPipeline": (AutoregressiveFewStepPipeline,) * 2,
}  # class in the folder -> as anything, as a student


def as_trained(info: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with a student's defaults. ValueError: another number of steps."""
    check_steps(info, call.get("num_inference_steps"))
    defaults = {"guidance_scale": info["guidance"]} | info.get("call", {})
    return defaults | call | {"num_inference_steps": info["steps"]}


def size_arguments(pipe: SanaPipeline | SanaSprintPipeline) -> dict[str, Any]:
    """What Sana's pipelines must be told to draw images of their network's size, if not 1024 px."""
    size = pipe.transformer.config.sample_size
    if (side := size * pipe.vae_scale_factor) == 1024:
        return {}
    return {"height": side, "width": side, "use_resolution_binning": size in (16, 32, 64, 128)}


class Generator:
    """A pipeline with its `diffdistill.json`: conditions and seeds in, uint8 images out."""

    def __init__(self, pipe: DiffusionPipeline, info: dict[str, Any]):
        self.pipe, self.info = pipe, info
        self.call = info.get("call") or (size_arguments(pipe) if info["family"] == "sana" else {})
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
            conditions: prompts, or labels (families edm and tokens).
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
                **self.call,
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
        tokens = self.info["family"] == "tokens"
        if tokens or isinstance(self.pipe.scheduler, HeunEDMScheduler):
            return self.pipe.passes(steps, guidance)
        twice = guidance not in (0, 1) if self.info["family"] == "edm" else guidance > 1
        if self.info["kind"] != "student":
            self.pipe.scheduler.set_timesteps(steps)
            steps = len(self.pipe.scheduler.timesteps)
        return steps * (2 if twice else 1)

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
        labelled = self.info["family"] in LABELLED
        wanted, name = (int, "labels") if labelled else (str, "prompts")
        if odd := [c for c in conditions if not isinstance(c, wanted)]:
            raise ValueError(f"{self.info['name']} is driven by {name}, but was given {odd[0]!r}.")


def load_pipeline(name_or_folder: str | Path, *, device: str | torch.device = "cpu") -> Generator:
    """An embedded teacher by name, or any teacher or student folder. Nothing is downloaded.

    An embedded name wins over a folder of that name; give such a folder as ./NAME. A folder without
    diffdistill.json is a teacher with the defaults of stock diffusers.
    """
    folder = _folder(name_or_folder)
    info = read_info(folder)
    return Generator(_load(folder, 0).to(device), info)


def load_student(
    folder: str | Path, *, device: str | torch.device = "cpu"
) -> AsTrained | EDMPipeline | AutoregressiveFewStepPipeline:
    """The student as a diffusers pipeline: `pipe(prompt)` or `pipe(label)` needs nothing more."""
    path = _folder(folder)
    info = read_info(path)
    if info["kind"] != "student":
        raise ValueError(f"{path} is a {info['kind']}, not a student. Use load_pipeline for it.")
    pipe = _load(path, 1).to(device)
    pipe.student = info
    return pipe


def read_info(folder: Path) -> dict[str, Any]:
    """The folder's diffdistill.json, or what its model_index.json tells."""
    index = folder / "model_index.json"
    if not index.is_file():
        own = folder / INFO
        if own.is_file() and json.loads(own.read_text()).get("family") == "module":
            raise ValueError(f"{folder} is no pipeline. {bare(folder)}")
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
    steps, guidance = _token_defaults(folder) if family == "tokens" else STOCK[family]
    return {
        "kind": "teacher", "name": folder.resolve().name, "world": None, "protocol": None,
        "family": family, "steps": steps, "guidance": guidance,
    }  # fmt: skip


def bare(folder: Path) -> str:
    """How the student of a bare network, in this folder, is used."""
    return (
        "Its teacher is a bare network, and so is the student. Load it into a network of that "
        "kind: student = teacher.clone(); student.net.load_state_dict(safetensors.torch.load_file("
        f"{str(folder / 'student.safetensors')!r})); see {folder / 'README.md'}"
    )


def _token_defaults(folder: Path) -> tuple[int, float]:
    """Groups of tokens and guidance of an autoregressive teacher's folder."""
    index, vq = (
        json.loads((folder / name).read_text())
        for name in ("model_index.json", "tokenizer/config.json")
    )
    side = -(-vq["size"] // (vq["fold"] * 2 ** (len(vq["widths"]) - 1)))
    return len(vq["scales"]) if vq["scales"] else side**2, index["guidance"]


def check_steps(info: dict[str, Any], steps: int | None) -> None:
    """A student refuses a step count that it was not trained for."""
    if steps not in (None, info["steps"]):
        raise ValueError(untrained_steps(steps, info["steps"]))


def _folder(name: str | Path) -> Path:
    from diffdistill import assets

    if (path := assets.teacher(name)) is not None:
        return path
    known = assets.names("teachers")
    raise ValueError(
        f"{str(name)!r} is neither a folder nor an embedded teacher ({', '.join(known)}). For a "
        "pipeline on the Hugging Face hub, download it first: hf download ID --local-dir FOLDER"
    )


def _load(folder: Path, which: int):
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = CLASSES[kind][which].from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
