"""Tables and figures of the documents, from the committed results: `python -m bench.plots`.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in README.md or bench/README.md
and comes from bench/results/NAME.json (see bench/tables.py). docs/kernels.png shows the variants of
bench/results/kernels-*.json, docs/scaling.png the runs of scaling-*.json. With --check nothing is
written, and the exit status is 1 where a table differs from its result; figures are not compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from bench.measure import ROOT
from bench.paper.markdown import PAPER_TABLES
from bench.tables import TABLES, Result, fill, headline

RESULTS = ROOT / "bench" / "results"
ALL_TABLES = TABLES | PAPER_TABLES
DOCUMENTS = ("README.md", "bench/README.md")
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"floor": "#999999", "ours": "#0072B2", "plain": "#E69F00", "peer": "#009E73"}
LEGEND = {"floor": "bare GEMMs", "ours": "paint_kernels", "plain": "PyTorch", "peer": "peers"}
MARKS = ("o", "s", "^", "D")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 160,
}


def result_of(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results_named(prefix: str) -> dict[str, Result]:
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{prefix}-*.json"))
    }


def bar_rows(groups: list[Result]) -> list[tuple[str, Result | None]]:
    """From top to bottom: a heading for each group, then its variants that could run here."""
    rows: list[tuple[str, Result | None]] = []
    for group in groups:
        rows.append((group["group"], None))
        rows += [(row["variant"], row) for row in group["rows"] if row["status"] != "cannot run"]
    return rows


def draw_bars(
    axes: Axes, rows: list[tuple[str, Result | None]], key: str, scale: float, digits: int
) -> None:
    """One horizontal bar a variant; a word in place of the bar that was not measured."""
    for position, (_, row) in enumerate(rows):
        if row is None:
            continue
        value = row.get(key)
        # A time that is missing has a reason; memory is not measured for the floor.
        missing = row.get("reason", "") if key == "ratio_to_floor" else ""
        label = missing if value is None else f"{value * scale:,.{digits}f}"
        axes.barh(position, (value or 0) * scale, color=COLOURS[row["kind"]], height=0.7)
        axes.annotate(
            f" {label}",
            ((value or 0) * scale, position),
            va="center",
            fontsize=7.5,
            color="#333333",
        )


def label_rows(axes: Axes, rows: list[tuple[str, Result | None]]) -> None:
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for label, (_, row) in zip(axes.get_yticklabels(), rows, strict=True):
        if row is None:
            label.set_fontweight("bold")


def draw_kernels(results: dict[str, Result]) -> Figure:
    """One line of panels a result: time as a multiple of the floor, and extra memory."""
    groups = [headline(result) for result in results.values()]
    rows = [bar_rows(one) for one in groups]
    figure = Figure(
        figsize=(10, 1.1 * len(rows) + 0.21 * sum(map(len, rows))), layout="constrained"
    )
    panels = figure.subplots(
        len(rows), 2, squeeze=False, height_ratios=[len(one) + 3 for one in rows]
    )
    for (left, right), result, one, lines in zip(
        panels, results.values(), groups, rows, strict=True
    ):
        shape = one[0]["shape"]
        draw_bars(left, lines, "ratio_to_floor", 1.0, 2)
        draw_bars(right, lines, "extra_bytes", 1e-6, 0)
        label_rows(left, lines)
        label_rows(right, [("", row) for _, row in lines])
        left.axvline(1, color=COLOURS["floor"], linewidth=0.8, linestyle="--")
        left.set_xlabel("time, in multiples of the bare GEMMs")
        right.set_xlabel("extra memory, MB")
        for axes in (left, right):
            axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
        left.set_title(
            f"{result['device']}: N {shape['num_tokens']:,}, H {shape['hidden']:,}, "
            f"V {shape['vocab_size']:,}, {one[0]['dtype']}",
            loc="left",
            fontsize=9,
        )
    handles = [Patch(color=COLOURS[kind], label=LEGEND[kind]) for kind in COLOURS]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_scaling(results: dict[str, Result]) -> Figure:
    """Time and working memory over N, both axes logarithmic, one line of panels a result."""
    figure = Figure(figsize=(9, 3.4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    colours = list(COLOURS.values())[1:]
    for (left, right), result in zip(panels, results.values(), strict=True):
        for index, layout in enumerate(result["layouts"]):
            num_tokens = [point["num_tokens"] for point in layout["points"]]
            style: dict[str, Any] = {"color": colours[index], "marker": MARKS[index]}
            times = [point["median_ms"] for point in layout["points"]]
            exponent = f"{layout['layout']}: N^{layout['time_exponent']:.2f}"
            left.plot(num_tokens, times, label=exponent, **style)
            working = [point["working_bytes"] / 1e6 for point in layout["points"]]
            right.plot(num_tokens, working, label=f"{layout['layout']}: working memory", **style)
        points = result["layouts"][0]["points"]
        num_tokens = [point["num_tokens"] for point in points]
        kept = [point["kept_bytes"] / 1e6 for point in points]
        label = "gradient rows and values, apart"
        right.plot(num_tokens, kept, color=COLOURS["floor"], linestyle="--", label=label)
        left.set_ylabel("forward and backward, ms")
        right.set_ylabel("extra memory, MB")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(num_tokens, [f"{n:,}" for n in num_tokens], rotation=30)
            axes.set_xlabel("N, tokens")
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.legend(frameon=False, fontsize=8)
        right.set_ylim(bottom=0.5 * min(kept))
        left.set_title(
            f"{result['device']}: H {result['hidden']:,}, V {result['vocab_size']:,}, "
            f"{result['dtype']}",
            loc="left",
            fontsize=9,
        )
    return figure


def draw(directory: Path) -> None:
    """Writes kernels.png and scaling.png, each where its results exist."""
    for name, drawn in (("kernels", draw_kernels), ("scaling", draw_scaling)):
        results = results_named(name)
        if results:
            with rc_context(STYLE):
                # Without matplotlib's version in the file, equal results give equal files.
                drawn(results).savefig(directory / f"{name}.png", metadata={"Software": None})


def documents() -> list[Path]:
    return [path for path in (ROOT / name for name in DOCUMENTS) if path.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    filled = {path: fill(path.read_text(), result_of, ALL_TABLES) for path in documents()}
    changed = [path for path, text in filled.items() if text != path.read_text()]
    if arguments.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
        sys.exit(f"{names}: tables differ from bench/results, run it again" if changed else 0)
    for path in changed:
        path.write_text(filled[path])
    draw(ROOT / "docs")


if __name__ == "__main__":
    main()
