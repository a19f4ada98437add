"""Results as Markdown: pure functions of the JSON that the benchmarks print.

A folder's own tables are in its `tables.py`; `bench.plots` lists all tables.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Result = dict[str, Any]
Table = Callable[[Result], str]
"""a result as Markdown"""


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
    """Returns the end of a caption: device, library versions, commit and command."""
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if name != "python"
    )
    commit = result["commit"]
    at = f", at {commit[:10]}{'+changes' if commit.endswith('+changes') else ''}" if commit else ""
    threads = "" if "cuda" in result["versions"] else f", {result['num_threads']} threads"
    return f"{result['device']}{threads}; {versions}{at}; by `{result['command']}`."


def tiny_table(result: Result) -> str:
    """Returns a table with one row per seed: Avg@k before and after, the paired difference and the
    time."""
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


def architectures_table(result: Result) -> str:
    """One row per architecture; below it, the reasons of those that are refused."""
    rows, reasons = [], []
    for found in result["outcomes"]:
        if found["trains"]:
            scale, error = f"{found['logit_scale']:g}", exponent(found["logit_error"])
            rows.append([found["name"], "yes", scale, error])
        else:
            rows.append([found["name"], "refused", "", ""])
            reasons.append(f"{found['name']}: {found['reason']}.")
    versions = result["versions"]
    caption = (
        f"{result['num_steps']} steps each; the error is the largest difference to the logits of "
        f"the model's own forward, with the trained adapter, relative to the largest logit; torch "
        f"{versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}; "
        f"by `{result['command']}`."
    )
    header = ["architecture", "trains", "factor on the logits", "error of our logits"]
    return "\n\n".join([markdown(header, rows), caption, *reasons])


def scaling_table(result: Result) -> str:
    """Returns a table with one row per number of tokens and layout; the fitted exponent and memory
    ratio below."""
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
    """Returns relative gradient errors by format and mean KL: median and maximum over seeds."""
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


def real_logits_table(result: Result) -> str:
    """Returns gradient errors by objective, and by the order and the share of the columns in
    float16."""

    def cell(found: Result) -> str:
        return f"{found['error']:.1e} ({found['row_p99']:.1e})"

    first = result["errors"][0]["products"]
    by_power = [(row["order"], row["float16_share"], row["power"]) for row in first]
    header = ["objective", "bfloat16"]
    header += [
        "float16" if share == 1 else f"{share:.4g}, {order}, power {power:g}"
        for order, share, power in by_power
    ]
    rows = [
        [line["objective"], cell(line["bfloat16"]), *map(cell, line["products"])]
        for line in result["errors"]
    ]
    # A table of few rows and many columns is read better the other way round.
    turned = [list(column) for column in zip(header, *rows, strict=True)]
    clipped, missed = result["clipped_rows"], result["mispredicted_rows"]
    caption = (
        "Relative error of the gradient by the hidden states against float64, by norm (the 99th "
        "percentile of its rows). The product with the head is emulated in bfloat16, in float16, "
        "and in two classes: this share of the columns in float16, the others in float8. "
        f"{result['num_tokens']:,} tokens of {result['model']}, V {result['vocab_size']:,}, H "
        f"{result['hidden']:,}; the order comes from {result['order_tokens']:,} tokens of other "
        f"solutions. {clipped / result['num_tokens']:.1%} of the rows have a clipped entry; of "
        f"{missed / max(clipped, 1):.1%} of these the clipped mass is predicted wrong. Emulated on "
        f"{made_by(result)}"
    )
    return f"{markdown(turned[0], turned[1:])}\n\n{caption}"


def real_logits_predicted_table(result: Result) -> str:
    """Returns the predicted time of the product in two classes at Qwen3-8B."""
    header = [
        "",
        "in float16",
        "exact",
        "product",
        "gradient",
        "fast",
        "of exact",
        "three products",
    ]
    rows = [
        [
            row["device"],
            f"{row['float16_share']:.3g}",
            *(
                f"{seconds * 1e3:.1f} ms"
                for seconds in (
                    row["exact_s"],
                    -row["saved"]["product_s"],
                    -row["saved"]["gradient_s"],
                    row["fast_s"],
                )
            ),
            f"{row['fast_s'] / row['exact_s']:.2f}",
            f"{row['gemms_s'] * 1e3:.1f} ms",
        ]
        for row in result["predicted"]
    ]
    copies = result["predicted"][0]["extra_bytes"] / 1e9
    caption = (
        "Qwen3-8B, 32,768 tokens in rollouts of 1,024, frozen head, forward KL: predicted from "
        "the counts of `bench.floor`, with float8 products at twice the rate of float16's. The "
        f"copies of the head take {copies:.2f} GB at the first share."
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def fill(
    document: str,
    results: Callable[[str], Result],
    tables: Mapping[tuple[str, str], Table],
) -> str:
    """Returns the document with every table regenerated.

    A table stands between `<!-- begin FILE -->` and `<!-- end FILE -->`, or `FILE:VIEW` on both;
    `results(FILE)` returns the content of that result file.
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
