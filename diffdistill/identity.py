"""What a run folder is of: its configuration, teacher, versions and command."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diffdistill import assets
from diffdistill.config import RunConfig, compose, differences, to_yaml
from diffdistill.teachers import Teacher

PACKAGES = ("diffdistill", "torch", "diffusers", "accelerate", "transformers", "numpy")


def refuse_another_run(folder: Path, cfg: RunConfig) -> None:
    """A folder with a finished or begun run is continued with that run's settings only."""
    finished, config = (folder / "DONE").is_file(), folder / "config.yaml"
    if not (_begun(folder) and config.is_file()):
        return
    earlier, _ = compose([f"recipe={config}"])
    if changed := differences(earlier, cfg):
        raise ValueError(
            f"{folder} holds a {'finished' if finished else 'begun'} run with other settings "
            f"({', '.join(changed)}). Set another run.name, or remove it."
        )


def refuse_another_teacher(folder: Path, teacher: Teacher) -> None:
    """Names do not tell: objects have none, and the files of a folder change."""
    lock = folder / "config.lock.json"
    known = json.loads(lock.read_text()).get("teacher") if lock.is_file() else None
    if known and known != teacher.key and _begun(folder):
        raise ValueError(
            f"{folder} holds a run of another teacher than this {teacher.name!r} (weights, "
            "configuration or schedule differ). Set another run.name, or remove it."
        )


def _begun(folder: Path) -> bool:
    return (folder / "DONE").is_file() or any((folder / "checkpoints").glob("step_*"))


def record(
    folder: Path, cfg: RunConfig, provenance: Mapping[str, str], argv: list[str], teacher: str
) -> None:
    """Write config.yaml, which `refuse_another_run` reads, and config.lock.json.

    teacher: its key.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "checkout"
    lock = {
        "command": argv, "provenance": dict(provenance), "teacher": teacher,
        "commit": _commit(), "versions": versions, "python": platform.python_version(),
        "platform": platform.platform(),
    }  # fmt: skip
    for name, text in (
        ("config.yaml", to_yaml(cfg)), ("config.lock.json", json.dumps(lock, indent=1)),
    ):  # fmt: skip
        aside = folder / f"{name}.partial"
        aside.write_text(text)
        aside.replace(folder / name)


def _commit() -> str | None:
    """Of a checkout, "-dirty" behind it if files differ; None of an installed package."""
    root = assets.root().parent
    if not (root / ".git").exists():
        return None
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout.strip() or None
