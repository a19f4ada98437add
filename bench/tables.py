"""Results as Markdown: pure functions of the JSON that the benchmarks print."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Result = dict[str, Any]
HEADLINE_TOKENS = 32768


def markdown(header: list[str], rows: list[list[str]]) -> str:
    left = (header[0], "lacks")
    lines = [header, ["---" if name in left else "---:" for name in header], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float) -> str:
    return number(value, 0 if value >= 100 else 1)


def exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def made_by(result: Result) -> str:
    """The end of every caption: device, library versions, commit and command."""
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if name != "python"
    )
    commit = result["commit"]
    at = f", at {commit[:10]}{'+changes' if commit.endswith('+changes') else ''}" if commit else ""
    threads = "" if "cuda" in result["versions"] else f", {result['num_threads']} threads"
    return f"{result['device']}{threads}; {versions}{at}; by `{result['command']}`."


def tiny_table(result: Result) -> str:
    """One row a seed: Avg@k before and after, the paired difference and the time."""
    rows = []
    for run in result["runs"]:
        low, high = run["paired_difference_ci95"]
        rows.append(
            [
                str(run["seed"]),
                f"{run['avg_at_k_before']:.1%}",
                f"{run['avg_at_k_after']:.1%}",
                f"{100 * run['paired_difference']:+.1f} points",
                f"{100 * low:+.1f} to {100 * high:+.1f}",
                f"{run['seconds']:.0f} s",
            ]
        )
    k, count = result["runs"][0]["num_samples"], result["runs"][0]["num_problems"]
    header = ["seed", f"Avg@{k} before", "after", "difference", "95% interval", "time"]
    caption = (
        f"{count} held-out problems, {k} samples each; {result['num_threads']} threads, "
        f"torch {result['versions']['torch']}; by `{result['command']}`."
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def gradient_error(row: Result) -> str:
    """The largest of a row's errors by its own rounding, and the one before it where measured."""
    errors = [row[key] for key in ("gradient_error", "head_gradient_error") if key in row]
    if not errors:
        return ""
    before = row.get("gradient_error_before_rounding")
    after = exponent(max(errors))
    return after if before is None else f"{exponent(before)}, rounded {after}"


def kernel_row(row: Result, with_bandwidth: bool) -> list[str]:
    name = f"`{row['variant']}`" if row["kind"] in ("floor", "ours") else row["variant"]
    extra = row.get("extra_bytes")
    memory = number(None if extra is None else extra / 1e6, 0)
    lacks = ", ".join(row["lacks"])
    if "median_ms" in row:
        cells = [
            milliseconds(row["median_ms"]),
            number(row.get("ratio_to_floor"), 2),
            number(row.get("gemm_equivalents"), 2),
        ]
    else:
        # Whatever kept the variant from being timed stands in place of its time.
        cells = [row["reason"], "", ""]
    bandwidth = row.get("row_kernel_bytes_per_s")
    extra_cell = [number(bandwidth and bandwidth / 1e12, 2)] if with_bandwidth else []
    error = "" if row["status"] == "failed accuracy" else gradient_error(row)
    return [name, *cells, *extra_cell, memory, error, lacks]


def describe(shape: Result, dtype: str) -> str:
    return (
        f"N {shape['num_tokens']:,} in rollouts of {shape['rollout_tokens']:,}, "
        f"H {shape['hidden']:,}, V {shape['vocab_size']:,}, {dtype}"
    )


def kernel_group_table(group: Result) -> str:
    """Variants that do equal work at one shape: the time's median, extra memory, accuracy."""
    with_bandwidth = any("row_kernel_bytes_per_s" in row for row in group["rows"])
    header = [f"{group['group']}, forward and backward", "ms", "of floor", "GEMMs"]
    header += ["row TB/s"] if with_bandwidth else []
    header += ["extra MB", "gradient error", "lacks"]
    rows = [kernel_row(row, with_bandwidth) for row in group["rows"]]
    caption = f"{describe(group['shape'], group['dtype'])}, mean KL {group['mean_kl']:.1e} nats."
    best = group.get("fastest_peer")
    if best:
        caption += f" The fastest peer, {best['variant']}, takes {best['ratio']:.2f} times as long."
    return f"{markdown(header, rows)}\n\n{caption}"


