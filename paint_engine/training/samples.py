"""The rollouts that are kept for the report, with what the objective said of every token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from paint_engine.prompts.anchors import extract_anchors, find_anchors
from paint_engine.recipes.losses import ObjectiveOutput
from paint_engine.types import PrivilegedRollout


def _teachers_view(item: PrivilegedRollout) -> dict[str, object]:
    anchors = extract_anchors(item.rollout.problem.solution)
    found = find_anchors(item.rollout.text, anchors)
    view: dict[str, object] = {
        "partial_solution": item.partial_solution,
        "mask_ratio": item.mask_ratio,
        "overlap": item.overlap,
        "anchors": [{"text": a, "found": f} for a, f in zip(anchors, found, strict=True)],
    }
    return view | ({"rationale": item.rationale} if item.rationale else {})


def _record(
    step: int,
    place: int,
    item: PrivilegedRollout,
    output: ObjectiveOutput,
    tokens: slice,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, object]:
    problem, rollout = item.rollout.problem, item.rollout
    record: dict[str, object] = {
        "step": step,
        "place": place,
        "problem_id": problem.problem_id,
        "problem": problem.problem,
        "solution": problem.solution,
        "answer": problem.answer,
        "truncated": rollout.truncated,
        "tokens": [tokenizer.decode([token]) for token in rollout.completion_ids],
    }
    # A reference solution in a rollout's place has no sampler's log-probabilities, and no verdict.
    if rollout.rollout_logprobs:
        record["correct"] = item.correct
    if item.partial_solution:
        record |= _teachers_view(item)
    if "ratio" in output.per_token:
        record |= {"reward": item.reward, "advantage": item.advantage}
    columns = {
        name: v[tokens].tolist() for name, v in output.per_token.items() if name != "logprobs"
    }
    return record | columns


def sample_records(
    step: int,
    items: Sequence[PrivilegedRollout],
    kept: Sequence[PrivilegedRollout],
    output: ObjectiveOutput,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, object]]:
    """One JSON-ready record for each of the micro-batch's `items` that is among `kept`, the first
    of the batch; `place` is where it is in it.

    output: the micro-batch's losses, the items' tokens in their order. Its `per_token` becomes a
    list each; what the teacher saw, a verdict and a reward are there where the objective has them.
    """
    records, start = [], 0
    for item in items:
        end = start + len(item.rollout.completion_ids)
        for place, candidate in enumerate(kept):
            if item is candidate:
                records.append(_record(step, place, item, output, slice(start, end), tokenizer))
        start = end
    return records
