"""Markdown tables of the kernels' comparison."""

from bench.tables import Result, exponent, made_by, markdown, milliseconds, number

HEADLINE_TOKENS = 32768


def gradient_error(row: Result) -> str:
    """Returns the largest of a row's gradient errors, preceded by the error before rounding if
    measured."""
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
        # The reason why the variant was not timed replaces its time.
        cells = [row["reason"], "", ""]
    bandwidth = row.get("row_kernel_bytes_per_s")
    extra_cell = [number(bandwidth and bandwidth / 1e12, 2)] if with_bandwidth else []
    error = "" if row["status"] == "failed accuracy" else gradient_error(row)
    products = number(row.get("products"), 0)
    return [name, products, *cells, *extra_cell, memory, error, lacks]


def describe(shape: Result, dtype: str) -> str:
    lengths = shape.get("mixture") or f"of {shape['rollout_tokens']:,}"
    return (
        f"N {shape['num_tokens']:,} in rollouts {lengths}, "
        f"H {shape['hidden']:,}, V {shape['vocab_size']:,}, {dtype}"
    )


def kernel_group_table(group: Result) -> str:
    """Variants that do equal work at one shape: median time, extra memory and accuracy."""
    with_bandwidth = any("row_kernel_bytes_per_s" in row for row in group["rows"])
    header = [
        f"{group['group']}, forward and backward",
        "products",
        "ms",
        "of floor",
        "in products",
    ]
    header += ["row TB/s"] if with_bandwidth else []
    header += ["extra MB", "gradient error", "lacks"]
    rows = [kernel_row(row, with_bandwidth) for row in group["rows"]]
    caption = f"{describe(group['shape'], group['dtype'])}, mean KL {group['mean_kl']:.1e} nats."
    best = group.get("fastest_peer")
    if best:
        caption += f" The fastest peer, {best['variant']}, takes {best['ratio']:.2f} times as long."
    return f"{markdown(header, rows)}\n\n{caption}"


def headline(result: Result) -> list[Result]:
    """Returns the groups of one shape: the largest model, at 32,768 tokens if that was measured."""
    groups = result["groups"]

    def rank(group: Result) -> tuple[int, bool, int]:
        shape = group["shape"]
        num_tokens = shape["num_tokens"]
        return shape["hidden"], num_tokens == HEADLINE_TOKENS, num_tokens

    best = max(rank(group) for group in groups)
    return [group for group in groups if rank(group) == best]


def kernels_table(result: Result) -> str:
    """Returns a table of every group at the headline shape."""
    return groups_table(result, headline(result))


def kernels_first_table(result: Result) -> str:
    """Returns a table of the PAINT loss alone, for the README."""
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
    """Returns a table of `paint_loss` and plain PyTorch at every measured shape."""
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
                *(cells[2], cells[3], cells[5], cells[6]),
                plain.get("reason", "") if time is None else milliseconds(time),
            ]
        )
    return f"{markdown([*header, 'plain ms'], rows)}\n\nMeasured on {made_by(result)}"
