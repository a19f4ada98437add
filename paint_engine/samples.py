"""The rollouts that are kept for the report, with what the loss said of every token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from paint_engine.anchors import extract_anchors, find_anchors
from paint_engine.objectives import PaintLossOutput
from paint_engine.types import PrivilegedRollout


def _record(
    step: int,
    place: int,
    item: PrivilegedRollout,
    output: PaintLossOutput,
    tokens: slice,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, object]:
    problem, rollout = item.rollout.problem, item.rollout
    anchors = extract_anchors(problem.solution)
    found = find_anchors(rollout.text, anchors)
    return {
        "step": step,
        "place": place,
        "problem_id": problem.problem_id,
        "problem": problem.problem,
        "solution": problem.solution,
        "answer": problem.answer,
        "partial_solution": item.partial_solution,
        "mask_ratio": item.mask_ratio,
        "overlap": item.overlap,
        "anchors": [{"text": a, "found": f} for a, f in zip(anchors, found, strict=True)],
        "correct": item.correct,
        "truncated": rollout.truncated,
        "tokens": [tokenizer.decode([token]) for token in rollout.completion_ids],
        "token_loss": output.token_loss[tokens].tolist(),
        "token_kl": output.token_kl[tokens].tolist(),
        "student_entropy": output.student_entropy[tokens].tolist(),
        "teacher_entropy": output.teacher_entropy[tokens].tolist(),
        "selected": output.selected[tokens].tolist(),
        "clipped_mass": output.clipped_mass[tokens].tolist(),
    }


def sample_records(
    step: int,
    items: Sequence[PrivilegedRollout],
    kept: Sequence[PrivilegedRollout],
    output: PaintLossOutput,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, object]]:
    """One JSON-ready record for each of the micro-batch's `items` that is among `kept`, the first
    of the batch; `place` is where it is in it.

    output: the micro-batch's losses, the items' tokens in their order.
    """
    records, start = [], 0
    for item in items:
        end = start + len(item.rollout.completion_ids)
        for place, candidate in enumerate(kept):
            if item is candidate:
                records.append(_record(step, place, item, output, slice(start, end), tokenizer))
        start = end
    return records
