"""Whole runs on made-up rows: what they leave, and that nothing depends on how they were cut."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from paint_engine.config.command_line import load_config
from paint_engine.distributed import World
from paint_engine.files import WriteFailed, read_jsonl
from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.packing import build_batch
from paint_engine.recipes import LossInputs, LossOutput
from paint_engine.training import run as run_module
from paint_engine.training import step as step_module
from paint_engine.training.build import build_run
from paint_engine.training.run import Run

Main = Callable[[Sequence[str]], int]
WORLD = World(0, 1, 0, torch.device("cpu"))
TIMING = {"seconds", "seconds_rollout", "seconds_update", "tokens_per_s"}


def untimed(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


@pytest.fixture
def run(command: list[str]) -> Run:
    return build_run(load_config(command), WORLD)


@pytest.mark.parametrize("shape", ["gsm8k", "aime"])
def test_two_steps_on_rows_of_each_shape_leave_a_whole_run_directory(
    shape: str,
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows(tmp_path / "train.jsonl", shape=shape)
    write_rows(tmp_path / "test.jsonl", 3, shape=shape)
    assert run_main([*command, "--train.num_steps", "2"]) == 0
    run_dir = tmp_path / "run"
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.toml",
        "data.json",
        "versions.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "evaluations",
        "summary.json",
        "report.html",
    }
    assert [r["step"] for r in read_jsonl(run_dir / "metrics.jsonl")] == [0, 1, 2, 2]
    samples = read_jsonl(run_dir / "samples.jsonl")
    assert [s["step"] for s in samples] == [1, 1, 2, 2]
    for sample in samples:
        per_token = ("token_loss", "token_kl", "student_entropy", "selected", "clipped_mass")
        assert {len(sample[name]) for name in per_token} == {len(sample["tokens"])}
        assert "...(omitted)..." in sample["shown"]
        assert sample["anchors"]
    problem = samples[0]["problem"]
    assert ("kites" in problem) == (shape == "gsm8k")
    for step in (0, 2):
        assert len(read_jsonl(run_dir / "evaluations" / f"step-{step}.jsonl")) == 6
    assert "<html" in (run_dir / "report.html").read_text()
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "Avg@2 before:" in printed and "Avg@2 after:" in printed
    assert str(run_dir / "report.html") in printed


def test_the_summary_has_what_is_promised(
    command: list[str], run_main: Main, tmp_path: Path
) -> None:
    assert run_main([*command, "--train.num_steps", "2"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["avg_at_k_before"] <= 1
    assert 0 <= summary["avg_at_k_after"] <= 1
    low, high = summary["paired_difference_ci95"]
    assert low <= summary["avg_at_k_after"] - summary["avg_at_k_before"] <= high
    assert summary["seconds"] == pytest.approx(summary["seconds_train"] + summary["seconds_eval"])
    assert summary["seconds_train"] > 0 and summary["seconds_eval"] > 0
    assert (summary["num_problems"], summary["num_samples"], summary["num_steps"]) == (3, 2, 2)


def test_without_evaluation_the_summary_has_none(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command, "--train.num_steps", "1", "--eval.enabled", "false"]
    assert run_main(argv) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["avg_at_k_before"] is summary["paired_difference_ci95"] is None
    assert summary["num_problems"] == 0
    assert not (tmp_path / "run" / "evaluations").exists()
    assert "Avg@" not in capsys.readouterr().out


def test_metrics_hold_what_the_design_logs_within_their_ranges(run: Run) -> None:
    metrics, _ = step_module.train_step(run, 0)
    fractions = ("clipped_mass", "clipped_token_share", "overlap", "accuracy", "truncation_rate")
    for name in fractions:
        assert 0 <= metrics[name] <= 1, name
    for name in ("token_kl", "student_entropy", "teacher_entropy", "grad_norm"):
        assert metrics[name] > 0, name
    assert 0.3 <= metrics["mask_ratio"] <= 0.4
    assert metrics["num_loss_tokens"] == 3 * metrics["completion_length"]
    assert metrics["step"] == 1
    # A random model's clipped loss is far below its divergence.
    assert metrics["loss"] < metrics["token_kl"]


def test_a_step_does_not_depend_on_the_size_of_its_micro_batches(
    command: list[str], tmp_path: Path
) -> None:
    results = []
    for limit in (1, 16384):
        argv = [*command, "--train.max_tokens_per_microbatch", str(limit)]
        run = build_run(load_config([*argv, "--run.dir", str(tmp_path / f"run-{limit}")]), WORLD)
        metrics, _ = step_module.train_step(run, 0)
        results.append((metrics, torch.cat([p.detach().flatten() for p in run.parameters])))
    (one_by_one, _), (whole, _) = results
    for name in ("loss", "token_kl", "grad_norm", "student_entropy", "clipped_mass"):
        assert one_by_one[name] == pytest.approx(whole[name], rel=1e-4), name
    assert one_by_one["num_loss_tokens"] == whole["num_loss_tokens"]


def test_a_step_moves_the_adapters_alone_by_at_most_the_learning_rate(run: Run) -> None:
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    metrics, _ = step_module.train_step(run, 0)
    moved = {
        name: (p.detach() - before[name]).abs().max().item()
        for name, p in run.model.named_parameters()
    }
    assert {name for name, distance in moved.items() if distance} <= {
        name for name in moved if "lora_" in name
    }
    # Adam's first step has the length of the learning rate; A has no gradient while B is zero.
    longest = max(moved.values())
    assert longest == pytest.approx(metrics["learning_rate"], rel=1e-3)
    assert all(p.grad is None for p in run.parameters)


def test_the_teacher_stays_the_base_while_the_student_learns(run: Run) -> None:
    examples, lag = step_module.sample_step(run, 0)
    assert lag == 0
    batch = build_batch(examples)

    def teacher_states() -> torch.Tensor:
        with run.teacher.scoring() as scorer:
            return hidden_states(scorer, batch.teacher, attention="padded")

    before = teacher_states()
    for step in range(2):
        step_module.train_step(run, step)
    assert torch.equal(teacher_states(), before)


def test_a_trained_head_is_compared_with_the_teachers_own(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(load_config([*command, "--lora.enabled", "false"]), WORLD)
    initial = lm_head_weight(run.model).detach().clone()
    heads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    original = run.recipe.loss

    def spy(inputs: LossInputs) -> LossOutput:
        (second,) = inputs.second_passes
        heads.append((inputs.lm_head_weight.detach().clone(), second.lm_head_weight))
        return original(inputs)

    monkeypatch.setattr(run.recipe, "loss", spy)
    for step in range(2):
        step_module.train_step(run, step)
    student_head, teacher_head = heads[-1]
    assert teacher_head is not None and torch.equal(teacher_head, initial)
    assert not torch.equal(student_head, initial)


def test_one_problem_is_answered_anew_in_every_place_and_step(command: list[str]) -> None:
    run = build_run(
        load_config([*command, "--data.max_rows", "1", "--train.batch_size", "2"]), WORLD
    )
    steps = [step_module.sample_step(run, step)[0] for step in (0, 1, 0)]
    ids = [[p.rollout.completion_ids for p in step] for step in steps]
    assert ids[0] == ids[2]
    assert len({*ids[0], *ids[1]}) == 4


def test_repeated_steps_on_one_batch_lower_the_divergence(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = step_module.sample_step(run, 0)
    monkeypatch.setattr(step_module, "sample_step", lambda run, step: fixed)
    divergences = [step_module.train_step(run, 0)[0]["token_kl"] for _ in range(6)]
    assert divergences[-1] < 0.8 * divergences[0]


@pytest.mark.parametrize(
    "switch", ["prompts.student_thinking", "prompts.teacher_thinking", "eval.thinking", "none"]
)
def test_each_thinking_switch_reaches_its_own_prompts(switch: str, command: list[str]) -> None:
    names = ("prompts.student_thinking", "prompts.teacher_thinking", "eval.thinking")
    settings = [part for n in names for part in (f"--{n}", str(n == switch).lower())]
    run = build_run(load_config([*command, *settings]), WORLD)
    (first, *_), _ = step_module.sample_step(run, 0)
    (held_out,) = run.eval_sets.values()
    prompts = (first.rollout.prompt_ids, first.teacher_view.prompt_ids, held_out.prompts[0])
    for name, ids in zip(names, prompts, strict=True):
        text = run.tokenizer.decode(list(ids))
        # Qwen3's template: with thinking off the answer begins after an empty thought.
        assert text.endswith("<think>\n\n</think>\n\n") == (name != switch), name
        assert text.endswith("<|im_start|>assistant\n") == (name == switch), name


def test_a_bfloat16_base_is_never_written_to(command: list[str]) -> None:
    """It is the teacher: adapters merged into it and taken out again would leave their rounding."""
    run = build_run(load_config([*command, "--model.dtype", "bfloat16"]), WORLD)
    frozen = {n: p for n, p in run.model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    for step in range(3):
        step_module.train_step(run, step)
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert {p.dtype for p in run.parameters} == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert isinstance(run.model, PeftModel)
    run.model.merge_adapter()
    run.model.unmerge_adapter()
    assert not all(torch.equal(p, before[name]) for name, p in frozen.items())


def test_adapters_on_disk_are_those_of_the_last_step(
    command: list[str], run_main: Main, tmp_path: Path
) -> None:
    assert run_main([*command, "--train.num_steps", "1"]) == 0
    saved = load_file(tmp_path / "run/checkpoints/step-1/adapter_model.safetensors")
    run = build_run(load_config([*command, "--run.dir", str(tmp_path / "again")]), WORLD)
    step_module.train_step(run, 0)
    own = {n.replace(".default", ""): p for n, p in run.model.named_parameters() if "lora_" in n}
    assert saved.keys() == own.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, own[name]), name


def test_dropout_of_the_adapters_is_applied_in_training_and_not_in_sampling(
    command: list[str], tmp_path: Path
) -> None:
    records = []
    for rate in ("0.0", "0.5"):
        argv = [*command, "--lora.dropout", rate, "--run.dir", str(tmp_path / f"run-{rate}")]
        run = build_run(load_config(argv), WORLD)
        sampled, losses = [], []
        for step in range(2):
            sampled.append(
                [p.rollout.completion_ids for p in step_module.sample_step(run, step)[0]]
            )
            losses.append(step_module.train_step(run, step)[0]["loss"])
        records.append((sampled, losses))
    without, with_dropout = records
    # B is zero in the first step: the same rollouts and the same loss. Then the losses part.
    assert without[0][0] == with_dropout[0][0]
    assert without[1][0] == pytest.approx(with_dropout[1][0])
    assert without[1][1] != with_dropout[1][1]


def test_a_run_whose_numbers_overflow_says_which_and_keeps_its_checkpoints(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([*command, "--optim.learning_rate", "1e30"]) == 1
    printed = capsys.readouterr().out
    assert "the sampler's log-probability of token 0 (id " in printed and "is nan" in printed
    assert "all weights are finite; the largest of the trained ones is 1e+30, in " in printed
    assert "newest checkpoint: step-1" in printed and "learning_rate" not in printed
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert [m["step"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_message(
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = run_module.save_checkpoint

    def full_at_step_3(run_dir, model, optimizer, state, **settings) -> Path:
        if state["step"] == 3:
            raise WriteFailed("no room for a checkpoint; make room")
        return original(run_dir, model, optimizer, state, **settings)

    monkeypatch.setattr(run_module, "save_checkpoint", full_at_step_3)
    assert run_main(command) == 1
    assert "error: no room for a checkpoint; make room" in capsys.readouterr().out
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-1", "step-2"}
    monkeypatch.undo()
    assert run_main(["--resume", str(tmp_path / "run")]) == 0


def test_brackets_in_a_path_are_printed_as_they_are(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "[red]run"
    argv = [*command, "--run.dir", str(run_dir), "--train.num_steps", "1"]
    assert run_main([*argv, "--eval.enabled", "false"]) == 0
    assert f"run directory: {run_dir}\n" in capsys.readouterr().out
