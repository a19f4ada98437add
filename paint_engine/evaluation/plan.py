"""What one command evaluates: target, tokenizer, problems, prompts and headers, without weights."""

import argparse
import datetime
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.checkpoint.choose import present, recorded_section
from paint_engine.config.benchmarks import Benchmark
from paint_engine.config.sections import ColumnsSection, EvalSection, PromptsSection
from paint_engine.data import ProblemSet, spelled_note
from paint_engine.data.rows import load_problems
from paint_engine.distributed import World, gather_objects
from paint_engine.evaluation.base_cache import base_cache_of
from paint_engine.evaluation.flags import EvaluationCommand
from paint_engine.evaluation.store import Header, evaluation_settings, fingerprints
from paint_engine.evaluation.target import (
    Target,
    check_target,
    compute_dtype_of,
    default_directory,
    find_target,
    mismatched_base,
    mismatched_prompts,
    skeleton,
)
from paint_engine.files.terminal import Terminal
from paint_engine.model import check_vocabulary, load_tokenizer, max_context
from paint_engine.prompts.chat import encode_student_prompts
from paint_engine.prompts.template import check_date, check_template, shows_date
from paint_engine.rollout import stop_notes, vllm_is_installed

# Beside it is what runs share that have no `run.dir`.
_SOME_RUN = "runs/any"


@dataclass(frozen=True)
class Plan:
    """A command with everything that it needs but the weights, loaded and checked.

    shape: the model on the meta device.
    sets, headers: by benchmark.
    base_cache: where evaluations of models before training are kept; None = nowhere, and for a
        trained one.
    """

    command: EvaluationCommand
    target: Target
    tokenizer: PreTrainedTokenizerBase
    shape: nn.Module
    engine: Literal["vllm", "builtin"]
    directory: Path
    sets: dict[str, ProblemSet]
    headers: dict[str, Header]
    base_cache: Path | None


def make_plan(
    command: EvaluationCommand,
    world: World,
    *,
    say: Callable[[str], object] | None = None,
    base_only: bool = False,
) -> Plan:
    """Loads and checks everything but the weights.

    say: called with each note, on the main rank; None = prints it.
    base_only: evaluate the base of the adapter that the command names.

    Raises ValueError for a user's mistake in a flag, the model, the adapter or the data.
    """
    arguments = command.arguments
    engine = _choose_engine(command)
    target = find_target(
        arguments.model,
        arguments.adapter,
        arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        revision=arguments.revision,
    )
    if base_only:
        target = Target(target.base)
    say = (say or Terminal().say) if world.is_main else lambda text: None
    with present(target.trained):
        return _plan_for(command, world, engine, target, say)


def _plan_for(
    command: EvaluationCommand,
    world: World,
    engine: Literal["vllm", "builtin"],
    target: Target,
    say: Callable[[str], object],
) -> Plan:
    arguments, section = command.arguments, command.section
    tokenizer, shape = load_tokenizer(target.base), skeleton(target)
    check_target(target, engine)
    check_vocabulary(target.base.name_or_path, tokenizer, shape)
    prompts, dated = with_date(command.prompts, target, tokenizer)
    # On by default is no wish of the user.
    asked = {} if section.thinking else {"--thinking": False}
    notes = mismatches(target, prompts) + check_template(tokenizer, asked, prompts.date)
    for note in notes + dated + stop_notes(shape, tokenizer):
        say(f"note: {note}")
    settings = evaluation_settings(section, arguments.seed, prompts, command.reward.function)
    identity = target.identity(engine, compute_dtype_of(target, world.device))
    load = partial(load_benchmark, on_bad_row=arguments.on_bad_row, say=say)
    sets = {
        benchmark.name: load(benchmark, tokenizer, section, prompts, max_context(shape))
        for benchmark in command.benchmarks
    }
    headers = {
        name: Header(name, settings, identity, fingerprints(problem_set.problems))
        for name, problem_set in sets.items()
    }
    directory = arguments.output or _directory(target, section, identity, settings)
    cache = base_cache_of(section.base_cache, Path(arguments.adapter or _SOME_RUN))
    if target.trained is not None:
        cache = None
    return Plan(command, target, tokenizer, shape, engine, directory, sets, headers, cache)


def _directory(
    target: Target, section: EvalSection, identity: dict[str, Any], settings: dict[str, Any]
) -> Path:
    return default_directory(target, identity | settings | {"num_problems": section.num_problems})


