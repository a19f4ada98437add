"""Markdown of the tables at laptop scale: pure functions of `paper-tables*.json`."""

import statistics
from collections.abc import Callable
from typing import Any

from bench.paper.cells import (
    LABELS,
    NOT_IN_PAPER,
    QUICK,
    UNPLANNED,
    accuracy_cells,
    backbone_index,
    base_names,
    blend_label,
    difference_cell,
    difference_cells,
    made_by,
    panels_of,
    percent,
    placement_label,
    points,
    ratio_label,
    reference_of,
)
from bench.paper.claims import CHOSEN_BY, CLAIMS, level_of
from bench.paper.mechanism_tables import mechanisms_text
from bench.paper.plan import EXPLORATORY
from bench.paper.published import ABLATIONS, TABLE_1, paper_difference
from bench.paper.reading import has_paper_tables, limits_text, reading_text
from bench.tables import Result, Table, markdown

TITLES = {
    1: "recipes",
    2: "how much of the solution is hidden",
    3: "what part of it is hidden",
    4: "strength and budget of the interpolation",
    5: "other teachers, contexts and signals",
    6: "the clip (exploratory)",
}


def recipes_table(result: Result) -> str:
    """Returns Table 1: one panel per size of the base with the paper's macro averages; then PAINT
    and OPSD."""
    header = ["base", "recipe", "last", "s.d. of seeds", "to no update", "verdict"]
    header += ["seeds above", "learning rate", "paper", "paper's difference"]
    lines = []
    for panel in panels_of(result, 1):
        index = backbone_index(result, panel["size"])
        backbone = list(TABLE_1)[index]
        for row in panel["rows"]:
            setting, rate = row["setting"], row["learning_rate"]
            is_base = setting == "base"
            paper = None if is_base else paper_difference(1, index, setting, "base")
            published = TABLE_1[backbone].get(setting)
            lines.append(
                [
                    base_names(result)[panel["size"]] if is_base else "",
                    LABELS[setting],
                    *accuracy_cells(row),
                    *difference_cells(row, "base"),
                    "" if rate is None else f"{rate:g}",
                    NOT_IN_PAPER if published is None else f"{published[-1]} ({backbone})",
                    "" if is_base else points(paper),
                ]
            )
    parts = [markdown(header, lines), against_opsd_table(result), caption(result, 1)]
    return "\n\n".join(part for part in parts if part)


def short_table(result: Result) -> str:
    """Returns Table 1 with a line per base: last accuracies, differences to no update, PAINT's to
    OPSD."""
    panels = panels_of(result, 1)
    settings = [row["setting"] for row in panels[0]["rows"]]
    header = ["base", *(LABELS[setting] for setting in settings), "PAINT to OPSD"]
    lines = []
    for panel in panels:
        cells = [base_names(result)[panel["size"]]]
        for row in panel["rows"]:
            difference, *_ = difference_cells(row, "base")
            cells.append(percent(row["last"]) + f", {difference}" * bool(difference))
        against, verdict, _ = difference_cells(panel["rows"][settings.index("paint")], "opsd")
        lines.append([*cells, f"{against}, {verdict}"])
    return f"{markdown(header, lines)}\n\n{caption(result, 1, beside_paper=False)}"


def against_opsd_table(result: Result) -> str:
    """Returns a table of what PAINT adds to OPSD at each size of the base; empty if one of the rows
    is not shown."""
    header = ["PAINT against OPSD", "OPSD, last", "PAINT, last", "difference", "verdict"]
    header += ["seeds above", "learning rates", "paper's difference"]
    lines = []
    for panel in panels_of(result, 1):
        rows = {row["setting"]: row for row in panel["rows"]}
        if "opsd" not in rows or "paint" not in rows:
            continue
        index = backbone_index(result, panel["size"])
        paper = points(paper_difference(1, index, "paint", "opsd"))
        lines.append(
            [
                base_names(result)[panel["size"]],
                *(percent(rows[name]["last"]) for name in ("opsd", "paint")),
                *difference_cells(rows["paint"], "opsd"),
                ", ".join(f"{rows[name]['learning_rate']:g}" for name in ("opsd", "paint")),
                f"{paper} ({list(TABLE_1)[index]})",
            ]
        )
    return markdown(header, lines) if lines else ""


def ablation_table(result: Result, table: int, label: Callable[[str], list[str]]) -> str:
    """Returns Table 2, 3 or 4: every row compared with the default, and the paper's AIME 2024."""
    (panel,) = panels_of(result, table)
    reference = reference_of(panel)
    header = [*TABLE_HEADERS[table], "last", "s.d. of seeds"]
    header += ["to the default", "verdict", "seeds above", "paper", "paper's difference"]
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
                *(["the default", "", ""] if is_default else difference_cells(row, reference)),
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


