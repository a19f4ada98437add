"""The report of `--dry-run`: the configuration, the first batch, and the memory and arithmetic of a
step."""

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.external import scorers, teacher_models
from paint_engine.config.schema import Config
from paint_engine.config.toml import to_toml
from paint_engine.contexts import Context
from paint_engine.data import ProblemSet, batch_requests
from paint_engine.estimate.capacity import check_fits, device_memory_bytes
from paint_engine.estimate.memory import GIB, Lengths, estimate_memory
from paint_engine.estimate.model_shape import ModelShape, forward_flops, shape_of, step_flops
from paint_engine.files import one_line
from paint_engine.model import max_context
from paint_engine.prompts.chat import encode_student_prompt, encode_teacher_prompt
from paint_engine.prompts.masking import mask_solution
from paint_engine.prompts.rationale import encode_reason_prompt
from paint_engine.recipes import recipe_of
from paint_engine.types import Problem, Reader

_MEASURED_PROMPTS = 256
"""number of problems whose teacher prompts are measured; each takes the tokenizer about 1 ms"""


_RATIONALE = "(what the teacher writes of the text that it is shown, before it scores)"


@dataclass(frozen=True)
class PromptLengths:
    """Prompt lengths in tokens: the student's of all problems, and the teacher's of some
    problems."""

    student: Sequence[int]
    teacher: Sequence[int]

    def longest(self, completion: int) -> Lengths:
        """Returns the longest prompt of each role, with a completion."""
        return Lengths(max(self.student), max(self.teacher), completion)

    def typical(self, completion: int) -> Lengths:
        """Returns the mean prompt of each role, with a completion."""
        return Lengths(round(mean(self.student)), round(mean(self.teacher)), completion)


def _shown_text(shows: Context, problem: Problem, problems: Sequence[Problem]) -> tuple[str, str]:
    """Returns a text that the context may show, and what the mask leaves of it where the settings
    hide the smallest part."""
    text, masking = shows.placeholder(problem, problems), shows.config.masking
    if not shows.is_masked:
        return text, text
    left = mask_solution(
        text,
        masking.rho_wrong,
        placement=masking.placement,
        generator=random.Random(0),
        marker=masking.marker,
    )
    return text, left


def _teacher_prompt(
    config: Config, reader: Reader, problem: Problem, problems: Sequence[Problem]
) -> tuple[int, ...]:
    """Returns the teacher's prompt with the smallest part hidden, and placeholders for what is not
    sampled yet. Without a teacher, returns the student's prompt.

    problems: the training problems.
    """
    prompts, shows, tokenizer = config.prompts, recipe_of(config).context, reader.tokenizer
    if shows is None:
        return encode_student_prompt(tokenizer, problem, prompts, thinking=prompts.student_thinking)
    text, left = _shown_text(shows, problem, problems)
    prompt, _ = encode_teacher_prompt(
        tokenizer,
        problem,
        left,
        shows.prompts,
        text=text,
        max_tokens=reader.max_context - config.rollout.max_new_tokens,
        marker=config.masking.marker,
        rationale=_RATIONALE if config.teacher.reason_first else None,
    )
    return prompt


def _request(
    shows: Context,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    problems: Sequence[Problem],
    context: int,
) -> tuple[int, ...]:
    """Returns the prompt that asks for the rationale, with the same part of the text."""
    text, left = _shown_text(shows, problem, problems)
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


