"""What happens inside the runs: how solutions are written, and which tokens the loss acts on.

A worker reads it from the run directory (`read_mechanisms`); `row_mechanisms` adds up a row's runs.
This module does not import PyTorch.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.paper.plan import EVALUATED, Scale, chosen_tables, shown_rows
from bench.paper.stats import row_records
from paint_engine.files import METRICS_FILE, SAMPLES_FILE, read_jsonl
from paint_engine.monitor.metrics import is_evaluation
from paint_engine.tiny.problems import way_of
from paint_engine.tiny.writer import CHECK

Record = dict[str, Any]
STEP_METRICS = (
    *("teacher_entropy", "student_entropy", "clipped_mass", "clipped_token_share"),
    *("mask_ratio", "overlap", "completion_length", "accuracy"),
)
"""metrics of a step that are kept, of the recipes that have them"""
STEPS_PER_BLOCK = 5
KINDS = ("result", "operand", "branch", "symbol", "word")
"""of tokens: a digit of a result, another digit, the first token of a line, what else is in a
formula, the rest"""
TOKEN_SUMS = ("token_loss", "token_kl", "clipped_mass")
"""values by token that are summed by kind, of the recipes that have them. `token_loss` is the loss,
which for PAINT is the divergence with the clip, and `token_kl` the divergence without it, in nats.
`clipped_mass` is the target's probability of the vocabulary entries whose summand is above the
clip: what the clip takes out of the gradient."""
_LABELLED = re.compile(r"^[^$\n]+: \$", re.MULTILINE)


def token_kinds(tokens: Sequence[str]) -> list[str]:
    """Returns the kind of each token of a solution.

    A formula is what stands between two dollar signs of a line. A digit is a token of its own. The
    digits of a final answer are operands: they are copied.
    """
    kinds = []
    begins_line, in_formula, after_equals = True, False, False
    for token in tokens:
        was_in_formula = in_formula
        for character in token:
            if character in "$\n":
                in_formula = character == "$" and not in_formula
                after_equals = False
            after_equals = after_equals or (in_formula and character == "=")
        if begins_line:
            kind = "branch"
        elif token.strip().isdigit():
            kind = "result" if after_equals else "operand"
        else:
            kind = "symbol" if was_in_formula or in_formula else "word"
        kinds.append(kind)
        begins_line = "\n" in token
    return kinds


def style_counts(texts: Iterable[str]) -> dict[str, int]:
    """Returns how many solutions there are, go "together", have a check, and are terse, which means
    without a label before a formula."""
    texts = list(texts)
    return {
        "solutions": len(texts),
        "together": sum(way_of(text) == "together" for text in texts),
        "checked": sum(CHECK in text for text in texts),
        "terse": sum(_LABELLED.search(text) is None for text in texts),
    }


def kind_sums(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns by kind the number of tokens and, of the recipes that have them, the number of
    selected ones, the sums of TOKEN_SUMS, and `by_chance`: how many would be selected if each
    rollout's selected positions were drawn at random."""
    sums = {kind: defaultdict[str, float](int) for kind in KINDS}
    for sample in samples:
        kinds = token_kinds(sample["tokens"])
        has_selected = "selected" in sample
        share = sum(sample["selected"]) / max(1, len(kinds)) if has_selected else 0.0
        for place, kind in enumerate(kinds):
            sums[kind]["tokens"] += 1
            if has_selected:
                sums[kind]["by_chance"] += share
            for name in ("selected", *TOKEN_SUMS):
                if name in sample:
                    sums[kind][name] += sample[name][place]
    return {
        kind: {name: _short(value) for name, value in found.items()} for kind, found in sums.items()
    }


def read_mechanisms(run_dir: Path) -> Record:
    """Returns what is kept of a run: a few kilobytes.

    steps: the STEP_METRICS, a value for each step; None for one in which the recipe had no rollout
        to train on.
    blocks: the `style_counts` of the kept rollouts of every STEPS_PER_BLOCK steps up to `step`.
        These are the first that a step trains on: of GRPO, in groups with right and wrong answers;
        of SFT, references.
    kinds: the `kind_sums` of the kept rollouts.
    """
    lines = [line for line in read_jsonl(run_dir / METRICS_FILE) if not is_evaluation(line)]
    samples = read_jsonl(run_dir / SAMPLES_FILE)
    blocks: dict[int, list[str]] = {}
    for sample in samples:
        end = STEPS_PER_BLOCK * -(-sample["step"] // STEPS_PER_BLOCK)
        text = "".join(sample["tokens"])
        blocks.setdefault(min(end, lines[-1]["step"]), []).append(text)
    return {
        "steps": {
            name: [_short(line[name]) if name in line else None for line in lines]
            for name in STEP_METRICS
            if any(name in line for line in lines)
        },
        "blocks": [{"step": step, **style_counts(blocks[step])} for step in sorted(blocks)],
        "kinds": kind_sums(samples),
    }


def _short(value: float) -> float:
    """Returns 4 digits of a number that is not whole."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def row_mechanisms(
    scale: Scale, numbers: Sequence[int], records: Mapping[str, Record]
) -> list[Record]:
    """Returns for each row on the ablations' base, over its seeds: the `style_counts` of the
    answers in each evaluation, and of a trained row what `read_mechanisms` returns, with means for
    the steps and sums for the rest."""
    size = scale.ablation_size
    settings = [row for table in chosen_tables(numbers) for row in shown_rows(scale, table)]
    rows = []
    for setting in dict.fromkeys(settings):
        found = row_records(scale, size, setting, records)
        evaluations = zip(*(record["evaluations"] for record in found), strict=True)
        answers = [
            {**_added([one["style"] for one in seeds]), "step": seeds[0]["step"]}
            for seeds in evaluations
        ]
        trained = {} if setting in EVALUATED else _pooled([one["mechanisms"] for one in found])
        rows.append({"setting": setting, "answers": answers, **trained})
    return rows


def _pooled(found: Sequence[Record]) -> Record:
    steps: dict[str, list[float | None]] = {}
    for name in STEP_METRICS:
        by_seed = [one["steps"][name] for one in found if name in one["steps"]]
        if by_seed:
            steps[name] = [_mean(values) for values in zip(*by_seed, strict=True)]
    # A recipe may train on no rollout of a block.
    blocks = [block for one in found for block in one["blocks"]]
    return {
        "steps": steps,
        "blocks": [
            {**_added([block for block in blocks if block["step"] == step]), "step": step}
            for step in sorted({block["step"] for block in blocks})
        ],
        "kinds": {kind: _added([one["kinds"][kind] for one in found]) for kind in KINDS},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the values that are there; None if none is."""
    there = [value for value in values if value is not None]
    return _short(statistics.fmean(there)) if there else None


def _added(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the sums by name; a name that is missing counts 0."""
    names = dict.fromkeys(name for one in counts for name in one)
    return {name: sum(one.get(name, 0) for one in counts) for name in names}
