"""The Python entry point: `distill(teacher, method=..., steps=..., out=...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffdistill.config import argument, compose, plain
from diffdistill.run import Result, execute
from diffdistill.teachers import Teacher, origin


def distill(teacher: Any, *, method: str, steps: int, out: str | Path, **overrides: Any) -> Result:
    """Distil a teacher and return the finished run; that of a `Denoiser` has `module`.

    Args:
        teacher: what `load_teacher` gives or takes, or a `Denoiser` with a sample shape, whose
            images are in [-1, 1].
        steps: engine steps.
        out: the run folder.
        overrides: configuration keys with "__" for ".": train__batch_size=32. Their values are
            taken as they stand.

    Raises:
        ValueError: a setting is unknown, of another type, or out of its range; `out` has no name.
    """
    folder = Path(out)
    if folder.name in ("", ".."):
        raise ValueError(f"out is {str(out)!r}. Give a folder with a name, such as 'runs/{method}'")
    settings = {
        "teacher.name": _name(teacher),
        "method": method,
        "train.steps": steps,
        "run.root": folder.parent,
        "run.name": folder.name,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    cfg, provenance = compose([], settings)
    argv = [argument(key, plain(key, value)) for key, value in settings.items()]
    return execute(cfg, provenance, teacher=teacher, argv=argv)


def _name(teacher: Any) -> str:
    """What `teacher.name` says: what loads it again, where that is known."""
    if isinstance(teacher, str | Path):
        return str(teacher)
    if isinstance(teacher, Teacher):
        return teacher.source or teacher.name
    return origin(teacher) or "given"
