"""One self-contained HTML page about one or more runs, with report.json and report.png beside it.

Reads what a run folder holds (config.yaml, metrics.jsonl, samples/, eval/, student/) and what
ships with its protocol: the teacher's rows, and its curve over guidance scales. Numbers share a
column, a figure or a sentence only if they are comparable; a number is never shown without its n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill.eval import report_curves, report_pictures, report_tables
from diffdistill.eval.records import picked
from diffdistill.eval.report_runs import Run, read_run, told_apart
from diffdistill.eval.report_teachers import Row, World, full_teacher, world
from diffdistill.eval.report_words import HEADLINES, counted, esc, name, number, section

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched


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
    taught = {run.info.get("teacher", "") for run in read}
    judged = sorted({r["protocol"] for run in read for r in run.records})
    worlds = {p: world(p, taught) for p in judged}
    verdicts = {run.name: verdict(run, worlds) for run in read}
    summary = {
        "runs": [
            {
                "name": run.name, "status": run.status, "verdict": verdicts[run.name],
                "cost": run.cost, "records": run.records, "info": run.info,
                "further": {k: made["records"] for k, made in run.further.items()},
            }
            for run in read
        ],
        "teacher": [row for p in judged for row in _listed(p, worlds[p].teachers)],
        "guidance": [row for p in judged for row in _listed(p, worlds[p].curve)],
    }  # fmt: skip
    report_pictures.poster(read, worlds, verdicts.values(), folder / "report.png")
    (folder / "report.json").write_text(json.dumps(_finite(summary), indent=1))
    page = folder / "index.html"
    page.write_text(render(read, worlds, verdicts), encoding="utf-8")
    return page


def _listed(protocol: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"protocol": protocol, "label": row.label, "records": row.records} for row in rows]


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(run: Run, worlds: Mapping[str, World]) -> str:
    """The result in one sentence."""
    records = picked(run.records, HEADLINES)
    if not records:
        return f"{run.name} has not been evaluated: diffdistill evaluate {run.path.name}/student"
    parts, passes = [], []
    for r in records:
        text = f"{name(r['metric'])} {number(r['value'])}"
        full = full_teacher(run, r, worlds)
        if full is None:
            text += f" (n {r['n']:,}; no comparable number of the teacher)"
        else:
            text += f" vs the teacher's {number(full['value'])}"
            text += f" at {counted(full['steps'])}" if not parts else ""
            text += f" (n {r['n']:,})"
            passes = [f"{full['nfe'] / r['nfe']:.3g}x fewer network passes"]
        parts.append(text)
    return f"{counted(records[0]['steps'])}: {'; '.join(parts + passes)}."


def render(runs: Sequence[Run], worlds: Mapping[str, World], verdicts: Mapping[str, str]) -> str:
    """The whole page as text."""
    many = len(runs) > 1
    body = [_head(runs, verdicts)]
    body += [report_tables.tiles(runs[0], worlds)] if not many else []
    body += [] if worlds else [section("Comparison", "<p>Nothing has been evaluated yet.</p>")]
    for protocol, known in worlds.items():
        under = f"protocol {protocol}"
        judged = [run for run in runs if any(r["protocol"] == protocol for r in run.records)]
        rows = report_tables.comparison(protocol, known.teachers, judged)
        steps = report_curves.steps_figure(protocol, known, judged)
        scales = report_curves.guidance_figure(protocol, known, judged)
        body += [
            section(f"Comparison, {under}", rows),
            section(f"Steps against quality, {under}", steps),
            section(f"The teacher over guidance scales, {under}", scales),
        ]
    for run in runs:
        of = f" · {run.name}" if many else ""
        body += [
            section(f"From the same noise{of}", report_pictures.grids(run)),
            section(f"Prompt by prompt{of}", report_pictures.prompts(run)),
            section(f"Training{of}", report_curves.training_figures(run, worlds)),
        ]
    body.append(section("Cost", report_tables.cost(runs)))
    for run in runs:
        of = f" · {run.name}" if many else ""
        body.append(section(f"Configuration and environment{of}", _config(run)))
    title = esc(", ".join(r.name for r in runs))
    css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>diffdistill: {title}</title><style>\n{css}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


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


def _config(run: Run) -> str:
    files = {
        "config.yaml": run.config, "config.lock.json: sources, versions, command": run.lock,
    }  # fmt: skip
    return "".join(
        f"<details><summary>{esc(title)}</summary><pre>{esc(text)}</pre></details>"
        for title, text in files.items()
        if text
    )