def against_paint_table(result: Result, table: int) -> str:
    """Returns Table 5 or 6: every row compared with no update and with PAINT."""
    (panel,) = panels_of(result, table)
    header = ["recipe", "last", "s.d. of seeds"]
    header += ["to no update", "verdict", "seeds above", "to PAINT", "verdict", "seeds above"]
    header += ["learning rate"]
    lines = []
    for row in panel["rows"]:
        rate = row["learning_rate"]
        lines.append(
            [
                LABELS[row["setting"]],
                *accuracy_cells(row),
                *difference_cells(row, "base"),
                *difference_cells(row, "paint"),
                "" if rate is None else f"{rate:g}",
            ]
        )
    return f"{markdown(header, lines)}\n\n{caption(result, table, beside_paper=False)}"


def caption(result: Result, table: int, *, beside_paper: bool = True) -> str:
    """Returns a table's caption: budget, samples, seeds, the paper's benchmark and the machine."""
    scale, panels = result["scale"], panels_of(result, table)
    of = "macro Avg@12" if table == 1 else "AIME 2024 Avg@12 of Qwen3-1.7B"
    base = "" if table == 1 else f"{base_names(result)[panels[0]['size']]}; "
    shared = ""
    if table in (2, 3):
        shared = " No row interpolates: the default is the first row of Table 4."
    notes = [QUICK] * result["quick"] + [UNPLANNED] * (table in EXPLORATORY)
    return (
        f"{''.join(f'{note} ' for note in notes)}Avg@{scale['num_samples']} on "
        f"{scale['num_problems']} held-out problems, "
        f"mean of {seeds_text(scale)}; {base}{scale['num_steps']} steps of "
        f"{scale['batch_size']} rollouts or solutions. "
        "Differences are between last accuracies, in points, with 95% intervals of about "
        f"±{half_width(panels):.1f} points; smaller differences are not resolved.{shared} "
        f"{f'Paper: {of}. ' * beside_paper}{made_by(result)}"
    )


def seeds_text(scale: dict[str, Any]) -> str:
    """Returns the number of seeds, and those of the rows that have more."""
    few, some, many = (len(scale[n]) for n in ("seeds", "claim_seeds", "primary_seeds"))
    more = f" ({some} for the rows of a claim, {many} for OPSD and PAINT)"
    return f"{few} seeds" + more * (many > few)


def half_width(panels: list[dict[str, Any]]) -> float:
    """Returns half the width of an interval in points: the median over the panels' differences."""
    found = [d for panel in panels for row in panel["rows"] for d in row["differences"]]
    return 50 * statistics.median(d["high"] - d["low"] for d in found)


def rates_table(result: Result) -> str:
    """Returns the sweep as a table: accuracy on validation problems by learning rate, the chosen
    one in bold."""
    rates = result["scale"]["rates"]
    header = ["base", "recipe", *(f"{rate:g}" for rate in rates), "at the grid's edge"]
    lines = []
    order = [*result["scale"]["sizes"]], [*LABELS]
    choices = sorted(
        result["learning_rates"],
        key=lambda choice: (order[0].index(choice["size"]), order[1].index(choice["recipe"])),
    )
    for choice in choices:
        tried = {entry["rate"]: percent(entry["avg_at_k"]) for entry in choice["tried"]}
        cells = [f"**{tried[r]}**" if r == choice["chosen"] else tried[r] for r in rates]
        edge = "yes" if choice["at_grid_edge"] else ""
        lines.append([choice["size"], LABELS[choice["recipe"]], *cells, edge])
    scale = result["scale"]
    num_seeds = len(scale["sweep_seeds"])
    answers = scale["sweep_problems"] * scale["sweep_samples"] * num_seeds
    text = (
        f"Avg@{scale['sweep_samples']} on {scale['sweep_problems']} validation problems after "
        f"{scale['num_steps']} steps, mean of {num_seeds} seed{'s' * (num_seeds > 1)} that no "
        "table uses. The rate with the highest accuracy is used, the lower one of equals. The "
        f"difference of two accuracies near 75% from {answers:,} answers each is known to about "
        f"±{1.96 * (2 * 75 * 25 / answers) ** 0.5:.1f} points, and less well because seeds "
        "differ, so the choice between closer rates is random."
    )
    return f"{markdown(header, lines)}\n\n{text}"


