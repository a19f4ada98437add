"""Markdown of the tables at laptop scale: pure functions of `paper-tables*.json`."""

import statistics
from collections.abc import Callable
from typing import Any

from bench.paper.plan import PAPER
from bench.paper.published import ABLATIONS, TABLE_1, paper_difference
from bench.tables import Result, Table, markdown

LABELS = {
    "base": "no update",
    "sft": "SFT",
    "grpo": "GRPO",
    "opsd": "OPSD",
    "paint": "PAINT",
    "teacher": "the stronger teacher itself",
    "opd": "OPD: the stronger teacher",
    "paint-control": "PAINT with another problem's solution",
    "sdpo": "SDPO: a correct sibling",
    "grpo-paint": "GRPO and PAINT",
    "place-prefix": "prefix",
    "place-middle": "middle",
    "place-random": "random span",
    "place-sentence_suffix": "suffix, at a sentence's end",
}
TITLES = {
    1: "recipes",
    2: "how much of the solution is hidden",
    3: "what part of it is hidden",
    4: "strength and budget of the interpolation",
    5: "other teachers, contexts and signals",
}
NOT_IN_PAPER = "none"
QUICK = "**A quick version:** one base, two seeds, half the steps, some of the rows. Not a result."


def percent(value: float) -> str:
    return f"{value:.1%}"


def points(value: float | None) -> str:
    return NOT_IN_PAPER if value is None else f"{value:+.1f}"


def difference_cell(difference: dict[str, Any]) -> str:
    low, high = 100 * difference["low"], 100 * difference["high"]
    return f"{100 * difference['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def difference_cells(row: dict[str, Any], reference: str) -> list[str]:
    """Returns the difference with its interval, the verdict, and the seeds in which the row is
    above.

    The cells are empty in the reference's own row.
    """
    for difference in row["differences"]:
        if difference["reference"] == reference:
            above, equal = difference["seeds_above"], difference["seeds_equal"]
            seeds = f"{above} of {len(row['last_by_seed'])}" + f", {equal} equal" * (equal > 0)
            return [difference_cell(difference), difference["verdict"], seeds]
    return ["", "", ""]


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
    """Returns the index of the paper's backbone that a size is shown with; both are sorted by
    size."""
    return list(result["scale"]["sizes"]).index(size)


def recipes_table(result: Result) -> str:
    """Returns Table 1: one panel per size of the base with the paper's macro averages; then PAINT
    and OPSD."""
    header = ["base", "recipe", "last", "best", "s.d. of seeds", "to no update", "verdict"]
    header += ["seeds above", "learning rate", "paper", "paper's difference"]
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
                    "" if rate is None else f"{rate:g}",
                    f"{TABLE_1[backbone][setting][-1]} ({backbone})",
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
    header += ["seeds above", "learning rates", "difference of best", "paper's difference"]
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
                points(100 * (rows["paint"]["best"] - rows["opsd"]["best"])),
                f"{paper} ({list(TABLE_1)[index]})",
            ]
        )
    return markdown(header, lines) if lines else ""


def ablation_table(result: Result, table: int, label: Callable[[str], list[str]]) -> str:
    """Returns Table 2, 3 or 4: every row compared with the default, and the paper's AIME 2024."""
    (panel,) = panels_of(result, table)
    reference = reference_of(panel)
    header = [*TABLE_HEADERS[table], "last", "best", "s.d. of seeds"]
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


def teachers_table(result: Result) -> str:
    """Returns Table 5: every row compared with no update and with PAINT."""
    (panel,) = panels_of(result, 5)
    header = ["recipe", "last", "best", "s.d. of seeds"]
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
    return f"{markdown(header, lines)}\n\n{caption(result, 5, beside_paper=False)}"


def reference_of(panel: dict[str, Any]) -> str:
    """Returns the setting that the other rows of a panel are compared with."""
    return next(d["reference"] for row in panel["rows"] for d in row["differences"])


def ratio_label(setting: str) -> list[str]:
    return setting.split("-")[1:]


def placement_label(setting: str) -> list[str]:
    return ["suffix" if setting.startswith("rho") else LABELS[setting]]


def blend_label(setting: str) -> list[str]:
    fixed = {"rho-0.40-0.30": ["0.00", "0.00"], "paint": ["0.03", "0.03"]}
    return fixed[setting] if setting in fixed else setting.split("-")[1:]


def caption(result: Result, table: int, *, beside_paper: bool = True) -> str:
    """Returns a table's caption: budget, samples, seeds, the paper's benchmark and the machine."""
    scale, panels = result["scale"], panels_of(result, table)
    of = "macro Avg@12" if table == 1 else "AIME 2024 Avg@12 of Qwen3-1.7B"
    base = "" if table == 1 else f"{base_names(result)[panels[0]['size']]}; "
    num_seeds, most = len(panels[0]["seeds"]), len(scale["main_seeds"])
    fewer = table == 4 and num_seeds < most
    shared = f" PAINT's row uses the first {num_seeds} seeds of Table 1." * fewer
    if table in (2, 3):
        shared = " No row interpolates: the default is the first row of Table 4."
    return (
        f"{QUICK + ' ' if result['quick'] else ''}Avg@{scale['num_samples']} on "
        f"{scale['num_problems']} held-out problems, mean of {num_seeds} seeds; "
        f"{base}{scale['num_steps']} steps of {scale['batch_size']} rollouts or solutions. "
        "Differences are between last accuracies, in points, with 95% intervals of about "
        f"±{half_width(panels):.1f} points; smaller differences are not resolved.{shared} "
        f"{f'Paper: {of}. ' * beside_paper}{made_by(result)}"
    )


def half_width(panels: list[dict[str, Any]]) -> float:
    """Returns half the width of an interval in points: the median over the panels' differences."""
    found = [d for panel in panels for row in panel["rows"] for d in row["differences"]]
    return 50 * statistics.median(d["high"] - d["low"] for d in found)


def made_by(result: Result) -> str:
    """Returns device, library versions, commits and command."""
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if name != "python"
    )
    commits = ", ".join(
        f"{commit[:10]}{'+changes' * commit.endswith('+changes')}" for commit in result["commits"]
    )
    return (
        f"One thread per run, on {result['device']}; {versions}; at {commits}; "
        f"by `{result['command']}`."
    )


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
    answers = scale["sweep_problems"] * scale["sweep_samples"]
    text = (
        f"Avg@{scale['sweep_samples']} on {scale['sweep_problems']} validation problems after "
        f"{scale['num_steps']} steps, with one seed that no table uses. The rate with the highest "
        "accuracy is used, the lower one of equals. The difference of two accuracies near 75% from "
        f"{answers} answers each is known to about ±{1.96 * (2 * 75 * 25 / answers) ** 0.5:.0f} "
        "points, so the choice between closer rates is random."
    )
    return f"{markdown(header, lines)}\n\n{text}"


READING = """\
All rows of a table start from the same base and take the same number of steps with the same number
of rollouts (solutions for SFT).

- *last*: accuracy on held-out problems after the last step, mean over seeds. This is the main
  result.
- *best*: the better of each run's two evaluations, in the middle and at the end. It is chosen on
  the test problems and therefore optimistic; the paper reports best checkpoints.
- *s.d. of seeds*: standard deviation of the seeds' last accuracies.
- A difference is between last accuracies, in points, with its 95% interval. Both rows share
  problems and seeds, which are resampled together.
- *verdict*: "above" or "below" if the interval excludes 0, else "within noise": these runs cannot
  tell the two apart, which does not make them equal.
- *seeds above*: number of seeds in which the row's last accuracy is higher, and in which both are
  equal."""
READING_PAPER = """
- *paper*: the paper's figures, for other models and problems and without intervals. Compare sign
  and order, not size."""


LIMITS = """\
**What the tables show:** whether each recipe, with its preset and at an equal budget, improves a
small model that often makes slips, and how large a difference must be to be detected here.

**What they do not show:** which of the paper's rows is best on competition mathematics.

- The models have {models} million parameters, and the problems are word problems of one domain.
- OPSD and PAINT are bounded by their teacher, the base with a solution in its prompt. Recipes that
  reach it cannot be told apart.{small}
- SFT learns from solutions without slips, while the base was trained to slip. This favours SFT here
  and not in the paper.
- Equal rollouts are not equal problems: GRPO spends 8 rollouts on each problem, so it sees {groups}
  problems per step and the others see {batch}. The paper's GRPO had longer rollouts and trained
  for longer.
- Each learning rate was chosen with one seed from a coarse grid, and the intervals ignore this
  choice. If the chosen rate is at the grid's edge, a better one may lie outside. Tables 2 to 4 use
  PAINT's rate in every row, which favours its default. The row of Table 2 that hides nothing is
  OPSD at PAINT's rate, which may differ from OPSD's rate in Table 1.
- Answers are sampled at top-p 1.0. At the paper's 0.95 the bases slip less, and there is less to
  gain.

**The intervals** come from a bootstrap over problems and seeds. With {seeds} seeds, the seeds' part
is rough. If seeds move a row by less than 2 points, the intervals are too wide, because the noise
of single answers is counted more than once: they cover the truth in more than 95% of cases, and
"within noise" is reported too often. If seeds move a row by more, they are too narrow (figures in
bench/paper/stats.py). There is no correction for the number of rows."""
LIMITS_OF_TEACHERS = """\
**What the table shows:** what a small model learns from each teacher and signal at an equal budget
of rollouts, and whether another problem's solution, as a control, teaches as much as its own.

**What it does not show:** which of them is best on competition mathematics.

- The models have {models} million parameters, and the problems are word problems of one domain.
- The stronger teacher is of the base's size; it was pretrained on solutions without slips. A
  teacher of the base's own family and size is closer to it than a larger one.
- The base was taught to read a solution of the problem in its prompt. It was not taught another
  problem's solution, and not the message that shows a sibling.
- Equal rollouts are not equal problems: SDPO and GRPO spend 8 rollouts on each problem, so they see
  {groups} problems per step and the others see {batch}.
- Each learning rate was chosen with one seed from a coarse grid, and the intervals ignore this
  choice.

**The intervals** come from a bootstrap over problems and seeds. With {seeds} seeds, the seeds' part
is rough (figures in bench/paper/stats.py). There is no correction for the number of rows."""
OF_SMALL = """
  The small base also uses the presence of a solution more than its contents, so mask ratios and
  placements hardly matter to it (docs/decisions.md)."""


def has_paper_tables(result: Result) -> bool:
    return any(panel["table"] in PAPER for panel in result["tables"])


def reading_text(result: Result) -> str:
    return READING + READING_PAPER * has_paper_tables(result)


def limits_text(result: Result) -> str:
    """Returns a text on what the tables show and do not show, and how long they took."""
    sizes = [f"{base['num_parameters'] / 1e6:.1f}" for base in result["bases"]]
    scale = result["scale"]
    num_seeds = sorted({len(panel["seeds"]) for panel in result["tables"]})
    text = (LIMITS if has_paper_tables(result) else LIMITS_OF_TEACHERS).format(
        models=" to ".join(dict.fromkeys((sizes[0], sizes[-1]))),
        small=OF_SMALL if "small" in scale["sizes"] else "",
        groups=scale["batch_size"] // 8,
        batch=scale["batch_size"],
        seeds=" to ".join(map(str, num_seeds)),
    )
    return f"{text}\n\n{time_text(result)}"


def time_text(result: Result) -> str:
    """Returns the time of all runs, as text."""
    seconds, workers = result["seconds"], result["num_workers"]
    hours = sum(seconds.values()) / 3600
    rates = seconds["learning_rates"] / 3600
    return (
        f"**Time:** {len(result['runs'])} runs took {hours:.1f} hours on one processor core, "
        f"{rates:.1f} of them for the learning rates. With {workers} cores that is "
        f"{60 * hours / workers:.0f} minutes. The pretraining of the bases is not counted."
    )


PAPER_TABLES: dict[tuple[str, str], Table] = {
    ("paper-tables", "1"): recipes_table,
    ("paper-tables", "short"): short_table,
    ("paper-tables", "2"): lambda result: ablation_table(result, 2, ratio_label),
    ("paper-tables", "3"): lambda result: ablation_table(result, 3, placement_label),
    ("paper-tables", "4"): lambda result: ablation_table(result, 4, blend_label),
    ("paper-tables", "5"): teachers_table,
    ("paper-tables", "rates"): rates_table,
    ("paper-tables", "reading"): reading_text,
    ("paper-tables", "limits"): limits_text,
}
"""for `bench.tables.fill`, keyed by the result's name and the view in the marker"""


def document(result: Result, figure: str) -> str:
    """Returns all tables as one page, which shows the figure of the given file name."""
    numbers = sorted({panel["table"] for panel in result["tables"]})
    views = [("## How to read them", "reading")]
    views += [(f"## Table {n}: {TITLES[n]}", str(n)) for n in numbers]
    views += [
        ("## Learning rates", "rates"),
        ("## What the tables show, and what they do not", "limits"),
    ]
    parts = [f"{title}\n\n{PAPER_TABLES['paper-tables', view](result)}" for title, view in views]
    of_paper = has_paper_tables(result)
    and_paper = ", and the paper's" if of_paper else ""
    picture = f"![Differences with their intervals{and_paper}]({figure})"
    what = "The paper's tables" if of_paper else "Teachers and signals"
    return "\n\n".join([f"# {what} at laptop scale", picture, *parts]) + "\n"
