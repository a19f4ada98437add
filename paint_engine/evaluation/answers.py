"""Samples and checks answers to held-out problems."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from paint_engine.evaluation.store import EvalSample
from paint_engine.rewards.checker import check_answer
from paint_engine.rollout.engine import Completion, RolloutEngine, SamplingParams
from paint_engine.rollout.sampler import to_rollout
from paint_engine.seeds import evaluation_seed
from paint_engine.types import Problem


def all_requests(problems: Sequence[Problem], num_samples: int) -> list[tuple[int, int]]:
    """The (problem, sample) indices of a whole evaluation, in order."""
    return [(i, j) for i in range(len(problems)) for j in range(num_samples)]


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    requests: Sequence[tuple[int, int]],
    params: SamplingParams,
    *,
    seed: int,
    base: bool,
    on_samples: Callable[[list[EvalSample]], None],
) -> list[EvalSample]:
    """Samples and checks an answer for each request.

    requests: pairs of a problem's index and a sample's index.
    base: sample from the model as it was before training.
    on_samples: called with each group of samples as it finishes.

    The seed of a sample depends on (seed, problem, sample index) alone (`evaluation_seed`), so a
    resumed evaluation draws the same samples as an uninterrupted one.
    """
    finished: dict[int, EvalSample] = {}

    def check(indices: list[int], completions: list[Completion]) -> None:
        for index, completion in zip(indices, completions, strict=True):
            i, j = requests[index]
            finished[index] = _checked(tokenizer, problems[i], prompts[i], j, completion)
        on_samples([finished[index] for index in indices])

    engine.generate(
        [prompts[i] for i, _ in requests],
        [evaluation_seed(seed, problems[i].problem_id, j) for i, j in requests],
        params,
        base=base,
        on_batch=check,
    )
    return [finished[index] for index in range(len(requests))]


def _checked(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    prompt: tuple[int, ...],
    sample_index: int,
    completion: Completion,
) -> EvalSample:
    rollout = to_rollout(tokenizer, problem, prompt, completion)
    verdict = check_answer(problem.answer, rollout.text)
    return EvalSample(
        problem.problem_id,
        sample_index,
        rollout.text,
        len(rollout.completion_ids),
        verdict.extracted,
        verdict.correct,
        rollout.truncated,
        verdict.error,
    )
