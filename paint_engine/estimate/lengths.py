"""Measures the prompts of a data set, as student and teachers will read them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from transformers import PreTrainedTokenizerBase

from paint_engine.config.external import scorers
from paint_engine.config.schema import Config
from paint_engine.contexts import Context
from paint_engine.data import ProblemSet
from paint_engine.estimate.memory import Lengths
from paint_engine.prompts.chat import encode_student_prompt, encode_teacher_prompt
from paint_engine.prompts.masking import mask_solution
from paint_engine.recipes import recipe_of
from paint_engine.types import Problem, Reader

_MEASURED_PROMPTS = 256
"""number of problems whose teacher prompts are measured; each takes the tokenizer about 1 ms"""


_RATIONALE = "(what the teacher writes of the text that it is shown, before it scores)"


@dataclass(frozen=True)
class PromptLengths:
    """Prompt lengths in tokens: the student's of all problems, and the teacher's of some problems;
    of several teachers, the longest.

    each: of each teacher, those of the problems that it scores.
    """

    student: Sequence[int]
    teacher: Sequence[int]
    each: Sequence[Sequence[int]]

    def mean_of(self, place: int) -> float:
        """Returns the mean prompt of a teacher, by its place; of all if it scores none of the
        measured problems."""
        return mean(self.each[place] or self.teacher)

    def longest(self, completion: int) -> Lengths:
        """Returns the longest prompt of each role, with a completion."""
        return Lengths(max(self.student), max(self.teacher), completion)

    def typical(self, completion: int) -> Lengths:
        """Returns the mean prompt of each role, with a completion."""
        return Lengths(round(mean(self.student)), round(mean(self.teacher)), completion)


def shown_text(shows: Context, problem: Problem, problems: Sequence[Problem]) -> tuple[str, str]:
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


def teacher_prompt(
    config: Config, reader: Reader, problem: Problem, problems: Sequence[Problem]
) -> tuple[int, ...]:
    """Returns the teacher's prompt with the smallest part hidden, and placeholders for what is not
    sampled yet. Without a teacher, returns the student's prompt.

    problems: the training problems.
    """
    prompts, shows, tokenizer = config.prompts, recipe_of(config).context, reader.tokenizer
    if shows is None:
        return encode_student_prompt(tokenizer, problem, prompts, thinking=prompts.student_thinking)
    text, left = shown_text(shows, problem, problems)
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


def prompt_lengths(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    context: int,
    teachers: Sequence[Reader] = (),
) -> PromptLengths:
    """Measures prompt lengths over the data set: the student's of all problems, the teacher's of
    problems spread evenly over it, each with the longest possible rationale, rollout or feedback.

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
        prompt = teacher_prompt(config, reader, problem, problems)
        return min(len(prompt) + added, reader.max_context - completion)

    by_place = [
        {place: length(readers[place], problem) for place in scorers(config, problem.route)}
        for problem in measured
    ]
    return PromptLengths(
        [len(prompt) for prompt in train_set.prompts],
        [max(found.values()) for found in by_place],
        [[found[place] for found in by_place if place in found] for place in range(len(readers))],
    )
