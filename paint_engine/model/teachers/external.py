"""External teachers: other models of the student's vocabulary, frozen, in the same process."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config.external import TeacherModel, teacher_models
from paint_engine.config.schema import Config
from paint_engine.distributed import World, together
from paint_engine.model.attention import check_layers, choose_attention
from paint_engine.model.forward import compute_dtype, max_context
from paint_engine.model.load import hub_commit, is_on_hub, load_base, meta_base, resolve_model
from paint_engine.model.probe import check_forward, logit_scale
from paint_engine.model.sharding import is_sharded, shard_model
from paint_engine.model.stored import check_stored
from paint_engine.model.teachers.base import Teacher
from paint_engine.model.tokenizer import (
    check_same_tokens,
    check_vocabulary,
    load_tokenizer,
    vocabulary_size,
)
from paint_engine.types import Reader

_KEY_OF = {"name_or_path": "model", "revision": "revision"}
# A teacher is of no evaluation or export, which name a model by --model.
_KEYS = re.compile(r"\bmodel\.(name_or_path|revision)\b(?: \(--model [^)]*\))?")


class ExternalTeacher(Teacher):
    """A frozen model with its own head, width and attention. `name` is what messages call it."""

    def __init__(self, name: str, model: nn.Module, attention: str, weight: float) -> None:
        self.name, self.model = name, model
        self.attention, self.weight = attention, weight

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the model, in evaluation mode and without gradients."""
        with torch.no_grad():
            yield self.model


class Panel(Teacher):
    """The external teachers of a run. Each scores in a pass of its own."""

    def __init__(self, members: Sequence[ExternalTeacher]) -> None:
        assert members, "no model was loaded"
        self._members = tuple(members)

    @property
    def members(self) -> Sequence[Teacher]:
        """The teachers, in the order of `teacher.models`."""
        return self._members


@dataclass(frozen=True)
class OpenedTeacher:
    """An external teacher before its weights are loaded. `shape` is its model without weights."""

    given: TeacherModel
    tokenizer: PreTrainedTokenizerBase
    shape: PreTrainedModel

    @property
    def reader(self) -> Reader:
        """The teacher as a reader of prompts."""
        return Reader(self.tokenizer, max_context(self.shape))


@contextmanager
def _for_teacher(name: str) -> Iterator[None]:
    """A context in which a ValueError says which teacher it is about, and names the teacher's keys
    and not the student's."""
    try:
        yield
    except ValueError as error:
        text = _KEYS.sub(lambda key: f"teacher.{_KEY_OF[key[1]]}", str(error))
        raise ValueError(f"teacher {name}: {text}") from error


def open_teachers(
    config: Config, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], object]
) -> tuple[OpenedTeacher, ...]:
    """Reads tokenizers and configurations of the external teachers; none if there are none.

    tokenizer: the student's.
    say: gets a note on a teacher with tokens that the student lacks.

    Raises ValueError for a model that cannot be read, whose logits are not its hidden states times
    its head (or a constant multiple), or whose tokens are not the student's, token by token.
    """
    opened = []
    for given in teacher_models(config):
        with _for_teacher(given.name):
            own = load_tokenizer(given.section)
            shape = meta_base(given.section)
            what = f"model {given.section.name_or_path}"
            check_vocabulary(given.section.name_or_path, own, shape)
            logit_scale(shape, what)
            check_layers(shape, given.section.attention)
        check_same_tokens(tokenizer, own, (config.model.name_or_path, given.name))
        more = vocabulary_size(own) - vocabulary_size(tokenizer)
        if more > 0:
            say(
                f"note: teacher {given.name} has {more} tokens more than the student; the loss "
                "takes its probabilities without them, divided by their sum"
            )
        opened.append(OpenedTeacher(given, own, shape))
    return tuple(opened)


def hub_commits(opened: Sequence[OpenedTeacher]) -> dict[str, str]:
    """Returns the commits, by name, of the teachers that are from the hub."""
    commits = {teacher.given.name: hub_commit(teacher.given.section) for teacher in opened}
    return {name: commit for name, commit in commits.items() if commit is not None}


def check_teachers_stored(opened: Sequence[OpenedTeacher], say: Callable[[str], object]) -> None:
    """Checks the teachers' files as `check_stored` does, without loading them. Raises ValueError.

    say: gets a note for a teacher that is not in the cache.
    """
    for teacher in opened:
        section = teacher.given.section
        with _for_teacher(teacher.given.name):
            # Of the hub, nothing is downloaded for it.
            path = resolve_model(section, with_weights=not is_on_hub(section))
            if not check_stored(path, section, say):
                say(
                    f"note: {section.name_or_path} is not in the cache; its weights are not checked"
                )


def load_teachers(
    config: Config,
    opened: Sequence[OpenedTeacher],
    world: World,
    say: Callable[[str], object],
) -> tuple[ExternalTeacher, ...]:
    """Loads the teachers' weights, onto this rank's device or sharded like the student's. A
    collective call.

    Raises ValueError as `load_base` and `check_forward` do.
    """
    ranks, teachers = world if is_sharded(config, world) else None, []
    for teacher in opened:
        section, name = teacher.given.section, teacher.given.name
        with _for_teacher(name):
            model = load_base(section, world.device, ranks=ranks, say=say)
            model.requires_grad_(False).eval()
            choose = partial(choose_attention, model, section.attention, world.device)
            # What takes weights to find out, only the main rank may see.
            attention = together(partial(choose, compute_dtype(model)), (ValueError,))
            if ranks is not None:
                shard_model(model, world, replicas=config.parallel.replicas)
            check_forward(model, attention, f"model {section.name_or_path}")
        teachers.append(ExternalTeacher(name, model, attention, teacher.given.weight))
    return tuple(teachers)
