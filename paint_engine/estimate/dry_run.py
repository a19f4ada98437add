"""The report of `--dry-run`: the configuration, the first batch, and the memory and arithmetic of a
step."""

import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.external import scorers, teacher_models
from paint_engine.config.schema import Config
from paint_engine.config.toml import to_toml
from paint_engine.contexts import Context
from paint_engine.data import ProblemSet, batch_requests
from paint_engine.estimate.arithmetic import Scoring, passes_flops, rollout_flops, scoring_of
from paint_engine.estimate.capacity import check_fits, device_memory_bytes
from paint_engine.estimate.hours import evaluations_of, hours_lines
from paint_engine.estimate.lengths import (
    PromptLengths,
    prompt_lengths,
    shown_text,
    teacher_prompt,
)
from paint_engine.estimate.memory import GIB, Lengths, estimate_memory
from paint_engine.estimate.model_shape import ModelShape, shape_of
from paint_engine.files import one_line
from paint_engine.model import max_context
from paint_engine.prompts.rationale import encode_reason_prompt
from paint_engine.recipes import draws, recipe_of
from paint_engine.types import Problem, Reader


def _request(
    shows: Context,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    problems: Sequence[Problem],
    context: int,
) -> tuple[int, ...]:
    """Returns the prompt that asks for the rationale, with the same part of the text."""
    text, left = shown_text(shows, problem, problems)
    config = shows.config
    request, _ = encode_reason_prompt(
        tokenizer,
        problem,
        left,
        shows.prompts,
        text=text,
        thinking=False,
        max_tokens=context - config.teacher.reason_max_new_tokens,
        marker=config.masking.marker,
    )
    return request


