"""One self-contained HTML page about one or more runs, with report.json and report.png beside it.

Reads what a run directory holds (config.yaml, metrics.jsonl, samples/, eval/, student/) and the
shipped teacher rows of its protocol. Numbers share a column only if they are comparable; a number
is never shown without its n.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffdistill import assets

KEY = ("metric", "protocol", "feature_net", "resize", "n", "m", "reference")  # of comparability
COLUMNS = 10  # of eval/step_N.png: pictures of the verdicts, in their order, 2 pixels apart
GAP = 2
LOWER = ("fd", "fid", "kd", "kid")  # these are better when lower
NAMES = {
    "fd": "FD", "fid": "FID", "kd": "KD", "kid": "KID", "clip": "CLIP score", "geneval": "GenEval",
    "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage",
    "accuracy": "Class accuracy",
}  # fmt: skip
HEADLINES = ("fd", "fid", "geneval", "accuracy")
CURVES = (*HEADLINES, "kd", "kid", "clip", "recall", "coverage")
Record = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass
class Run:
    """What a run directory says."""

    path: Path
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
    def name(self) -> str:
        return self.path.name

    @property
    def records(self) -> list[Record]:
        """Of the newest evaluation."""
        return self.evals[max(self.evals)]["records"] if self.evals else []


@dataclass
class Row:
    """One line of a comparison table."""

    label: str
    student: bool
    records: list[Record] = field(default_factory=list)


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write index.html, report.json and report.png; returns the path of the page.

    Args:
        out: folder; None: `report/` of the first run.
    """
    read = [read_run(Path(r)) for r in runs]
    if not read:
        raise ValueError("no run given. Usage: diffdistill report RUN [RUN ...]")
    folder = Path(out) if out is not None else read[0].path / "report"
    folder.mkdir(parents=True, exist_ok=True)
    protocols = sorted({r["protocol"] for run in read for r in run.records})
    teachers = {p: teacher_rows(p) for p in protocols}
    verdicts = {run.name: verdict(run, teachers) for run in read}
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
            for p, rows in teachers.items() for row in rows
        ],
    }  # fmt: skip
    picture(read, teachers, verdicts, folder / "report.png")
    (folder / "report.json").write_text(json.dumps(_finite(summary), indent=1))
    page = folder / "index.html"
    page.write_text(render(read, teachers, verdicts), encoding="utf-8")
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


def teacher_rows(protocol: str) -> list[Row]:
    """The shipped scores of the world's teacher, fewest steps first; none for other protocols."""
    file = assets.path("reference", f"{protocol}.json")
    if not file.is_file():
        return []
    rows = [
        Row(f"teacher, {_steps(r['records'][0]['steps'])}", False, r["records"])
        for r in json.loads(file.read_text())["rows"]
    ]
    return sorted(rows, key=lambda row: row.records[0]["nfe"])


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


def key(record: Record) -> tuple:
    """Two numbers may be compared only if this is equal."""
    return tuple(record.get(k) for k in KEY)


def full_teacher(record: Record, teachers: Mapping[str, list[Row]]) -> Record | None:
    """The comparable number of the teacher with the most network passes."""
    rows = teachers.get(record["protocol"], [])
    found = [r for row in rows for r in row.records if key(r) == key(record)]
    return max(found, key=lambda r: r["nfe"]) if found else None


def verdict(run: Run, teachers: Mapping[str, list[Row]]) -> str:
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
        full = full_teacher(r, teachers)
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
    }


def name(metric: str) -> str:
    return NAMES.get(metric, metric)


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


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


