"""Results as Markdown."""

from collections import Counter
from typing import Any

from bench.soak.flat import MIB
from bench.tables import Result, markdown

_LABELS = {
    "resident_bytes": "resident memory, MiB",
    "own_bytes": "memory of its own, swap included, MiB",
    "children_bytes": "its child processes, MiB",
    "open_files": "open files",
    "threads": "threads",
    "processes": "processes",
    "shared_memory_entries": "names in shared memory",
    "run_files": "files in the run directory",
}


def _made_by(part: dict[str, Any]) -> str:
    commit = part["commit"]
    changes = "+changes" if commit.endswith("+changes") else ""
    return (
        f"{part['device']}, beside a load of {part['load_before']:.0f} when it started; torch "
        f"{part['versions']['torch']}, at {commit[:10]}{changes}; by `{part['command']}`."
    )


def steps_table(result: Result) -> str:
    """Returns a table with one row per amount and count, and columns for each run."""
    part = result["parts"]["steps"]
    rows = []
    for name, label in _LABELS.items():
        row = [label]
        for run in part["runs"]:
            verdict, unit = run["verdicts"][name], MIB if name.endswith("_bytes") else 1
            digits = 1 if unit == MIB else 0
            first, last = (f"{verdict[at] / unit:,.{digits}f}" for at in ("second", "last"))
            slope = f"{verdict['slope'] / unit:+.1f}" if unit == MIB else ""
            row += [f"{first} to {last}", slope, "yes" if verdict["is_flat"] else "**no**"]
        rows.append(row)
    header = [""]
    for run in part["runs"]:
        header += [run["variant"], "per 1,000 steps", "flat"]
    samples = len(part["runs"][0]["series"]["step"])
    caption = (
        f"{part['num_steps']:,} steps, {samples} samples from outside. Each cell compares the "
        "second quarter of the run with the last: medians of memory, minima of counts. Memory is "
        f"flat if it grows by at most {part['limit_bytes'] // MIB} MiB, by the medians and by the "
        f"slope over the second half; counts, if they do not grow. {_made_by(part)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def kills_table(result: Result) -> str:
    """Returns a table with one row per phase in which kills fell."""
    part = result["parts"]["kills"]
    by_how = Counter((kill["phase"], kill["how"]) for kill in part["kills"])
    rows = [
        [name, str(count), str(by_how[name, "all"]), str(by_how[name, "main"])]
        for name, count in part["phases"].items()
    ]
    rows.append(["all", *(str(sum(int(row[i]) for row in rows)) for i in (1, 2, 3))])
    header = ["killed during", "kills", "with its children", "alone"]
    orphans = max((kill["orphans_s"] or 0.0 for kill in part["kills"]), default=0.0)
    variants = "; ".join(run["variant"] for run in part["undisturbed"])
    drawn = Counter(kill["moment"] for kill in part["kills"])
    moments = ", ".join(f"{count} {name}" for name, count in drawn.items())
    num_killed = sum(run["kills"] > 0 for run in part["runs"])
    caption = (
        f"{len(part['kills'])} kills ({moments}) in {num_killed} runs of {part['num_steps']} steps "
        f"({variants}); {part['num_differing']} runs ended otherwise than the "
        f"undisturbed one, {part['num_lost_checkpoints']} finished checkpoints were lost, "
        f"{part['num_orphaned']} processes and {len(part['left_in_shared_memory'])} names in "
        f"shared memory stayed. What a killed process had started ended within {orphans:.1f} s. "
        f"{_made_by(part)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def starts_table(result: Result) -> str:
    """Returns a table with one row per kind of second process."""
    part = result["parts"]["starts"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in part["cases"]:
        kinds.setdefault(case["second"], []).append(case)
    rows = [
        [
            name,
            str(len(cases)),
            str(sum(case["codes"].count(2) == 1 for case in cases)),
            str(sum(not case["differing"] for case in cases)),
        ]
        for name, cases in kinds.items()
    ]
    header = ["second process", "tries", "one refused", "the other as if alone"]
    caption = (
        f"Runs of {part['num_steps']} steps, which take {part['seconds_alone']:.0f} s alone. "
        f"{_made_by(part)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"