def headline(result: Result) -> list[Result]:
    """The groups of one shape: the largest model's, at 32,768 tokens where that was measured."""
    groups = result["groups"]

    def rank(group: Result) -> tuple[int, bool, int]:
        shape = group["shape"]
        num_tokens = shape["num_tokens"]
        return shape["hidden"], num_tokens == HEADLINE_TOKENS, num_tokens

    best = max(rank(group) for group in groups)
    return [group for group in groups if rank(group) == best]


def kernels_table(result: Result) -> str:
    """Every group at the headline shape."""
    return groups_table(result, headline(result))


def kernels_first_table(result: Result) -> str:
    """The PAINT loss alone, for the README."""
    return groups_table(result, headline(result)[:1])


def groups_table(result: Result, groups: list[Result]) -> str:
    tables = [kernel_group_table(group) for group in groups]
    ratios = ""
    if "time_ratio" in result and len({str(g["shape"]) for g in result["groups"]}) == 1:
        parts = [f"{result['time_ratio']:.2f} of plain PyTorch's time"]
        if "memory_ratio" in result:
            parts.append(f"{result['memory_ratio']:.2f} of its extra memory")
        ratios = f"`paint_loss` takes {' and '.join(parts)}. "
    return "\n\n".join([*tables, f"{ratios}Measured on {made_by(result)}"])


def kernel_shapes_table(result: Result) -> str:
    """`paint_loss` at every measured shape, beside plain PyTorch."""
    header = ["H", "N", "gemms ms", "`paint_loss` ms", "of floor", "extra MB", "gradient error"]
    rows = []
    for group in result["groups"]:
        if group["group"] != "PAINT":
            continue
        by_name = {row["variant"]: row for row in group["rows"]}
        ours, floor = by_name["paint_loss"], by_name.get("gemms", {})
        plain = by_name.get("plain", {})
        time = plain.get("median_ms")
        cells = kernel_row(ours, False)
        rows.append(
            [
                f"{group['shape']['hidden']:,}",
                f"{group['shape']['num_tokens']:,}",
                "" if "median_ms" not in floor else milliseconds(floor["median_ms"]),
                *(cells[1], cells[2], cells[4], cells[5]),
                plain.get("reason", "") if time is None else milliseconds(time),
            ]
        )
    return f"{markdown([*header, 'plain ms'], rows)}\n\nMeasured on {made_by(result)}"


