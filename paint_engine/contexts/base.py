"""The base class of contexts: what the teacher of a rollout is shown, and whose text it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from paint_engine.config import templates
from paint_engine.config.plugins import load_class, plugin_names
from paint_engine.config.schema import Config
from paint_engine.config.sections import PromptsSection
from paint_engine.config.toml import LEAVES, flag, value_of

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample

PACKAGE, ATTRIBUTE, KEY = "paint_engine.contexts", "CONTEXT", "teacher.context"
_MASK_KEYS = ("masking.rho_wrong", "masking.rho_correct", "masking.placement")
# A text is also shortened where the prompt has no room for it; the marker says so.
_TEXT_KEYS = ("masking.marker", "teacher.reason_first")
_GROUP_KEYS = ("teacher.group_size",)
# Values that switch a part off. They are valid for a context that lacks the part.
_SWITCHED_OFF = {"masking.rho_wrong": 0.0, "masking.rho_correct": 0.0}


class ContextFailed(Exception):
    """A context or a recipe of the user's own has no text for the teacher that it can be shown."""


@dataclass(frozen=True)
class Shown:
    """What a context shows the teacher of one rollout: Shown("First we add ...", "gsm8k:1")

    text: not empty, except where the context shows nothing but the problem.
    source: whose text it is: a problem's id, or for a sibling its rollout's place in the batch,
        counted from 0.
    """

    text: str
    source: str


class Context:
    """What the teacher is shown beside the problem.

    A context is bound to a configuration. A built-in context is `CONTEXT` of its own file in
    `paint_engine/contexts/`; `teacher.context = "my_module:MyContext"` names a user's own. A
    subclass overrides what differs from the defaults below and implements `show` and
    `placeholder`.

    keys: configuration keys that this context reads and others may not. Those of masks, groups and
        texts follow from the declarations below.
    needs_solution, needs_answer: rows of the data must have one.
    needs_group: a problem is sampled several times, in consecutive rollouts: `teacher.group_size`
        times, or `grpo.group_size` times by a recipe that has groups of its own.
    is_masked: a part of the text is hidden, the more the rollout overlaps with it (Eq. 4 to 6).
    shows_text: the prompt has a text beside the problem.
    is_optional: a rollout may have nothing to show. The teacher then does not train it.
    teacher_template, reason_template: the messages that stand in place of the default ones of
        `prompts`.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    needs_solution: ClassVar[bool] = False
    needs_answer: ClassVar[bool] = False
    needs_group: ClassVar[bool] = False
    is_masked: ClassVar[bool] = False
    shows_text: ClassVar[bool] = True
    is_optional: ClassVar[bool] = False
    teacher_template: ClassVar[str] = templates.TEACHER
    reason_template: ClassVar[str] = templates.REASON

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """`teacher.context`."""
        return self.config.teacher.context

    @property
    def message(self) -> str:
        """The template of the teacher's message: the context's own in place of the default."""
        own = self.config.prompts.teacher_template
        return self.teacher_template if own == templates.TEACHER else own

    @cached_property
    def prompts(self) -> PromptsSection:
        """The prompts with the context's own messages in place of the default ones."""
        asked = self.config.prompts.reason_template
        reason = self.reason_template if asked == templates.REASON else asked
        update = {"teacher_template": self.message, "reason_template": reason}
        return self.config.prompts.model_copy(update=update)

    # ---- checks ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ValueError for settings that contradict the context or that it does not read."""
        self._check_idle_keys()
        if self.shows_text:
            self._check_template()

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raises ValueError for training problems of which the context can show nothing."""

    def notes(self) -> list[str]:
        """Returns notes on settings that are allowed but may surprise, for the console."""
        return []

    def _check_idle_keys(self) -> None:
        builtin = {name: context_class(name) for name in plugin_names(PACKAGE, ATTRIBUTE)}
        for key in sorted({key for other in builtin.values() for key in read_keys(other)}):
            value, default = value_of(self.config, key), LEAVES[key].default
            if key in read_keys(type(self)) or value in (default, _SWITCHED_OFF.get(key, default)):
                continue
            users = " or ".join(name for name, other in builtin.items() if key in read_keys(other))
            raise ValueError(
                f"{key}: got {value!r} with {KEY} {self.name!r}, which does not read it; leave it "
                f"out (the default is {flag(key, default)}), or use --{KEY} {users}"
            )

    def _check_template(self) -> None:
        if "{solution}" not in self.message:
            raise ValueError(
                f"prompts.teacher_template: got {self.message!r} with {KEY} {self.name!r}; needs "
                "{solution} in it, at the place of the text that the teacher is shown; add it, or "
                f"use --{KEY} none"
            )
        if self.config.teacher.reason_first and "{rationale}" not in self.message:
            raise ValueError(
                f"prompts.teacher_template: got {self.message!r} with teacher.reason_first true; "
                "needs {rationale} in it, because the rationale would otherwise appear nowhere; "
                "add it, or use --teacher.reason_first false"
            )

    # ---- a step ----------------------------------------------------------------------------------

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns what the teacher of one judged rollout is shown, or None for nothing.

        The choice follows from the arguments alone: a resumed run, or one on another number of
        ranks, shows the same.

        request: the rollout's; `request.index` is its place in `step.batch`.
        """
        raise NotImplementedError

    # ---- before a step ---------------------------------------------------------------------------

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns a text like those that `show` returns for rollouts of this problem, for the
        dry run and for lengths.

        problems: the training problems.
        """
        raise NotImplementedError

    @property
    def num_added_tokens(self) -> int:
        """The largest number of tokens that a shown text has beyond its placeholder's."""
        return 0

    def texts_of(self, problem: Problem) -> tuple[str, ...]:
        """Returns the texts of a row, beside the problem, that prompts may show."""
        return ()


def shown_by(
    context: Context, example: TrainExample, request: Request, step: StepContext
) -> Shown | None:
    """Returns `context.show`. Raises ContextFailed for a value that its declarations do not
    allow."""
    shown = context.show(example, request, step)
    if shown is None:
        wrong = "" if context.is_optional else "needs a Shown, or is_optional = True in the class"
    elif not isinstance(shown, Shown) or not isinstance(shown.text, str):
        wrong = "needs Shown(text, source) with two texts, or None"
    else:
        empty = context.shows_text and not shown.text.strip()
        wrong = "needs a text; return None, with is_optional, where there is none" if empty else ""
    if wrong:
        raise ContextFailed(
            f"{KEY}: {context.name}: show returned {shown!r:.200} for "
            f"{request.problem.problem_id}; {wrong}"
        )
    return shown


def read_keys(context: type[Context]) -> tuple[str, ...]:
    """Returns the keys of the configuration that a context reads and others may not."""
    return (
        *context.keys,
        *(_MASK_KEYS if context.is_masked else ()),
        *(_TEXT_KEYS if context.shows_text else ()),
        *(_GROUP_KEYS if context.needs_group else ()),
    )


def context_class(name: str) -> type[Context]:
    """Returns the context of a name, built in or "module:Class". Raises ValueError if there is
    none."""
    return load_class(name, PACKAGE, ATTRIBUTE, KEY, Context, ("show", "placeholder"))


def context_of(config: Config) -> Context:
    """Returns the context that the configuration names, bound to it."""
    return context_class(config.teacher.context)(config)