def _quoted(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """Returns a prompt's text, of which no line looks like one of the report."""
    return textwrap.indent(str(tokenizer.decode(list(prompt))), "| ", lambda line: True)


def _first_batch(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    context: int,
    teachers: Sequence[Reader],
) -> list[str]:
    """Returns lines with the first problem's prompts in full and the lengths of the others."""
    requests = batch_requests(config, train_set, 0)
    problem, student = requests[0].problem, requests[0].prompt_ids
    lines = [
        f"# student's prompt of {one_line(problem.problem_id)} ({len(student)} tokens)",
        _quoted(tokenizer, student),
    ]
    shows, problems = recipe_of(config).context, train_set.problems
    if shows is not None:
        readers = teachers or (Reader(tokenizer, context),)
        mask = f" at mask ratio {config.masking.rho_wrong}" if shows.is_masked else ""
        for place in scorers(config, problem.route):
            teacher = teacher_prompt(config, readers[place], problem, problems)
            name = f" {teacher_models(config)[place].name}" if teachers else ""
            lines += [
                "",
                f"# teacher{name}'s prompt of the same problem{mask} ({len(teacher)} tokens)",
                _quoted(readers[place].tokenizer, teacher),
            ]
    if config.teacher.reason_first and shows is not None:
        request = _request(shows, tokenizer, problem, problems, context)
        lines += [
            "",
            f"# request for the teacher's rationale ({len(request)} tokens)",
            _quoted(tokenizer, request),
        ]
    others = [len(request.prompt_ids) for request in requests[1:]]
    if others:
        size = recipe_of(config).group_size
        each = f", {size} of each problem" if size > 1 else ""
        lines += [
            "",
            f"# {len(others)} more rollouts in the first step{each}, with student's prompts of "
            f"{min(others)} to {max(others)} tokens",
        ]
    return lines


def _share(number: float) -> str:
    """Returns a number of rollouts, which is a mean where routes decide: 1,024 or 2.86."""
    return f"{number:,.2f}".rstrip("0").rstrip(".")


def _teacher_lines(config: Config, completion: int, scoring: Sequence[Scoring]) -> list[str]:
    """Returns a line on each teacher that is another model, and one on a teacher that follows."""
    size, lines = config.train.batch_size, []
    models, recipe = teacher_models(config), recipe_of(config)
    may_lack = recipe.context is not None and recipe.context.is_optional
    bound = "at most " if recipe.leaves_out or may_lack else ""
    for model, one in zip(models, scoring if models else (), strict=True):
        number = one.share * size
        lines.append(
            f"# teacher {one_line(model.name)}: {one.shape.base_parameters:,} parameters, frozen; "
            f"it scores {bound}{_share(number)} of a step's {size:,} rollouts, "
            f"{number * (one.prompt + completion):,.0f} tokens"
        )
    every = config.teacher.refresh_every
    if every is not None and scoring:
        lines.append(
            f"# every {every} steps the teacher becomes a copy of the student's "
            f"{scoring[0].shape.trained_parameters:,} trained weights, which is not in the sums "
            "below"
        )
    return lines


def _step_flops(
    config: Config, shape: ModelShape, typical: Lengths, scoring: Sequence[Scoring]
) -> dict[str, float]:
    """Returns the operations of one rollout by part."""
    return rollout_flops(
        config,
        shape,
        student_prompt=typical.student_prompt,
        completion=typical.completion,
        scoring=scoring,
    )


def _server_lines(config: Config) -> list[str]:
    """Returns a line on the servers that share a step's rollouts, if there are several."""
    urls, size = config.rollout.url or (), config.train.batch_size
    if len(urls) < 2 or not draws(config):
        return []
    return [
        f"# {len(urls)} servers sample about {_share(size / len(urls))} of a step's {size:,} "
        f"rollouts each (not asked now): {', '.join(urls)}"
    ]


def _work_lines(
    config: Config, shape: ModelShape, typical: Lengths, scoring: Sequence[Scoring]
) -> list[str]:
    """Returns the lines on the tokens and the operations of a step."""
    recipe, size, completion = recipe_of(config), config.train.batch_size, typical.completion
    student = size * (typical.student_prompt + completion)
    teacher = size * sum(one.share * (one.prompt + completion) for one in scoring)
    second = f" and {teacher:,.0f} through the teacher" if scoring else ""
    if recipe.served_top_k is not None:
        served = size * (typical.teacher_prompt + completion)
        second = f"; the server scores {served:,}, which are not in the sums below"
    flops = _step_flops(config, shape, typical, scoring)
    parts = ", ".join(f"{name} {part * size / 1e12:.3g}" for name, part in flops.items())
    lines = [
        f"# a step: at most {size * completion:,} completion tokens, {student:,} tokens "
        f"through the student{second}",
        f"# a step: {sum(flops.values()) * size / 1e12:.3g} TFLOP ({parts})",
    ]
    if recipe.leaves_out:
        passes = passes_flops(flops)
        lines.append(
            "# the sums have every rollout; each one that is left out of the passes takes "
            f"{passes / 1e12:.3g} TFLOP less"
        )
    return lines


def _sizes(
    config: Config, shape: ModelShape, lengths: PromptLengths, scoring: Sequence[Scoring]
) -> list[str]:
    completion = config.rollout.max_new_tokens
    total = shape.base_parameters + shape.adapter_parameters
    trained = shape.trained_parameters
    typical = lengths.typical(completion)
    prompts = (
        f", {typical.teacher_prompt} for the teacher (at most {max(lengths.teacher)} in "
        f"{len(lengths.teacher)} measured)"
        if recipe_of(config).uses_teacher
        else ""
    )
    return [
        f"# {total:,} parameters, {trained:,} trainable ({trained / total:.1%})",
        *_teacher_lines(config, completion, scoring),
        f"# prompts of {typical.student_prompt} tokens on average for the student (at most "
        f"{max(lengths.student)}){prompts}",
        *_server_lines(config),
        *_work_lines(config, shape, typical, scoring),
    ]


def check_run_fits(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    model: nn.Module,
    *,
    device: torch.device,
    num_ranks: int,
    teachers: Sequence[tuple[nn.Module, Reader]] = (),
) -> None:
    """Raises ValueError if the run does not fit into its GPU. The message names the setting to
    change.

    model: the model to train, with its adapters, not sharded; it may be on the meta device
        (`meta_model`).
    teachers: those that are other models, likewise.
    """
    readers = [reader for _, reader in teachers]
    lengths = prompt_lengths(config, tokenizer, train_set, max_context(model), readers)
    check_fits(
        shape_of(model),
        config=config,
        lengths=lengths.longest(config.rollout.max_new_tokens),
        num_ranks=num_ranks,
        device_memory_bytes=device_memory_bytes(config.parallel, device),
        teachers=[shape_of(teacher) for teacher, _ in teachers],
    )


def describe(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    eval_sets: Mapping[str, ProblemSet] | None,
    model: nn.Module,
    *,
    device: torch.device,
    num_ranks: int,
    teachers: Sequence[tuple[nn.Module, Reader]] = (),
) -> str:
    """Returns the whole report. It does not check whether the run fits (see `check_run_fits`).

    model: the model to train, with its adapters, not sharded; it may be on the meta device
        (`meta_model`).
    teachers: those that are other models, likewise.
    """
    shape, context = shape_of(model), max_context(model)
    shapes, readers = [shape_of(one) for one, _ in teachers], [reader for _, reader in teachers]
    lengths = prompt_lengths(config, tokenizer, train_set, context, readers)
    scoring = scoring_of(config, shape, lengths, train_set.problems, shapes)
    completion = config.rollout.max_new_tokens
    checkpointing = not config.parallel.activation_checkpointing
    parallel = config.parallel.model_copy(update={"activation_checkpointing": checkpointing})
    other = config.model_copy(update={"parallel": parallel})
    longest, typical, otherwise = (
        estimate_memory(
            shape,
            config=estimated,
            lengths=roles,
            num_ranks=num_ranks,
            device_memory_bytes=device_memory_bytes(config.parallel, device),
            teachers=shapes,
        )
        for estimated, roles in (
            (config, lengths.longest(completion)),
            (config, lengths.typical(completion)),
            (other, lengths.longest(completion)),
        )
    )
    passes = passes_flops(_step_flops(config, shape, lengths.typical(completion), scoring))
    processors = "a CPU" if longest.device_memory_bytes is None else "a GPU"
    each = "1 process" if num_ranks == 1 else f"each of {num_ranks} processes"
    num_held_out = sum(len(held_out.problems) for held_out in (eval_sets or {}).values())
    return "\n".join(
        (
            to_toml(config),
            f"# {len(train_set.problems)} training problems, {num_held_out} held-out problems",
            *_sizes(config, shape, lengths, scoring),
            *hours_lines(
                config,
                shape,
                evaluations_of(config.eval, config.train.num_steps, eval_sets or {}),
                step_flops=passes * config.train.batch_size,
                prompt=mean(lengths.student),
                device=device,
                num_ranks=num_ranks,
            ),
            "",
            *_first_batch(config, tokenizer, train_set, context, readers),
            "",
            f"# memory that {each} takes on {processors}, in GiB, with the longest prompts (with "
            f"average ones {typical.total_bytes / GIB:.3f})",
            longest.table(),
            f"{otherwise.total_bytes / GIB:9.3f}  {'with' if checkpointing else 'without'} "
            "activation checkpointing",
        )
    )
