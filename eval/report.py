"""One self-contained HTML page about one or more runs, with report.json and report.png beside it.

Reads what a run directory holds (config.yaml, metrics.jsonl, samples/, eval/, student/) and what
ships with its protocol: the teacher's rows, and its curve over guidance scales. Numbers share a
column, a figure or a sentence only if they are comparable; a number is never shown without its n.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffdistill.eval import figures, metrics, protocols, standings
from diffdistill.eval.figures import Line, Panel, Points
from diffdistill.eval.records import key

COLUMNS = 10  # of eval/step_N.png: pictures of the verdicts, in their order, 2 pixels apart
GAP = 2
LOWER = {name for m in metrics.METRICS.values() if not m.up for name in m.values}
NAMES = {
    "fd": "FD", "kd": "KD", "clip": "CLIP score", "geneval": "GenEval", "precision": "Precision",
    "recall": "Recall", "density": "Density", "coverage": "Coverage", "accuracy": "Class accuracy",
    "diversity": "Diversity within a prompt", "vendi_prompt": "Vendi per prompt",
}  # fmt: skip
HEADLINES = ("fd", "geneval", "accuracy")
STEPS = (*HEADLINES, "clip", "recall")  # drawn against network passes
CURVES = (*HEADLINES, "kd", "clip", "recall", "coverage", "diversity")  # against images seen
PAIRS = (("clip", "fd"), ("accuracy", "fd"), ("geneval", "fd"), ("recall", "precision"))
NOT_LOSSES = ("lr", "updates", "skipped")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched
Record = Mapping[str, Any]


@dataclass
class Run:
    """What a run directory says."""

    path: Path
    name: str  # of the folder; with parents where several runs have one name
    status: str  # finished, failed, unfinished
    failure: str
    info: dict[str, Any]  # student/diffdistill.json
    log: list[dict[str, Any]]  # metrics.jsonl, one row per step
    damaged: int  # lines of metrics.jsonl that are not JSON
    evals: dict[int, dict[str, Any]]  # step -> evaluation
    samples: dict[int, Path]  # step -> grid of the student
    teacher_grid: Path | None
    config: str
    lock: str

    @property
    def records(self) -> list[Record]:
        """Of the newest evaluation."""
        return self.evals[max(self.evals)]["records"] if self.evals else []


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


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write index.html, report.json and report.png; returns the path of the page.

    Args:
        out: folder; None: `report/` of the first run.
    """
    read = told_apart([read_run(Path(r)) for r in runs])
    if not read:
        raise ValueError("no run given. Usage: diffdistill report RUN [RUN ...]")
    folder = Path(out) if out is not None else read[0].path / "report"
    folder.mkdir(parents=True, exist_ok=True)
    judged = sorted({r["protocol"] for run in read for r in run.records})
    taught = {run.info.get("teacher", "") for run in read}
    worlds = {p: world(p, taught) for p in judged}
    verdicts = {run.name: verdict(run, worlds) for run in read}
    summary = {
        "runs": [
            {
                "name": run.name, "status": run.status, "verdict": verdicts[run.name],
                "cost": cost(run), "records": run.records, "info": run.info,
            }
            for run in read
        ],
        "teacher": [
            {"protocol": p, "label": row.label, "records": row.records}
            for p in judged for row in worlds[p].teachers
        ],
        "guidance": [
            {"protocol": p, "label": row.label, "records": row.records}
            for p in judged for row in worlds[p].curve
        ],
    }  # fmt: skip
    picture(read, worlds, verdicts, folder / "report.png")
    (folder / "report.json").write_text(json.dumps(_finite(summary), indent=1))
    page = folder / "index.html"
    page.write_text(render(read, worlds, verdicts), encoding="utf-8")
    return page


# ---- reading ------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """Everything the report needs from a run directory; parts may still be missing."""
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
    return Run(
        path=path.resolve(),
        name=path.resolve().name,
        status="failed" if failed.is_file() else status,
        failure=_text(failed),
        info=json.loads(info.read_text()) if info.is_file() else {},
        log=log,
        damaged=damaged,
        evals={_step(p): json.loads(p.read_text()) for p in (path / "eval").glob("step_*.json")},
        samples={_step(p): p for p in sorted((path / "samples").glob("student_*.png"))},
        teacher_grid=grids[0] if grids else None,
        config=_text(path / "config.yaml"),
        lock=_text(path / "config.lock.json"),
    )  # fmt: skip


