"""How a report names metrics, writes numbers, and puts them into HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from diffdistill.eval import metrics, standings

LOWER = {name for m in metrics.METRICS.values() if not m.up for name in m.values}
NAMES = {
    "fd": "FD", "kd": "KD", "clip": "CLIP score", "geneval": "GenEval", "precision": "Precision",
    "recall": "Recall", "density": "Density", "coverage": "Coverage", "accuracy": "Class accuracy",
    "diversity": "Diversity within a prompt", "vendi_prompt": "Vendi per prompt",
}  # fmt: skip
HEADLINES = ("fd", "geneval", "accuracy")

# ---- words --------------------------------------------------------------------------------


def name(metric: str) -> str:
    return NAMES.get(metric, metric)


def heading(metric: str) -> str:
    """Its name, and which way is better."""
    return name(metric) + (" ↓" if metric in LOWER else " ↑" if metric in NAMES else "")


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else standings.number(value)


def counted(steps: int) -> str:
    return f"{steps} step" + ("" if steps == 1 else "s")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- HTML ---------------------------------------------------------------------------------


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def section(title: str, content: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{content}</section>" if content else ""


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], css: str = "") -> str:
    """A table that scrolls sideways.

    Args:
        head: one HTML text per column.
        rows: class of each line, or "", and its cells as HTML, of which the first names the line.
        css: further class of the frame.
    """
    lines = []
    for kind, (first, *others) in rows:
        start = f'<tr class="{kind}">' if kind else "<tr>"
        lines.append(f"{start}<th>{first}</th>{''.join(f'<td>{c}</td>' for c in others)}</tr>")
    return (
        f'<div class="{" ".join(("scroll", *css.split()))}"><table><thead><tr>'
        f"{''.join(f'<th>{c}</th>' for c in head)}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def picture(label: str, source: str) -> str:
    """An `<img>` from a data URI."""
    return f'<img alt="{esc(label)}" src="{source}">'
