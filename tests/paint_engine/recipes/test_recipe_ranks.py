"""Every recipe on two processes: the steps of one."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from paint_engine.files import read_jsonl

Main = Callable[[Sequence[str]], int]
RunRanks = Callable[[int, Sequence[Sequence[object]]], None]
# On the bundled model: of its answers in 160 tokens about half are right.
SMALL = (
    "--train.num_steps 2 --train.batch_size 8 --train.device cpu --rollout.max_new_tokens 16 "
    "--rollout.engine builtin --eval.enabled false --data.max_rows 40 --checkpoint.every 0"
)
REASON = "--teacher.reason_first true --teacher.reason_max_new_tokens 8"
RECIPES = {
    "opsd-v1": "--preset opsd-v1-tiny",
    "sft": "--preset sft-tiny",
    "grpo": (
        "--preset grpo-tiny --rollout.max_new_tokens 48 --grpo.group_size 4 --grpo.num_updates 2 "
        "--grpo.kl_weight 0.04 --train.max_tokens_per_microbatch 400 "
        "--reward.function own_functions:judge_some --train.seed 3"
    ),
    "grpo, all groups skipped": "--preset grpo-tiny",
    "ema": "--preset paint-tiny --teacher.weights ema --teacher.ema_decay 0.5",
    "live": "--preset paint-tiny --teacher.weights live",
    "reason-first, ema": f"--preset paint-tiny {REASON} --teacher.weights ema",
    # One rank has nothing to sample, to reason about or to train on.
    "reason-first, one rollout": f"--preset paint-tiny {REASON} --train.batch_size 1",
    "none": "--preset paint-tiny --teacher.context none --prompts.teacher_thinking true",
    "other": "--preset paint-tiny --teacher.context other --masking.placement random",
    "answer": "--preset paint-tiny --teacher.context answer",
    "sibling, reason-first": (
        f"--preset paint-tiny --teacher.context sibling --teacher.group_size 4 {REASON} "
        "--rollout.max_new_tokens 160 --train.max_tokens_per_microbatch 600"
    ),
    "sibling, all groups wrong": "--preset paint-tiny --teacher.context sibling",
    "sampled tokens": (
        "--preset paint-tiny --objective.name sampled_token --objective.importance_cap 2 "
        "--rollout.top_p 1.0 --rollout.top_k -1"
    ),
    # Whole answers, of which some are right. Each rank has some of either kind.
    "grpo-paint": (
        "--preset paint-tiny --objective.name grpo_paint --objective.on wrong "
        "--objective.token_weights entropy --rollout.max_new_tokens 160 --grpo.group_size 4 "
        "--grpo.num_updates 2"
    ),
    "wrong rollouts": (
        "--preset paint-tiny --objective.on wrong --objective.token_weights position "
        "--rollout.max_new_tokens 160 --train.max_tokens_per_microbatch 600"
    ),
    "feedback, own weights of tokens": (
        "--preset paint-tiny --teacher.context feedback --reward.function own_functions:judge "
        "--objective.token_weights own_functions:early"
    ),
    "right rollouts": (
        "--preset paint-tiny --objective.on right --reward.function own_functions:judge"
    ),
    # Some rollouts are shown nothing, and all of a rank's in some micro-batches.
    "grpo-paint, sibling": (
        "--preset paint-tiny --objective.name grpo_paint --teacher.context sibling "
        "--reward.function own_functions:judge --grpo.group_size 4 --grpo.num_updates 2 "
        "--train.max_tokens_per_microbatch 200"
    ),
    "grpo-paint, feedback": (
        "--preset paint-tiny --objective.name grpo_paint --teacher.context feedback "
        "--reward.function own_functions:judge --grpo.group_size 4 "
        "--train.max_tokens_per_microbatch 200"
    ),
    "negative advantage": "--preset grpo-tiny --grpo.advantage negative --grpo.num_updates 2",
}
# Of the sampler's rounding, whose batches differ; of time.
NOT_COMPARED = ("rollout_logprob_diff", "seconds", "tokens_per_s")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks, run_main: Main
) -> tuple[Path, Path]:
    """The directories of the runs of one process and of two, a run by the name of its recipe."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    commands = {name: shlex.split(f"{SMALL} {options}") for name, options in RECIPES.items()}
    for name, argv in commands.items():
        assert run_main([*argv, "--run.dir", str(one / name)]) == 0
    run_ranks(2, [[*argv, "--run.dir", two / name] for name, argv in commands.items()])
    return one, two


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_train_as_one_process_does(name: str, runs: tuple[Path, Path]) -> None:
    one, two = (directory / name for directory in runs)
    expected, actual = (read_jsonl(run / "metrics.jsonl") for run in (one, two))
    assert len(expected) == len(actual) == 2
    for step, other in zip(expected, actual, strict=True):
        assert other.keys() == step.keys()
        for key, value in step.items():
            if not key.startswith(NOT_COMPARED):
                # Losses and KL of hundredths are sums of numbers about 1.
                assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    (file,) = (one / "checkpoints" / "step-2").glob("*model.safetensors")
    weights, others = load_file(file), load_file(two / "checkpoints" / "step-2" / file.name)
    assert weights.keys() == others.keys()
    # One by one they may be a step apart: Adam's first steps are by the gradients' signs, and those
    # of tiny gradients are rounding's.
    apart = sum((others[n] - w).abs().sum().item() for n, w in weights.items())
    moved = 1e-4 * sum(w.numel() for w in weights.values())
    assert apart < 1e-3 * moved


def test_the_runs_move_but_where_nothing_is_said(runs: tuple[Path, Path]) -> None:
    for name in RECIPES:
        steps = read_jsonl(runs[1] / name / "metrics.jsonl")
        assert (steps[1]["grad_norm"] > 0) == ("all groups" not in name), name
    # The rewards of one problem of each step are all 0, so that its group is left out.
    steps = read_jsonl(runs[1] / "grpo" / "metrics.jsonl")
    assert [step["zero_variance_groups"] for step in steps] == [1, 1]
