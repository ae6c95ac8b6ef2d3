"""Whether a teacher denoises its own data: a check of what the adapter took from the pipeline.

A wrong prediction type, schedule or latent scale raises no error anywhere, and its students are
noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.data.prepare import pair_solver
from diffdistill.denoiser import Cond, uncounted
from diffdistill.schedules import add_noise, times
from diffdistill.teachers import Teacher

LEVELS = (0.2, 0.5, 0.8)  # of the teacher's grid of times
SLACK = 1.1


@torch.no_grad()
def undenoised(
    teacher: Teacher, x: Tensor | None, cond: Cond, device: torch.device | str = "cpu"
) -> str:
    """A line that says where the teacher is worse than a z, a one number; empty if nowhere.

    Args:
        x: clean data [B, ...], images or latents. None: the teacher's own samples are taken.
        cond: of the rows of x, or of as many samples; on `device`, as the teacher.
    """
    net, schedule = teacher.denoiser, teacher.denoiser.schedule
    rng = torch.Generator().manual_seed(0)
    with uncounted():
        if x is None:
            rows = len(next(iter(cond.values()))) if cond else 4
            eps = torch.randn(rows, *net.shape, generator=rng)
            info = {"guidance": 1.0, "steps": 0} | teacher.info
            _, solve = pair_solver(teacher, float(info["guidance"]), int(info["steps"]))
            x = solve(eps.to(device), cond)
        grid, found = schedule.grid(), []
        for level in LEVELS:
            t = times(float(grid[int(level * (len(grid) - 1))]), x)
            z = add_noise(schedule, x, torch.randn(x.shape, generator=rng).to(x), t).to(x.dtype)
            best = x - (z * x).sum() / z.square().sum() * z
            error = (net(z, t, cond) - x).square().mean() / best.square().mean()
            if not error <= SLACK:
                found.append(f"{float(error):.2g} x at {float(t[0]):.3g}")
    if not found:
        return ""
    return (
        f"warning: teacher {teacher.name!r} does not denoise its data: squared error against that "
        f"of its best multiple of the noisy input {', '.join(found)}. Check the scheduler's "
        "prediction_type and noise schedule, the scale of the latents and the conditions\n"
    )
