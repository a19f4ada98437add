"""The predictions, and those beside measured steps, as Markdown."""

from collections.abc import Mapping

from bench.cluster.splits import AHEAD, SHARED
from bench.tables import Result, made_by, markdown, number

SHOWN_GPUS = 8
"""the number whose splits the documents show"""
GROUPS = {
    "rollout": ("rollout",),
    "sync": ("sync",),
    "passes": ("teacher", "student", "backward"),
    "loss": ("loss",),
    "collectives": ("collectives",),
    "other": ("rewards", "optimizer", "other"),
}


def seconds(value: float) -> str:
    return number(value, 1 if value >= 9.95 else 2)


def split_name(row: Result) -> str:
    if row["num_gpus"] == 1:
        return "it samples, then trains"
    if row["mode"] == SHARED:
        return f"all {row['num_gpus']} sample, then train"
    ahead = ", one step ahead" if row["mode"] == AHEAD else ""
    return f"{row['rollout_gpus']} sample, {row['train_gpus']} train{ahead}"


def engines(row: Result) -> str:
    sampling, parallel = row["rollout_gpus"] or row["train_gpus"], row["tensor_parallel"]
    return f"{sampling // parallel} x {parallel}"


def weights(row: Result) -> str:
    if row["shards"] == 1:
        return "whole"
    return "sharded" if row["shards"] == row["train_gpus"] else f"sharded over {row['shards']}"


def grouped(parts: Mapping[str, float]) -> list[str]:
    return [seconds(sum(parts[part] for part in names)) for names in GROUPS.values()]


def split_row(row: Result) -> list[str]:
    head = [split_name(row), engines(row), weights(row)]
    if row["obstacle"]:
        return [*head, *[""] * len(GROUPS), row["obstacle"], ""]
    step, rate = seconds(row["step_s"]), number(row["tokens_per_s"], 0)
    step = f"**{step}**" if row["best"] or row["best_on_policy"] else step
    return [*head, *grouped(row["parts_s"]), step, rate]


def title(result: Result) -> str:
    return (
        f"{result['model']} on {result['gpu'].upper()}, {result['num_rollouts']} rollouts per "
        f"step, lengths: {result['lengths']} ({result['num_tokens']:,} tokens in all), prompts of "
        f"{result['student_prompt']} tokens (teacher {result['teacher_prompt']:,})"
    )


def splits_of_number(result: Result, num_gpus: int) -> str:
    """Returns a table of the splits of this number of GPUs."""
    header = [f"{num_gpus} GPUs" if num_gpus > 1 else "1 GPU", "engines x GPUs", "weights"]
    header += [*GROUPS, "step, s", "tokens/s"]
    rows = [split_row(row) for row in result["rows"] if row["num_gpus"] == num_gpus]
    return markdown(header, rows)


def splits_table(result: Result) -> str:
    caption = (
        f"A prediction, not a measurement: {title(result)}. Seconds by part; bold: the shortest "
        "step, and the shortest with rollouts of the newest weights. Of each split, the fastest "
        f"engines and weights that fit. By `{result['command']}`."
    )
    return f"{splits_of_number(result, SHOWN_GPUS)}\n\n{caption}"


def gpus_table(result: Result) -> str:
    """Returns a table with the best split of each number of GPUs."""
    bests = [row for row in result["rows"] if row["best"] or row["best_on_policy"]]
    alone = next((row["step_s"] for row in bests if row["num_gpus"] == 1), None)
    header = ["GPUs", "best split", "engines x GPUs", "weights", "step, s", "tokens/s"]
    header += ["times as fast as 1 GPU"]
    rows = [
        [
            str(row["num_gpus"]),
            split_name(row),
            engines(row),
            weights(row),
            seconds(row["step_s"]),
            number(row["tokens_per_s"], 0),
            number(alone and alone / row["step_s"], 1),
        ]
        for row in bests
    ]
    caption = (
        f"A prediction, not a measurement: {title(result)}. Two rows where rollouts one step ahead "
        f"are faster: the best with them, and without. By `{result['command']}`."
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def quantity(value: float, unit: str) -> str:
    """Returns a value with its unit, in a prefix's steps: 50 ms, 3.35 TB/s."""
    if not unit:
        return f"{value:g}"
    sizes = ((1e12, "T"), (1e9, "G"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
    size, prefix = next(pair for pair in sizes if value >= pair[0])
    return f"{value / size:.4g} {prefix}{unit}"


def constants_table(result: Result) -> str:
    """Returns a table of every constant with its source."""
    rows = [
        [
            name,
            quantity(one["value"], one["unit"]),
            "assumed" if one["assumed"] else "published",
            one["source"],
        ]
        for name, one in result["constants"].items()
    ]
    return markdown(["constant", "value", "", "source"], rows)


def changes_table(result: Result) -> str:
    """Returns a table of the best split where an assumed constant has another value."""
    rows = [
        [
            row["constant"],
            quantity(row["value"], row["unit"]),
            split_name(row),
            engines(row),
            weights(row),
            seconds(row["step_s"]),
        ]
        for row in result["changes"]
    ]
    header = ["assumed constant", "if it were", "best split", "engines x GPUs", "weights"]
    caption = f"A prediction, not a measurement: {title(result)}. By `{result['command']}`."
    return f"{markdown([*header, 'step, s'], rows)}\n\n{caption}"


def cpu_table(result: Result) -> str:
    """Returns a table of measured steps beside their prediction."""
    rows = [
        [
            str(row["num_processes"]),
            "one process" if row["num_processes"] == 1 else f"`{row['shard']}`",
            f"{row['measured_s']:.2f}",
            f"{row['fastest_s']:.2f} to {row['slowest_s']:.2f}",
            f"{row['predicted_s']:.2f}",
            f"{row['error']:+.1%}",
            f"{row['busy_s']:.2f}",
            f"{row['error_to_busy']:+.1%}",
            f"{row['others']:.2f}",
        ]
        for row in result["rows"]
    ]
    tokens = " or ".join(f"{number:,}" for number in result["num_tokens"])
    caption = (
        f"Seconds of a step of the preset `tiny`: {result['num_rollouts']} rollouts of {tokens} "
        f"tokens in all; {result['cores']} cores, one thread per process. Median of "
        f"{result['rounds']} rounds and their range. Errors are medians of the rounds' own. Busy: "
        "what the processes' processor seconds take on the cores, without any waiting. Others: how "
        "many cores other processes used; more than 0.1 lengthen the measured steps. Measured on "
        f"{made_by(result)}"
    )
    header = ["processes", "weights", "measured", "rounds", "predicted", "error"]
    header += ["busy", "error to busy", "others"]
    return f"{markdown(header, rows)}\n\n{caption}"