def scaling_table(result: Result) -> str:
    """One row per number of tokens and layout; the fitted exponent and memory ratio below."""
    header = ["N", "rollouts of", "ms", "extra MB", "of it float32 rows and values", "the rest"]
    rows = [
        [
            f"{point['num_tokens']:,}",
            f"{point['rollout_tokens']:,}",
            milliseconds(point["median_ms"]),
            number(point["extra_bytes"] / 1e6, 0),
            number(point["kept_bytes"] / 1e6, 0),
            number(point["working_bytes"] / 1e6, 0),
        ]
        for layout in result["layouts"]
        for point in layout["points"]
    ]
    fits = "; ".join(
        f"{layout['layout']}: time as N^{layout['time_exponent']:.2f}, working memory of the "
        f"longest {layout['memory_ratio']:.2f} times that of the shortest"
        for layout in result["layouts"]
    )
    shape = f"H {result['hidden']:,}, V {result['vocab_size']:,}, {result['dtype']}"
    caption = (
        f"`paint_loss`, forward and backward, {shape}. Fits: {fits}. Measured on {made_by(result)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def logit_formats_table(result: Result) -> str:
    """Relative gradient errors, the median over seeds and the largest, by format and mean KL."""
    header = ["what is rounded", "bytes", *(f"KL {kl:g}" for kl in result["mean_kls"])]
    rows = [
        [
            line["format"],
            number(line["bytes"], 0),
            *(f"{cell['median']:.1e} ({cell['largest']:.1e})" for cell in line["errors"]),
        ]
        for line in result["formats"]
    ]
    caption = (
        f"Relative gradient error against float64, by norm: median over {result['num_seeds']} "
        f"seeds (largest). {result['num_rows']} rows, H {result['hidden']:,}, "
        f"V {result['vocab_size']:,}; bytes per token and vocabulary entry. "
        f"Emulated on {made_by(result)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def floor_table(result: Result) -> str:
    """Counted products and bytes, and the time that they predict."""
    header = ["", "rows a chunk", "three products", "row kernels", "other", "predicted", "ratio"]
    header.append("extra memory")
    rows = [
        [
            f"Qwen3 {row['model'].upper()}, {row['device']}",
            number(row["rows_per_chunk"], 0),
            *(
                f"{row[key] * 1e3:.0f} ms"
                for key in ("gemms_s", "rows_s", "other_s", "predicted_s")
            ),
            f"{row['ratio_to_floor']:.2f}",
            f"{row['extra_bytes'] / 1e9:.1f} GB",
        ]
        for row in result["rows"]
    ]
    devices = "; ".join(
        f"{device['name']} {device['flops_per_s'] / 1e12:.0f} TFLOP/s and "
        f"{device['bytes_per_s'] / 1e12:.1f} TB/s"
        for device in result["devices"]
    )
    caption = (
        f"Counted, not measured: N {result['num_tokens']:,}, V {result['vocab_size']:,}, rollouts "
        f"of {result['rollout_tokens']:,} tokens, frozen bfloat16 head; {devices}; by "
        "`python -m bench.floor`."
    )
    return f"{markdown(header, rows)}\n\n{caption}"


PART_ORDER = ("rollout", "sync", "student", "teacher", "loss", "backward", "optimizer", "other")


def engine_step_table(case: Result) -> str:
    """A whole step with its rollouts, by part."""
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
    """The steps of one model: whole ones where rollouts were sampled, then the training part of
    every loop on the same rollouts."""
    tables = [engine_step_table(case)] if "step" in case else []
    memory = "extra_bytes" if any("extra_bytes" in row for row in case["rows"]) else "peak_bytes"
    header = [f"training part of {case['case']}", "ms", "tokens/s", "of GEMM", *PART_ORDER[2:]]
    header += ["extra MB" if memory == "extra_bytes" else "peak MB", "lacks"]
    rows = [engine_row(row, memory) for row in case["rows"]]
    tokens = case["num_tokens"]
    caption = (
        f"{case['num_rollouts']} rollouts, at most {case['rows_a_pass']} a pass; "
        f"{tokens['student']:,} tokens of the student, {tokens['teacher']:,} of the teacher, "
        f"{tokens['completion']:,} of them completions, which tokens/s counts; {case['dtype']}, "
        f"attention {case['attention']}. Of GEMM: the model's "
        f"{sum(case['flops'].values()) / 1e12:,.3g} TFLOP over time and the measured "
        f"{case['gemm_flops_per_s'] / 1e12:,.3g} TFLOP/s."
    )
    for name, found in case["ratios"].items():
        parts = [f"{ratio:.2f} times the {label}" for label, ratio in found.items()]
        caption += f" {name}: {', '.join(parts)}."
    return "\n\n".join([*tables, markdown(header, rows), caption])


def engine_table(result: Result) -> str:
    """Every model's steps."""
    tables = [engine_case_table(case) for case in result["cases"]]
    return "\n\n".join([*tables, f"Measured on {made_by(result)}"])


TABLES: dict[tuple[str, str], Callable[[Result], str]] = {
    ("tiny", ""): tiny_table,
    ("kernels", ""): kernels_table,
    ("kernels", "first"): kernels_first_table,
    ("kernels", "shapes"): kernel_shapes_table,
    ("scaling", ""): scaling_table,
    ("logit_formats", ""): logit_formats_table,
    ("floor", ""): floor_table,
    ("engine", ""): engine_table,
}
"""by the result's own name and the view that a marker asks for"""


def fill(
    document: str,
    results: Callable[[str], Result],
    tables: Mapping[tuple[str, str], Callable[[Result], str]] = TABLES,
) -> str:
    """The document with every table made anew.

    A table stands between `<!-- begin FILE -->` and `<!-- end FILE -->`, or `FILE:VIEW` on both;
    `results(FILE)` is the content of that result file.
    """

    def table(match: re.Match[str]) -> str:
        marker = match["marker"]
        file, _, view = marker.partition(":")
        result = results(file)
        body = tables[result["name"], view](result)
        return f"<!-- begin {marker} -->\n{body}\n<!-- end {marker} -->"

    pattern = r"<!-- begin (?P<marker>\S+) -->.*?<!-- end (?P=marker) -->"
    return re.sub(pattern, table, document, flags=re.DOTALL)


def markers(document: str) -> list[str]:
    return re.findall(r"<!-- begin (\S+) -->", document)
