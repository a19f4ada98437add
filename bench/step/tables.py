"""Markdown tables of the training steps."""

from bench.tables import Result, made_by, markdown, milliseconds, number

PART_ORDER = ("rollout", "sync", "student", "teacher", "loss", "backward", "optimizer", "other")


def engine_step_table(case: Result) -> str:
    """Returns a table of a whole step by part, including the rollouts."""
    step = case["step"]
    rows = [
        [name, milliseconds(1e3 * seconds), f"{seconds / step['seconds']:.1%}"]
        for name in PART_ORDER
        if (seconds := step["part_seconds"].get(name)) is not None
    ]
    rows.append(["the step", milliseconds(1e3 * step["seconds"]), ""])
    caption = (
        f"Mean of {step['num_steps']} steps, {step['completion_tokens_per_s']:,.0f} completion "
        "tokens/s."
    )
    header = [f"a step of {case['case']}", "ms", "share"]
    return f"{markdown(header, rows)}\n\n{caption}"


def engine_row(row: Result, memory: str) -> list[str]:
    name = f"`{row['loop']}`" if row["kind"] == "ours" else row["loop"]
    parts = row.get("part_ms", {})
    cells = [row.get("reason", ""), "", ""]
    if row["status"] == "measured":
        cells = [
            milliseconds(row["median_ms"]),
            number(row["completion_tokens_per_s"], 0),
            f"{row['utilisation']:.1%}",
        ]
    times = [milliseconds(parts[part]) if part in parts else "" for part in PART_ORDER[2:]]
    size = row.get(memory)
    return [name, *cells, *times, number(size and size / 1e6, 0), ", ".join(row["lacks"])]


def engine_case_table(case: Result) -> str:
    """Tables of one case: whole steps if rollouts were sampled, then the training part of every
    loop."""
    tables = [engine_step_table(case)] if "step" in case else []
    memory = "extra_bytes" if any("extra_bytes" in row for row in case["rows"]) else "peak_bytes"
    header = [f"training part of {case['case']}", "ms", "tokens/s", "of GEMM", *PART_ORDER[2:]]
    header += ["extra MB" if memory == "extra_bytes" else "peak MB", "lacks"]
    rows = [engine_row(row, memory) for row in case["rows"]]
    tokens = case["num_tokens"]
    caption = (
        f"{case['num_rollouts']} rollouts, at most {case['rows_a_pass']} per pass; "
        f"{tokens['student']:,} student and {tokens['teacher']:,} teacher tokens, each with the "
        f"{tokens['completion']:,} completion tokens that tokens/s counts; {case['dtype']}, "
        f"attention {case['attention']}. Of GEMM: the model's "
        f"{sum(case['flops'].values()) / 1e12:,.3g} TFLOP, divided by the time and the measured "
        f"rate of GEMMs, {case['gemm_flops_per_s'] / 1e12:,.3g} TFLOP/s."
    )
    for name, found in case["ratios"].items():
        parts = [f"{ratio:.2f} times the {label}" for label, ratio in found.items()]
        caption += f" {name}: {', '.join(parts)}."
    return "\n\n".join([*tables, markdown(header, rows), caption])


def engine_table(result: Result) -> str:
    """Tables of all cases."""
    tables = [engine_case_table(case) for case in result["cases"]]
    return "\n\n".join([*tables, f"Measured on {made_by(result)}"])


def estimates_table(result: Result) -> str:
    """Returns a table with one row per teacher: the measured and the predicted time of a step over
    the plain step's, and the error of the prediction."""
    header = ["teacher", "TFLOP", "measured", "rounds", "predicted", "error"]
    rows = [
        [
            row["teacher"],
            f"{sum(row['flops'].values()) / 1e12:.3g}",
            f"{row['measured']:.2f}",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
            f"{row['predicted']:.2f}",
            f"{row['error']:+.1%}",
        ]
        for row in result["rows"]
    ]
    sizes = ", ".join(
        f"{name} H {hidden} with {layers} layers"
        for name, (hidden, layers) in result["models"].items()
    )
    caption = (
        "Processor time of a step over that with the base as the teacher, "
        f"{result['plain_ms']:,.0f} ms: the median of {result['rounds']} rounds, their range, and "
        "the ratio of the operations that the dry run counts. "
        f"{result['rollouts']} rollouts of {result['completion']} tokens, "
        f"V {result['num_tokens']:,}; {sizes}. Measured on {made_by(result)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"