def claims_table(result: Result) -> str:
    """Returns the paper's claims with the difference, its interval and the outcome; empty if no
    claim's rows were run."""
    if not result["claims"]:
        return ""
    header = ["claim", "outcome", "difference", "level", "p", "seeds above", "size as claimed"]
    header += ["paper's difference"]
    lines = []
    for entry in result["claims"]:
        text = entry["text"] + (", the primary claim" if entry["is_primary"] else "")
        lines.append(
            [
                f"**{text}**" if entry["is_primary"] else text,
                entry["outcome"],
                difference_cell(entry),
                f"{100 * entry['level']:g}%",
                f"{entry['p_value']:.2g}",
                f"{entry['seeds_above']} of {entry['num_seeds']}",
                size_as_claimed(entry),
                points(entry["paper_difference"]),
            ]
        )
    others = [claim for claim in CLAIMS if not claim.is_primary]
    text = (
        f"{QUICK + ' ' if result['quick'] else ''}Fixed before the runs. The primary claim is "
        f"tested at 95%. The other {len(others)} share an error of 5%, so that their intervals are "
        f"at {100 * level_of(others[0]):g}% (Bonferroni); p is of a single test. A claim is *seen* "
        "if its interval lies on the paper's side of 0, and *reversed* if on the other. *Not seen* "
        "is not equal: the next to last column is the largest effect as claimed that the interval "
        "does not exclude; of a claim that was seen, it is the smallest."
    )
    return f"{markdown(header, lines)}\n\n{text} {made_by(result)}"


def exploratory_table(result: Result) -> str:
    """Returns the claims on all problems and on those that chose no base; empty without the
    latter."""
    if not result["exploratory"]:
        return ""
    num_problems = result["scale"]["num_problems"]
    header = ["claim", "all problems", f"problems {CHOSEN_BY + 1} to {num_problems:,}"]
    lines = [
        [entry["text"], difference_cell(entry["all"]), difference_cell(entry["unchosen"])]
        for entry in result["exploratory"]
    ]
    text = (
        "Exploratory: 95% intervals without correction. The base was chosen by its properties on "
        f"the first {CHOSEN_BY} problems."
    )
    return f"{markdown(header, lines)}\n\n{text}"


def size_as_claimed(entry: dict[str, Any]) -> str:
    """Returns the bound of the effect in the claimed direction, in points: the lower one of a claim
    that was seen, else the upper one."""
    ends = sorted(100 * entry["paper_sign"] * entry[end] for end in ("low", "high"))
    if entry["outcome"] == "reversed":
        return "none"
    return f"at least {ends[0]:.1f}" if entry["outcome"] == "seen" else f"at most {ends[1]:.1f}"


PAPER_TABLES: dict[tuple[str, str], Table] = {
    ("paper-tables", "1"): recipes_table,
    ("paper-tables", "short"): short_table,
    ("paper-tables", "2"): lambda result: ablation_table(result, 2, ratio_label),
    ("paper-tables", "3"): lambda result: ablation_table(result, 3, placement_label),
    ("paper-tables", "4"): lambda result: ablation_table(result, 4, blend_label),
    ("paper-tables", "5"): lambda result: against_paint_table(result, 5),
    ("paper-tables", "6"): lambda result: against_paint_table(result, 6),
    ("paper-tables", "claims"): claims_table,
    ("paper-tables", "exploratory"): exploratory_table,
    ("paper-tables", "mechanisms"): mechanisms_text,
    ("paper-tables", "rates"): rates_table,
    ("paper-tables", "reading"): reading_text,
    ("paper-tables", "limits"): limits_text,
}
"""for `bench.tables.fill`, keyed by the result's name and the view in the marker"""


def mechanisms_figure(stem: str) -> str:
    """Returns the file name of the figure of the mechanisms, from the stem of the result's."""
    if stem.startswith("paper-tables"):
        return f"{stem.replace('tables', 'mechanisms', 1)}.png"
    return f"{stem}-mechanisms.png"


def document(result: Result, stem: str) -> str:
    """Returns all tables as one page beside the result, whose file name has this stem."""
    of_paper = has_paper_tables(result)
    numbers = sorted({panel["table"] for panel in result["tables"]})
    views = [("## How to read them", "reading")]
    views += [("## The paper's claims", "claims")] * bool(result["claims"])
    views += [("## Exploratory", "exploratory")] * bool(result["exploratory"])
    views += [(f"## Table {n}: {TITLES[n]}", str(n)) for n in numbers]
    views += [
        ("## Learning rates", "rates"),
        ("## What happens inside", "mechanisms"),
        ("## What the tables show, and what they do not", "limits"),
    ]
    texts = {view: PAPER_TABLES["paper-tables", view](result) for _, view in views}
    texts["mechanisms"] += f"\n\n![Mechanisms]({mechanisms_figure(stem)})"
    parts = [f"{title}\n\n{texts[view]}" for title, view in views]
    and_paper = ", and the paper's" if of_paper else ""
    picture = f"![Differences with their intervals{and_paper}]({stem}.png)"
    what = "The paper's tables" if of_paper else " and ".join(TITLES[n] for n in numbers)
    title = f"# {what[0].upper()}{what[1:]} at laptop scale"
    return "\n\n".join([title, picture, *parts]) + "\n"
