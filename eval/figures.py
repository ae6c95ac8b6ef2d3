"""Figures of the report, drawn by matplotlib: panels with lines, stars and levels."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

Points = list[tuple[float, float]]

INK, DIM, RULE = "#1d2127", "#6a727d", "#e4e5e3"
COLOURS = ("#b8452d", "#33658a", "#2c7a4b", "#8a6d1f", "#75507b")
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "text.parse_math": False, "text.color": INK,
    "axes.labelcolor": DIM, "axes.labelsize": 8.5, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "axes.titlepad": 9, "axes.edgecolor": DIM,
    "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7,
    "xtick.color": DIM, "ytick.color": DIM, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round", "svg.fonttype": "none", "svg.hashsalt": "diffdistill",
}  # fmt: skip


@dataclass
class Line:
    """Points (x, y) that are joined. A teacher is drawn in ink, a student in a colour."""

    label: str
    points: Points
    colour: int | None = None  # of COLOURS, in turn; None: a teacher
    texts: Sequence[str] = ()  # beside the points
    star: bool = False  # a student among teachers
    dots: bool = True


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    lines: list[Line]
    x: str
    y: str = ""
    levels: Sequence[tuple[str, float]] = ()  # (label, y) of horizontal lines
    costs: bool = False  # x counts network passes: logarithmic, ticks where the points are
    linear: bool = False  # y is never logarithmic (shares and rates)


def sheet(panels: Sequence[Panel]) -> str:
    """Panels in a row, with one legend above, as the data URI of an SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.3), layout="constrained")
        columns = max(len(panels), 2)  # a single panel is not stretched
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=False):
            draw(ax, panel)
        for ax in axes[len(panels) :]:
            ax.remove()
        known: dict[str, Any] = {}
        for ax in axes[: len(panels)]:
            known |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(known.values(), known.keys(), loc="outside upper left", ncols=5)
        return _svg(figure)


def small(panel: Panel) -> str:
    """One small panel without a frame around it, as the data URI of an SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.1), layout="constrained")
        ax = figure.subplots()
        draw(ax, panel)
        ax.set_title("")  # it stands in the caption
        if len(panel.lines) > 1:
            ax.legend(loc="best")
        return _svg(figure)


def poster(title: str, grids: Sequence[tuple[str, Path]], panel: Panel | None, file: Path) -> None:
    """Grids of samples, and one panel beside them, as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 5.4), layout="constrained")
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        both = bool(grids and panel)
        left, right = (
            figure.subfigures(1, 2, width_ratios=(1.25, 1), wspace=0.04) if both else [figure] * 2
        )
        axes = left.subplots(len(grids), 1, squeeze=False)[:, 0] if grids else []
        for ax, (label, path) in zip(axes, grids, strict=True):
            ax.imshow(Image.open(path))
            ax.set_title(label)
            ax.axis("off")
        if panel is not None:
            ax = right.subplots()
            draw(ax, panel)
            ax.legend(loc="best")
        figure.savefig(file, dpi=110)


def draw(ax: Any, panel: Panel) -> None:
    """One panel. Points that are not finite are left out."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    ax.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    values = [level for _, level in panel.levels if math.isfinite(level)]
    for line in panel.lines:
        colour = INK if line.colour is None else COLOURS[line.colour % len(COLOURS)]
        kept = [point for point in line.points if all(map(math.isfinite, point))]
        xs, ys = ([point[i] for point in kept] for i in (0, 1))
        values += ys
        smooth = [] if line.dots else running_mean(list(zip(xs, ys, strict=True)))
        mark = {"marker": "*", "markersize": 13} if line.star else {"marker": "o", "markersize": 4}
        how = {"color": colour, "zorder": 4 if line.star else 3}
        if smooth:
            ax.plot(xs, ys, alpha=0.35, linewidth=0.9, **how)
            xs, ys = zip(*smooth, strict=True)
        ax.plot(xs, ys, label=line.label, **how, **(mark if line.dots or len(kept) == 1 else {}))
    for label, level in panel.levels:
        if math.isfinite(level):
            ax.axhline(level, color=DIM, linestyle=(0, (4, 3)), linewidth=0.9, zorder=2)
            place = ax.get_yaxis_transform()
            ax.annotate(
                label, (1, level), (0, 3), xycoords=place, textcoords="offset points", ha="right",
                fontsize=7.5, color=DIM,
            )  # fmt: skip
    if not panel.linear and is_log(values):
        log_axis(ax, values)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(FuncFormatter(_tick))
    if panel.costs:
        ax.set_xscale("log")
        ticks = sorted({x for line in panel.lines for x, _ in line.points})
        ax.set_xticks(ticks, map(short, ticks))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(_tick))
    ax.margins(0.12 if any(line.texts for line in panel.lines) else 0.05)
    ax.autoscale_view()
    for line in panel.lines:
        _texts(ax, line)


def _texts(ax: Any, line: Line) -> None:
    """Each text stands off its point at a right angle to the line there, on the right side."""
    pixels = [tuple(p) for p in ax.transData.transform(line.points)] if line.texts else []
    for i, (text, point) in enumerate(zip(line.texts, line.points, strict=False)):
        (x0, y0), (x1, y1) = pixels[max(i - 1, 0)], pixels[min(i + 1, len(pixels) - 1)]
        across = math.atan2(x0 - x1, y1 - y0) if len(pixels) > 1 else math.pi / 4
        across += math.pi if math.cos(across) < 0 else 0
        away = 13 if line.star else 9
        offset = (away * math.cos(across), away * math.sin(across))
        if all(map(math.isfinite, point)):
            ax.annotate(
                text, point, offset, textcoords="offset points", ha="center", va="center",
                fontsize=7.5, color=DIM,
            )  # fmt: skip


def is_log(values: Sequence[float]) -> bool:
    """Positive, and over more than a decade."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 15


def log_axis(ax: Any, values: Sequence[float]) -> None:
    """Logarithmic heights with plain numbers at 1, 2 and 5, or at the powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    wide = bool(values) and max(values) / min(values) > 300
    ax.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(_tick))


def running_mean(points: Points) -> Points:
    """Means over a window of a twelfth of the points; none where there are few."""
    if len(points) < 24:
        return []
    half = max(1, len(points) // 24)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    means = [sum(y for _, y in window) / len(window) for window in windows]
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]


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


def _tick(value: float, _: int) -> str:
    return short(value)


def _svg(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return data_uri(stream.getvalue(), "svg+xml")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
