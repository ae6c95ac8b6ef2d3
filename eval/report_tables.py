"""Tables of a report. Numbers share a column only if they are comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffdistill.eval.records import key, picked
from diffdistill.eval.report_runs import Record, Run
from diffdistill.eval.report_teachers import Row, World, full_teacher
from diffdistill.eval.report_words import (
    HEADLINES,
    counted,
    duration,
    esc,
    heading,
    name,
    number,
    table,
)  # fmt: skip


def tiles(run: Run, worlds: Mapping[str, World]) -> str:
    """The figures one looks for first."""
    cells = []
    for r in picked(run.records, (*HEADLINES, "recall", "diversity")):
        full = full_teacher(run, r, worlds)
        beside = f"teacher {number(full['value'])} · " if full else ""
        cells.append((name(r["metric"]), number(r["value"]), f"{beside}n {r['n']:,}"))
    if run.records:
        first = run.records[0]
        full = full_teacher(run, first, worlds)
        beside = f"teacher {full['nfe']} ({counted(full['steps'])})" if full else ""
        cells.append(("Passes per image", first["nfe"], beside))
    used = run.cost
    if used["seconds"] is not None:
        cells.append(("Training", duration(used["seconds"]), f"{used['images']:,} images"))
    inner = "".join(
        f'<div class="tile"><p>{esc(a)}</p><b>{esc(b)}</b><p>{esc(c)}</p></div>'
        for a, b, c in cells
    )
    return f'<div class="tiles">{inner}</div>' if cells else ""


def comparison(protocol: str, teachers: Sequence[Row], runs: Sequence[Run]) -> str:
    """One column per comparability key, teachers first."""
    rows = [*teachers, *_students(protocol, runs)]
    columns = _columns(rows)
    order = [c[0] for c in columns]
    columns.sort(key=lambda c: order.index(c[0]))  # what must not be mixed up stands side by side
    judges = {by: chr(ord("A") + i) for i, by in enumerate(dict.fromkeys(map(_judge, columns)))}
    lines = []
    for row in rows:
        values = {key(r): r for r in row.records}
        first, what = row.records[0], _what(row)
        label = f"{esc(row.teacher or row.label)} <i>{what}</i>"
        how = (str(first["steps"]), str(first["nfe"]), f"{first['guidance']:g}")
        lines.append((what, (label, *how, *(_cell(row, values.get(c)) for c in columns))))
    heads = (f"{esc(heading(c[0]))}<small>n {c[4]:,} {judges[_judge(c)]}</small>" for c in columns)
    legend = "".join(f"<li><b>{letter}</b> {_told(by)}</li>" for by, letter in judges.items())
    return (
        table(("", "steps", "passes", "guidance", *heads), lines)
        + '<div class="dim small">Numbers stand in one column only where metric, protocol, n, '
        f"feature network, resizing and reference images agree.<ul>{legend}</ul></div>"
        + _tasks(rows)
    )


def _students(protocol: str, runs: Sequence[Run]) -> list[Row]:
    """The newest evaluations of each run that were made under the protocol."""
    rows = []
    for run in runs:
        more = {f"{run.name}, {counted(k)}": made for k, made in sorted(run.further.items())}
        for label, made in ({run.name: run.newest} | more).items():
            found = [r for r in made.get("records", []) if r["protocol"] == protocol]
            extra = {"tasks": made.get("tasks", {}), "kd_std": made.get("kd_std")}
            rows += [Row(label, found, **extra)] if found else []
    return rows


def _columns(rows: Sequence[Row]) -> list[tuple]:
    return list(dict.fromkeys(key(r) for row in rows for r in row.records))


def _what(row: Row) -> str:
    return "teacher" if row.teacher else "student"


def _judge(column: tuple) -> tuple:
    """Feature network, resizing, count and hash of the reference images."""
    return column[2:4] + column[5:]


def _told(judge: tuple) -> str:
    net, resize, m, reference = judge
    facts = [f"judged by {net}"] if net else []
    facts += [f"{m:,} reference images ({str(reference)[:12]})"] if m else []
    facts += [f"resize {resize}"] if resize else []
    return esc(", ".join(facts))


def _cell(row: Row, record: Record | None) -> str:
    if record is None:
        return ""
    kd = record["metric"] == "kd" and row.kd_std
    return number(record["value"]) + (f"<small>± {number(row.kd_std)}</small>" if kd else "")


def _tasks(rows: Sequence[Row]) -> str:
    """GenEval by task: of the students, and of the teachers that can be compared with them."""
    score = {
        row.label: r for row in rows for r in row.records if r["metric"] == "geneval" and row.tasks
    }
    ours = {key(score[row.label]) for row in rows if not row.teacher and row.label in score}
    shown = [row for row in rows if row.label in score and key(score[row.label]) in ours]
    if not shown:
        return ""
    tags = list(dict.fromkeys(t for row in shown for t in row.tasks))
    lines = []
    for row in shown:
        values = (number(row.tasks[t]) if t in row.tasks else "" for t in tags)
        lines.append((_what(row), (esc(row.label), f"{score[row.label]['n']:,}", *values)))
    heads = (esc(t.replace("_", " ")) for t in tags)
    return f"<h3>GenEval by task</h3>{table(('', 'n in all', *heads), lines)}"


def guidance(curve: Sequence[Row]) -> str:
    """The numbers of a teacher's curve over guidance scales, folded away."""
    columns = _columns(curve)
    lines = []
    for row in curve:
        first, values = row.records[0], {key(r): number(r["value"]) for r in row.records}
        cells = (f"{first['guidance']:g}", str(first["nfe"]), *(values.get(c, "") for c in columns))
        lines.append(("", cells))
    title = f"Numbers of the curve, {curve[0].teacher}, n {curve[0].records[0]['n']:,}"
    heads = ("guidance", "passes", *(esc(heading(c[0])) for c in columns))
    return f"<details><summary>{esc(title)}</summary>{table(heads, lines, 'inner')}</details>"


def cost(runs: Sequence[Run]) -> str:
    """What each run used."""
    how = {
        "steps": ("steps", "{:,}".format),
        "images": ("images seen", "{:,}".format),
        "network_passes": ("network passes", "{:,}".format),
        "seconds": ("wall time", duration),
        "peak_memory_gib": ("peak memory", "{:.2f} GiB".format),
        "images_per_s": ("then samples", "{:,.0f} images/s".format),
    }
    lines = []
    for run in runs:
        used = [(run.cost[k], write) for k, (_, write) in how.items()]
        cells = ("not recorded" if v is None else write(v) for v, write in used)
        lines.append(("", (esc(run.name), *cells)))
    return table(("", *(head for head, _ in how.values())), lines)
