"""Collects what the micro-batches of one step produce into the step's metrics and samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paint_engine.config.external import scorer_names
from paint_engine.config.schema import Config
from paint_engine.distributed import gather_objects, sum_over_ranks
from paint_engine.prompts.anchors import extract_anchors, find_anchors
from paint_engine.recipes import LossOutput, Recipe
from paint_engine.rollout.mismatch import mismatch_metrics
from paint_engine.training.finite import Scored
from paint_engine.types import TeacherView, TopK, TrainExample


def count_tokens(items: Sequence[TrainExample]) -> int:
    """Returns the number of completion tokens."""
    return sum(len(item.rollout.completion_ids) for item in items)


# Per-token values that are not averaged into a metric.
_NOT_SUMMED = ("token_loss", "logprobs", "selected")


def metric_sums(output: LossOutput) -> dict[str, float]:
    """Returns the micro-batch's share of the step's loss and of its parts, and the sums over its
    tokens of the other logged values. Divided by the step's number of tokens, the sums are
    means."""
    sums = {n: float(v.sum().item()) for n, v in output.per_token.items() if n not in _NOT_SUMMED}
    parts = {name: part.item() for name, part in output.parts.items()}
    return {"loss": output.loss.item(), **parts, **sums}


class StepRecord:
    """One rank's record of one step. `step` counts from 0; `rollouts` are those of all ranks.

    trained: the rollouts that the models process.
    stand_in: a rollout for a rank without any, whose passes have no weight.
    old_logprobs: by micro-batch, the log-probabilities of the first update if others follow.
    """

    def __init__(self, recipe: Recipe, step: int, rollouts: Sequence[TrainExample]) -> None:
        self._recipe = recipe
        self._config = recipe.config
        self._step = step
        self._rollouts = rollouts
        self.trained = recipe.trained(rollouts)
        self.stand_in = _stand_in(recipe, rollouts)
        self.num_tokens = count_tokens(rollouts)
        self.old_logprobs: dict[int, Tensor] = {}
        self._sums: Counter[str] = Counter()
        self._samples: list[dict[str, object]] = []
        self._differences: list[Tensor] = []

    @property
    def denominator(self) -> int:
        """The divisor of the micro-batches' losses: rollouts or tokens of the whole step."""
        per_rollout = self._config.objective.reduction == "sequence_mean"
        return len(self._rollouts) if per_rollout else self.num_tokens

    def add(self, items: Sequence[TrainExample], output: LossOutput) -> dict[str, float]:
        """Adds a micro-batch with the rollouts `items` to the metrics. Returns its
        `metric_sums`."""
        assert items, "a micro-batch without rollouts has nothing to count"
        sums = metric_sums(output)
        self._sums.update(sums)
        return sums

    def add_first(
        self,
        place: int,
        items: Sequence[TrainExample],
        scored: Scored,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Records what only the first update on the rollouts provides: samples for the report,
        differences to the sampler's log-probabilities, and old log-probabilities."""
        kept, output = self.trained[: self._config.run.samples_per_step], scored.output
        step, config = self._step + 1, self._config
        self._samples += sample_records(step, items, kept, output, tokenizer, config)
        self._differences += scored.differences
        if self._recipe.num_updates > 1:
            self.old_logprobs[place] = output.per_token["logprobs"]

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of all ranks: the loss and its parts, means over trained tokens and
        updates, means over rollouts, and the mismatch with the sampler. A collective call."""
        totals, num_updates = sum_over_ranks(self._sums), self._recipe.num_updates
        differences = [value for part in self._differences for value in part.tolist()]
        losses = ("loss", *self._recipe.loss_parts)
        return {
            **{name: totals.pop(name, 0.0) / num_updates for name in losses},
            **self._token_means(totals),
            **self._recipe.metrics(self._rollouts),
            **mismatch_metrics(gather_objects(differences)),
            "num_loss_tokens": self.num_tokens,
        }

    def _token_means(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns the means of the values by token, over all updates. Those of a teacher are over
        the rollouts that it has scored, and missing where there are none."""
        viewed = [item for item in self.trained if item.teacher_view is not None]
        of_teacher = set(self._recipe.teacher_values)
        counts = {
            name: count_tokens(viewed if name in of_teacher else self.trained) for name in totals
        }
        num_updates = self._recipe.num_updates
        return {n: t / (counts[n] * num_updates) for n, t in totals.items() if counts[n]}

    def samples(self) -> list[dict[str, object]]:
        """Returns all ranks' samples in the order of the batch. A collective call."""
        return sorted(chain.from_iterable(gather_objects(self._samples)), key=itemgetter("place"))


def _stand_in(recipe: Recipe, rollouts: Sequence[TrainExample]) -> TrainExample:
    """Returns the first rollout that has what the recipe's passes need. If the teacher has nothing
    to show in the whole step, it gets the student's prompt; if the server was asked for none of
    the rollouts, a teacher that is certain of its tokens."""
    if recipe.served_top_k is not None:
        scored = next((e for e in rollouts if e.served is not None), None)
        return scored or replace(rollouts[0], served=_certain(rollouts[0]))
    if recipe.second_pass != "teacher":
        return rollouts[0]
    viewed = next((e for e in rollouts if e.teacher_view is not None), None)
    if viewed is not None:
        return viewed
    return replace(
        rollouts[0], teacher_view=TeacherView(rollouts[0].rollout.prompt_ids, "", mask_ratio=0.0)
    )


def _certain(item: TrainExample) -> TopK:
    ids = torch.tensor(item.rollout.completion_ids, dtype=torch.int32)[:, None]
    return TopK(ids, torch.zeros(ids.shape))


def _teacher_view(item: TrainExample, view: TeacherView, config: Config) -> dict[str, object]:
    """Returns what the report shows of the view: the teachers that are other models, and with a
    mask, the text behind it unless that is the problem's solution, and which of its anchors were
    found."""
    record: dict[str, object] = {
        "context": view.context,
        "source": view.source,
        "shown": view.shown,
    }
    if names := scorer_names(config, view.scorers):
        record["scored_by"] = list(names)
    solution = item.rollout.problem.solution
    if item.overlap is not None:
        # A view that a recipe of the user's own made may say nothing of its text.
        text = view.text or solution
        anchors = extract_anchors(text)
        found = find_anchors(item.rollout.text, anchors)
        record |= {
            "overlap": item.overlap,
            "mask_ratio": view.mask_ratio,
            "anchors": [{"text": a, "found": f} for a, f in zip(anchors, found, strict=True)],
        }
        if text != solution:
            record["text"] = text
    return record | ({"rationale": view.rationale} if view.rationale else {})


def _record(
    step: int,
    place: int,
    item: TrainExample,
    output: LossOutput,
    tokens: slice,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
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
        record |= _teacher_view(item, item.teacher_view, config)
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
    config: Config,
) -> list[dict[str, object]]:
    """Returns a JSON-ready record of each of the micro-batch's `items` that is in `kept`, the first
    rollouts of the batch. `place` is its position in `kept`.

    output: the loss of the micro-batch; each entry of its `per_token` becomes a list. The teacher
    view, the verdict and the reward are included if the recipe has them.
    """
    records, start = [], 0
    for item in items:
        end = start + len(item.rollout.completion_ids)
        for place, candidate in enumerate(kept):
            if item is candidate:
                tokens = slice(start, end)
                records.append(_record(step, place, item, output, tokens, tokenizer, config))
        start = end
    return records
