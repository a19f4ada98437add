"""Settings that are known only when a run starts, and that it records: the date of a chat template,
the model of the teacher's server."""

import datetime
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from paint_engine.checkpoint.run_dir import find_earlier, recorded_date
from paint_engine.config.command_line import CommandLine
from paint_engine.distributed import World, gather_objects, together
from paint_engine.model.teachers.external import OpenedTeacher
from paint_engine.prompts.template import check_date, shows_date
from paint_engine.recipes import recipe_of
from paint_engine.scoring import ServedModel, find_teacher


def with_date(
    command: CommandLine, tokenizer: PreTrainedTokenizerBase, teachers: Sequence[OpenedTeacher]
) -> CommandLine:
    """Returns the command with the date that a chat template shows: the one that is given, that of
    the run which is resumed, or today's, the same on every rank."""
    config = command.config
    tokenizers = (tokenizer, *(teacher.tokenizer for teacher in teachers))
    shows = [one for one in tokenizers if shows_date(one)]
    if not shows:
        check_date(tokenizer, config.prompts.date, "--prompts.date")
    if config.prompts.date is not None or not shows:
        return command
    earlier = command.resume or find_earlier(config, command.preset or "run")
    recorded = recorded_date(earlier) if earlier is not None else None
    date = gather_objects(recorded or datetime.date.today().isoformat())[0]
    prompts = config.prompts.model_copy(update={"date": date})
    return replace(command, config=config.model_copy(update={"prompts": prompts}))


def with_served_model(
    command: CommandLine, world: World | None = None
) -> tuple[CommandLine, ServedModel | None]:
    """Returns the command with the name of the model that the teacher's server serves, and the
    model; None if there is no server. A resumed run has the recorded name, which the server must
    still serve.

    world: None = this process is no rank of a run. A collective call otherwise.
    """
    config = command.config
    if recipe_of(config).served_top_k is None:
        return command, None

    def ask() -> ServedModel | None:
        return find_teacher(config.teacher) if world is None or world.is_main else None

    served = gather_objects(together(ask, (ValueError,)))[0]
    assert served is not None
    name = config.teacher.served_model or served.name
    teacher = config.teacher.model_copy(update={"served_model": name})
    return replace(command, config=config.model_copy(update={"teacher": teacher})), served
