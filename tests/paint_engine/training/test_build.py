"""What a run is built from: lengths, filters, directories, schedules, and every refusal's text."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from paint_engine.config.command_line import load_config, read_toml
from paint_engine.config.sections import OptimSection
from paint_engine.config.toml import to_toml
from paint_engine.distributed import World
from paint_engine.training.build import build_run, plan_run
from paint_engine.training.optim import learning_rate

Main = Callable[[Sequence[str]], int]
WORLD = World(0, 1, 0, torch.device("cpu"))


def refused(run_main: Main, capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    """The one message of a command that ends with exit code 2."""
    assert run_main(argv) == 2
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert text.startswith("error: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_to_the_peak_and_the_schedule_falls_from_it(schedule: str) -> None:
    section = OptimSection.model_validate(
        {"learning_rate": 2e-3, "warmup_steps": 4, "schedule": schedule}
    )
    rates = [learning_rate(section, step, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3, 2e-3])
    # Half way down, and what the step after the last one would get.
    half, end = learning_rate(section, 14, 24), learning_rate(section, 24, 24)
    if schedule == "constant":
        assert set(rates[4:]) == {2e-3}
    else:
        assert half == pytest.approx(1e-3)
        assert end == pytest.approx(0, abs=1e-12)
        assert rates[-1] > 0
        assert rates[4:] == sorted(rates[4:], reverse=True)
    if schedule == "cosine":
        assert rates[9] == pytest.approx(2e-3 * 0.8535533906)


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak() -> None:
    section = OptimSection(learning_rate=1.0, warmup_steps=3, schedule="cosine")
    assert [learning_rate(section, step, 3) for step in range(3)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_the_optimizer_has_the_settings_and_only_what_is_trainable(command: list[str]) -> None:
    argv = [*command, "--optim.beta1", "0.8", "--optim.eps", "1e-6", "--optim.weight_decay", "0.1"]
    run = build_run(load_config(argv), WORLD)
    (group,) = run.optimizer.param_groups
    assert group["betas"] == (0.8, 0.999)
    assert (group["eps"], group["weight_decay"], group["lr"]) == (1e-6, 0.1, 0.02)
    trainable = {id(p) for n, p in run.model.named_parameters() if "lora_" in n}
    assert {id(p) for p in run.parameters} == trainable
    assert isinstance(run.model, PeftModel)


def test_the_run_directory_holds_the_resolved_configuration(
    command: list[str], tmp_path: Path
) -> None:
    line = load_config(command)
    build_run(line, WORLD)
    file = tmp_path / "run" / "config.toml"
    assert file.read_text() == to_toml(line.config)
    again = load_config(["--config", str(file), "--run.dir", str(tmp_path / "run")])
    assert again.config == line.config
    assert read_toml(file)["train.num_steps"] == 4


def test_an_existing_run_directory_is_refused_with_three_ways_out(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_run(load_config(command), WORLD)
    marker = tmp_path / "run" / "metrics.jsonl"
    marker.write_text('{"step": 1}\n')
    text = refused(run_main, capsys, command)
    for way in (f"--resume {tmp_path / 'run'}", "--run.dir", "--run.overwrite true"):
        assert way in text
    assert marker.exists()
    build_run(load_config([*command, "--run.overwrite", "true"]), WORLD)
    assert not marker.exists()


def test_overwrite_never_empties_a_directory_that_is_no_run(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "run" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("x")
    refused(run_main, capsys, [*command, "--run.overwrite", "true"])
    assert precious.exists()
    # An empty directory is in nobody's way.
    (tmp_path / "empty").mkdir()
    build_run(load_config([*command, "--run.dir", str(tmp_path / "empty")]), WORLD)


def test_a_prompt_longer_than_the_context_names_the_row_and_the_remedies(
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / "train.jsonl").read_text().splitlines()
    rows[2] = rows[2].replace("Mia has", "Mia has " + "very " * 900)
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    text = refused(run_main, capsys, command)
    assert "train.jsonl:3: the student's prompt takes" in text
    # 1024 positions less the 12 tokens of a completion.
    assert "context leaves 1012" in text
    assert "--rollout.max_new_tokens" in text and "--data.max_prompt_tokens" in text
    assert not (tmp_path / "run").exists()
    run = build_run(load_config([*command, "--data.max_prompt_tokens", "900"]), WORLD)
    assert [p.problem_id for p in run.train_set.problems] == [
        f"train.jsonl:{line}" for line in (1, 2, 4, 5, 6, 7)
    ]


def test_a_teachers_prompt_that_never_fits_is_found_before_training(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(load_config(command), WORLD)
    longest = max(map(len, run.train_set.prompts))
    # Room for every student's prompt, and not for a teacher's with the solution hidden.
    room = str(1024 - longest - 5)
    other = ["--run.dir", str(tmp_path / "other"), "--rollout.max_new_tokens", room]
    text = refused(run_main, capsys, [*command, *other])
    assert "the teacher's prompt takes" in text
    assert f"leaves {longest + 5}" in text


@pytest.mark.parametrize(("longest", "words"), [(940, "leaves 84"), (5000, "got 5000")])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_rationale_that_never_fits_is_found_before_training(
    dry: tuple[str, ...],
    longest: int,
    words: str,
    command: list[str],
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = ("--teacher.reason_first", "true", "--teacher.reason_max_new_tokens", str(longest))
    text = refused(run_main, capsys, [*command, *reason, *dry])
    assert words in text and "--teacher.reason_max_new_tokens" in text


@pytest.mark.parametrize(
    "moves",
    [("--teacher.weights", "ema"), ("--teacher.refresh_every", "5")],
    ids=["ema", "refresh"],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_server_has_no_moving_teacher_to_reason_with(
    dry: tuple[str, ...],
    moves: tuple[str, ...],
    command: list[str],
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = ("--rollout.engine", "vllm", "--rollout.url", "http://localhost:1")
    reason = ("--teacher.reason_first", "true", *moves)
    text = refused(run_main, capsys, [*command, *server, *reason, *dry])
    assert "only the student's and the base's weights" in text
    assert "--rollout.engine builtin" in text


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_replicas_that_do_not_divide_the_processes_are_refused(
    dry: tuple[str, ...],
    command: list[str],
    run_main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = refused(run_main, capsys, [*command, "--parallel.replicas", "2", *dry])
    assert "got 2 with 1 process; needs a divisor of that number (1)" in text
    if dry:
        monkeypatch.setenv("WORLD_SIZE", "8")
        text = refused(run_main, capsys, [*command, "--parallel.replicas", "3", *dry])
        assert "got 3 with 8 processes; needs a divisor of that number (1, 2, 4, 8)" in text
        assert run_main([*command, "--parallel.replicas", "4", *dry]) == 0


def test_replicas_of_whole_weights_are_refused(
    command: list[str], run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ("--parallel.shard", "replicate", "--parallel.replicas", "2")
    text = refused(run_main, capsys, [*command, *whole])
    assert "parallel.replicas: got 2 with parallel.shard 'replicate'" in text
    assert "--parallel.shard full" in text


def test_an_evaluation_longer_than_the_context_is_refused(
    command: list[str], run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(run_main, capsys, [*command, "--eval.max_new_tokens", "1020"])
    assert "the evaluation's prompt takes" in text and "--eval.max_new_tokens" in text


def test_no_problem_left_after_the_filter(
    command: list[str], run_main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = refused(run_main, capsys, [*command, "--data.max_prompt_tokens", "3"])
    assert "all 7 problems have prompts longer than data.max_prompt_tokens = 3" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("missing", "needed"),
    [("tokenizer.json", "has no tokenizer"), ("config.json", "has no config.json")],
)
def test_a_model_directory_that_lacks_a_part_ends_with_one_message(
    missing: str,
    needed: str,
    command: list[str],
    model_dir: Path,
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / missing).unlink()
    text = refused(run_main, capsys, [*command, "--model.name_or_path", str(directory)])
    assert needed in text and str(directory) in text and "save_pretrained" in text
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_head_is_refused(
    command: list[str],
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    other = type(tokenizer).from_pretrained(directory)
    other.add_tokens([f"<extra{i}>" for i in range(20)])
    other.save_pretrained(directory)
    text = refused(run_main, capsys, [*command, "--model.name_or_path", str(directory)])
    assert "up to 359" in text and "346" in text


def test_adapters_on_the_head_are_refused(
    command: list[str], run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command, "--lora.target_modules", '["q_proj", "lm_head"]']
    text = refused(run_main, capsys, argv)
    assert "lm_head" in text and "--lora.target_modules" in text


def test_adapters_on_no_layer_at_all_are_refused(
    command: list[str], run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command, "--lora.target_modules", '["nothing_like_it"]']
    text = refused(run_main, capsys, argv)
    assert "nothing_like_it" in text


def test_resuming_without_a_checkpoint_says_what_to_do(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_run(load_config(command), WORLD)
    text = refused(run_main, capsys, ["--resume", str(tmp_path / "run")])
    assert "no complete checkpoint" in text and "--run.auto_resume true" in text


def test_an_unknown_key_and_a_bad_row_end_with_one_message_each(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "train.num_steps" in refused(run_main, capsys, [*command, "--train.num_step", "3"])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"question": "Why?"}\n')
    assert "train.jsonl:8" in refused(run_main, capsys, command)
    assert run_main([*command, "--data.on_bad_row", "skip", "--dry-run"]) == 0
    assert "kept 7 problems, skipped 1 bad rows" in capsys.readouterr().out


def test_a_dry_run_shows_both_prompts_with_their_special_tokens_and_leaves_nothing(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([*command, "--dry-run", "--prompts.teacher_suffix", "Sure:"]) == 0
    printed = capsys.readouterr().out.replace("\n| ", "\n")
    student, _, teacher = printed.partition("# teacher's prompt")
    opening = "<|im_start|>user\nProblem: Mia has "
    tail = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert opening in student and tail in student
    assert opening in teacher and tail + "Sure:" in teacher
    assert "=== Reference Solution Begin ===" in teacher
    assert "...(omitted)..." in teacher and "at mask ratio 0.3" in teacher
    assert "Reference Solution" not in student.partition("# student's prompt")[2]
    assert "# 7 training problems, 3 held-out problems" in printed
    # r (in + out) for the seven linear maps of two layers of width 32.
    assert "trainable" in printed and "num_steps = 4" in printed
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_printing_the_configuration_loads_no_model(
    command: list[str],
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(line) -> None:
        raise AssertionError

    monkeypatch.setattr("paint_engine.training.build.build_run", never)
    assert run_main([*command, "--print-config"]) == 0
    assert capsys.readouterr().out == to_toml(load_config(command).config)


def test_two_builds_of_one_configuration_are_equal(command: list[str], tmp_path: Path) -> None:
    lines = [load_config([*command, "--run.dir", str(tmp_path / name)]) for name in "ab"]
    runs = [build_run(line, WORLD) for line in lines]
    first, second = ([p.detach() for p in run.parameters] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert runs[0].train_set == runs[1].train_set
    shown: list[list[str]] = [[], []]
    for line, of_line in zip(lines, shown, strict=True):
        plan_run(line, of_line.append)
    assert [text.replace("/a", "/b") for text in shown[0]] == shown[1]


def test_a_run_directory_that_cannot_be_made_is_named(
    command: list[str], run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    below = str(tmp_path / "file" / "run")
    text = refused(run_main, capsys, [*command, "--run.dir", below])
    assert below in text and "--run.dir" in text
