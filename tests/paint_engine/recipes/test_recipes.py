"""Two steps of every recipe and of every option of docs/recipes.md, and the dry run before them.

What each option computes is tested beside the code that does; here, that it can be chosen, that the
run is whole, that the weights move where they must, and that the option's numbers are its own.
"""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from paint_engine.config.command_line import load_config, preset_names
from paint_engine.files import read_jsonl
from paint_engine.recipes import recipe_of
from paint_engine.report.records import read_metrics

Main = Callable[[Sequence[str]], int]
TINY = [name for name in preset_names() if name.endswith("tiny")]
# The larger teachers of another model need its files: opd-tiny stands for them.
LARGE = [name for name in preset_names() if not name.endswith("tiny") and name[:4] != "opd-"]
SMALL = (
    "--train.num_steps 2 --train.batch_size 8 --train.device cpu --rollout.max_new_tokens 24 "
    "--rollout.engine builtin --eval.enabled false --data.max_rows 40 --lora.rank 8"
)
EVALUATED = (
    "--data.path tiny --eval.path tiny --eval.split test --eval.enabled true --eval.num_problems 2 "
    "--eval.num_samples 2 --eval.max_new_tokens 8"
)
# Room for whole answers: the bundled base gets about half right, and they differ in length.
WHOLE = "--rollout.max_new_tokens 128"
REASON = "--teacher.reason_first true --teacher.reason_max_new_tokens 8"
UNTRUNCATED = "--rollout.top_p 1.0 --rollout.top_k -1"
OVERRIDES = [
    ("paint-tiny", "--objective.interpolation_weight 0"),
    ("paint-tiny", "--masking.rho_wrong 0 --masking.rho_correct 0"),
    ("paint-tiny", "--masking.rho_wrong 0.35 --masking.rho_correct 0.35"),
    ("paint-tiny", "--masking.rho_wrong 1 --masking.rho_correct 1"),
    ("paint-tiny", "--objective.pointwise_clip none"),
    ("paint-tiny", "--objective.top_fraction 1"),
    ("paint-tiny", "--objective.reduction token_mean"),
    ("paint-tiny", "--masking.placement prefix"),
    ("paint-tiny", "--masking.placement middle"),
    ("paint-tiny", "--masking.placement random"),
    ("paint-tiny", "--masking.placement sentence_suffix"),
    ("paint-tiny", "--objective.divergence reverse_kl --objective.pointwise_clip none"),
    ("paint-tiny", "--objective.divergence jsd --objective.pointwise_clip none"),
    ("paint-tiny", "--objective.divergence jsd --objective.jsd_weight 0.9"),
    ("paint-tiny", "--objective.teacher_top_k 50"),
    ("paint-tiny", "--teacher.weights ema --teacher.ema_decay 0.5"),
    ("paint-tiny", "--teacher.weights live"),
    ("paint-tiny", "--teacher.weights live --lora.enabled false"),
    ("paint-tiny", REASON),
    ("paint-tiny", f"{REASON} --teacher.weights ema"),
    ("paint-tiny", f"{REASON} --teacher.weights live"),
    ("paint-tiny", "--prompts.student_thinking true"),
    ("paint-tiny", "--prompts.teacher_thinking true"),
    ("paint-tiny", "--prompts.student_thinking true --prompts.teacher_thinking true"),
    ("paint-tiny", '--prompts.teacher_suffix "Let me see." --prompts.instruction "Box it."'),
    ("paint-tiny", '--prompts.student_template "{problem} {instruction}"'),
    ("paint-tiny", '--prompts.teacher_template "{problem} {solution} {instruction}"'),
    ("paint-tiny", f'{REASON} --prompts.reason_template "Explain {{problem}}: {{solution}}"'),
    ("paint-tiny", "--lora.enabled false"),
    ("paint-tiny", "--parallel.activation_checkpointing true"),
    ("paint-tiny", "--objective.name sampled_token"),
    ("paint-tiny", f"--objective.name sampled_token --objective.importance_cap 2 {UNTRUNCATED}"),
    ("paint-tiny", "--objective.name sampled_token --teacher.weights ema"),
    ("paint-tiny", "--objective.on wrong"),
    ("paint-tiny", "--objective.on right"),
    ("paint-tiny", "--objective.token_weights entropy"),
    ("paint-tiny", "--objective.token_weights position --objective.reduction token_mean"),
    ("paint-tiny", "--objective.name sampled_token --objective.token_weights position"),
    ("paint-tiny", "--objective.name grpo_paint --objective.distill_weight 0.5"),
    ("paint-tiny", "--objective.name grpo_paint --objective.on wrong --grpo.num_updates 2"),
    ("grpo-tiny", "--grpo.advantage negative"),
    ("grpo-tiny", "--grpo.kl_weight 0.04"),
    ("grpo-tiny", "--grpo.num_updates 2"),
    ("grpo-tiny", "--grpo.num_updates 2 --grpo.kl_weight 0.04 --grpo.ratio_clip_high 0.28"),
    ("grpo-tiny", "--grpo.skip_zero_variance false"),
    ("grpo-tiny", "--grpo.skip_zero_variance false --grpo.num_updates 2"),
    ("grpo-tiny", "--grpo.scale_by_std false --reward.function first_box --grpo.group_size 4"),
    ("grpo-tiny", "--objective.importance_cap none --lora.enabled false"),
    ("sft-tiny", "--objective.reduction sequence_mean"),
    ("sft-tiny", "--lora.enabled false"),
]
# How a step is computed, and passes without a gradient, of which these steps have none.
SAME_NUMBERS = ("--parallel.activation_checkpointing true", "--grpo.skip_zero_variance false")
TIMING = ("seconds", "tokens_per_s")


