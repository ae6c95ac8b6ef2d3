"""Curves of a report: steps against quality, guidance scales, and training over images seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffdistill.eval import figures, report_tables
from diffdistill.eval.figures import Line, Panel, Points
from diffdistill.eval.records import comparable, key, picked
from diffdistill.eval.report_runs import Record, Run
from diffdistill.eval.report_teachers import World, full_teacher
from diffdistill.eval.report_words import (
    HEADLINES,
    LOWER,
    counted,
    esc,
    heading,
    name,
    picture,
)  # fmt: skip

STEPS = (*HEADLINES, "clip", "recall")  # drawn against network passes
CURVES = (*HEADLINES, "kd", "clip", "recall", "coverage", "diversity")  # against images seen
PAIRS = (("clip", "fd"), ("accuracy", "fd"), ("geneval", "fd"), ("recall", "precision"))
NOT_LOSSES = ("lr", "updates", "skipped")

# ---- steps against quality ----------------------------------------------------------------


def steps_figure(protocol: str, known: World, runs: Sequence[Run]) -> str:
    """Each metric against network passes per image: teachers joined, students as stars."""
    panels = steps_panels(protocol, known, runs)
    if not panels:
        return ""  # no comparable number at another cost
    caption = f"{_what([r for r, _ in panels])} Numbers beside the points are sampling steps."
    if any(panel.levels for _, panel in panels):
        caption += " Dashed: unseen real images in place of samples."
    return _figure([panel for _, panel in panels], caption, "steps against quality")


def steps_panels(protocol: str, known: World, runs: Sequence[Run]) -> list[tuple[Record, Panel]]:
    """One panel per metric with numbers at two or more costs, and a record of it."""
    found = []
    keys = {key(r): r for run in runs for r in run.records if r["protocol"] == protocol}
    for record in picked(keys.values(), STEPS)[:4]:
        lines = []
        for teacher in dict.fromkeys(row.teacher for row in known.teachers):
            rows = [row for row in known.teachers if row.teacher == teacher]
            dots = [r for row in rows for r in row.records if comparable(r, record)]
            lines += [_line(f"{teacher} (teacher)", dots)] if dots else []
        lines += _stars(runs, [record])
        if len({x for line in lines for x, _ in line.points}) > 1:
            panel = Panel(
                heading(record["metric"]), lines, "network passes per image", costs=True,
                levels=_floors(record, runs), linear=record["metric"] not in LOWER,
            )  # fmt: skip
            found.append((record, panel))
    return found


def _floors(record: Record, runs: Sequence[Run]) -> list[tuple[str, float]]:
    """FD of real images, where it is known for the number of samples of `record`."""
    if record["metric"] != "fd" or "/n=" in record["protocol"]:
        return []  # the floor is of the protocol's own n
    judged = [run for run in runs if any(comparable(r, record) for r in run.records)]
    floors = {run.newest.get("floor_fd") for run in judged}
    return [("real images", floor) for floor in floors if floor is not None]


def _line(label: str, dots: Sequence[Record], **how: Any) -> Line:
    points = [(r["nfe"], r["value"]) for r in dots]
    return Line(label, points, texts=[str(r["steps"]) for r in dots], **how)


def _stars(runs: Sequence[Run], wanted: Sequence[Record]) -> list[Line]:
    """A star for every run that has numbers comparable to `wanted`: (x, y), or y over passes.

    Of y over passes, a run has one for each count of steps that it was sampled with; and runs of
    one method and teacher with different passes per image are joined.
    """
    found = {}
    for i, run in enumerate(runs):
        mine = [r for w in wanted for r in run.records if comparable(r, w)]
        if len(mine) == len(wanted) == 2:
            taught = run.info.get("teacher_guidance")
            label = run.name if taught is None else f"{run.name}, distilled at guidance {taught:g}"
            found[i] = Line(label, [(mine[0]["value"], mine[1]["value"])], i, star=True)
        elif len(mine) == len(wanted):
            more = [r for made in run.further.values() for r in made["records"]]
            dots = [*mine, *(r for r in more if comparable(r, wanted[0]))]
            dots.sort(key=lambda r: r["nfe"])
            found[i] = _line(run.name, dots, colour=i, star=True)
    return list(found.values()) if len(wanted) == 2 else _joined(found, runs)


def _joined(lines: Mapping[int, Line], runs: Sequence[Run]) -> list[Line]:
    groups: dict[tuple, list[Line]] = {}
    for i, line in lines.items():
        info = runs[i].info
        groups.setdefault((info.get("method", i), info.get("teacher")), []).append(line)
    joined: list[Line] = []
    for (method, _), group in groups.items():
        group.sort(key=lambda line: line.points[0][0])
        dots = [dot for line in group for dot in zip(line.points, line.texts, strict=True)]
        points, texts = zip(*sorted(dots), strict=True)
        if len(group) == 1 or len({passes for passes, _ in points}) < len(points):
            joined += group  # nothing to join, or several runs at one cost
        else:
            colour = group[0].colour
            joined.append(Line(str(method), list(points), colour, list(texts), star=True))
    return joined


# ---- the teacher over guidance scales -------------------------------------------------------


def guidance_figure(protocol: str, known: World, runs: Sequence[Run]) -> str:
    """The teacher's curve over guidance scales with the students on it, and its numbers."""
    if not known.curve:
        return f'<p class="dim">No curve is drawn: {esc(known.missing)}</p>'
    records = [r for run in runs for r in run.records if r["protocol"] == protocol]
    first = {r["metric"]: r for r in reversed(records)}
    panels: list[Panel] = []
    judged: list[Record] = []
    for pair in PAIRS:
        wanted = [first[m] for m in pair if m in first]
        rows = {
            row.records[0]["guidance"]: [r for w in wanted for r in row.records if comparable(r, w)]
            for row in known.curve
        }
        dots = {g: found for g, found in rows.items() if len(found) == 2}
        if len(wanted) < 2 or len(dots) < 2:
            continue
        points = [(x["value"], y["value"]) for x, y in dots.values()]
        teacher = f"{known.curve[0].teacher} (teacher), guidance {min(dots):g} to {max(dots):g}"
        lines = [Line(teacher, points, texts=[f"{g:g}" for g in dots]), *_stars(runs, wanted)]
        panels.append(Panel("", lines, *map(heading, pair), linear=pair[1] not in LOWER))
        judged += wanted
    if not panels:
        return (
            '<p class="dim">No curve is drawn: the numbers of the stored one cannot be compared '
            "with those above.</p>"
        )
    caption = (
        f"{_what(judged)} The teacher has {counted(known.curve[0].records[0]['steps'])}; numbers "
        "beside its points are guidance scales. Stars are students, which use none."
    )
    drawn = _figure(panels[:3], caption, "teacher over guidance scales")
    return drawn + report_tables.guidance(known.curve)


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
        f'<figure class="plot">{picture(label, figures.sheet(panels))}'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