def prompt_lengths(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    context: int,
    teachers: Sequence[Reader] = (),
) -> PromptLengths:
    """Measures prompt lengths over the data set: the student's of all problems, the teacher's of
    problems spread evenly over it, each with the longest possible rationale, rollout or feedback;
    of several teachers, the longest.

    context: the model's context, in tokens.
    teachers: those that are other models.
    """
    every = -(-len(train_set.problems) // _MEASURED_PROMPTS)
    measured, readers = train_set.problems[::every], teachers or (Reader(tokenizer, context),)
    section, completion = config.teacher, config.rollout.max_new_tokens
    shows, problems = recipe_of(config).context, train_set.problems
    added = section.reason_max_new_tokens if section.reason_first else 0
    added += 0 if shows is None else shows.num_added_tokens

    def length(reader: Reader, problem: Problem) -> int:
        prompt = _teacher_prompt(config, reader, problem, problems)
        return min(len(prompt) + added, reader.max_context - completion)

    teacher = [
        max(length(readers[place], problem) for place in scorers(config, problem.route))
        for problem in measured
    ]
    return PromptLengths([len(prompt) for prompt in train_set.prompts], teacher)


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
            teacher = _teacher_prompt(config, readers[place], problem, problems)
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


def _external_flops(
    config: Config, shape: ModelShape, typical: Lengths, teachers: Sequence[ModelShape]
) -> dict[str, float]:
    """Returns the operations of other models' passes over one rollout, and of the losses against
    them. A routed rollout has one teacher, a mean one here."""
    length, completion = typical.teacher_prompt + typical.completion, typical.completion
    share = 1 / len(teachers) if config.teacher.route_column is not None else 1.0
    # The student's logits, and the gradients by its hidden states and by a trained head.
    own = 2 * shape.head_parameters * completion * (2 if shape.adapted else 3)
    heads = sum(2 * teacher.head_parameters * completion for teacher in teachers)
    passes = sum(forward_flops(teacher, length, adapters=False) for teacher in teachers)
    return {"teacher": share * passes, "loss": share * (len(teachers) * own + heads)}


def rollout_flops(
    config: Config, shape: ModelShape, typical: Lengths, teachers: Sequence[ModelShape] = ()
) -> dict[str, float]:
    """Returns the floating-point operations of one rollout by part, over all updates on it.

    teachers: the shapes of those that are other models.
    """
    checkpointing = config.parallel.activation_checkpointing
    flops = step_flops(
        shape,
        student_prompt=typical.student_prompt,
        teacher_prompt=typical.teacher_prompt,
        completion=typical.completion,
        checkpointing=checkpointing,
    )
    if teachers:
        flops |= _external_flops(config, shape, typical, teachers)
    sampled = flops.pop("rollout")
    if not recipe_of(config).second_pass:
        del flops["teacher"]
    flops = {name: size * recipe_of(config).num_updates for name, size in flops.items()}
    if recipe_of(config).samples:
        flops = {"rollout": sampled} | flops
    if config.teacher.reason_first:
        # The teacher's prompt contains the request's parts and the rationale.
        rationale = config.teacher.reason_max_new_tokens
        reasoned = step_flops(
            shape,
            student_prompt=max(0, typical.teacher_prompt - rationale),
            teacher_prompt=0,
            completion=rationale,
            checkpointing=checkpointing,
        )
        flops["rationale"] = reasoned["rollout"]
    return flops


def _sizes(
    config: Config, shape: ModelShape, lengths: PromptLengths, teachers: Sequence[ModelShape]
) -> list[str]:
    completion, batch_size = config.rollout.max_new_tokens, config.train.batch_size
    total = shape.base_parameters + shape.adapter_parameters
    trained = shape.trained_parameters
    typical = lengths.typical(completion)
    flops = rollout_flops(config, shape, typical, teachers)
    parts = ", ".join(f"{name} {size * batch_size / 1e12:.3g}" for name, size in flops.items())
    student = batch_size * (typical.student_prompt + completion)
    teacher = batch_size * (typical.teacher_prompt + completion)
    recipe = recipe_of(config)
    second = f" and {teacher:,} through the teacher" if recipe.second_pass else ""
    if recipe.served_top_k is not None:
        second = f"; the server scores {teacher:,}, which are not in the sums below"
    prompts = (
        f", {typical.teacher_prompt} for the teacher (at most {max(lengths.teacher)} in "
        f"{len(lengths.teacher)} measured)"
        if recipe.uses_teacher
        else ""
    )
    return [
        f"# {total:,} parameters, {trained:,} trainable ({trained / total:.1%})",
        *(
            f"# teacher {one_line(model.name)}: {teacher.base_parameters:,} parameters, frozen"
            for model, teacher in zip(teacher_models(config), teachers, strict=True)
        ),
        f"# prompts of {typical.student_prompt} tokens on average for the student (at most "
        f"{max(lengths.student)}){prompts}",
        f"# a step: at most {batch_size * completion:,} completion tokens, {student:,} tokens "
        f"through the student{second}",
        f"# a step: {sum(flops.values()) * batch_size / 1e12:.3g} TFLOP ({parts})",
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
    eval_set: ProblemSet | None,
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
    processors = "a CPU" if longest.device_memory_bytes is None else "a GPU"
    each = "1 process" if num_ranks == 1 else f"each of {num_ranks} processes"
    num_held_out = len(eval_set.problems) if eval_set else 0
    return "\n".join(
        (
            to_toml(config),
            f"# {len(train_set.problems)} training problems, {num_held_out} held-out problems",
            *_sizes(config, shape, lengths, shapes),
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