def told_apart(runs: list[Run]) -> list[Run]:
    """The runs, each once, under the shortest ends of their paths that differ."""
    runs = list({run.path: run for run in runs}.values())
    depth, ends = 1, lambda n: ["/".join(run.path.parts[-n:]) for run in runs]
    while len({*ends(depth)}) < len(runs):
        depth += 1
    for run, name in zip(runs, ends(depth), strict=True):
        run.name = name
    return runs


def world(protocol: str, taught: Collection[str] = ()) -> World:
    """What ships with a protocol: of the teachers `taught` that it judges, else of all of these.

    A curve of other weights than the teacher's rows is not used.
    """
    every = protocols.rated(protocol)
    names = [name for name in every if name in taught] or [*every]
    rows = [
        _teacher(row, _steps(row["steps"]), every[name]["weights"])
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
                _teacher(row, f"guidance {row['records'][0]['guidance']:g}", stored["weights"])
                for row in made
            ]
    return found


def _teacher(made: Mapping[str, Any], how: str, weights: dict[str, str]) -> Row:
    name, tasks = made["pipeline"], made.get("tasks", {})
    label, std = f"{name}, {how}", made.get("kd_std")
    return Row(label, made["records"], name, weights, tasks, std)


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


# ---- numbers ------------------------------------------------------------------------------


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


def verdict(run: Run, worlds: Mapping[str, World]) -> str:
    """The result in one sentence."""
    records = sorted(
        (r for r in run.records if r["metric"] in HEADLINES),
        key=lambda r: HEADLINES.index(r["metric"]),
    )
    if not records:
        return f"{run.name} has not been evaluated: diffdistill evaluate {run.path.name}/student"
    parts, passes = [], ""
    for r in records:
        text = f"{name(r['metric'])} {number(r['value'])}"
        full = full_teacher(run, r, worlds)
        if full is None:
            text += f" (n {r['n']:,}; no comparable number of the teacher)"
        else:
            text += f" vs the teacher's {number(full['value'])}"
            text += f" at {_steps(full['steps'])}" if not parts else ""
            text += f" (n {r['n']:,})"
            passes = f"{full['nfe'] / r['nfe']:.3g}x fewer network passes"
        parts.append(text)
    return f"{_steps(records[0]['steps'])}: {'; '.join([*parts, *([passes] if passes else [])])}."


def cost(run: Run) -> dict[str, Any]:
    """What the run used; None where it was not recorded."""
    train = run.info.get("train", {})
    last = run.log[-1] if run.log else {}
    return {
        "steps": train.get("steps", last.get("step")),
        "images": train.get("images", last.get("images")),
        "network_passes": train.get("network_passes"),
        "seconds": train.get("seconds", last.get("seconds")),
        "peak_memory_gib": train.get("peak_memory_gib"),
        "images_per_s": run.evals[max(run.evals)].get("images_per_s") if run.evals else None,
    }


def name(metric: str) -> str:
    return NAMES.get(metric, metric)


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else standings.number(value)


def _steps(count: int) -> str:
    return f"{count} step" + ("" if count == 1 else "s")


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the page -----------------------------------------------------------------------------


