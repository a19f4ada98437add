"""The report's training curves: one small SVG per quantity, drawn by matplotlib.

The page adds captions, legends and units; a drawing contains only axes and lines. Its colours are
CSS variables of the page, so one drawing serves the light and the dark scheme.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from paint_engine.recipes.display import Display, Quantity

MAX_POINTS = 400
WIDTH_IN, HEIGHT_IN = 3.7, 1.85

# matplotlib has no CSS variables. It draws in these colours, which nothing else uses, and the SVG
# text is rewritten afterwards.
_CSS_COLORS = {
    "#010203": "var(--series-1)",
    "#010204": "var(--series-2)",
    "#010205": "var(--series-3)",
    "#010206": "var(--axis)",
    "#010207": "var(--grid)",
}
_SERIES_1, _SERIES_2, _SERIES_3, _AXIS, _GRID = _CSS_COLORS
_SERIES_COLORS = (_SERIES_1, _SERIES_2, _SERIES_3)
# Lines also differ by dash, for print and for readers who cannot distinguish the colours.
_SERIES_DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))


@dataclass(frozen=True)
class Legend:
    """One line of a drawing with its first and last values, formatted for display."""

    label: str
    first: str
    last: str


@dataclass(frozen=True)
class Curve:
    """A drawn quantity. `svg` is markup; the other fields are plain text."""

    title: str
    unit: str
    note: str
    legend: tuple[Legend, ...]
    svg: str


def draw_curves(
    metrics: Sequence[Mapping[str, Any]], display: Display
) -> tuple[list[Curve], list[str]]:
    """Draws the curves of a run. Also returns the titles of the curves whose metrics are missing.

    Args:
        metrics: the objects of `metrics.jsonl`, in the order of their steps.
        display: the recipe's display.
    """
    curves, missing = [], []
    for quantity in display.curves:
        lines = _lines(quantity, metrics)
        if lines:
            curve = _draw(quantity, lines)
            if quantity.title == "Loss" and all(map(display.loss_is_flat, metrics)):
                notes = filter(None, (curve.note, display.flat_loss_note))
                curve = replace(curve, note="; ".join(notes))
            curves.append(curve)
        elif not quantity.optional:
            missing.append(quantity.title)
    return curves, missing


@dataclass(frozen=True)
class _Line:
    label: str
    steps: np.ndarray
    values: np.ndarray
    mean_of: int  # number of steps per point


def _lines(quantity: Quantity, metrics: Sequence[Mapping[str, Any]]) -> list[_Line]:
    lines = []
    for key, label in quantity.series:
        points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
        if points:
            steps, values = np.asarray(points, dtype=float).T
            mean_of = -(-len(steps) // MAX_POINTS)
            lines.append(_Line(label, _means(steps, mean_of), _means(values, mean_of), mean_of))
    return lines


def _means(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the means of consecutive groups of `width`; the last group may be smaller."""
    starts = np.arange(0, len(values), width)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean over `width` (odd) neighbours. Near an end, it uses the neighbours that
    exist."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - width // 2, 0)
    high = np.minimum(index + width // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _draw(quantity: Quantity, lines: list[_Line]) -> Curve:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    width = _smoothing_width(len(lines[0].steps)) if quantity.smooth else 1
    legend = []
    for line, color, dashes in zip(lines, _SERIES_COLORS, _SERIES_DASHES, strict=False):
        drawn = running_mean(line.values, width)
        if width > 1:
            axes.plot(line.steps, line.values, color=color, linewidth=0.7, alpha=0.38)
        marker = "o" if len(drawn) <= 10 else ""
        axes.plot(
            line.steps,
            drawn,
            color=color,
            linewidth=1.5,
            linestyle=dashes,
            marker=marker,
            markersize=2.6,
        )
        legend.append(Legend(line.label, _value(quantity, drawn[0]), _value(quantity, drawn[-1])))
    _style(axes, quantity, lines)
    notes = []
    if width > 1:
        notes.append(f"bold: running mean over {width * lines[0].mean_of} steps")
    elif lines[0].mean_of > 1:
        notes.append(f"each point is the mean of {lines[0].mean_of} steps")
    return Curve(
        quantity.title, quantity.unit, "; ".join(notes), tuple(legend), _svg(figure, quantity.title)
    )


def _smoothing_width(num_points: int) -> int:
    """Returns an odd width of about an eighth of the curve, or 1 (no smoothing) for a short
    curve."""
    return 1 if num_points < 10 else num_points // 8 | 1


def _value(quantity: Quantity, value: float) -> str:
    if quantity.percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _style(axes: Axes, quantity: Quantity, lines: list[_Line]) -> None:
    lowest = min(line.values.min() for line in lines)
    highest = max(line.values.max() for line in lines)
    last_step = max(line.steps[-1] for line in lines)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=_AXIS, linewidth=0.6)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=_AXIS, labelsize=8, length=0, pad=4)
    axes.tick_params(axis="x", length=2.5, width=0.6)
    # A quantity that is never negative is drawn from zero, so a small ripple looks small.
    ticks = MaxNLocator(4, min_n_ticks=3).tick_values(min(lowest, 0.0), highest or 1.0)
    axes.set_yticks(ticks)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_xlim(0, 1.02 * max(1.0, last_step))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if quantity.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))


def _percent_tick(value: float, _position: object) -> str:
    return f"{100 * value:.3g}%"


def _svg(figure: Figure, title: str) -> str:
    """Returns the figure as SVG for embedding: no metadata, styles or fonts, and no clashing
    ids."""
    buffer = io.StringIO()
    # Its own salt gives each drawing its own ids, which are the same at every rebuild.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->|<style.*?</style>| font-family: [^;]*;", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    for color, variable in _CSS_COLORS.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\n\s*", "\n", svg)