def arguments(preset: str, *options: str) -> list[str]:
    return ["--preset", preset, *shlex.split(" ".join((SMALL, *options)))]


def check_two_steps(main: Main, argv: list[str], run_dir: Path) -> list[dict]:
    """The dry run, the run, and the metrics of its two steps."""
    assert main([*argv, "--dry-run"]) == 0
    assert not run_dir.exists()
    assert main([*argv, "--run.dir", str(run_dir)]) == 0
    steps = read_metrics(run_dir / "metrics.jsonl")
    assert [metrics["step"] for metrics in steps] == [1, 2]
    config = load_config(argv).config
    num_groups = config.train.batch_size // config.grpo.group_size
    for metrics in steps:
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert metrics["num_loss_tokens"] > 0
        # Groups of equal rewards move nothing; nor does a KL to the base that the student still is.
        # A teacher does, if there is a rollout that it trains.
        moves = metrics.get("zero_variance_groups", 0) < num_groups
        if recipe_of(config).uses_teacher:
            moves = min(metrics.get("taught_share", 1.0), metrics.get("context_share", 1.0)) > 0
        assert (metrics["grad_norm"] > 0) == moves
    # Rollouts that are left out of the passes have no losses to show.
    leaves_out = recipe_of(config).leaves_out or "context_share" in steps[0]
    assert read_jsonl(run_dir / "samples.jsonl") or leaves_out
    assert (run_dir / "checkpoints" / "step-2").is_dir()
    assert "<html" in (run_dir / "report.html").read_text()
    return steps


@pytest.mark.parametrize("preset", TINY)
def test_two_steps_of_the_tiny_recipes(preset: str, run_main: Main, tmp_path: Path) -> None:
    check_two_steps(run_main, arguments(preset, EVALUATED), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_problems"] == 2


def numbers(steps: Sequence[dict]) -> list[dict]:
    return [{k: v for k, v in step.items() if not k.startswith(TIMING)} for step in steps]


@pytest.fixture(scope="module")
def unchanged(
    run_main: Main, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], list[dict]]:
    """The numbers of a preset's two steps without any option but the length of its answers."""

    @cache
    def run(preset: str, length: str) -> list[dict]:
        directory = tmp_path_factory.mktemp("unchanged") / "run"
        return numbers(check_two_steps(run_main, arguments(preset, length), directory))

    return run


@pytest.mark.parametrize(("preset", "options"), OVERRIDES)
def test_two_steps_of_every_option(
    preset: str,
    options: str,
    run_main: Main,
    tmp_path: Path,
    unchanged: Callable[[str, str], list[dict]],
) -> None:
    whole = preset == "grpo-tiny" or "reduction" in options or "objective.on" in options
    length = WHOLE if whole else ""
    argv = arguments(preset, length, options)
    assert load_config(argv).config != load_config(arguments(preset, length)).config
    steps = numbers(check_two_steps(run_main, argv, tmp_path / "run"))
    assert (steps == unchanged(preset, length)) == (options in SAME_NUMBERS)


@pytest.mark.parametrize("preset", LARGE)
def test_two_steps_of_the_published_recipes_on_a_small_model(
    preset: str, run_main: Main, tmp_path: Path, model_dir: Path
) -> None:
    argv = arguments(preset, EVALUATED, f"--model.name_or_path {shlex.quote(str(model_dir))}")
    check_two_steps(run_main, argv, tmp_path / "run")


SERVER = "--rollout.engine vllm --rollout.url http://localhost:1"
SKIP, KL = "--grpo.skip_zero_variance false", "--grpo.kl_weight 0.04"
UNWEIGHED = f"{SERVER} --rollout.ahead 1 --objective.importance_cap none"
NOTES = {
    "designed for the forward KL": [("paint-tiny", "--objective.divergence reverse_kl")],
    "only importance weights correct this": [
        ("grpo-tiny", UNWEIGHED),
        ("paint-tiny", f"{UNWEIGHED} --objective.name sampled_token"),
    ],
    "": [
        ("paint-tiny", UNWEIGHED),
        ("grpo-tiny", SKIP),
        ("grpo-tiny", KL),
        ("grpo-tiny", f"{SERVER} --rollout.ahead 1"),
        ("grpo-tiny", "--objective.importance_cap none"),
    ],
}


@pytest.mark.parametrize(
    ("note", "preset", "options"), [(note, *case) for note in NOTES for case in NOTES[note]]
)
def test_what_goes_together_otherwise_than_it_seems_is_said(
    note: str, preset: str, options: str, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([*arguments(preset, options), "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (note != "") and all(note in line for line in notes)


def test_rewards_that_differ_move_the_weights(run_main: Main, tmp_path: Path) -> None:
    # Room for whole answers, of which the bundled base gets about half right.
    argv = arguments("grpo-tiny", "--rollout.max_new_tokens 200 --train.batch_size 16")
    steps = check_two_steps(run_main, argv, tmp_path / "run")
    assert any(metrics["grad_norm"] > 0 for metrics in steps)
    for metrics in steps:
        assert 0 < metrics["reward"] < 1
        assert metrics["reward"] == metrics["accuracy"]
