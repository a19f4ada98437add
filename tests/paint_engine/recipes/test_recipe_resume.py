"""Every recipe: two steps and, resumed, two more are four steps bit for bit."""

import shlex
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from run_contents import assert_same

from paint_engine.files import read_jsonl

Main = Callable[[Sequence[str]], int]
# Steps large enough that each changes what the next one samples. Dropout draws random numbers.
SMALL = (
    "--train.batch_size 4 --train.device cpu --rollout.max_new_tokens 16 --rollout.engine builtin "
    "--eval.enabled false --data.max_rows 40 --optim.learning_rate 3e-3 --optim.max_grad_norm 1.0 "
    "--lora.rank 8 --lora.alpha 16 --lora.dropout 0.1"
)
REASON = "--teacher.reason_first true --teacher.reason_max_new_tokens 8"
RECIPES = {
    "opsd-v1": "--preset opsd-v1-tiny",
    "sft": "--preset sft-tiny",
    # Room for whole answers, of which the bundled base gets about half right.
    "grpo": (
        "--preset grpo-tiny --train.batch_size 8 --grpo.group_size 8 --grpo.num_updates 2 "
        "--grpo.kl_weight 0.04 --rollout.max_new_tokens 160 --optim.learning_rate 3e-4"
    ),
    "ema": "--preset paint-tiny --teacher.weights ema --teacher.ema_decay 0.5",
    "live": "--preset paint-tiny --teacher.weights live",
    "reason-first, ema": (
        f"--preset paint-tiny {REASON} --teacher.weights ema --teacher.ema_decay 0.5"
    ),
    "other": "--preset paint-tiny --teacher.context other --masking.placement random",
    # Room for whole answers, as for grpo.
    "sibling": (
        "--preset paint-tiny --teacher.context sibling --teacher.group_size 4 "
        "--train.batch_size 8 --rollout.max_new_tokens 160 --optim.learning_rate 3e-4"
    ),
    "sampled tokens": (
        "--preset paint-tiny --objective.name sampled_token --objective.token_weights entropy"
    ),
    "grpo-paint": (
        "--preset paint-tiny --objective.name grpo_paint --objective.on wrong "
        "--objective.token_weights position --train.batch_size 8 --grpo.group_size 4 "
        "--grpo.num_updates 2 --rollout.max_new_tokens 160 --optim.learning_rate 3e-4"
    ),
    "none": "--preset paint-tiny --teacher.context none --prompts.teacher_thinking true",
    "answer, own weights of tokens": (
        "--preset paint-tiny --teacher.context answer --objective.token_weights own_functions:early"
    ),
    "feedback, wrong rollouts": (
        "--preset paint-tiny --teacher.context feedback --objective.on wrong "
        "--reward.function own_functions:judge"
    ),
    "right rollouts": (
        "--preset paint-tiny --objective.on right --reward.function own_functions:judge "
        "--train.batch_size 12 --optim.learning_rate 3e-4"
    ),
    # Some rollouts are shown nothing.
    "grpo-paint, sibling": (
        "--preset paint-tiny --objective.name grpo_paint --teacher.context sibling "
        "--reward.function own_functions:judge --grpo.group_size 4 --grpo.num_updates 2"
    ),
    "grpo-paint, feedback": (
        "--preset paint-tiny --objective.name grpo_paint --teacher.context feedback "
        "--reward.function own_functions:judge --grpo.group_size 4"
    ),
    "negative advantage": (
        "--preset grpo-tiny --train.batch_size 8 --grpo.advantage negative --grpo.num_updates 2"
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_and_two_more_are_four(name: str, run_main: Main, tmp_path: Path) -> None:
    argv = shlex.split(f"{SMALL} {RECIPES[name]}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_main([*argv, "--train.num_steps", "4", "--run.dir", str(whole)]) == 0
    assert run_main([*argv, "--train.num_steps", "2", "--run.dir", str(cut)]) == 0
    assert [step["step"] for step in read_jsonl(cut / "metrics.jsonl")] == [1, 2]
    # A run directory cannot allow modules of a user's own.
    own = [p for pair in pairwise(argv) if pair[1].startswith("own_functions:") for p in pair]
    assert run_main(["--resume", str(cut), "--train.num_steps", "4", *own]) == 0
    expected = assert_same(cut, whole)
    # Steps that change nothing would make every comparison above empty.
    assert len({step["loss"] for step in expected["metrics"]}) == 4
    assert all(step["grad_norm"] > 0 for step in expected["metrics"][2:])
    means = [key for key in expected if ":ema/" in key]
    assert bool(means) == ("ema" in name)
