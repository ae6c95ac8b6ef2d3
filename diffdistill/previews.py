"""Sample grids from fixed noise, through training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffdistill.config import RunConfig
from diffdistill.data import fashion, prepare, shapes
from diffdistill.data.images import to_uint8
from diffdistill.engine import Engine, Every
from diffdistill.finish import averaged, sampling_info, student_networks
from diffdistill.method import TokenSampler
from diffdistill.parts import autoregressive
from diffdistill.parts.rollout import sample
from diffdistill.pipelines.loading import STOCK
from diffdistill.signs import Signs
from diffdistill.teachers import Teacher
from diffdistill.tracking import PICTURES, Tracker

PREVIEWS = 24  # samples in a grid


def preview_conditions(teacher: Teacher, stream: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """The same conditions in every grid: the protocol's first ones, else the data's first."""
    world = teacher.info.get("world")
    if world == "shapes" and teacher.conditions == "prompts":
        conditions: list[Any] = [shapes.scene(i, "test").caption for i in range(PREVIEWS)]
        return conditions, dict(teacher.encode(conditions))
    if world == "fashion":
        conditions = [i % len(fashion.CLASSES) for i in range(PREVIEWS)]
        return conditions, dict(teacher.encode(conditions))
    rows = torch.arange(PREVIEWS) % stream.size
    return [None] * PREVIEWS, {k: fn(rows) for k, fn in stream.cond.items()}


def sample_grids(
    cfg: RunConfig, engine: Engine, teacher: Teacher, tracker: Tracker | None, signs: Signs
) -> tuple[Every, ...]:
    """Sample grids from fixed noise, teacher's first; on the main process only."""
    shape = teacher.denoiser.shape
    if tracker is None or (teacher.family != "tokens" and len(shape) != 3):
        return ()
    if teacher.family == "module" and shape[0] not in PICTURES:
        print(f"no sample grids: samples of {shape[0]} channels are no pictures")
        return ()
    device = engine.acc.device
    _, cond = preview_conditions(teacher, engine.stream)
    cond = {k: v.to(device) for k, v in cond.items()}
    rng, sampler = torch.Generator().manual_seed(0), engine.method.sampler()
    noise = [
        torch.randn(PREVIEWS, *teacher.denoiser.shape, generator=rng).to(device)
        for _ in range(sampling_info(sampler)[0])
    ]

    shown: list[Tensor] = []  # the teacher's, where this process made it

    def teacher_grid(engine: Engine) -> None:
        if teacher.family == "tokens":
            images = teacher.pipe(
                cond["label"].tolist(), latents=noise[0], output_type="pt",
                guidance_scale=float(teacher.info["guidance"]),
            ).images  # fmt: skip
            shown.append(to_uint8(2 * images - 1))
            tracker.images(0, "teacher", shown[0], 8)
            return
        steps, guidance = STOCK.get(teacher.family, (25, 1.0))
        info = {"steps": steps, "guidance": guidance} | teacher.info
        _, solve = prepare.pair_solver(teacher, float(info["guidance"]), int(info["steps"]))
        shown.append(teacher.to_images(solve(noise[0], cond)))
        tracker.images(0, "teacher", shown[0], 8)

    @torch.no_grad()
    def student_grid(engine: Engine) -> None:
        students, sampler = student_networks(engine), engine.method.sampler()
        one = students if len(students) > 1 else students[0]
        with averaged(engine):
            if isinstance(sampler, TokenSampler):
                x = autoregressive.generate(one, noise[0], cond, sampler)
            else:
                x = sample(one, students[0].schedule, noise, cond, sampler)
        images = teacher.to_images(x)
        tracker.images(engine.step, "student", images, 8)
        if shown and engine.step:
            signs.spread(images, shown[0])

    return (
        Every(cfg.train.steps, lambda e: teacher_grid(e) if e.step == 0 else None),
        Every(cfg.log.samples_every, student_grid),
    )