def render(
    runs: Sequence[Run], teachers: Mapping[str, list[Row]], verdicts: Mapping[str, str]
) -> str:
    """The whole page as text."""
    many = len(runs) > 1
    body = [_head(runs, verdicts)]
    body += [tiles(runs[0], teachers)] if not many else []
    tables = [
        section(f"Comparison, protocol {protocol}", comparison(protocol, rows, runs))
        for protocol, rows in teachers.items()
    ]
    body += tables or [section("Comparison", "<p>Nothing has been evaluated yet.</p>")]
    for run in runs:
        of = f" · {run.name}" if many else ""
        body.append(section(f"From the same noise{of}", grids(run)))
        body.append(section(f"Prompt by prompt{of}", verdict_pictures(run)))
        body.append(section(f"Training{of}", curves(run, teachers)))
    body.append(section("Cost", cost_table(runs)))
    for run in runs:
        of = f" · {run.name}" if many else ""
        body.append(section(f"Configuration and environment{of}", config(run)))
    title = esc(", ".join(r.name for r in runs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
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


def tiles(run: Run, teachers: Mapping[str, list[Row]]) -> str:
    """The figures one looks for first."""
    cells = []
    for r in run.records:
        if r["metric"] in HEADLINES:
            full = full_teacher(r, teachers)
            beside = f"teacher {number(full['value'])} at {_steps(full['steps'])}" if full else ""
            cells.append((name(r["metric"]), number(r["value"]), f"{beside} · n {r['n']:,}"))
    used = cost(run)
    if run.records:
        nfe, full = run.records[0]["nfe"], full_teacher(run.records[0], teachers)
        beside = f"teacher {full['nfe']}" if full else ""
        cells.append(("Passes per image", str(nfe), beside))
    if used["seconds"] is not None:
        cells.append(("Training", duration(used["seconds"]), f"{used['images']:,} images"))
    inner = "".join(
        f'<div class="tile"><p>{esc(a)}</p><b>{esc(b)}</b><p>{esc(c.strip(" ·"))}</p></div>'
        for a, b, c in cells
    )
    return f'<div class="tiles">{inner}</div>' if cells else ""


def comparison(protocol: str, teacher: Sequence[Row], runs: Sequence[Run]) -> str:
    """One column per comparability key, teachers first."""
    students = [
        Row(run.name, True, [r for r in run.records if r["protocol"] == protocol]) for run in runs
    ]
    rows = [row for row in (*teacher, *students) if row.records]
    columns = list(dict.fromkeys(key(r) for row in reversed(rows) for r in row.records))
    groups = list(dict.fromkeys(c[2:4] + c[5:] for c in columns))
    letter = lambda c: chr(ord("A") + groups.index(c[2:4] + c[5:]))  # noqa: E731
    head = "".join(
        f"<th>{esc(name(c[0]))}{_arrow(c[0])}<small>n {c[4]:,} · {letter(c)}</small></th>"
        for c in columns
    )
    lines = []
    for row in rows:
        values = {key(r): r for r in row.records}
        first = row.records[0]
        cells = "".join(
            f"<td>{number(values[c]['value']) if c in values else ''}</td>" for c in columns
        )
        label = f"{esc(row.label)}" + (" <i>student</i>" if row.student else "")
        lines.append(
            f'<tr class="{"student" if row.student else ""}"><th>{label}</th>'
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
        f'<div class="dim small">{note}</div>{tasks_table(teacher, runs, protocol)}'
    )


def _arrow(metric: str) -> str:
    return " ↓" if metric in LOWER else " ↑" if metric in NAMES else ""


def _group(group: tuple) -> str:
    net, resize, m, reference = group
    facts = [f"judged by {net}"] if net else []
    facts += [f"{m:,} reference images ({str(reference)[:12]})"] if m else []
    facts += [f"resize {resize}"] if resize else []
    return esc(", ".join(facts))


def tasks_table(teacher: Sequence[Row], runs: Sequence[Run], protocol: str) -> str:
    """GenEval by task, of the students."""
    scored = {}
    for run in runs:
        newest = run.evals[max(run.evals)] if run.evals else {}
        if newest.get("tasks") and newest.get("protocol") == protocol:
            n = [r["n"] for r in newest["records"] if r["metric"] == "geneval"]
            scored[f"{run.name}, n {n[0]:,} in all" if n else run.name] = newest["tasks"]
    if not scored:
        return ""
    tags = list(dict.fromkeys(t for tasks in scored.values() for t in tasks))
    head = "".join(f"<th>{esc(t.replace('_', ' '))}</th>" for t in tags)
    lines = "".join(
        f"<tr><th>{esc(run)}</th>"
        + "".join(f"<td>{number(tasks[t]) if t in tasks else ''}</td>" for t in tags)
        + "</tr>"
        for run, tasks in scored.items()
    )
    return (
        f'<h3>GenEval by task</h3><div class="scroll"><table><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{lines}</tbody></table></div>"
    )


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
        f'<figure><img alt="{esc(label)}" src="{data_uri(path.read_bytes())}">'
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
        found.append(data_uri(buffer.getvalue()))
    return found


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def curves(run: Run, teachers: Mapping[str, list[Row]]) -> str:
    """Metrics, losses and gradient norms against images seen."""
    batch = run.info.get("train", {}).get("batch_size")
    charts = []
    for r in run.records:
        points = metric_points(run, r, batch)
        if len(points) > 1 and r["metric"] in CURVES:
            full = full_teacher(r, teachers)
            charts.append(
                chart(
                    f"{name(r['metric'])}, n {r['n']:,}", {"student": points}, dots=True,
                    level=full["value"] if full else None, linear=r["metric"] not in LOWER,
                )
            )  # fmt: skip
    losses: dict[str, dict[str, Points]] = {}
    norms: dict[str, Points] = {}
    for row in run.log:
        for column, value in row.items():
            if "/" not in column or not isinstance(value, (int, float)):
                continue
            group, item = column.split("/", 1)
            point = (row.get("images", row["step"]), value)
            if item == "grad_norm":
                norms.setdefault(group, []).append(point)
            elif item not in ("lr", "updates", "skipped"):
                losses.setdefault(column, {}).setdefault(item, []).append(point)
    charts += [chart(f"loss {column}", series) for column, series in losses.items()]
    charts += [chart("gradient norm", norms)] if norms else []
    note = ""
    if run.damaged:
        note = f'<p class="dim small">damaged lines of metrics.jsonl, left out: {run.damaged}</p>'
    return (f'<div class="charts">{"".join(charts)}</div>' if charts else "") + note


def metric_points(run: Run, record: Record, batch: int | None) -> Points:
    """The numbers comparable to `record` of all evaluations of a run, by images seen."""
    return [
        (step * (batch or 1), r["value"])
        for step in sorted(run.evals)
        for r in run.evals[step]["records"]
        if key(r) == key(record)
    ]


def chart(
    title: str,
    series: Mapping[str, Points],
    *,
    dots: bool = False,
    level: float | None = None,
    linear: bool = False,
) -> str:
    """A line chart as inline SVG, against images seen; logarithmic where values span decades.

    Args:
        level: the teacher's value, drawn dashed.
        linear: never logarithmic (shares and rates).
    """
    series = {k: thin([p for p in v if math.isfinite(p[1])]) for k, v in series.items()}
    series = {k: v for k, v in series.items() if v}
    if not series:
        return ""
    xs, ys = ([p[i] for points in series.values() for p in points] for i in (0, 1))
    ys += [level] if level is not None and math.isfinite(level) else []
    log = not linear and min(ys) > 0 and max(ys) / min(ys) > 15
    f = math.log10 if log else float
    low, high = f(min(ys)), f(max(ys))
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad
    left, right, top, bottom = 42, 352, 10, 146
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    px = lambda x: left + (x - x0) / (x1 - x0) * (right - left)  # noqa: E731
    py = lambda y: bottom - (f(y) - low) / (high - low) * (bottom - top)  # noqa: E731
    parts = []
    for v in ticks(low, high, log):
        parts.append(
            f'<line class="rule" x1="{left}" x2="{right}" y1="{py(v):.1f}" y2="{py(v):.1f}"/>'
            f'<text x="{left - 6}" y="{py(v) + 3:.1f}" class="end">{short(v)}</text>'
        )
    for x, anchor in ((x0, "start"), ((x0 + x1) / 2, "mid"), (x1, "end")):
        label = short(x) + (" images" if anchor == "end" else "")
        parts.append(f'<text x="{px(x):.1f}" y="{bottom + 16}" class="{anchor}">{label}</text>')
    if level is not None and math.isfinite(level):
        y = py(level)
        parts.append(
            f'<line class="level" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{right}" y="{y - 4:.1f}" class="end">teacher</text>'
        )
    for i, points in enumerate(series.values()):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line c{i % 5}" points="{path}"/>')
        for x, y in points if dots or len(points) == 1 else []:
            parts.append(f'<circle class="dot c{i % 5}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>')
    legend = ""
    if len(series) > 1:
        legend = " ".join(f'<span class="c{i % 5}">{esc(k)}</span>' for i, k in enumerate(series))
    return (
        f'<figure class="chart"><figcaption>{esc(title)}{" (log)" if log else ""} {legend}'
        f'</figcaption><svg viewBox="0 0 360 168" role="img" aria-label="{esc(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between the ends; for `log` the ends are exponents of ten."""
    if log:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        found = [
            m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= math.log10(m) + e <= high
        ]
        return found[:: math.ceil(len(found) / 5)]
    size = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(size))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= size)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def thin(points: Points, most: int = 200) -> Points:
    """Means over equal runs of points, so that a curve has at most `most`."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def short(value: float) -> str:
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


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
        )  # fmt: skip
        lines.append(
            f"<tr><th>{esc(run.name)}</th>" + "".join(f"<td>{v}</td>" for v in cells) + "</tr>"
        )
    names = ("", "steps", "images seen", "network passes", "wall time", "peak memory")
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
    teachers: Mapping[str, list[Row]],
    verdicts: Mapping[str, str],
    file: Path,
) -> None:
    """report.png: teacher and student from the same noise, and the first headline number."""
    import textwrap

    from matplotlib.figure import Figure

    run = runs[0]
    panels = [("teacher", run.teacher_grid)] if run.teacher_grid else []
    if run.samples:
        panels.append(("student, same noise", run.samples[max(run.samples)]))
    bars = _bars(runs, teachers)
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    title = "\n".join(textwrap.fill(v, 118) for v in verdicts.values())
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", parse_math=False)
    left, right = (
        figure.subfigures(1, 2, width_ratios=(1.15, 1)) if panels and bars else [figure] * 2
    )
    if panels:
        axes = left.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, (label, path) in zip(axes, panels, strict=True):
            ax.imshow(Image.open(path))
            ax.set_title(label, fontsize=10, loc="left")
            ax.axis("off")
    if bars:
        label, values = bars
        ax = right.subplots()
        colours = ["#c8553d" if student else "#9aa5b1" for _, _, student in values]
        drawn = ax.barh(range(len(values)), [v[1] for v in values], color=colours)
        ax.set_yticks(range(len(values)), [v[0] for v in values], parse_math=False)
        ax.bar_label(drawn, [number(v[1]) for v in values], padding=3, fontsize=9)
        ax.set_title(label, fontsize=10, loc="left", parse_math=False)
        ax.invert_yaxis()
        ax.margins(x=0.16)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.tick_params(bottom=False, labelbottom=False, left=False, labelsize=9)
    figure.savefig(file, dpi=110)


def _bars(
    runs: Sequence[Run], teachers: Mapping[str, list[Row]]
) -> tuple[str, list[tuple[str, float, bool]]] | None:
    """The first headline metric of the first run, with everything comparable to it."""
    wanted = [r for m in HEADLINES for r in runs[0].records if r["metric"] == m]
    if not wanted:
        return None
    column = key(wanted[0])
    rows = [row for row in teachers.get(wanted[0]["protocol"], [])]
    rows += [Row(run.name, True, list(run.records)) for run in runs]
    values = [
        (row.label, r["value"], row.student)
        for row in rows
        for r in row.records
        if key(r) == column
    ]
    arrow = "lower is better" if wanted[0]["metric"] in LOWER else "higher is better"
    return f"{name(wanted[0]['metric'])}, n {wanted[0]['n']:,} ({arrow})", values


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
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin-top:24px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile p{color:var(--dim);font-size:13px;margin:0}
.tile b{font-size:28px;font-weight:650;line-height:1.3;letter-spacing:-.02em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:8px 7px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{font-weight:600;vertical-align:bottom;border-bottom:1.5px solid var(--dim)}
th:first-child{text-align:left}tbody th{font-weight:500}
th small{display:block;color:var(--dim);font-weight:400;font-size:11px;line-height:1.35}
tr.student{background:var(--soft)}tr.student th,tr.student td{font-weight:650}
tr.student i{color:var(--accent);font-style:normal;font-size:12px;font-weight:500;margin-left:4px}
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
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:16px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.chart figcaption{color:var(--fg);font-weight:500}
.chart span{font-weight:400;margin-left:8px}
svg{width:100%;display:block}svg text{font-size:10px;fill:var(--dim)}
.end{text-anchor:end}.mid{text-anchor:middle}.rule{stroke:var(--line)}
.level{stroke:var(--dim);stroke-dasharray:4 3}
.line{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linejoin:round}.dot{fill:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}
details{border:1px solid var(--line);border-radius:10px;margin-bottom:10px;background:var(--card)}
summary{padding:10px 16px;cursor:pointer;font-weight:500}
pre{margin:0;padding:12px 16px;overflow-x:auto;max-height:480px;
font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
@media print{details{display:none}}
"""
