"""What a run is compared with: the teacher rows and the guidance curve of its protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffdistill.eval import protocols
from diffdistill.eval.records import key
from diffdistill.eval.report_runs import Record, Run
from diffdistill.eval.report_words import counted


@dataclass
class Row:
    """One line of a comparison table."""

    label: str
    records: list[Record] = field(default_factory=list)
    teacher: str = ""  # its name; "": this is a student
    weights: dict[str, str] | None = None  # of a teacher: file -> hash
    tasks: dict[str, float] = field(default_factory=dict)
    kd_std: float | None = None  # over subsets


@dataclass
class World:
    """What ships with a protocol; nothing for other protocols."""

    teachers: list[Row] = field(default_factory=list)  # fewest passes first
    curve: list[Row] = field(default_factory=list)  # a teacher's, lowest guidance first
    missing: str = ""  # why there is no curve


def world(protocol: str, taught: Collection[str] = ()) -> World:
    """What ships with a protocol: of the teachers `taught` that it judges, else of all of these.

    A curve of other weights than the teacher's rows is not used.
    """
    every = protocols.rated(protocol)
    names = [name for name in every if name in taught] or [*every]
    rows = [
        _row(row, counted(row["steps"]), every[name]["weights"])
        for name in names
        for row in every[name]["rows"]
    ]
    found = World(sorted(rows, key=lambda row: (row.teacher, row.records[0]["nfe"])))
    found.missing = f"nothing ships with protocol {protocol}, neither teacher rows nor a curve"
    for name in reversed(names):
        stored = protocols.curve(name)
        command = f"python -m diffdistill.eval.protocols --curve {name}"
        if not stored:
            found.missing = f"it has not been measured for {name}. To make it: {command}"
        elif stored["weights"] != every[name]["weights"]:
            found.missing = f"that of {name} is of other weights. To make it again: {command}"
        else:
            made = sorted(stored["rows"], key=lambda row: row["records"][0]["guidance"])
            found.curve = [
                _row(row, f"guidance {row['records'][0]['guidance']:g}", stored["weights"])
                for row in made
            ]
    return found


def _row(made: Mapping[str, Any], how: str, weights: dict[str, str]) -> Row:
    name, tasks = made["pipeline"], made.get("tasks", {})
    return Row(f"{name}, {how}", made["records"], name, weights, tasks, made.get("kd_std"))


def full_teacher(run: Run, record: Record, worlds: Mapping[str, World]) -> Record | None:
    """The comparable number of the run's own teacher with the most network passes."""
    own = run.info.get("teacher"), run.info.get("teacher_weights")
    found = [
        r
        for row in worlds[record["protocol"]].teachers
        for r in row.records
        if (row.teacher, row.weights) == own and key(r) == key(record)
    ]
    return max(found, key=lambda r: r["nfe"]) if found else None
