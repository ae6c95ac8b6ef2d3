"""Rows of a league: what can be compared, the table of it, and the plot of quality against cost.

A row is one trained student (or the teacher at some number of steps). It holds `metrics` (name ->
value), the fields that all records of its evaluation share, the others in `details` by metric, and
what the student cost. Rows are seeds of one entry only if `asked`, the hash of all else that was
asked for, is the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdistill.eval.figures import log_axis
from diffdistill.eval.records import comparable

Row = Mapping[str, Any]

TEACHER = "teacher"  # method of the teacher's own rows
NAMES = {
    "fd": "FD", "kd": "KD", "recall": "recall", "coverage": "coverage", "diversity": "diversity",
    "vendi_prompt": "Vendi per prompt", "clip": "CLIP score", "geneval": "GenEval",
    "accuracy": "class accuracy",
}  # fmt: skip
SAME = ("teacher_weights", "budget")  # of all students in a table
SCORES = ("geneval", "accuracy")  # drawn besides FD
LEFT_OUT = ("precision", "density")  # of the tables, not of the files


# ---- rows -------------------------------------------------------------------------------


def packed(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The records of one evaluation as the fields of a row."""
    names = [k for k in records[0] if k not in ("metric", "value")]
    shared = {k: records[0][k] for k in names if all(r[k] == records[0][k] for r in records)}
    details = {r["metric"]: {k: r[k] for k in names if k not in shared} for r in records}
    shared["n"] = max(r["n"] for r in records)  # images; some metrics take fewer
    return shared | {"metrics": {r["metric"]: r["value"] for r in records}, "details": details}


def record(row: Row, metric: str) -> dict[str, Any]:
    """The record of one metric of a row."""
    return {**row, **row["details"][metric], "metric": metric, "value": row["metrics"][metric]}


def alike(a: Row, b: Row) -> bool:
    """Whether every number that both rows have is comparable."""
    both = a["metrics"].keys() & b["metrics"].keys()
    return bool(both) and all(comparable(record(a, m), record(b, m)) for m in both)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Students of one teacher and budget with comparable numbers, and the teacher's rows."""
    found: list[list[Row]] = []
    rows = list(rows)
    for row in (r for r in rows if r["method"] != TEACHER):
        for group in found:
            if all(group[0][k] == row[k] for k in SAME) and all(alike(r, row) for r in group):
                group.append(row)
                break
        else:
            found.append([row])
    for group in found:
        files = group[0]["teacher_files"]
        taught = [r for r in rows if r["method"] == TEACHER and r["teacher_files"] == files]
        group += [r for r in taught if all(alike(student, r) for student in group)]
    return found


@dataclass(frozen=True)
class Line:
    """One entry over its seeds."""

    entry: str
    method: str
    rows: tuple[Row, ...]

    def of(self, metric: str) -> list[float]:
        """Values of the seeds that have this metric."""
        return [r["metrics"][metric] for r in self.rows if metric in r["metrics"]]

    @property
    def fd(self) -> float:
        values = self.of("fd")
        return statistics.fmean(values) if values else float("inf")

    @property
    def nfe(self) -> int:
        return self.rows[0]["nfe"]


def lines(group: Iterable[Row]) -> list[Line]:
    """Entries of a group, best FD first."""
    seeds: dict[tuple, list[Row]] = {}
    for row in group:
        named = row["league"], row["entry"], row["method"]
        seeds.setdefault((*named, row["steps"], row["asked"]), []).append(row)
    many = len({league for league, *_ in seeds if league}) > 1
    found = [
        Line(f"{league}/{entry}" if many and league else entry, method, tuple(rows))
        for (league, entry, method, *_), rows in seeds.items()
    ]
    return sorted(found, key=lambda line: line.fd)


# ---- table ------------------------------------------------------------------------------


def markdown(rows: Iterable[Row]) -> str:
    """A table per group: best FD first, seeds of an entry as mean ± standard deviation."""
    return "\n\n".join(_table(group) for group in groups(rows))


