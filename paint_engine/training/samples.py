"""The rollouts that are kept for the report, with what the objective said of every token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from paint_engine.prompts.anchors import extract_anchors, find_anchors
from paint_engine.recipes import LossOutput
from paint_engine.types import Rollout, TeacherView, TrainExample


def _teacher_view(rollout: Rollout, view: TeacherView) -> dict[str, object]:
    anchors = extract_anchors(rollout.problem.solution)
    found = find_anchors(rollout.text, anchors)
    record: dict[str, object] = {
        "partial_solution": view.partial_solution,
        "mask_ratio": view.mask_ratio,
        "anchors": [{"text": a, "found": f} for a, f in zip(anchors, found, strict=True)],
    }
    return record | ({"rationale": view.rationale} if view.rationale else {})


def _record(
    step: int,
    place: int,
    item: TrainExample,
    output: LossOutput,
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
    if item.verdict is not None:
        record["correct"] = item.verdict.correct
    if item.teacher_view is not None:
        record |= {"overlap": item.overlap, **_teacher_view(rollout, item.teacher_view)}
    if item.verdict is not None and item.advantage is not None:
        record |= {"reward": item.verdict.reward, "advantage": item.advantage}
    columns = {
        name: v[tokens].tolist() for name, v in output.per_token.items() if name != "logprobs"
    }
    return record | columns


def sample_records(
    step: int,
    items: Sequence[TrainExample],
    kept: Sequence[TrainExample],
    output: LossOutput,
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
