"""What a run folder says: its state, log, evaluations, pictures and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdistill.eval.records import evaluations

Record = Mapping[str, Any]


@dataclass
class Run:
    """What a run folder says."""

    path: Path
    name: str  # of the folder; with parents where several runs have one name
    status: str  # finished, failed, unfinished
    failure: str
    info: dict[str, Any]  # student/diffdistill.json
    log: list[dict[str, Any]]  # metrics.jsonl, one row per step
    damaged: int  # lines of metrics.jsonl that are not JSON
    evals: dict[int, dict[str, Any]]  # step -> evaluation
    further: dict[int, dict[str, Any]]  # other count of student steps -> its newest evaluation
    samples: dict[int, Path]  # step -> grid of the student
    teacher_grid: Path | None
    config: str
    lock: str

    @property
    def newest(self) -> dict[str, Any]:
        """The newest evaluation; empty before the first one."""
        return self.evals[max(self.evals)] if self.evals else {}

    @property
    def records(self) -> list[Record]:
        """Of the newest evaluation."""
        return self.newest.get("records", [])

    @property
    def batch_size(self) -> int | None:
        """Images per step, from the student's card or, of an unfinished run, from its log."""
        logged = [r["images"] // r["step"] for r in self.log if r["step"] and "images" in r]
        return self.info.get("train", {}).get("batch_size", logged[0] if logged else None)

    @property
    def cost(self) -> dict[str, Any]:
        """What the run used; None where it was not recorded."""
        train = self.info.get("train", {})
        last = self.log[-1] if self.log else {}
        return {
            "steps": train.get("steps", last.get("step")),
            "images": train.get("images", last.get("images")),
            "network_passes": train.get("network_passes"),
            "seconds": train.get("seconds", last.get("seconds")),
            "peak_memory_gib": train.get("peak_memory_gib"),
            "images_per_s": self.newest.get("images_per_s"),
        }


def read_run(path: Path) -> Run:
    """Everything a report needs from a run folder; parts may still be missing.

    Raises:
        ValueError: the folder holds no run.
    """
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{path} is not a run: it has no config.yaml. Give the folder that training printed, "
            "such as runs/quickstart-1a2b."
        )
    log, damaged = _read_log(path / "metrics.jsonl")
    info = path / "student" / "diffdistill.json"
    failed = path / "FAILED"
    status = "finished" if (path / "DONE").is_file() else "unfinished"
    grids = sorted((path / "samples").glob("teacher*.png"))
    made = evaluations(path)
    return Run(
        path=path.resolve(),
        name=path.resolve().name,
        status="failed" if failed.is_file() else status,
        failure=_text(failed),
        info=json.loads(info.read_text()) if info.is_file() else {},
        log=log,
        damaged=damaged,
        evals=made.pop(0),
        further={count: of[max(of)] for count, of in made.items()},
        samples={_step(p): p for p in sorted((path / "samples").glob("student_*.png"))},
        teacher_grid=grids[0] if grids else None,
        config=_text(path / "config.yaml"),
        lock=_text(path / "config.lock.json"),
    )


def told_apart(runs: list[Run]) -> list[Run]:
    """The runs, each once, under the shortest ends of their paths that differ."""
    runs = list({run.path: run for run in runs}.values())
    depth, ends = 1, lambda n: ["/".join(run.path.parts[-n:]) for run in runs]
    while len({*ends(depth)}) < len(runs):
        depth += 1
    for run, name in zip(runs, ends(depth), strict=True):
        run.name = name
    return runs


def _read_log(file: Path) -> tuple[list[dict[str, Any]], int]:
    rows, damaged = {}, 0
    for line in _text(file).splitlines():
        try:
            row = json.loads(line)
            rows[row["step"]] = row  # a resumed run writes some steps again: the last one counts
        except ValueError:
            damaged += 1
    return [rows[s] for s in sorted(rows)], damaged


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _step(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])
