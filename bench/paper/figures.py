"""Draws the tables' differences with their intervals, beside those of the paper; and what happens
inside the runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bench.figures import COLOURS, STYLE
from bench.paper.cells import (
    LABELS,
    backbone_index,
    base_names,
    blend_label,
    panels_of,
    ratio_label,
    reference_of,
    setting_label,
)
from bench.paper.mechanism_tables import KIND_LABELS, per_token, times_chance
from bench.paper.mechanisms import KINDS
from bench.paper.plan import BASE, CONTROL, RATIO_ROWS
from bench.paper.published import paper_difference
from bench.tables import Result

SHADES = colormaps["viridis_r"]
TITLES = {
    1: "Table 1, recipes: points above no update,\n{base}",
    2: "Table 2, share of the solution hidden at\noverlap 1 / 0: points above 0.40 / 0.30",
    3: "Table 3, what is hidden:\npoints above a suffix",
    4: "Table 4, strength k and budget f of the\ninterpolation: points above k 0.03, f 0.03",
    5: "Table 5, other teachers, contexts and signals:\npoints above no update",
    6: "Table 6 (exploratory), the clip, at PAINT's learning\nrate: points above no update",
}
LINES = ((1,), (2, 3, 4), (5,), (6,))
"""the tables of each line of panels"""
WAY_ROWS = (
    *("rho-0.00-0.00", "rho-0.25-0.25", "rho-0.40-0.30", "rho-0.75-0.75"),
    *(BASE, "opsd", "sft", "paint", CONTROL),
    *("clip-own-none", "clip-other-0.06", "clip-other-none"),
)
"""rows whose share of solutions that go "together" is drawn"""
WAY_COLOURS = colormaps["tab20"]


def row_name(table: int, setting: str) -> str:
    if table == 2:
        correct, wrong = ratio_label(setting)
        return f"{correct} / {wrong}"
    if table == 4:
        weight, fraction = blend_label(setting)
        return f"k {weight}, f {fraction}"
    return LABELS.get(setting, "suffix")


def shown_differences(panel: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Returns lines from top to bottom: (name, setting, difference).

    The differences to the first reference come first, then those to a further one.
    """
    table, first = panel["table"], reference_of(panel)
    found = [
        (row["setting"], difference) for row in panel["rows"] for difference in row["differences"]
    ]
    found.sort(key=lambda one: one[1]["reference"] != first)
    return [
        (
            row_name(table, setting)
            + (f" over {LABELS[d['reference']]}" if d["reference"] != first else ""),
            setting,
            d,
        )
        for setting, d in found
    ]


def draw_panel(axes: Axes, result: Result, panel: dict[str, Any]) -> None:
    """Draws one line per difference: ours with its interval, the paper's as a hollow mark below
    it."""
    table = panel["table"]
    backbone = backbone_index(result, panel["size"]) if table == 1 else 0
    lines = shown_differences(panel)
    for place, (_, setting, found) in enumerate(lines):
        value, low, high = (100 * found[key] for key in ("difference", "low", "high"))
        noise = found["verdict"] == "within noise"
        colour = COLOURS["floor"] if noise else COLOURS["ours"]
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(value, place, "o", color=colour)
        paper = paper_difference(table, backbone, setting, found["reference"])
        if paper is not None:
            axes.plot(paper, place + 0.28, "D", color=COLOURS["plain"], fillstyle="none", ms=5)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    title = TITLES[table].format(base=base_names(result)[panel["size"]])
    axes.set_title(title, loc="left", fontsize=9)


