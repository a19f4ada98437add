"""The report's table of where the loss acts: the kept rollouts' tokens by kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paint_engine.report.samples import ViewSettings, check_values, spread

MAX_SAMPLES = 256
KINDS = ("number", "line start", "symbol", "word")


@dataclass(frozen=True)
class KindsTable:
    """Headings, and a row of texts for each kind. `num_tokens` are counted in `num_samples`."""

    headings: list[str]
    rows: list[list[str]]
    num_samples: int
    num_tokens: int


def token_kinds(tokens: Sequence[str]) -> list[str]:
    """Returns the kind of each token: the first of a line, where a text branches; else digits; else
    neither letters nor digits; else a word or a part of one."""
    kinds, begins_line = [], True
    for token in tokens:
        text = token.strip()
        if begins_line:
            kind = "line start"
        elif text.isdigit():
            kind = "number"
        else:
            kind = "word" if any(map(str.isalnum, text)) else "symbol"
        kinds.append(kind)
        begins_line = "\n" in token
    return kinds


def kinds_table(samples: Sequence[Mapping[str, Any]], settings: ViewSettings) -> KindsTable | None:
    """Returns each kind's shares, and its divergence and loss per token, from at most `MAX_SAMPLES`
    of the kept rollouts; None if their recipe has no divergence per token. Raises BadFile as
    `view_sample` does."""
    chosen = spread(samples, MAX_SAMPLES)
    for sample in chosen:
        check_values(sample, settings)
    headings = {"token_kl": f"of the {settings.color.label}"}
    headings |= {"selected": "of the selected"} if settings.interpolates else {}
    headings = {n: text for n, text in headings.items() if all(n in one for one in chosen)}
    if settings.color.key not in headings or not chosen:
        return None
    kinds = [token_kinds(sample["tokens"]) for sample in chosen]
    counts = _sums(kinds, [[1] * len(found) for found in kinds])
    tokens = _shares(counts)
    shares = [_shares(_sums(kinds, [sample[name] for sample in chosen])) for name in headings]
    label = settings.color.label
    means = {"token_kl": f"{label} per token", "token_loss": "loss per token"}
    means = {n: text for n, text in means.items() if all(n in one for one in chosen)}
    values = [_sums(kinds, [sample[name] for sample in chosen]) for name in means]
    rows = []
    for kind in KINDS:
        cells = [_percent(tokens[kind])]
        for found in shares:
            times = found[kind] / tokens[kind] if tokens[kind] else 0.0
            cells.append(f"{_percent(found[kind])}, {times:.1f} times")
        cells += [f"{found[kind] / max(1, counts[kind]):.4f}" for found in values]
        rows.append([kind, *cells])
    names = ["kind of token", "of all tokens", *headings.values(), *means.values()]
    return KindsTable(names, rows, len(chosen), sum(map(len, kinds)))


def _sums(kinds: Sequence[Sequence[str]], values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns the sum of the values by kind. Both have a list per rollout with an entry per
    token."""
    sums: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for names, numbers in zip(kinds, values, strict=True):
        for name, number in zip(names, numbers, strict=True):
            sums[name] += number
    return sums


def _shares(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns each kind's share of the total, all zeros if that is zero."""
    total = sum(sums.values())
    return {kind: part / total if total else 0.0 for kind, part in sums.items()}


def _percent(share: float) -> str:
    return f"{share:.1%}"
