"""Tables of what happens inside the runs, as Markdown."""

from bench.paper.cells import percent, setting_label
from bench.paper.mechanisms import KINDS
from bench.paper.plan import KEPT_ROLLOUTS
from bench.tables import Result, markdown

KIND_SHARES = ("tokens", "selected", "token_kl")
KIND_LABELS = {
    "result": "digit of a result",
    "operand": "other digit",
    "branch": "first token of a line",
    "symbol": "other, in a formula",
    "word": "other",
}


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
