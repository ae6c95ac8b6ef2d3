"""Pictures of a report: grids from the same noise, images by prompt, and report.png."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from diffdistill.eval import figures
from diffdistill.eval.report_curves import steps_panels
from diffdistill.eval.report_runs import Run
from diffdistill.eval.report_teachers import World
from diffdistill.eval.report_words import esc, picture

COLUMNS = 10  # of eval/step_N.png: pictures of the verdicts, in their order, 2 pixels apart
GAP = 2


def grids(run: Run) -> str:
    """The teacher's grid, and the student's at up to four moments, first and last included."""
    steps = list(run.samples)
    if len(steps) > 4:
        steps = [steps[round(i * (len(steps) - 1) / 3)] for i in range(4)]
    found = [("teacher", run.teacher_grid)] if run.teacher_grid else []
    for step in (*steps[-1:], *steps[:-1]):
        label = "student before training" if step == 0 else f"student, step {step:,}"
        found.append((label, run.samples[step]))
    shown = [
        f"<figure>{picture(label, _png(path.read_bytes()))}"
        f"<figcaption>{esc(label)}</figcaption></figure>"
        for label, path in found
    ]
    blocks = (("grids two", shown[:2]), ("grids", shown[2:]))  # the result, then how it came about
    return "".join(f'<div class="{css}">{"".join(part)}</div>' for css, part in blocks if part)


def prompts(run: Run) -> str:
    """What was drawn for each prompt, and what the detector says of it, by task."""
    verdicts = run.newest.get("verdicts", [])
    file = run.path / "eval" / f"step_{max(run.evals, default=0):06d}.png"
    if not verdicts or not file.is_file():
        return ""
    groups: dict[str, list[str]] = {}
    right: dict[str, int] = {}
    for v, image in zip(verdicts, _tiles(Image.open(file), len(verdicts)), strict=True):
        mark, css = ("✓", "right") if v["correct"] else ("✗", "wrong")
        reason = f"<small>{esc(v['reason'])}</small>" if v.get("reason") else ""
        groups.setdefault(v["tag"], []).append(
            f'<figure class="{css}">{picture(v["prompt"], image)}'
            f"<figcaption><b>{mark}</b> {esc(v['prompt'])}{reason}</figcaption></figure>"
        )
        right[v["tag"]] = right.get(v["tag"], 0) + bool(v["correct"])
    return "".join(
        f"<h3>{esc(tag.replace('_', ' ').capitalize())} "
        f"<span>{right[tag]} of {len(shown)} right</span></h3>"
        f'<div class="prompts">{"".join(shown)}</div>'
        for tag, shown in groups.items()
    )


def _tiles(grid: Image.Image, count: int) -> Iterator[str]:
    """The first pictures of a grid with COLUMNS columns as data URIs."""
    size = (grid.width + GAP) // COLUMNS - GAP
    for i in range(count):
        x, y = i % COLUMNS * (size + GAP), i // COLUMNS * (size + GAP)
        buffer = io.BytesIO()
        grid.crop((x, y, x + size, y + size)).save(buffer, "png", optimize=True)
        yield _png(buffer.getvalue())


def _png(data: bytes) -> str:
    return figures.data_uri(data, "png")


def poster(
    runs: Sequence[Run], worlds: Mapping[str, World], verdicts: Iterable[str], file: Path
) -> None:
    """report.png: teacher and student from the same noise, and the first headline number."""
    run = runs[0]
    found = [("teacher", run.teacher_grid)] if run.teacher_grid else []
    if run.samples:
        found.append(("student, same noise", run.samples[max(run.samples)]))
    panels = [p for protocol, known in worlds.items() for p in steps_panels(protocol, known, runs)]
    panel = None
    if panels:
        record, panel = panels[0]
        panel.title += f", n {record['n']:,}, protocol {record['protocol']}"
    figures.poster("\n".join(textwrap.fill(v, 118) for v in verdicts), found, panel, file)