def _table(group: Sequence[Row]) -> str:
    first = group[0]
    shown = {m: NAMES.get(m, m) for row in group for m in row["metrics"] if m not in LEFT_OUT}
    order = sorted(shown, key=lambda m: [*NAMES, m].index(m))
    net = record(first, order[0])["feature_net"]
    counts = {m: record(row, m)["n"] for row in group for m in order if m in row["metrics"]}
    few = {m: f" (n = {counts[m]})" for m in order if counts[m] != first["n"]}
    named = [shown[m] + few.get(m, "") for m in order]
    heads = ["entry", "method", "steps", "passes per image", "seeds", *named]
    paired = any(row.get("pair_passes") for row in group)
    minutes = "minutes (without pairs)" if paired else "minutes"
    heads += ["images seen", "training passes", minutes, "GiB"]
    out = [
        f"Teacher `{first['teacher']}` (weights `{first['teacher_weights']}`), "
        f"{first['budget']:,} network passes of training, protocol `{first['protocol']}`, "
        f"n = {first['n']}, features `{net}`:",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for line in lines(group):
        row = line.rows[0]
        cells = [TEACHER if line.method == TEACHER else f"`{line.entry}`"]
        cells += ["" if line.method == TEACHER else f"`{line.method}`", row["steps"], row["nfe"]]
        cells += ["" if line.method == TEACHER else len(line.rows)]
        cells += [spread(line.of(m)) for m in order]
        cells += ["", "", "", ""] if line.method == TEACHER else _cost(line.rows)
        out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(out)


def _cost(rows: Sequence[Row]) -> list[str]:
    mean = {k: statistics.fmean(r[k] for r in rows) for k in ("images", "passes", "seconds")}
    peak = max(r["peak_memory_gib"] for r in rows)
    return [
        f"{mean['images']:,.0f}", f"{mean['passes']:,.0f}", f"{mean['seconds'] / 60:.1f}",
        f"{peak:.2f}",
    ]  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """`1.23`, or `1.23 ± 0.04` (n - 1 in the standard deviation) of several."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    error = f" ± {statistics.stdev(values):.{_places(mean)}f}" if len(values) > 1 else ""
    return number(mean) + error


def number(value: float) -> str:
    return f"{value:.{_places(value)}f}"


def _places(value: float) -> int:
    return 3 if abs(value) < 1 else 2 if value < 100 else 0


# ---- plot -------------------------------------------------------------------------------


def plot(rows: Iterable[Row], path: Path) -> None:
    """The largest group as PNG: FD over training time, FD and the other headline over passes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    group = max(groups(rows), key=len)
    students = [line for line in lines(group) if line.method != TEACHER]
    teacher = sorted((r for r in group if r["method"] == TEACHER), key=lambda r: r["nfe"])
    scores = [m for m in ("fd", *SCORES) if any(m in r["metrics"] for r in group)]
    figure = Figure(figsize=(4.4 * (1 + len(scores)) + 1.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, *panels = figure.subplots(1, 1 + len(scores))
    marks, colours = "os^Dv<>Ph*", [f"C{i}" for i in range(10)]
    named, latest = [line.entry for line in students], 1e-3
    for i, line in enumerate(students):
        look = {"marker": marks[i // 10 % 10], "color": colours[i % 10]}
        for row in line.rows:
            pairs = row.get("pair_passes", 0)  # made before the clock of training starts
            rate = row["seconds"] / (row["passes"] - pairs) / 60
            minutes = [(p - pairs) * rate for p, _ in row["curve"]]
            latest = max(latest, *minutes)
            left.plot(minutes, [fd for _, fd in row["curve"]], markersize=5, **look)
        several = f", {line.rows[0]['steps']}" if named.count(line.entry) > 1 else ""
        for axes, score in zip(panels, scores, strict=True):
            if values := line.of(score):
                axes.plot([line.nfe] * 2, [min(values), max(values)], color=look["color"])
                label = line.entry + several if score == scores[0] else None
                axes.plot(line.nfe, statistics.fmean(values), label=label, ls="", **look)
    ticks = sorted({r["nfe"] for r in group})
    for axes, score in zip(panels, scores, strict=True):
        known = [(r["nfe"], r["metrics"][score]) for r in teacher if score in r["metrics"]]
        if known:
            label = TEACHER if score == scores[0] else None
            axes.plot(*zip(*known, strict=True), "k--.", label=label)
        axes.set(xlabel="passes per image", ylabel=NAMES[score], xscale="log")
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.minorticks_off()
    if teacher:
        left.axhline(teacher[-1]["metrics"]["fd"], color="k", linestyle="--", linewidth=1)
    left.set(xlabel="training, minutes", ylabel=NAMES["fd"], xlim=(0, 1.06 * latest))
    for axes in (left, panels[0]):
        log_axis(axes, [height for line in axes.lines for height in line.get_ydata()])
    title = "{teacher}, {budget:,} network passes of training, {protocol}, n = {n}"
    figure.suptitle(title.format_map(group[0]))
    figure.legend(loc="outside right upper", fontsize=8)
    for axes in (left, *panels):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", dpi=75)
    aside.replace(path)
