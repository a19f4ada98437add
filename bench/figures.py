"""Colours and style of all figures, and the figure of `bench.scaling`."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.tables import Result

# Okabe and Ito's palette, safe for colour-blind readers.
COLOURS = {"floor": "#999999", "ours": "#0072B2", "plain": "#E69F00", "peer": "#009E73"}
MARKS = ("o", "s", "^", "D")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 160,
}


def draw_scaling(results: dict[str, Result]) -> Figure:
    """Draws time and working memory over N on logarithmic axes, one row of panels per result."""
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