# ---- training -----------------------------------------------------------------------------


def training_figures(run: Run, worlds: Mapping[str, World]) -> str:
    """Metrics, losses and gradient norms against images seen."""
    charts = []
    axis = "images seen" if run.batch_size else "steps"
    for r in run.records:
        points = metric_points(run, r)
        if len(points) > 1 and r["metric"] in CURVES:
            full, title = full_teacher(run, r, worlds), heading(r["metric"])
            levels = [(f"teacher, {counted(full['steps'])}", full["value"])] if full else []
            lines, linear = [Line(run.name, points, 0)], r["metric"] not in LOWER
            panel = Panel(title, lines, axis, levels=levels, linear=linear)
            charts.append(_chart(f"{title}, n {r['n']:,}", panel))
    for title, series in _logged(run).items():
        lines = [
            Line(label, figures.thin(points), i, dots=False)
            for i, (label, points) in enumerate(series.items())
        ]
        charts.append(_chart(title, Panel("", lines, axis)))
    shown = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    if run.damaged:
        shown += f'<p class="dim small">damaged lines of metrics.jsonl, left out: {run.damaged}</p>'
    return shown


def metric_points(run: Run, record: Record) -> Points:
    """The numbers comparable to `record` of all evaluations of a run, by images seen or steps."""
    return [
        (step * (run.batch_size or 1), r["value"])
        for step in sorted(run.evals)
        for r in run.evals[step]["records"]
        if comparable(r, record)
    ]


def _logged(run: Run) -> dict[str, dict[str, Points]]:
    """Title -> label -> finite points: a chart per loss, and one of all gradient norms."""
    losses: dict[str, dict[str, Points]] = {}
    norms: dict[str, Points] = {}
    batch = run.batch_size or 1
    for row in run.log:
        for column, value in row.items():
            group, _, item = column.partition("/")
            if item in ("", *NOT_LOSSES) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                continue
            chart = norms if item == "grad_norm" else losses.setdefault(column, {})
            label = group if item == "grad_norm" else column
            chart.setdefault(label, []).append((row["step"] * batch, value))
    return losses | ({"gradient norm": norms} if norms else {})


def _chart(title: str, panel: Panel) -> str:
    return (
        f'<figure class="chart"><figcaption>{esc(title)}</figcaption>'
        f"{picture(title, figures.small(panel))}</figure>"
    )
