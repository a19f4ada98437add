"""The paper's tables in small as Markdown: pure functions of `paper-tables*.json`."""

from collections.abc import Callable
from typing import Any

from bench.paper_numbers import ABLATIONS, TABLE_1, paper_difference
from bench.tables import Result, made_by, markdown

LABELS = {
    "base": "no update",
    "sft": "SFT",
    "grpo": "GRPO",
    "opsd": "OPSD",
    "paint": "PAINT",
    "place-prefix": "prefix",
    "place-middle": "middle",
    "place-random": "random span",
    "place-sentence_suffix": "suffix, at a sentence's end",
}
NOT_IN_PAPER = "none"
LIMITS = (
    "What this can say: whether each recipe, from its preset at equal base, steps and rollouts, "
    "improves a small model that often slips, and how large a difference between settings has to "
    "be to show here. What it cannot say: which of the paper's rows is best on competition "
    "mathematics. The models have a million parameters, the problems are word problems of one "
    "domain, and the small base with a solution in its prompt is right some 82% of the time, "
    "which bounds what it can teach: recipes that come near that cannot be told apart. That base "
    "also draws on the presence of a reference more than on its contents, so that it hardly tells "
    "mask ratios and placements apart (docs/decisions.md). SFT has clean solutions where the base "
    "has learned to slip, which favours it here and not in the paper. The paper's figures have "
    "other models and problems, and stand beside ours for their sign and order alone. Intervals "
    "are 95%, by a bootstrap over problems and seeds, both rows of a difference drawn together. "
    "With three to five seeds their part of it is rough: the intervals are too narrow where seeds "
    "differ much, and too wide where they differ little, since the chance in single answers is "
    "drawn twice. There are many rows and no correction for that: about one in twenty intervals "
    "misses the truth. *Best* is the better of a run's evaluations on the test problems "
    "themselves, and so flatters; *last* is the one to read."
)
QUICK = "**A quick version:** one size, two seeds, half the steps. Not a result."


def percent(value: float) -> str:
    return f"{value:.1%}"


def points(value: float | None) -> str:
    return NOT_IN_PAPER if value is None else f"{value:+.1f}"


def difference_cell(difference: dict[str, Any]) -> str:
    low, high = 100 * difference["low"], 100 * difference["high"]
    return f"{100 * difference['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def difference_cells(row: dict[str, Any], reference: str) -> list[str]:
    """The difference with its interval, and the verdict; empty in the reference's own row."""
    for difference in row["differences"]:
        if difference["reference"] == reference:
            return [difference_cell(difference), difference["verdict"]]
    return ["", ""]


def accuracy_cells(row: dict[str, Any]) -> list[str]:
    spread = row["seed_std"]
    shown = "" if spread is None else f"{100 * spread:.1f}"
    return [percent(row["last"]), percent(row["best"]), shown]


def base_names(result: Result) -> dict[str, str]:
    return {
        base["size"]: f"{base['size']} base, {base['num_parameters'] / 1e6:.1f}M parameters"
        for base in result["bases"]
    }


def panels_of(result: Result, table: int) -> list[dict[str, Any]]:
    return [panel for panel in result["tables"] if panel["table"] == table]


def backbone_index(result: Result, size: str) -> int:
    """The paper's backbone beside a size: the smallest beside the smallest."""
    return list(result["scale"]["sizes"]).index(size)


def recipes_table(result: Result) -> str:
    """Table 1: a panel for each size of the base, the paper's macro averages beside it."""
    header = ["base", "recipe", "last", "best", "s.d. of seeds", "to no update", "verdict"]
    header += ["PAINT to OPSD", "verdict", "learning rate", "paper", "paper's difference"]
    lines = []
    for panel in panels_of(result, 1):
        index = backbone_index(result, panel["size"])
        backbone = list(TABLE_1)[index]
        for row in panel["rows"]:
            setting, rate = row["setting"], row["learning_rate"]
            is_base = setting == "base"
            paper = None if is_base else paper_difference(1, index, setting, "base")
            lines.append(
                [
                    base_names(result)[panel["size"]] if is_base else "",
                    LABELS[setting],
                    *accuracy_cells(row),
                    *difference_cells(row, "base"),
                    *difference_cells(row, "opsd"),
                    "" if rate is None else f"{rate:g}",
                    f"{TABLE_1[backbone][setting][-1]} ({backbone})",
                    "" if is_base else points(paper),
                ]
            )
    return f"{markdown(header, lines)}\n\n{caption(result, 1)}"


def ablation_table(result: Result, table: int, label: Callable[[str], list[str]]) -> str:
    """Table 2, 3 or 4: every row beside the default's, and beside the paper's AIME 2024."""
    (panel,) = panels_of(result, table)
    reference = reference_of(panel)
    header = [*TABLE_HEADERS[table], "last", "best", "s.d. of seeds"]
    header += ["to the default", "verdict", "paper", "paper's difference"]
    lines = []
    for row in panel["rows"]:
        setting = row["setting"]
        paper = ABLATIONS[table].get(setting)
        is_default = setting == reference
        difference = None if is_default else paper_difference(table, 0, setting, reference)
        lines.append(
            [
                *label(setting),
                *accuracy_cells(row),
                *(["the default", ""] if is_default else difference_cells(row, reference)),
                NOT_IN_PAPER if paper is None else str(paper),
                "" if is_default else points(difference),
            ]
        )
    return f"{markdown(header, lines)}\n\n{caption(result, table)}"


