"""What the tables' cells and captions say: labels, numbers, and how a result was made."""

from typing import Any

from bench.paper.plan import TABLES
from bench.tables import Result

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
    "clip-own-none": "PAINT without the clip (exploratory)",
    "clip-other-0.06": "the control at PAINT's rate (exploratory)",
    "clip-other-none": "the control at PAINT's rate, without the clip (exploratory)",
}
NOT_IN_PAPER = "none"
QUICK = "**A quick version:** one base, two seeds, few steps, some of the rows. Not a result."
UNPLANNED = "**Exploratory:** not part of the plan; added after the first runs."


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


def setting_label(setting: str) -> str:
    """Returns the words for a row of any table."""
    if setting in LABELS:
        return LABELS[setting]
    kind, first, second = setting.split("-")
    names = {"rho": f"mask {first} / {second}", "blend": f"k {first}, f {second}"}
    return names[kind]


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
