"""Samples and judges answers to held-out problems."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from paint_engine.distributed import gather_objects, raise_together
from paint_engine.evaluation.store import EvalSample, SampleFiles
from paint_engine.files import LockLost, WriteFailed
from paint_engine.monitor import NotFinite
from paint_engine.rewards import Reward, RewardFailed
from paint_engine.rollout import (
    Completion,
    RolloutEngine,
    SamplingParams,
    check_completion,
    to_rollout,
)
from paint_engine.seeds import evaluation_seed
from paint_engine.types import Problem, Rollout

MAX_FIRST_FAILURES = 32
"""failed calls of a user's reward function, before the first that works, that end an evaluation"""


def all_requests(problems: Sequence[Problem], num_samples: int) -> list[tuple[int, int]]:
    """Returns the (problem, sample) indices of a whole evaluation, in order."""
    return [(i, j) for i in range(len(problems)) for j in range(num_samples)]


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    requests: Sequence[tuple[int, int]],
    params: SamplingParams,
    reward: Reward,
    *,
    seed: int,
    base: bool,
    on_samples: Callable[[list[EvalSample]], None],
) -> list[EvalSample]:
    """Samples an answer to each request and judges it.

    requests: pairs of a problem's index and a sample's index.
    base: sample from the model as it was before training.
    on_samples: called with each group of samples as it finishes. Samples that could not be judged
        wait until one is judged.

    The seed of a sample depends on (seed, problem, sample index) alone (`evaluation_seed`), so a
    resumed evaluation draws the same samples as an uninterrupted one.

    Raises RewardFailed if the first MAX_FIRST_FAILURES calls of a user's reward function fail,
    before `on_samples` is called, NotFinite where the log-probability of the first token, or of
    one that the engine returns without being asked, is not finite, and what `on_samples` raises.
    """
    if not (params.logprobs or engine.always_has_logprobs):
        _check_first_token(engine, problems, prompts, requests[:1], params, seed=seed, base=base)
    finished: dict[int, EvalSample] = {}
    waiting: list[EvalSample] = []
    works = not reward.is_own

    def judge(indices: list[int], completions: list[Completion]) -> None:
        nonlocal works
        for index, completion in zip(indices, completions, strict=True):
            i, j = requests[index]
            check_completion(completion, problems[i].problem_id)
            rollout = to_rollout(tokenizer, problems[i], prompts[i], completion)
            finished[index] = _judged(reward, rollout, j)
            waiting.append(finished[index])
            works = works or finished[index].error is None
        if works:
            on_samples(list(waiting))
            waiting.clear()
        elif len(waiting) >= MAX_FIRST_FAILURES:
            reward.check_some_judged([sample.error for sample in waiting], "the evaluation")

    engine.generate(
        [prompts[i] for i, _ in requests],
        [evaluation_seed(seed, problems[i].problem_id, j) for i, j in requests],
        params,
        base=base,
        on_batch=judge,
    )
    if waiting:
        on_samples(waiting)
    return [finished[index] for index in range(len(requests))]


def _check_first_token(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    requests: Sequence[tuple[int, int]],
    params: SamplingParams,
    *,
    seed: int,
    base: bool,
) -> None:
    """Samples the first token of these answers with its log-probability, which weights that are not
    finite show. The answers themselves have none: it would cost a pass over the vocabulary per
    token. All ranks call it, as some engines need."""
    completions = engine.generate(
        [prompts[i] for i, _ in requests],
        [evaluation_seed(seed, problems[i].problem_id, j) for i, j in requests],
        replace(params, max_new_tokens=1, logprobs=True),
        base=base,
    )
    try:
        for (i, _), completion in zip(requests, completions, strict=True):
            check_completion(completion, problems[i].problem_id)
    except NotFinite:
        # Ranks that share the engine wait for this one in the answers' batch.
        engine.generate([], [], params, base=base)
        raise


def _judged(reward: Reward, rollout: Rollout, sample_index: int) -> EvalSample:
    verdict = reward.judge(rollout.problem, rollout.text)
    return EvalSample(
        rollout.problem.problem_id,
        sample_index,
        rollout.text,
        len(rollout.completion_ids),
        reward.final_answer(rollout.text),
        verdict.correct,
        rollout.truncated,
        verdict.error,
        None if verdict.reward == verdict.correct else verdict.reward,
    )


FAILURES = (RewardFailed, NotFinite, WriteFailed, LockLost)
"""what `evaluate` raises on one rank, which `check_answers` then raises on all"""


def check_answers(reward: Reward, files: SampleFiles, failure: Exception | None) -> None:
    """Raises on every rank what a rank's `evaluate` raised, or RewardFailed where all samples
    failed, which are deleted then. A collective.

    failure: this rank's, one of FAILURES.
    """
    raise_together(failure)
    ours = {(s.problem_id, s.sample_index): s.error for s in files.finished}
    errors = {key: error for part in gather_objects(ours) for key, error in part.items()}
    try:
        reward.check_some_judged(list(errors.values()), "the evaluation")
    except RewardFailed:
        files.discard()
        raise
