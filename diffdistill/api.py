"""The Python entry point: `distill(teacher, method=..., steps=..., out=...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffdistill.config import compose
from diffdistill.run import Result, execute


def distill(teacher: Any, *, method: str, steps: int, out: str | Path, **overrides: Any) -> Result:
    """Distil a teacher and return the finished run; that of a `Denoiser` has `module`.

    Args:
        teacher: what `load_teacher` gives or takes, or a `Denoiser` with a sample shape, whose
            images are in [-1, 1].
        steps: engine steps.
        out: the run folder.
        overrides: configuration keys with "__" for ".": train__batch_size=32.
    """
    out = Path(out)
    name = getattr(teacher, "name", teacher if isinstance(teacher, str | Path) else "given")
    argv = [
        f"teacher.name={name}",
        f"method={method}",
        f"train.steps={steps}",
        f"run.root={out.parent}",
        f"run.name={out.name}",
        *(f"{key.replace('__', '.')}={value}" for key, value in overrides.items()),
    ]
    cfg, provenance = compose(argv)
    return execute(cfg, provenance, teacher=teacher, argv=argv)
