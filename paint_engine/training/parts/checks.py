"""Checks on settings, tokenizer and chat templates, and that a resumed run continues from what it
was started with."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.checkpoint.push import check_push
from paint_engine.config.command_line import CommandLine
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, value_of
from paint_engine.data import ProblemSet, check_same_data, held_out_notes
from paint_engine.files import recorded_commit, recorded_teacher_commits
from paint_engine.model import check_vocabulary
from paint_engine.model.sharding import check_replicas
from paint_engine.model.teachers.external import OpenedTeacher
from paint_engine.monitor import check_loggers
from paint_engine.prompts.template import check_template, shows_date
from paint_engine.recipes import recipe_of
from paint_engine.rollout import server_notes, stop_notes
from paint_engine.rollout.choose import check_engine_has_teacher


def check_before_loading(config: Config, num_ranks: int, say: Callable[[str], object]) -> None:
    """Says the notes on the settings. Raises ValueError for loggers, a push, an engine and
    replicas that the run cannot have."""
    check_replicas(config, num_ranks)
    check_loggers(tensorboard=config.run.tensorboard, wandb_project=config.run.wandb_project)
    check_push(config.run.push_to_hub)
    check_engine_has_teacher(config)
    notes = recipe_of(config).notes() + server_notes(config.rollout, config.teacher)
    for note in notes + held_out_notes(config):
        say(f"note: {note}")


def check_tokenizer(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    base: nn.Module,
    teachers: Sequence[OpenedTeacher],
) -> list[str]:
    """Returns notes on the tokenizer, the chat templates and the stop tokens. Raises ValueError for
    a tokenizer that does not fit the model or the recipe, and a template that fails.

    base: may be on the meta device.
    """
    recipe_of(config).check_tokenizer(tokenizer)
    check_vocabulary(config.model.name_or_path, tokenizer, base)
    keys, of_teacher = ["prompts.student_thinking"], []
    if recipe_of(config).uses_teacher:
        (of_teacher if teachers else keys).append("prompts.teacher_thinking")
    keys += ["eval.thinking"] if config.eval.enabled else []
    notes = _template_notes(config, tokenizer, keys)
    for teacher in teachers:
        notes += _template_notes(config, teacher.tokenizer, of_teacher)
    if any(map(shows_date, (tokenizer, *(teacher.tokenizer for teacher in teachers)))):
        notes.append(f"the chat template shows the date; this run's is {config.prompts.date}")
    return notes + stop_notes(base, tokenizer)


def _template_notes(
    config: Config, tokenizer: PreTrainedTokenizerBase, keys: Sequence[str]
) -> list[str]:
    values = {key: value_of(config, key) for key in keys}
    # On by default is no wish of the user.
    asked = {key: on for key, on in values.items() if not (on and LEAVES[key].default)}
    return check_template(tokenizer, asked, config.prompts.date)


def check_same_start(
    command: CommandLine,
    run_dir: Path,
    commit: str | None,
    data: dict[str, Any],
    sets: tuple[ProblemSet, dict[str, ProblemSet]],
    say: Callable[[str], object],
) -> None:
    """Raises ValueError if a model of the hub is not at the commit that the run was started with,
    as after a push to it, or if rows of the data have changed since."""
    before = recorded_commit(run_dir)
    if before is not None and before != commit:
        raise ValueError(
            f"{command.config.model.name_or_path} is at commit {commit}, and {run_dir} was started "
            f"with {before}; a resumed run continues from the same base; give --model.revision "
            f"{before}"
        )
    check_same_data(run_dir, data, sets, allow_changed=command.allow_changed_data, say=say)


def check_same_teachers(run_dir: Path, commits: Mapping[str, str]) -> None:
    """Raises ValueError if a teacher of the hub is not at the commit that the run was started
    with."""
    for name, before in recorded_teacher_commits(run_dir).items():
        if commits.get(name) != before:
            raise ValueError(
                f"teacher {name} is at commit {commits.get(name)}, and {run_dir} was started with "
                f"{before}; a resumed run continues with the same teacher; give "
                f"--teacher.revision {before}, or restore that version in the hub's cache if "
                "there are several teachers"
            )
