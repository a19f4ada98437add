"""The figure of the kernels' comparison."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.figures import COLOURS
from bench.kernels.tables import headline
from bench.tables import Result

LEGEND = {"floor": "bare GEMMs", "ours": "paint_kernels", "plain": "PyTorch", "peer": "peers"}


def bar_rows(groups: list[Result]) -> list[tuple[str, Result | None]]:
    """Returns rows from top to bottom: each group's heading, then its variants that could run."""
    rows: list[tuple[str, Result | None]] = []
    for group in groups:
        rows.append((group["group"], None))
        rows += [(row["variant"], row) for row in group["rows"] if row["status"] != "cannot run"]
    return rows


def draw_bars(
    axes: Axes, rows: list[tuple[str, Result | None]], key: str, scale: float, digits: int
) -> None:
    """Draws one horizontal bar per variant, and the reason in place of a bar that was not
    measured."""
    for position, (_, row) in enumerate(rows):
        if row is None:
            continue
        value = row.get(key)
        # A missing time has a reason; memory is not measured for the floor.
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
    """Draws one row of panels per result: time as a multiple of the floor, and extra memory."""
    groups = [headline(result) for result in results.values()]
    rows = [bar_rows(one) for one in groups]
    figure = Figure(
        figsize=(10, 1.1 * len(rows) + 0.21 * sum(map(len, rows))), layout="constrained"
    )
    panels = figure.subplots(
        len(rows), 2, squeeze=False, height_ratios=[len(one) + 3 for one in rows]
    )
    for (left, right), (name, result), one, lines in zip(
        panels, results.items(), groups, rows, strict=True
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
            f"{name}, {result['device']}: N {shape['num_tokens']:,}, H {shape['hidden']:,}, "
            f"V {shape['vocab_size']:,}, {one[0]['dtype']}",
            loc="left",
            fontsize=9,
        )
    handles = [Patch(color=COLOURS[kind], label=LEGEND[kind]) for kind in COLOURS]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure
