"""Markdown of the tables at laptop scale: pure functions of `paper-tables*.json`."""

import statistics
from collections.abc import Callable
from typing import Any

from bench.paper.claims import CHOSEN_BY, CLAIMS, level_of
from bench.paper.mechanisms import KINDS
from bench.paper.plan import KEPT_ROLLOUTS, PAPER, TABLES
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
QUICK = "**A quick version:** one base, two seeds, few steps, some of the rows. Not a result."


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
            seeds = f"{above} of {difference['num_seeds']}" + f", {equal} equal" * (equal > 0)
            return [difference_cell(difference), difference["verdict"], seeds]
    return ["", "", ""]


def accuracy_cells(row: dict[str, Any]) -> list[str]:
    spread = row["seed_std"]
    shown = "" if spread is None else f"{100 * spread:.1f}"
    return [percent(row["last"]), shown]


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


def teachers_table(result: Result) -> str:
    """Returns Table 5: every row compared with no update and with PAINT."""
    (panel,) = panels_of(result, 5)
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
    return f"{markdown(header, lines)}\n\n{caption(result, 5, beside_paper=False)}"


def reference_of(panel: dict[str, Any]) -> str:
    """Returns the setting that the other rows of a panel are compared with."""
    return next(table for table in TABLES if table.number == panel["table"]).references[0]


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
    shared = ""
    if table in (2, 3):
        shared = " No row interpolates: the default is the first row of Table 4."
    return (
        f"{QUICK + ' ' if result['quick'] else ''}Avg@{scale['num_samples']} on "
        f"{scale['num_problems']} held-out problems, mean of {seeds_text(scale)}; "
        f"{base}{scale['num_steps']} steps of {scale['batch_size']} rollouts or solutions. "
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


def mechanisms_text(result: Result) -> str:
    """Returns where PAINT's selection, divergence and clip act, and how the rows' answers are
    written."""
    parts = [kinds_table(result), style_table(result)]
    return "\n\n".join(part for part in parts if part)


def kinds_table(result: Result) -> str:
    """Returns the shares of PAINT's tokens by kind; empty without its row."""
    rows = [row for row in result["mechanisms"] if row["setting"] == "paint"]
    if not rows:
        return ""
    kinds = rows[0]["kinds"]
    header = ["kind of token", "of all tokens", "of the selected", "selected, times chance"]
    header += ["of the KL", "KL per token", "with the clip"]
    lines = []
    for kind in KINDS:
        shares = {name: kind_share(kinds, kind, name) for name in KIND_SHARES}
        lines.append(
            [
                KIND_LABELS[kind],
                percent(shares["tokens"]),
                percent(shares["selected"]),
                f"{times_chance(kinds, kind):.2f}",
                percent(shares["token_kl"]),
                *(f"{per_token(kinds[kind], name):.4f}" for name in ("token_kl", "token_loss")),
            ]
        )
    num_tokens = round(sum(kinds[kind]["tokens"] for kind in KINDS))
    text = (
        f"PAINT's {num_tokens:,} tokens in the first {KEPT_ROLLOUTS} rollouts of each step, all "
        "seeds. *Times chance*: how often a kind is selected, over how often it would be if each "
        "rollout's positions were drawn at random. KL: the divergence without the clip. The last "
        "two columns are in nats. With the clip, it can be negative: the clip lowers the summands "
        "of single vocabulary entries that are above it, and leaves those below 0."
    )
    return f"{markdown(header, lines)}\n\n{text}"


KIND_SHARES = ("tokens", "selected", "token_kl")
KIND_LABELS = {
    "result": "digit of a result",
    "operand": "other digit",
    "branch": "first token of a line",
    "symbol": "other, in a formula",
    "word": "other",
}


def kind_share(kinds: dict[str, dict[str, float]], kind: str, name: str) -> float:
    """Returns a kind's share of the sum over all kinds; 0 of nothing."""
    total = sum(kinds[one].get(name, 0) for one in KINDS)
    return kinds[kind].get(name, 0) / total if total else 0.0


def times_chance(kinds: dict[str, dict[str, float]], kind: str) -> float:
    """Returns how many tokens of a kind are selected over how many would be by chance; 0 for a kind
    without tokens."""
    by_chance = kinds[kind].get("by_chance", 0)
    return kinds[kind]["selected"] / by_chance if by_chance else 0.0


def per_token(sums: dict[str, float], name: str) -> float:
    """Returns the mean of a value over a kind's tokens; 0 of none."""
    return sums.get(name, 0) / sums["tokens"] if sums.get("tokens") else 0.0


def style_table(result: Result) -> str:
    """Returns how the answers to the test problems are written after the last step, by row."""
    header = ["row", "go together", "have a check", "are terse"]
    lines = []
    for row in result["mechanisms"]:
        last = row["answers"][-1]
        names = ("together", "checked", "terse")
        shares = [percent(last[name] / last["solutions"]) for name in names]
        lines.append([setting_label(row["setting"]), *shares])
    text = (
        "Answers to the test problems after the last step, all seeds. *Together* adds up what "
        "comes at a time and multiplies once, as the references do; *terse* is a solution of bare "
        f"formulas, as the references are. The figure below has the first {KEPT_ROLLOUTS} rollouts "
        "that each step trains on, which for GRPO are of one problem with right and wrong answers."
    )
    return f"{markdown(header, lines)}\n\n{text}"


def setting_label(setting: str) -> str:
    """Returns the words for a row of any table."""
    if setting in LABELS:
        return LABELS[setting]
    kind, first, second = setting.split("-")
    names = {"rho": f"mask {first} / {second}", "blend": f"k {first}, f {second}"}
    return names[kind]


READING = """\
All rows of a table start from the same base and take the same number of steps with the same number
of rollouts (solutions for SFT).

- *last*: accuracy on held-out problems after the last step, mean over seeds. The paper
  reports best checkpoints; here none is chosen.
- *s.d. of seeds*: standard deviation of the seeds' last accuracies.
- A difference is between last accuracies, in points, with its 95% interval. It is taken on each
  problem and each seed that both rows have, so where one row has more seeds, it is not the
  difference of the two means.
- *verdict*: "above" or "below" if the interval excludes 0, else "within noise": these runs cannot
  tell the two apart, which does not make them equal.
- *seeds above*: number of seeds in which the row's last accuracy is higher, and in which both are
  equal."""
READING_PAPER = """
- *paper*: the paper's figures, for other models and problems and without intervals. Compare sign
  and order, not size."""


LIMITS = """\
**What the tables show:** whether each recipe, with its preset and at an equal budget, improves a
small model that makes slips, which of the paper's differences appear on it, and how large a
difference must be to be detected here.

**What they do not show:** which row is best on competition mathematics.

- {models}, and the problems are word problems of one domain.
- The base's slips are learned: it was pretrained on a writer who slips more where he works alone
  than where a reference confirms a result. Recipes unlearn them. Large models may err
  for other reasons.
- The two ways to an answer, and how strongly a reference draws to its own, are built in: the more
  of it the base sees, the likelier it goes that way (docs/decisions.md, "The tiny base"). What a
  mask does to the teacher is therefore chosen; the tables show what the student takes from it.
- Another problem's reference draws the base to its way and confirms none of its results. So the
  teacher has nothing to gain from one, by design.
- The base has seen references with a hidden end more often than others. A start or a middle was
  hidden only where a random part was.
- The base was chosen by its properties on the first 512 of the test problems. The rows share this
  base and these problems.
- OPSD and PAINT are bounded by their teacher, the base with a solution in its prompt. Recipes that
  reach it cannot be told apart.
- SFT learns from terse solutions without slips or checks, all of one way. The base writes longer
  ones, and checks some of its results.
- Equal rollouts are not equal problems: {grouped} 8 rollouts on each problem, {groups} problems a
  step where the others see {batch}.
- Each learning rate was chosen from a coarse grid, and the intervals ignore this choice. If the
  chosen rate is at the grid's edge, a better one may lie outside.
"""
LIMITS_OF_ABLATIONS = """\
- Tables 2 to 4 use PAINT's rate in every row, which favours its default. The row of Table 2 that
  hides nothing is OPSD at PAINT's rate, which may differ from OPSD's rate in Table 1.
"""
LIMITS_OF_TEACHERS = """\
- The stronger teacher of Table 5 is the base after more steps on solutions without slips. It is
  closer to the base than a larger model would be. The base was not taught the message that shows a
  sibling.
"""
INTERVALS = """\
- Answers are sampled at temperature {temperature:g} and top-p {top_p:g}. They have up to
  {max_new_tokens} tokens.

**The intervals** are those of a mean with errors that cluster by seeds and by problems, with
Student's t of as many degrees of freedom as the rows share seeds, less one. They are too wide where
seeds hardly differ (bench/paper/stats.py). The claims are corrected for their number; the verdicts
in the tables are not, and one of twenty would be wrong if all rows were equal."""


def has_paper_tables(result: Result) -> bool:
    return any(panel["table"] in PAPER for panel in result["tables"])


def reading_text(result: Result) -> str:
    return READING + READING_PAPER * has_paper_tables(result)


def limits_text(result: Result) -> str:
    """Returns a text on what the tables show and do not show, and how long they took."""
    sizes = [f"{base['num_parameters'] / 1e6:.1f}" for base in result["bases"]]
    scale, numbers = result["scale"], {panel["table"] for panel in result["tables"]}
    one = f"The model has {sizes[0]} million parameters"
    several = f"The models have {' and '.join(dict.fromkeys(sizes))} million parameters"
    text = (
        LIMITS
        + LIMITS_OF_ABLATIONS * (not numbers.isdisjoint((2, 3, 4)))
        + LIMITS_OF_TEACHERS * (5 in numbers)
        + INTERVALS
    ).format(
        models=one if len(set(sizes)) == 1 else several,
        grouped="GRPO and SDPO spend" if 5 in numbers else "GRPO spends",
        groups=scale["batch_size"] // 8,
        batch=scale["batch_size"],
        **result["sampling"],
    )
    return f"{text}\n\n{time_text(result)}"


def time_text(result: Result) -> str:
    """Returns the time of all runs, as text."""
    seconds, workers = result["seconds"], result["num_workers"]
    hours = sum(seconds.values()) / 3600
    rates = seconds["learning_rates"] / 3600
    return (
        f"**Time:** {result['num_runs']} runs took {hours:.1f} hours on one processor core, "
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
    what = "The paper's tables" if of_paper else "Teachers and signals"
    return "\n\n".join([f"# {what} at laptop scale", picture, *parts]) + "\n"