def draw_tables(result: Result) -> Figure:
    """Draws Table 1's bases in the first line of panels, the ablations in the second, then a line
    each for Tables 5 and 6."""
    lines = [[panel for number in line for panel in panels_of(result, number)] for line in LINES]
    lines = [line for line in lines if line]
    figure = Figure(figsize=(12, 2.9 * len(lines) + 0.4), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for part, line in zip(parts, lines, strict=True):
        # The bases share an axis, so that their gains can be compared.
        share = line[0]["table"] == 1
        drawn = part.subplots(1, len(line), squeeze=False, sharex=share)[0]
        for axes, panel in zip(drawn, line, strict=True):
            draw_panel(axes, result, panel)
    handles = [
        Line2D([], [], color=COLOURS["ours"], marker="o", label="ours, 95% interval"),
        Line2D([], [], color=COLOURS["floor"], marker="o", label="ours, within noise"),
        Line2D(
            *([], []),
            color=COLOURS["plain"],
            marker="D",
            linestyle="",
            fillstyle="none",
            label="the paper's, on Qwen3",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_mechanisms(result: Result) -> Figure:
    """Draws, of the rows that were run: the teacher's entropy by mask ratio, the share of solutions
    that go "together", and of each kind of PAINT's tokens how often it is selected, against chance,
    and its divergence without and with the clip."""
    rows = {row["setting"]: row for row in result["mechanisms"]}
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    (entropy, way), (selected, divergence) = figure.subplots(2, 2)
    draw_entropies(entropy, {name: rows[name] for name in RATIO_ROWS if name in rows})
    draw_ways(way, {name: rows[name] for name in WAY_ROWS if name in rows})
    if "paint" in rows:
        draw_selection(selected, rows["paint"]["kinds"])
        draw_divergence(divergence, rows["paint"]["kinds"])
    for axes in (entropy, way):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.5)
        if axes.lines:
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    titles = {
        entropy: "Teacher's entropy, nats",
        way: 'Share that goes "together": rollouts (lines), test answers (squares)',
        selected: "PAINT: selected, times chance",
        divergence: "PAINT: divergence per token, nats",
    }
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize=9)
    return figure


def draw_entropies(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Draws a line per mask ratio, darker the more is hidden."""
    for setting, row in rows.items():
        values = row["steps"]["teacher_entropy"]
        shade = SHADES(0.2 + sum(map(float, ratio_label(setting))) / 2)
        axes.plot(range(1, len(values) + 1), values, color=shade, label=setting_label(setting))


def draw_ways(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Draws a line per row, of its rollouts for each block of steps, and a square for its answers
    to the test problems. SFT, which has no rollouts, and the base have the square alone."""
    for place, (setting, row) in enumerate(rows.items()):
        colour, label = WAY_COLOURS(place), setting_label(setting)
        has_rollouts = setting not in ("sft", BASE)
        if has_rollouts:
            axes.plot(*together_by_step(row["blocks"]), color=colour, label=label)
        squares = axes.plot(*together_by_step(row["answers"]), "s", color=colour)
        if not has_rollouts:
            squares[0].set_label(label)
    axes.set_ylim(-0.02, 1.02)


def together_by_step(points: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    shares = [entry["together"] / entry["solutions"] for entry in points]
    return [entry["step"] for entry in points], shares


def draw_selection(axes: Axes, kinds: dict[str, dict[str, float]]) -> None:
    values = [times_chance(kinds, kind) for kind in KINDS]
    axes.barh(range(len(KINDS)), values, color=COLOURS["ours"])
    name_kinds(axes)
    axes.axvline(1, color="#333333", linewidth=0.8)


def draw_divergence(axes: Axes, kinds: dict[str, dict[str, float]]) -> None:
    """Draws two bars per kind: without the clip, and below it with the clip."""
    for name, shift, label, colour in (
        ("token_kl", -0.2, "without the clip", COLOURS["plain"]),
        ("token_loss", 0.2, "with the clip", COLOURS["ours"]),
    ):
        places = [place + shift for place in range(len(KINDS))]
        values = [per_token(kinds[kind], name) for kind in KINDS]
        axes.barh(places, values, height=0.38, color=colour, label=label)
    name_kinds(axes)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.legend(frameon=False, fontsize=7)


def name_kinds(axes: Axes) -> None:
    axes.set_yticks(range(len(KINDS)), [KIND_LABELS[kind] for kind in KINDS])
    axes.invert_yaxis()


def save(draw: Callable[[Result], Figure], result: Result, path: Path) -> None:
    with rc_context(STYLE):
        # Omits matplotlib's version, so that equal results give equal files.
        draw(result).savefig(path, metadata={"Software": None})