TABLE_HEADERS = {
    2: ["hidden at overlap 1", "at overlap 0"],
    3: ["what is hidden"],
    4: ["k, the strength", "f, the share of positions"],
}


def reference_of(panel: dict[str, Any]) -> str:
    """The setting that a panel's other rows are compared with."""
    return next(d["reference"] for row in panel["rows"] for d in row["differences"])


def ratio_label(setting: str) -> list[str]:
    return ["0.00", "0.00"] if setting == "opsd" else setting.split("-")[1:]


def placement_label(setting: str) -> list[str]:
    return ["suffix" if setting.startswith("rho") else LABELS[setting]]


def blend_label(setting: str) -> list[str]:
    fixed = {"rho-0.40-0.30": ["0.00", "0.00"], "paint": ["0.03", "0.03"]}
    return fixed[setting] if setting in fixed else setting.split("-")[1:]


def caption(result: Result, table: int) -> str:
    scale, panels = result["scale"], panels_of(result, table)
    of = "macro Avg@12" if table == 1 else "AIME 2024 Avg@12 of Qwen3-1.7B"
    base = "" if table == 1 else f"{base_names(result)[panels[0]['size']]}; "
    return (
        f"{QUICK + ' ' if result['quick'] else ''}Avg@{scale['num_samples']} on "
        f"{scale['num_problems']} held-out problems, mean of {len(panels[0]['seeds'])} seeds; "
        f"{base}{scale['num_steps']} steps of {scale['batch_size']} rollouts or solutions. "
        f"Differences in points, with 95% intervals. Paper: {of}. On {made_by(result)}"
    )


def rates_table(result: Result) -> str:
    """The sweep: accuracy on validation problems at every learning rate, the chosen one in bold."""
    rates = result["scale"]["rates"]
    header = ["base", "recipe", *(f"{rate:g}" for rate in rates), "at the grid's edge"]
    lines = []
    for choice in result["learning_rates"]:
        tried = {entry["rate"]: percent(entry["avg_at_k"]) for entry in choice["tried"]}
        cells = [f"**{tried[r]}**" if r == choice["chosen"] else tried[r] for r in rates]
        edge = "yes" if choice["at_grid_edge"] else ""
        lines.append([choice["size"], LABELS[choice["recipe"]], *cells, edge])
    scale = result["scale"]
    text = (
        f"Avg@{scale['sweep_samples']} on {scale['sweep_problems']} validation problems, one seed "
        "that no table uses. Where the best is at the grid's edge, a better one may lie beyond it."
    )
    return f"{markdown(header, lines)}\n\n{text}"


def limits_text(result: Result) -> str:
    """What the tables can and cannot say, and what they took."""
    seconds = result["seconds"]
    hours = sum(seconds.values()) / 3600
    runs = len(result["runs"])
    took = (
        f"{runs} runs took {hours:.1f} hours of one core each, of them "
        f"{seconds['learning_rates'] / 3600:.1f} for the learning rates; with "
        f"{result['num_workers']} workers that is {60 * hours / result['num_workers']:.0f} minutes."
    )
    edges = [
        f"{LABELS[c['recipe']]} on the {c['size']} base"
        for c in result["learning_rates"]
        if c["at_grid_edge"]
    ]
    edge = f" The chosen learning rate is at the grid's edge for {', '.join(edges)}." * bool(edges)
    return f"{LIMITS}\n\n{took}{edge}"


PAPER_TABLES: dict[tuple[str, str], Callable[[Result], str]] = {
    ("paper-tables", "1"): recipes_table,
    ("paper-tables", "2"): lambda result: ablation_table(result, 2, ratio_label),
    ("paper-tables", "3"): lambda result: ablation_table(result, 3, placement_label),
    ("paper-tables", "4"): lambda result: ablation_table(result, 4, blend_label),
    ("paper-tables", "rates"): rates_table,
    ("paper-tables", "limits"): limits_text,
}
"""for `bench.tables.fill`, by the result's own name and the view that a marker asks for"""


def document(result: Result, figure: str) -> str:
    """All of it as one page, with the figure's file name in it."""
    numbers = sorted({panel["table"] for panel in result["tables"]})
    views = [(f"## Table {n}", str(n)) for n in numbers]
    views += [("## Learning rates", "rates"), ("## What this can and cannot say", "limits")]
    parts = [f"{title}\n\n{PAPER_TABLES['paper-tables', view](result)}" for title, view in views]
    picture = f"![Differences with their intervals, and the paper's]({figure})"
    return "\n\n".join(["# The paper's tables in small", picture, *parts]) + "\n"