def render(runs: Sequence[Run], worlds: Mapping[str, World], verdicts: Mapping[str, str]) -> str:
    """The whole page as text."""
    many = len(runs) > 1
    body = [_head(runs, verdicts)]
    body += [tiles(runs[0], worlds)] if not many else []
    body += [] if worlds else [section("Comparison", "<p>Nothing has been evaluated yet.</p>")]
    for protocol, known in worlds.items():
        under = f"protocol {protocol}"
        judged = [run for run in runs if any(r["protocol"] == protocol for r in run.records)]
        body += [
            section(f"Comparison, {under}", comparison(protocol, known.teachers, judged)),
            section(f"Steps against quality, {under}", steps_figure(protocol, known, judged)),
            section(
                f"The teacher over guidance scales, {under}",
                guidance_figure(protocol, known, judged),
            ),
        ]
    for run in runs:
        of = f" · {run.name}" if many else ""
        body.append(section(f"From the same noise{of}", grids(run)))
        body.append(section(f"Prompt by prompt{of}", verdict_pictures(run)))
        body.append(section(f"Training{of}", curves(run, worlds)))
    body.append(section("Cost", cost_table(runs)))
    for run in runs:
        of = f" · {run.name}" if many else ""
        body.append(section(f"Configuration and environment{of}", config(run)))
    title = esc(", ".join(r.name for r in runs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>diffdistill: {title}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def section(title: str, content: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{content}</section>" if content else ""


def _head(runs: Sequence[Run], verdicts: Mapping[str, str]) -> str:
    parts = []
    for run in runs:
        what = " · ".join(
            str(run.info[k]) for k in ("method", "teacher", "paper") if run.info.get(k)
        )
        parts.append(
            f'<p class="kicker">{esc(run.name)} <span class="status {run.status}">{run.status}'
            f'</span></p><h1>{esc(verdicts[run.name])}</h1><p class="dim">{esc(what)}</p>'
        )
        if run.failure:
            parts.append(f'<pre class="failure">{esc(run.failure)}</pre>')
    return f"<header>{''.join(parts)}</header>"


def tiles(run: Run, worlds: Mapping[str, World]) -> str:
    """The figures one looks for first."""
    cells = []
    for metric in (*HEADLINES, "recall", "diversity"):
        for r in (r for r in run.records if r["metric"] == metric):
            full = full_teacher(run, r, worlds)
            beside = f"teacher {number(full['value'])} · n {r['n']:,}" if full else f"n {r['n']:,}"
            cells.append((name(r["metric"]), number(r["value"]), beside))
    used = cost(run)
    if run.records:
        nfe, full = run.records[0]["nfe"], full_teacher(run, run.records[0], worlds)
        beside = f"teacher {full['nfe']} ({_steps(full['steps'])})" if full else ""
        cells.append(("Passes per image", str(nfe), beside))
    if used["seconds"] is not None:
        cells.append(("Training", duration(used["seconds"]), f"{used['images']:,} images"))
    inner = "".join(
        f'<div class="tile"><p>{esc(a)}</p><b>{esc(b)}</b><p>{esc(c)}</p></div>'
        for a, b, c in cells
    )
    return f'<div class="tiles">{inner}</div>' if cells else ""


def comparison(protocol: str, teacher: Sequence[Row], runs: Sequence[Run]) -> str:
    """One column per comparability key, teachers first."""
    rows = [*teacher, *students(protocol, runs)]
    columns = list(dict.fromkeys(key(r) for row in rows for r in row.records))
    order = list(dict.fromkeys(c[0] for c in columns))
    columns.sort(key=lambda c: order.index(c[0]))  # what must not be mixed up stands side by side
    groups = list(dict.fromkeys(c[2:4] + c[5:] for c in columns))
    letter = lambda c: chr(ord("A") + groups.index(c[2:4] + c[5:]))  # noqa: E731
    head = "".join(
        f"<th>{esc(name(c[0]))}{_arrow(c[0])}<small>n {c[4]:,} {letter(c)}</small></th>"
        for c in columns
    )
    lines = []
    for row in rows:
        values = {key(r): r for r in row.records}
        first = row.records[0]
        cells = "".join(f"<td>{_cell(row, values.get(c))}</td>" for c in columns)
        what = "teacher" if row.teacher else "student"
        lines.append(
            f'<tr class="{what}"><th>{esc(row.teacher or row.label)} <i>{what}</i></th>'
            f"<td>{first['steps']}</td><td>{first['nfe']}</td>"
            f"<td>{first['guidance']:g}</td>{cells}</tr>"
        )
    legend = "".join(
        f"<li><b>{chr(ord('A') + i)}</b> {_group(g)}</li>" for i, g in enumerate(groups)
    )
    note = (
        "Numbers stand in one column only where metric, protocol, n, feature network, resizing and "
        f"reference images agree.<ul>{legend}</ul>"
    )
    return (
        f'<div class="scroll"><table><thead><tr><th></th><th>steps</th><th>passes</th>'
        f"<th>guidance</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<div class="dim small">{note}</div>{tasks_table(rows)}'
    )


def _cell(row: Row, record: Record | None) -> str:
    if record is None:
        return ""
    kd = record["metric"] == "kd" and row.kd_std
    spread = f"<small>± {number(row.kd_std)}</small>" if kd else ""
    return number(record["value"]) + spread


def students(protocol: str, runs: Sequence[Run]) -> list[Row]:
    """The newest evaluation of each run, if it was made under the protocol."""
    rows = []
    for run in runs:
        made = run.evals[max(run.evals)] if run.evals else {}
        found = [r for r in run.records if r["protocol"] == protocol]
        extra = {"tasks": made.get("tasks", {}), "kd_std": made.get("kd_std")}
        rows += [Row(run.name, found, **extra)] if found else []
    return rows


def _arrow(metric: str) -> str:
    return " ↓" if metric in LOWER else " ↑" if metric in NAMES else ""


def _group(group: tuple) -> str:
    net, resize, m, reference = group
    facts = [f"judged by {net}"] if net else []
    facts += [f"{m:,} reference images ({str(reference)[:12]})"] if m else []
    facts += [f"resize {resize}"] if resize else []
    return esc(", ".join(facts))


def tasks_table(rows: Sequence[Row]) -> str:
    """GenEval by task: of the students, and of the teachers that can be compared with them."""
    score = {
        row.label: r for row in rows for r in row.records if r["metric"] == "geneval" and row.tasks
    }
    ours = {key(score[row.label]) for row in rows if not row.teacher and row.label in score}
    shown = [row for row in rows if row.label in score and key(score[row.label]) in ours]
    if not shown:
        return ""
    tags = list(dict.fromkeys(t for row in shown for t in row.tasks))
    head = "".join(f"<th>{esc(t.replace('_', ' '))}</th>" for t in tags)
    lines = "".join(
        f'<tr class="{"teacher" if row.teacher else "student"}"><th>{esc(row.label)}</th>'
        f"<td>{score[row.label]['n']:,}</td>"
        + "".join(f"<td>{number(row.tasks[t]) if t in row.tasks else ''}</td>" for t in tags)
        + "</tr>"
        for row in shown
    )
    return (
        f'<h3>GenEval by task</h3><div class="scroll"><table><thead><tr><th></th><th>n in all</th>'
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


# ---- the figures --------------------------------------------------------------------------


def steps_figure(protocol: str, known: World, runs: Sequence[Run]) -> str:
    """Each metric against network passes per image: teachers joined, students as stars."""
    panels = steps_panels(protocol, known, runs)
    if not panels:
        return ""  # no comparable number at another cost
    what = _what([record for record, _ in panels])
    caption = f"{what} Numbers beside the points are sampling steps."
    if any(panel.levels for _, panel in panels):
        caption += " Dashed: unseen real images in place of samples."
    return _figure([panel for _, panel in panels], caption, "steps against quality")


def steps_panels(protocol: str, known: World, runs: Sequence[Run]) -> list[tuple[Record, Panel]]:
    """One panel per metric with numbers at two or more costs, and a record of it."""
    found = []
    keys = {key(r): r for run in runs for r in run.records if r["protocol"] == protocol}
    for record in sorted(
        (r for r in keys.values() if r["metric"] in STEPS), key=lambda r: STEPS.index(r["metric"])
    )[:4]:
        lines = []
        for teacher in dict.fromkeys(row.teacher for row in known.teachers):
            rows = [row for row in known.teachers if row.teacher == teacher]
            dots = [r for row in rows for r in row.records if key(r) == key(record)]
            lines += [_line(f"{teacher} (teacher)", dots)] if dots else []
        lines += _stars(runs, [record])
        if len({x for line in lines for x, _ in line.points}) > 1:
            panel = _panel(record, lines, runs)
            panel.x, panel.costs = "network passes per image", True
            found.append((record, panel))
    return found


def _line(label: str, dots: Sequence[Record], **how: Any) -> Line:
    points = [(r["nfe"], r["value"]) for r in dots]
    return Line(label, points, texts=[str(r["steps"]) for r in dots], **how)


def _stars(runs: Sequence[Run], wanted: Sequence[Record]) -> list[Line]:
    """A star for every run that has numbers comparable to `wanted`: (x, y), or y over passes.

    Runs of one method and teacher with different passes per image are joined.
    """
    found = {}
    for i, run in enumerate(runs):
        mine = [r for w in wanted for r in run.records if key(r) == key(w)]
        if len(mine) == len(wanted) == 2:
            taught = run.info.get("teacher_guidance")
            label = run.name if taught is None else f"{run.name}, distilled at guidance {taught:g}"
            found[i] = Line(label, [(mine[0]["value"], mine[1]["value"])], i, star=True)
        elif len(mine) == len(wanted):
            found[i] = _line(run.name, mine, colour=i, star=True)
    return list(found.values()) if len(wanted) == 2 else _joined(found, runs)


def _joined(lines: Mapping[int, Line], runs: Sequence[Run]) -> list[Line]:
    groups: dict[tuple, list[Line]] = {}
    for i, line in lines.items():
        info = runs[i].info
        groups.setdefault((info.get("method", i), info.get("teacher")), []).append(line)
    joined: list[Line] = []
    for (method, _), group in groups.items():
        group.sort(key=lambda line: line.points[0][0])
        points = [p for line in group for p in line.points]
        if len({passes for passes, _ in points}) < max(2, len(points)):
            joined += group  # nothing to join, or several runs at one cost
        else:
            texts = [t for line in group for t in line.texts]
            joined.append(Line(str(method), points, group[0].colour, texts, star=True))
    return joined


def guidance_figure(protocol: str, known: World, runs: Sequence[Run]) -> str:
    """The teacher's curve over guidance scales with the students on it, and its numbers."""
    if not known.curve:
        return f'<p class="dim">No curve is drawn: {esc(known.missing)}</p>'
    panels: list[Panel] = []
    judged: list[Record] = []
    for pair in PAIRS:
        wanted = [r for m in pair for r in (_newest(runs, protocol, m),) if r is not None]
        rows = {
            row.records[0]["guidance"]: [r for w in wanted for r in row.records if key(r) == key(w)]
            for row in known.curve
        }
        dots = {g: found for g, found in rows.items() if len(found) == 2}
        if len(wanted) < 2 or len(dots) < 2:
            continue
        points = [(x["value"], y["value"]) for x, y in dots.values()]
        teacher = f"{known.curve[0].teacher} (teacher), guidance {min(dots):g} to {max(dots):g}"
        lines = [Line(teacher, points, texts=[f"{g:g}" for g in dots]), *_stars(runs, wanted)]
        x, y = (name(m) + _arrow(m) for m in pair)
        panels.append(Panel("", lines, x, y, linear=pair[1] not in LOWER))
        judged += wanted
    if not panels:
        return (
            '<p class="dim">No curve is drawn: the numbers of the stored one cannot be compared '
            "with those above.</p>"
        )
    caption = (
        f"{_what(judged)} The teacher has {_steps(known.curve[0].records[0]['steps'])}; numbers "
        "beside its points are guidance scales. Stars are students, which use none."
    )
    return _figure(panels[:3], caption, "teacher over guidance scales") + guidance_table(known)


def _newest(runs: Sequence[Run], protocol: str, metric: str) -> Record | None:
    records = [r for run in runs for r in run.records]
    found = [r for r in records if r["protocol"] == protocol and r["metric"] == metric]
    return found[0] if found else None


def guidance_table(known: World) -> str:
    """The numbers of the teacher's curve."""
    columns = list(dict.fromkeys(key(r) for row in known.curve for r in row.records))
    head = "".join(f"<th>{esc(name(c[0]))}{_arrow(c[0])}</th>" for c in columns)
    lines = []
    for row in known.curve:
        values = {key(r): r["value"] for r in row.records}
        cells = "".join(f"<td>{number(values[c]) if c in values else ''}</td>" for c in columns)
        first = row.records[0]
        lines.append(f"<tr><th>{first['guidance']:g}</th><td>{first['nfe']}</td>{cells}</tr>")
    first = known.curve[0].records[0]
    title = f"Numbers of the curve, {esc(known.curve[0].teacher)}, n {first['n']:,}"
    return (
        f'<details><summary>{title}</summary><div class="scroll inner"><table><thead><tr>'
        f"<th>guidance</th><th>passes</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table></div></details>"
    )


def _panel(record: Record, lines: list[Line], runs: Sequence[Run]) -> Panel:
    """A panel of one metric, with the floor of the protocol where that is known."""
    metric, levels = record["metric"], []
    if metric == "fd" and "/n=" not in record["protocol"]:  # the floor is of the protocol's own n
        floors = {
            run.evals[max(run.evals)].get("floor_fd")
            for run in runs
            if any(key(r) == key(record) for r in run.records)
        }
        levels = [("real images", floor) for floor in floors if floor is not None]
    return Panel(
        f"{name(metric)}{_arrow(metric)}", lines, "", levels=levels, linear=metric not in LOWER
    )


def _what(records: Sequence[Record]) -> str:
    """What the numbers of a figure rest on."""
    groups: dict[str, dict[str, None]] = {}
    for r in records:
        net = f", {r['feature_net']}" if r["feature_net"] else ""
        groups.setdefault(f"n {r['n']:,}{net}", {})[name(r["metric"])] = None
    told = "; ".join(f"{', '.join(named)}: {how}" for how, named in groups.items())
    return f"Protocol {records[0]['protocol']}. {told}."


def _figure(panels: Sequence[Panel], caption: str, label: str) -> str:
    return (
        f'<figure class="plot"><img alt="{esc(label)}" src="{figures.sheet(panels)}">'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


# ---- pictures -----------------------------------------------------------------------------


def grids(run: Run) -> str:
    """The teacher's grid, and the student's at up to four moments, first and last included."""
    steps = list(run.samples)
    if len(steps) > 4:
        steps = [steps[round(i * (len(steps) - 1) / 3)] for i in range(4)]
    figures = [("teacher", run.teacher_grid)] if run.teacher_grid else []
    for step in (*steps[-1:], *steps[:-1]):
        label = "student before training" if step == 0 else f"student, step {step:,}"
        figures.append((label, run.samples[step]))
    shown = [
        f'<figure><img alt="{esc(label)}" src="{_png(path.read_bytes())}">'
        f"<figcaption>{esc(label)}</figcaption></figure>"
        for label, path in figures
    ]
    blocks = (("grids two", shown[:2]), ("grids", shown[2:]))  # the result, then how it came about
    return "".join(f'<div class="{css}">{"".join(part)}</div>' for css, part in blocks if part)


def verdict_pictures(run: Run) -> str:
    """What was drawn for each prompt, and what the detector says of it, by task."""
    if not run.evals:
        return ""
    step = max(run.evals)
    file, verdicts = run.path / "eval" / f"step_{step:06d}.png", run.evals[step].get("verdicts", [])
    if not verdicts or not file.is_file():
        return ""
    pictures = cut(Image.open(file), len(verdicts))
    groups: dict[str, list[str]] = {}
    right: dict[str, int] = {}
    for v, image in zip(verdicts, pictures, strict=True):
        mark, css = ("✓", "right") if v["correct"] else ("✗", "wrong")
        reason = f"<small>{esc(v['reason'])}</small>" if v.get("reason") else ""
        groups.setdefault(v["tag"], []).append(
            f'<figure class="{css}"><img alt="{esc(v["prompt"])}" src="{image}">'
            f"<figcaption><b>{mark}</b> {esc(v['prompt'])}{reason}</figcaption></figure>"
        )
        right[v["tag"]] = right.get(v["tag"], 0) + bool(v["correct"])
    return "".join(
        f"<h3>{esc(tag.replace('_', ' ').capitalize())} "
        f"<span>{right[tag]} of {len(figures)} right</span></h3>"
        f'<div class="prompts">{"".join(figures)}</div>'
        for tag, figures in groups.items()
    )


def cut(picture: Image.Image, count: int) -> list[str]:
    """The tiles of a grid with COLUMNS columns as data URIs."""
    size = (picture.width + GAP) // COLUMNS - GAP
    found = []
    for i in range(count):
        x, y = i % COLUMNS * (size + GAP), i // COLUMNS * (size + GAP)
        buffer = io.BytesIO()
        picture.crop((x, y, x + size, y + size)).save(buffer, "png", optimize=True)
        found.append(_png(buffer.getvalue()))
    return found


def _png(data: bytes) -> str:
    return figures.data_uri(data, "png")


# ---- training -----------------------------------------------------------------------------


def curves(run: Run, worlds: Mapping[str, World]) -> str:
    """Metrics, losses and gradient norms against images seen."""
    charts, batch = [], batch_size(run)
    for r in run.records:
        points = metric_points(run, r)
        if len(points) > 1 and r["metric"] in CURVES:
            full = full_teacher(run, r, worlds)
            panel = _panel(r, [Line(run.name, points, 0)], [run])
            panel.levels = [(f"teacher, {_steps(full['steps'])}", full["value"])] if full else []
            charts.append((f"{panel.title}, n {r['n']:,}", panel))
    logged: dict[str, Points] = {}
    norms: dict[str, Points] = {}
    for row in run.log:
        for column, value in row.items():
            if "/" not in column or not isinstance(value, (int, float)):
                continue
            group, item = column.split("/", 1)
            point = (row["step"] * (batch or 1), value)
            if item == "grad_norm":
                norms.setdefault(group, []).append(point)
            elif item not in NOT_LOSSES:
                logged.setdefault(column, []).append(point)
    charts += [(column, Panel("", _lines({column: made}), "")) for column, made in logged.items()]
    charts += [("gradient norm", Panel("", _lines(norms), ""))] if norms else []
    shown = [chart(title, panel, "images seen" if batch else "steps") for title, panel in charts]
    note = ""
    if run.damaged:
        note = f'<p class="dim small">damaged lines of metrics.jsonl, left out: {run.damaged}</p>'
    return (f'<div class="charts">{"".join(shown)}</div>' if any(shown) else "") + note


def _lines(series: Mapping[str, Points]) -> list[Line]:
    return [
        Line(label, figures.thin([p for p in points if math.isfinite(p[1])]), i, dots=False)
        for i, (label, points) in enumerate(series.items())
    ]


def chart(title: str, panel: Panel, axis: str) -> str:
    """A small figure against images seen or steps; nothing where no value is finite."""
    panel.lines = [line for line in panel.lines if line.points]
    if not panel.lines:
        return ""
    panel.x = axis
    return (
        f'<figure class="chart"><figcaption>{esc(title)}</figcaption>'
        f'<img alt="{esc(title)}" src="{figures.small(panel)}"></figure>'
    )


def batch_size(run: Run) -> int | None:
    """Images per step, from the student's card or, of an unfinished run, from its log."""
    logged = [row["images"] // row["step"] for row in run.log if row["step"] and "images" in row]
    return run.info.get("train", {}).get("batch_size", logged[0] if logged else None)


def metric_points(run: Run, record: Record) -> Points:
    """The numbers comparable to `record` of all evaluations of a run, by images seen or steps."""
    batch = batch_size(run) or 1
    return [
        (step * batch, r["value"])
        for step in sorted(run.evals)
        for r in run.evals[step]["records"]
        if key(r) == key(record)
    ]


def cost_table(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        c = cost(run)
        count = lambda v: "not recorded" if v is None else f"{v:,}"  # noqa: E731
        memory = c["peak_memory_gib"]
        cells = (
            count(c["steps"]), count(c["images"]), count(c["network_passes"]),
            "not recorded" if c["seconds"] is None else duration(c["seconds"]),
            "not recorded" if memory is None else f"{memory:.2f} GiB",
            "not recorded" if c["images_per_s"] is None else f"{c['images_per_s']:,.0f} images/s",
        )  # fmt: skip
        lines.append(
            f"<tr><th>{esc(run.name)}</th>" + "".join(f"<td>{v}</td>" for v in cells) + "</tr>"
        )
    names = (
        "", "steps", "images seen", "network passes", "wall time", "peak memory", "then samples",
    )  # fmt: skip
    head = "".join(f"<th>{n}</th>" for n in names)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def config(run: Run) -> str:
    parts = [
        ("config.yaml", run.config),
        ("config.lock.json: sources, versions, command", run.lock),
    ]
    return "".join(
        f"<details><summary>{esc(title)}</summary><pre>{esc(text)}</pre></details>"
        for title, text in parts
        if text
    )


# ---- the picture --------------------------------------------------------------------------


def picture(
    runs: Sequence[Run],
    worlds: Mapping[str, World],
    verdicts: Mapping[str, str],
    file: Path,
) -> None:
    """report.png: teacher and student from the same noise, and the first headline number."""
    import textwrap

    run = runs[0]
    found = [("teacher", run.teacher_grid)] if run.teacher_grid else []
    if run.samples:
        found.append(("student, same noise", run.samples[max(run.samples)]))
    panels = [p for protocol, known in worlds.items() for p in steps_panels(protocol, known, runs)]
    panel = None
    if panels:
        record, panel = panels[0]
        panel.title += f", n {record['n']:,}, protocol {record['protocol']}"
    title = "\n".join(textwrap.fill(v, 118) for v in verdicts.values())
    figures.poster(title, found, panel, file)


CSS = """
:root{color-scheme:light dark;--bg:#fcfcfb;--fg:#1d2127;--dim:#6a727d;--line:#e4e5e3;--card:#fff;
--accent:#b8452d;--soft:#faf0ec;--good:#2c7a4b;--bad:#b8452d;--c0:#b8452d;--c1:#33658a;--c2:#2c7a4b;
--c3:#8a6d1f;--c4:#75507b}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e8ea;--dim:#98a1ac;--line:#2b3037;
--card:#1b1f24;--accent:#f0876c;--soft:#2a2120;--good:#6fcf97;--bad:#f0876c;--c0:#f0876c;
--c1:#7fb3dd;--c2:#6fcf97;--c3:#d9b650;--c4:#c39bd3}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1140px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:25px;line-height:1.35;font-weight:650;letter-spacing:-.01em;margin:4px 0 8px;
max-width:46em;text-wrap:pretty}
h2{font-size:18px;font-weight:650;margin:48px 0 14px;padding-top:14px;
border-top:1px solid var(--line)}
h3{font-size:14px;font-weight:650;margin:22px 0 8px}
h3 span{color:var(--dim);font-weight:400;margin-left:6px}
p{margin:0 0 6px}.dim{color:var(--dim)}.small{font-size:13px;margin-top:8px}
ul{list-style:none;margin:4px 0 0;padding:0}
.kicker{color:var(--dim);font-size:14px;margin-top:18px}
.status{border:1px solid;border-radius:20px;padding:0 9px;font-size:12px;margin-left:6px;
color:var(--dim)}
.finished{color:var(--good)}.failed{color:var(--bad)}
.failure{border-left:3px solid var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:24px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile p{color:var(--dim);font-size:13px;margin:0}
.tile b{font-size:25px;font-weight:650;line-height:1.35;letter-spacing:-.02em;white-space:nowrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{padding:8px 5px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{font-weight:600;vertical-align:bottom;white-space:normal;
border-bottom:1.5px solid var(--dim)}
th:first-child{text-align:left}tbody th{font-weight:500}
th small,td small{display:block;white-space:nowrap;color:var(--dim);
font-weight:400;font-size:11px;line-height:1.35}
tr.student{background:var(--soft)}tr.student th,tr.student td{font-weight:650}
tbody i{font-style:normal;font-size:12px;font-weight:400;color:var(--dim);margin-left:4px}
tr.student i{color:var(--accent);font-weight:500}
figure{margin:0}figcaption{font-size:13px;color:var(--dim)}
.grids{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:18px;
margin-top:18px}.two{grid-template-columns:repeat(auto-fit,minmax(420px,1fr))}
.grids img{width:100%;display:block;border-radius:6px}.grids figcaption{margin-top:6px}
.prompts{display:grid;grid-template-columns:repeat(auto-fill,minmax(92px,1fr));gap:10px}
.prompts img{width:100%;display:block;image-rendering:pixelated;border-radius:5px;
border-bottom:3px solid var(--good)}
.prompts .wrong img{border-color:var(--bad)}
.prompts figcaption{margin-top:4px;line-height:1.3;font-size:12px;overflow-wrap:anywhere}
.right b{color:var(--good)}.wrong b{color:var(--bad)}
.prompts small{display:block;color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:16px}
.chart,.plot{background:var(--card);border:1px solid var(--line);border-radius:10px}
.chart{padding:12px 14px}.chart figcaption{color:var(--fg);font-weight:500}
.chart img,.plot img{width:100%;display:block}
.plot{padding:16px 18px 14px;margin-bottom:12px}.plot figcaption{margin-top:8px}
@media(prefers-color-scheme:dark){.chart img,.plot img{filter:invert(.9) hue-rotate(180deg)}}
details{border:1px solid var(--line);border-radius:10px;margin-bottom:10px;background:var(--card)}
summary{padding:10px 16px;cursor:pointer;font-weight:500}
pre{margin:0;padding:12px 16px;overflow-x:auto;max-height:480px;
font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
.inner{padding:0 16px 12px}
@media print{main{max-width:none;padding:0}details{display:none}
figure,tr,.tile{break-inside:avoid}h2,h3{break-after:avoid}}
"""