def with_seed(plan: Plan, seed: int, parent: Path | None = None) -> Plan:
    """Returns the plan with another decoding seed. Its directory is the one that the same command
    with this seed would have by default.

    parent: the directory that holds it, in place of the default one.
    """
    command = plan.command
    arguments = argparse.Namespace(**vars(command.arguments) | {"seed": seed})
    headers = {
        name: replace(header, settings=header.settings | {"seed": seed})
        for name, header in plan.headers.items()
    }
    first = next(iter(headers.values()))
    directory = _directory(plan.target, command.section, first.subject, first.settings)
    if parent is not None:
        directory = parent / directory.name
    command = replace(command, arguments=arguments)
    return replace(plan, command=command, headers=headers, directory=directory)


def with_date(
    prompts: PromptsSection, target: Target, tokenizer: PreTrainedTokenizerBase
) -> tuple[PromptsSection, list[str]]:
    """Returns the prompts with the date that the chat template shows, the same on every rank, and
    a note on it: the one that is given, that of the target's training, or today's."""
    check_date(tokenizer, prompts.date, "--date")
    if not shows_date(tokenizer):
        return prompts, []
    trained = target.trained
    recorded = recorded_section(trained.resolve(), "prompts", PromptsSection) if trained else None
    date, source = prompts.date, "as --date says"
    if date is None:
        date, source = recorded and recorded.date, "that of its training"
    if date is None:
        today = datetime.date.today().isoformat()
        date, source = gather_objects(today)[0], f"today's; --date {today} repeats it"
    note = f"the chat template shows the date; this evaluation's is {date}, {source}"
    return prompts.model_copy(update={"date": date}), [note]


def _choose_engine(command: EvaluationCommand) -> Literal["vllm", "builtin"]:
    arguments = command.arguments
    if arguments.engine == "vllm" and not vllm_is_installed():
        raise ValueError(
            "--engine vllm: vLLM is not installed; install it (pip install '.[engine,vllm]' in "
            "the clone), or use --engine builtin"
        )
    if arguments.engine == "auto":
        return "vllm" if vllm_is_installed() else "builtin"
    return arguments.engine


def mismatches(target: Target, prompts: PromptsSection) -> list[str]:
    """Returns notes on how the evaluation uses the target differently from its training."""
    found = []
    if (trained_on := mismatched_base(target)) is not None:
        found.append(
            f"the adapter {target.adapter} was trained on {trained_on}, and --model puts it on "
            f"{target.base.name_or_path}; unless both are the same weights, this evaluates a model "
            "that was never trained"
        )
    if (trained_with := mismatched_prompts(target, prompts)) is not None:
        flags = []
        if trained_with.student_template != prompts.student_template:
            flags += ["--student-template", trained_with.student_template]
        if "{instruction}" in trained_with.student_template and (
            trained_with.instruction != prompts.instruction
        ):
            flags += ["--instruction", trained_with.instruction]
        found.append(
            f"{target.trained} was trained with another student prompt than "
            f"this evaluation's; for the prompt of its training give {shlex.join(flags)}"
        )
    return found


def load_benchmark(
    benchmark: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    section: EvalSection,
    prompts: PromptsSection,
    context: int,
    *,
    on_bad_row: Literal["stop", "skip"] = "stop",
    say: Callable[[str], object] = print,
) -> ProblemSet:
    """Loads the problems of an evaluation and the student's prompts; rows need no solution.

    section: its columns, number of problems, thinking and longest completion are used.
    context: the model's, in tokens; a prompt and a completion must fit in it together.
    say: called with a line about rows that were skipped.
    """
    columns = ColumnsSection() if benchmark.path == "tiny" else section.columns
    loaded = load_problems(
        benchmark.path,
        split=benchmark.split,
        columns=columns,
        on_bad_row=on_bad_row,
        max_rows=section.num_problems,
        section="eval",
    )
    if loaded.num_skipped:
        say(f"{benchmark.path}: skipped {loaded.num_skipped} bad rows")
    for note in spelled_note(benchmark.path, tokenizer, loaded.problems):
        say(f"note: {note}")
    ids = encode_student_prompts(tokenizer, loaded.problems, prompts, thinking=section.thinking)
    _check_context(benchmark.name, max(map(len, ids)), section.max_new_tokens, context)
    return ProblemSet(loaded.problems, tuple(ids), loaded.num_skipped)


def _check_context(name: str, longest: int, max_new_tokens: int, context: int) -> None:
    if longest + max_new_tokens > context:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}, and the longest prompt of {name} has {longest} "
            f"tokens; the model's context holds {context} together; "
            + (
                f"give --max-new-tokens {context - longest} or less"
                if longest < context
                else "evaluate a model with a longer context"
            )
        )
