"""Turn slow diffusion teachers into students that need one to eight steps.

import diffdistill as dd
teacher = dd.load_teacher("shapes-sd")
run = dd.distill(teacher, method="dmd", steps=2000, out="runs/x")
"""

from __future__ import annotations

import importlib
from typing import Any

from diffdistill import _checkout  # noqa: F401  (first: lets a clone run without an install)

__version__ = "0.1.0"

_PUBLIC = {
    "load_teacher": "diffdistill.teachers",
    "Teacher": "diffdistill.teachers",
    "Denoiser": "diffdistill.denoiser",
    "distill": "diffdistill.api",
    "load_student": "diffdistill.pipelines.loading",
}
__all__ = ["Denoiser", "Teacher", "distill", "load_student", "load_teacher", "schedules"]


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return importlib.import_module("diffdistill.schedules")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'diffdistill' has no attribute {name!r}")
