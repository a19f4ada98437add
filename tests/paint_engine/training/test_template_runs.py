"""Prompt templates in runs: each message that a model reads is its template's, in training, in the
dry run and in evaluations, and an evaluation's record says so."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from paint_engine.config import templates
from paint_engine.config.benchmarks import Benchmark
from paint_engine.config.command_line import load_config
from paint_engine.config.sections import EvalSection, PromptsSection
from paint_engine.distributed import World
from paint_engine.estimate.dry_run import describe
from paint_engine.evaluation.flags import parse_arguments, prompts_of
from paint_engine.evaluation.plan import load_benchmark
from paint_engine.evaluation.store import evaluation_settings
from paint_engine.files.terminal import Terminal
from paint_engine.monitor.progress import Progress
from paint_engine.prompts.template import BadTemplate
from paint_engine.recipes import teacher_view
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import Completion
from paint_engine.training.build import build_run
from paint_engine.training.evaluations import evaluate_at
from paint_engine.training.interrupt import StopRequest
from paint_engine.training.rollouts import sample_step
from paint_engine.training.run import Run
from paint_engine.training.summary import present_evaluations

OPENING = "<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
OWN = {
    "teacher.reason_first": "true",
    "teacher.reason_max_new_tokens": "7",
    "prompts.instruction": "Go.",
    "prompts.student_template": "Q {problem} {instruction}",
    "prompts.teacher_template": "T {problem} {part_of}[{solution}] {rationale}{instruction}",
    "prompts.rationale_template": "<{rationale}> ",
    "prompts.reason_template": "R {problem} {part_of}[{solution}]",
}


@pytest.fixture
def run(command: list[str]) -> Run:
    flags = [part for key, value in OWN.items() for part in (f"--{key}", value)]
    return build_run(load_config([*command, *flags]), World(0, 1, 0, torch.device("cpu")))


def decoded(run: Run, ids: tuple[int, ...]) -> str:
    text = run.tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def test_every_message_of_a_step_is_its_template_s(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = BuiltinEngine.generate

    def generate(self, prompts, seeds, params, *, base=False, on_batch=None):
        if not base:
            return original(self, prompts, seeds, params, base=base, on_batch=on_batch)
        asked.extend(decoded(run, tuple(prompt)) for prompt in prompts)
        ids = tuple(run.tokenizer.encode("it adds<|im_end|>"))
        return [Completion(ids, (0.0,) * len(ids), False)] * len(prompts)

    monkeypatch.setattr(BuiltinEngine, "generate", generate)
    items, _ = sample_step(run, 0)
    assert len(items) == len(asked) == 3
    for item, request in zip(items, asked, strict=True):
        question, shown = item.rollout.problem.problem, item.teacher_view.shown
        assert shown.endswith("...(omitted)...")
        student = decoded(run, item.rollout.prompt_ids)
        teacher = decoded(run, item.teacher_view.prompt_ids)
        assert student == f"{OPENING}Q {question} Go.{ANSWER}"
        assert request == f"{OPENING}R {question} part of [{shown}]{ANSWER}"
        assert teacher == f"{OPENING}T {question} part of [{shown}] <it adds> Go.{ANSWER}"


def test_the_dry_run_shows_every_message(run: Run) -> None:
    report = describe(
        run.config,
        run.tokenizer,
        run.train_set,
        run.eval_sets,
        run.model,
        device=torch.device("cpu"),
        num_ranks=1,
    )
    messages = report.replace("\n| ", "\n").split(OPENING)[1:]
    assert [message[:2] for message in messages] == ["Q ", "T ", "R "]
    assert (
        "<(what the teacher writes of the text that it is shown, before it scores)> Go."
        in messages[1]
    )
    assert 'student_template = "Q {problem} {instruction}"' in report


def test_a_run_is_evaluated_with_the_student_s_message_and_its_record_says_so(run: Run) -> None:
    (held_out,) = run.eval_sets.values()
    texts = [decoded(run, prompt) for prompt in held_out.prompts]
    problems = held_out.problems
    assert texts == [f"{OPENING}Q {problem.problem} Go.{ANSWER}" for problem in problems]
    evaluate_at(run, 0, Progress(Terminal(quiet=True)), StopRequest())
    ((step, found),) = present_evaluations(run).items()
    (evaluation,) = found.values()
    assert step == 0
    assert evaluation.settings["student_template"] == OWN["prompts.student_template"]
    prompts = run.config.prompts.model_copy(update={"student_template": templates.STUDENT})
    other = replace(run, config=run.config.model_copy(update={"prompts": prompts}))
    assert present_evaluations(other) == {}


def test_the_default_message_is_recorded_as_before_there_was_a_choice() -> None:
    section = EvalSection()
    plain = evaluation_settings(section, 0, PromptsSection(instruction="Go."))
    assert "student_template" not in plain and plain["instruction"] == "Go."
    own = PromptsSection(instruction="Go.", student_template="{problem}! {instruction}")
    other = evaluation_settings(section, 0, own)
    assert other == plain | {"student_template": "{problem}! {instruction}"}
    # An instruction that only the teacher reads decides nothing.
    bare = [PromptsSection(instruction=text, student_template="{problem}") for text in ("a", "b")]
    first, second = (evaluation_settings(section, 0, prompts) for prompts in bare)
    assert first == second and "instruction" not in first


def test_the_evaluation_command_takes_a_message_and_checks_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    fixed = ["--model", "tiny", "--benchmarks", "tiny"]
    assert parse_arguments(fixed).student_template == templates.STUDENT
    prompts = prompts_of(parse_arguments([*fixed, "--student-template", "Q {problem}"]))
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "answer": "2"}))
    section = EvalSection(num_problems=None, max_new_tokens=8, thinking=False)
    loaded = load_benchmark(Benchmark("a", str(file), "test"), tokenizer, section, prompts, 200)
    assert tokenizer.decode(list(loaded.prompts[0])) == f"{OPENING}Q 1+1?{ANSWER}"
    for wrong in ("{solution}", "Solve it."):
        with pytest.raises(ValueError, match=r"--student-template: got '.*'; needs "):
            parse_arguments([*fixed, "--student-template", wrong])


def test_a_template_that_fails_within_a_step_ends_the_run_with_one_message(
    command: list[str],
    tmp_path: Path,
    run_main: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As for one partial solution only, so that no prompt at the start shows it."""
    calls, original = itertools.count(), teacher_view.encode_teacher_prompt

    def encode(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise BadTemplate("the chat template of model refuses a conversation")
        return original(*arguments, **options)

    monkeypatch.setattr(teacher_view, "encode_teacher_prompt", encode)
    assert run_main([*command, "--eval.enabled", "false", "--checkpoint.every", "0"]) == 1
    printed = capsys.readouterr().out
    assert "error: the chat template of model refuses a conversation; saved " in printed
    assert "resume with: " in printed
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()
