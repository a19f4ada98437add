"""Avg@k and pass@k on held-out problems, and the paired difference of two evaluations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from paint_engine.config_sections import EvalSection
from paint_engine.distributed import World, my_share
from paint_engine.metrics import read_jsonl
from paint_engine.rollout import RolloutEngine, request_seed, to_rollout
from paint_engine.rollout_hf import Completion, SamplingParams
from paint_engine.types import Problem
from paint_engine.verify import check_answer


@dataclass(frozen=True)
class EvalSample:
    """One answer to one problem.

    EvalSample("tiny-test:3", 0, "The length is ...", 104, "312", True, False, None)

    error: why the checker failed, apart from wrong answers; None where it did not.
    """

    problem_id: str
    sample_index: int
    text: str
    num_tokens: int
    extracted: str | None
    correct: bool
    truncated: bool
    error: str | None


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation and what decided its outcome beside the weights after `step` steps.

    settings: the evaluation's section, without what only schedules it, and the seed. Two
    evaluations are paired only where these are equal.
    """

    step: int
    settings: dict[str, Any]
    seconds: float
    samples: list[EvalSample]


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference of two evaluations on the same problems, with its 95% interval
    (fractions)."""

    difference: float
    low: float
    high: float


def correct_matrix(samples: Sequence[EvalSample]) -> np.ndarray:
    """(P, k) booleans: problems in their order of first appearance, samples by index."""
    rows: dict[str, dict[int, bool]] = {}
    for sample in samples:
        rows.setdefault(sample.problem_id, {})[sample.sample_index] = sample.correct
    return np.array([[row[j] for j in sorted(row)] for row in rows.values()], dtype=bool)


def avg_at_k(correct: np.ndarray) -> float:
    """Share of correct answers over all problems and samples, a fraction."""
    return float(correct.mean())


def pass_at_k(correct: np.ndarray) -> float:
    """Share of problems with a correct answer among their k samples, a fraction."""
    return float(correct.any(axis=1).mean())


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, *, num_resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """after - before, resampling problems: both evaluations of a problem are drawn together.

    before, after: (P, k) booleans over the same problems in the same order.
    """
    assert before.shape[0] == after.shape[0], (before.shape, after.shape)
    per_problem = after.mean(axis=1) - before.mean(axis=1)
    num_problems = len(per_problem)
    draws = np.random.default_rng(seed).integers(num_problems, size=(num_resamples, num_problems))
    low, high = np.quantile(per_problem[draws].mean(axis=1), [0.025, 0.975])
    return PairedDifference(float(per_problem.mean()), float(low), float(high))


def my_requests(num_problems: int, num_samples: int, world: World) -> list[tuple[int, int]]:
    """(problem, sample) indices of this rank's share of an evaluation."""
    return my_share([(i, j) for i in range(num_problems) for j in range(num_samples)], world)


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    section: EvalSection,
    params: SamplingParams,
    *,
    seed: int,
    world: World,
    base: bool,
    on_samples: Callable[[list[EvalSample]], None],
) -> list[EvalSample]:
    """This rank's share of `section.num_samples` answers to every problem, checked.

    base: from the model as it was before training.

    The seed of a sample depends on (seed, problem, index) alone: two evaluations draw the same
    random numbers, which makes their difference less noisy. `on_samples` sees each finished group.
    """
    requests = my_requests(len(problems), section.num_samples, world)
    finished: dict[int, EvalSample] = {}

    def check(indices: list[int], completions: list[Completion]) -> None:
        group = []
        for index, completion in zip(indices, completions, strict=True):
            i, j = requests[index]
            rollout = to_rollout(tokenizer, problems[i], prompts[i], completion)
            verdict = check_answer(problems[i].answer, rollout.text)
            finished[index] = EvalSample(
                problems[i].problem_id,
                j,
                rollout.text,
                len(rollout.completion_ids),
                verdict.extracted,
                verdict.correct,
                rollout.truncated,
                verdict.error,
            )
            group.append(finished[index])
        on_samples(group)

    engine.generate(
        [prompts[i] for i, _ in requests],
        [request_seed("eval", seed, problems[i].problem_id, j) for i, j in requests],
        params,
        base=base,
        on_batch=check,
    )
    return [finished[index] for index in range(len(requests))]


def evaluation_settings(section: EvalSection, seed: int) -> dict[str, Any]:
    """What the outcome of an evaluation depends on, beside the weights."""
    schedule = {"enabled", "every", "at_start", "at_end", "max_sequences"}
    return section.model_dump(mode="json", exclude=schedule) | {"seed": seed}


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """`evaluations/step-N.jsonl` (the samples), then `step-N.json`, which says it is complete."""
    directory = run_dir / "evaluations"
    directory.mkdir(exist_ok=True)
    head = directory / f"step-{evaluation.step}.json"
    head.unlink(missing_ok=True)
    lines = (json.dumps(asdict(sample)) + "\n" for sample in evaluation.samples)
    head.with_suffix(".jsonl").write_text("".join(lines))
    fields = {name: getattr(evaluation, name) for name in ("step", "settings", "seconds")}
    unfinished = head.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(fields, indent=2) + "\n")
    unfinished.rename(head)


def read_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """The run's complete evaluations by step, in the order of steps."""
    found = {}
    for head in (run_dir / "evaluations").glob("step-*.json"):
        fields = json.loads(head.read_text())
        samples = [EvalSample(**row) for row in read_jsonl(head.with_suffix(".jsonl"))]
        found[fields["step"]] = Evaluation(**fields, samples=samples)
    return dict(sorted(found.items()))
