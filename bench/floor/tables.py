"""The predicted times as Markdown."""

from collections.abc import Iterable

from bench.tables import Result, markdown, number

DIVERGENCES = {"forward_kl": "forward KL", "jsd": "JSD"}
LIMITS = {"memory": "bytes", "instructions": "instructions", "special functions": "special"}


def name_of(row: Result) -> str:
    return f"Qwen3 {row['model'].upper()}, {row['device']}"


def head_of(row: Result) -> str:
    return "trainable" if row["trainable"] else "frozen"


def milliseconds(seconds: float) -> str:
    return number(seconds * 1e3, 1 if 0 < seconds < 0.01 else 0)


def by_limit(row: Result) -> list[str]:
    return [milliseconds(row["rows_by_limit_s"][limit]) for limit in LIMITS]


def smallest_share(rows: Iterable[Result]) -> float:
    return min(row["clipped_share"] for row in rows)


def sizes(result: Result) -> str:
    devices = "; ".join(
        f"{device['name']} {device['flops_per_s'] / 1e12:.0f} TFLOP/s and "
        f"{device['bytes_per_s'] / 1e12:.1f} TB/s"
        for device in result["devices"]
    )
    return (
        f"Counted, not measured: N {result['num_tokens']:,}, V {result['vocab_size']:,}; "
        f"{devices}; by `python -m bench.floor`."
    )


def parts_table(result: Result) -> str:
    """Returns the parts of the predicted time of the first case."""
    header = ["", "head", "rows per chunk", "products", "row kernels"]
    header += [f"by {name}" for name in LIMITS.values()]
    header += ["head's gradient", "other", "predicted, ms", "ratio", "before", "extra memory"]
    first, share = result["cases"][0], smallest_share(result["rows"])
    rows = [
        [
            f"{name_of(row)}, {DIVERGENCES[row['divergence']]}",
            head_of(row),
            number(row["rows_per_chunk"], 0),
            milliseconds(row["products_s"]),
            milliseconds(row["rows_s"]),
            *by_limit(row),
            *(milliseconds(row[key]) for key in ("head_gradient_s", "other_s", "predicted_s")),
            f"{row['ratio_to_floor']:.2f}",
            f"{row['earlier']['ratio_to_floor']:.2f}",
            f"{row['extra_bytes'] / 1e9:.1f} GB",
        ]
        for row in result["rows"]
        if row["case"] == first and row["clipped_share"] == share
    ]
    caption = (
        f"Milliseconds; rollouts {first}, {share:.0%} of rows clipped, bfloat16 head. A row kernel "
        f"takes the largest of its times by each limit. {sizes(result)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def lengths_table(result: Result) -> str:
    """Returns the predicted time as a multiple of the bare products, by rollout lengths, before and
    after."""
    shares = sorted({row["clipped_share"] for row in result["rows"]})
    columns = [("forward_kl", trainable, share) for trainable in (False, True) for share in shares]
    # The JSD reads every row twice, whether an entry of it is clipped or not.
    columns += [("jsd", trainable, shares[0]) for trainable in (False, True)]
    header = ["", "rollout lengths", "rows again"]
    for divergence, trainable, share in columns:
        head = "trainable" if trainable else "frozen"
        header.append(f"JSD, {head}" if divergence == "jsd" else f"{head}, {share:.0%} clipped")
    lines: dict[tuple[str, str], dict[tuple[str, bool, float], Result]] = {}
    for row in result["rows"]:
        line = lines.setdefault((name_of(row), row["case"]), {})
        line[row["divergence"], row["trainable"], row["clipped_share"]] = row
    rows = [
        [
            name,
            case,
            number(line[columns[0]]["rows_redone"], 0),
            *(
                f"{line[column]['earlier']['ratio_to_floor']:.2f} → "
                f"{line[column]['ratio_to_floor']:.2f}"
                for column in columns
            ),
        ]
        for (name, case), line in lines.items()
    ]
    caption = (
        "Predicted time over that of the bare products, three with a frozen head and four with a "
        "trainable one, before and after; forward KL where nothing is said. The JSD's is the same "
        f"at each share of clipped rows. {sizes(result)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def head_table(result: Result) -> str:
    """Returns what the memory traffic of a trainable head's gradient adds to four bare products."""
    header = ["", "rollout lengths", "products", "its bytes, ms", "four products, ms", "share"]
    header += ["products before", "share before"]
    share = smallest_share(result["rows"])
    rows = [
        [
            name_of(row),
            row["case"],
            number(row["num_head_products"], 0),
            f"{row['head_gradient_s'] * 1e3:.1f}",
            f"{row['gemms_s'] * 1e3:.1f}",
            f"{row['head_gradient_s'] / row['gemms_s']:.1%}",
            number(row["earlier"]["num_head_products"], 0),
            f"{row['earlier']['head_gradient_s'] / row['gemms_s']:.1%}",
        ]
        for row in result["rows"]
        if row["trainable"] and row["divergence"] == "forward_kl" and row["clipped_share"] == share
    ]
    return f"{markdown(header, rows)}\n\n{sizes(result)}"


def top_k_table(result: Result) -> str:
    """Returns the parts of the predicted time of losses on a teacher's top-k."""
    header = ["", "head", "loss", "products", "products, ms", "row kernels"]
    header += [f"by {name}" for name in LIMITS.values()]
    header += ["head's gradient", "other", "predicted, ms", "of the whole vocabulary", "before, ms"]
    rows = [
        [
            name_of(row),
            head_of(row),
            row["case"],
            number(row["num_products"], 0),
            milliseconds(row["products_s"]),
            milliseconds(row["rows_s"]),
            *by_limit(row),
            *(milliseconds(row[key]) for key in ("head_gradient_s", "other_s", "predicted_s")),
            f"{row['ratio_to_whole_vocabulary']:.2f}",
            milliseconds(row["earlier"]["predicted_s"]) if row["earlier"] else "",
        ]
        for row in result["top_k"]
    ]
    caption = (
        f"Milliseconds; k = {result['top_k'][0]['k']}; at any lengths, divergence and share of "
        "clipped rows. The whole vocabulary is that of the forward KL with the same head, rollouts "
        f"{result['cases'][0]}. A loss of a served top-k did not exist before. {sizes(result)}"
    )
    return f"{markdown(header, rows)}\n\n{caption}"
