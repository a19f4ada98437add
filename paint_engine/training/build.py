"""Builds a run, in order: data, prompts, base, adapters, teacher, optimizer, directory, sampler."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.run_dir import (
    find_earlier,
    lock_run_dir,
    prepare_run_dir,
    recorded_date,
    start_again,
)
from paint_engine.config.command_line import CommandLine
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, to_toml, value_of
from paint_engine.data import (
    ProblemSet,
    check_same_data,
    data_record,
    load_eval_set,
    load_train_set,
    longest_sequence,
    step_requests,
    write_data_record,
)
from paint_engine.distributed import (
    World,
    gather_objects,
    launched_ranks,
    my_share,
    raise_together,
    together,
)
from paint_engine.estimate import check_run_fits, describe
from paint_engine.files import (
    CONFIG_FILE,
    FILE_FAILURES,
    STATE_FILE,
    BadFile,
    DirectoryLock,
    checked,
    one_line,
    read_bytes,
    recorded_commit,
    recorded_name,
    recorded_teacher_commits,
    write_atomic,
    write_versions,
)
from paint_engine.files.terminal import Terminal
from paint_engine.model import (
    FixedTeacher,
    Teacher,
    add_lora,
    causal_lm,
    check_vocabulary,
    compute_dtype,
    hub_commit,
    is_on_hub,
    lm_head_weight,
    load_base,
    load_tokenizer,
    make_teacher,
    max_context,
    meta_model,
    pick_device,
    resolve_model,
    vocabulary_size,
)
from paint_engine.model.attention import check_layers, choose_attention
from paint_engine.model.probe import check_forward, logit_scale
from paint_engine.model.sharding import checkpoint_activations, is_sharded, shard_model
from paint_engine.model.stored import check_stored, set_generation_config
from paint_engine.model.teachers.external import (
    OpenedTeacher,
    check_teachers_stored,
    hub_commits,
    load_teachers,
    open_teachers,
)
from paint_engine.monitor import check_loggers, wandb_id
from paint_engine.monitor.timings import Timings
from paint_engine.prompts.template import check_date, check_template, shows_date
from paint_engine.recipes import keeps_base, recipe_of
from paint_engine.rewards import Reward, open_reward
from paint_engine.rollout import (
    Completion,
    RolloutEngine,
    Sampled,
    Sampler,
    make_engines,
    sampling_params,
    server_notes,
    stop_notes,
)
from paint_engine.rollout.choose import check_engine_has_teacher
from paint_engine.scoring import Asked, Scorer, ServedModel, TeacherServer, find_teacher
from paint_engine.seeds import adapter_seed, global_seed
from paint_engine.training.optim import build_optimizer
from paint_engine.training.run import Run, SavedProgress
from paint_engine.types import Reader, Request


def _check_tokenizer(
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


def _with_date(
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


def _with_served_model(
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


def _lock_run_dir(command: CommandLine, world: World) -> DirectoryLock | None:
    """Returns the main rank's lock on the run's directory; None on the others. A collective call.

    Raises ValueError on every rank if another run is in the directory.
    """
    name, resume, allow = (
        command.preset or "run",
        command.resume is not None,
        command.allow_changed_data,
    )

    def take() -> DirectoryLock | None:
        if not world.is_main:
            return None
        return lock_run_dir(command.config, name, resume=resume, allow_changed_data=allow)

    return together(take, (ValueError, *FILE_FAILURES))


def _find_run_dir(
    command: CommandLine, world: World, lock: DirectoryLock | None
) -> tuple[Path, bool]:
    """Returns the run's directory, the same on every rank, and whether training resumes there.

    lock: the main rank's.

    Training resumes with `--resume`. If there is a checkpoint, it also resumes with
    `run.auto_resume` and after torchrun has restarted the processes.
    """

    def prepare() -> tuple[Path, bool] | None:
        if lock is None:
            return None
        # Loading the model takes minutes.
        lock.check()
        if command.resume is not None:
            return lock.directory, True
        name, allow = command.preset or "run", command.allow_changed_data
        run_dir = lock.directory
        return run_dir, prepare_run_dir(command.config, name, run_dir, allow_changed_data=allow)

    choice = gather_objects(together(prepare, (ValueError, *FILE_FAILURES)))[0]
    assert choice is not None
    return choice


def _sampled_ahead(
    progress: SavedProgress, requests: Callable[[int], list[Request]], num_tokens: int, world: World
) -> Sampled | None:
    """Returns this rank's share of the completions that a checkpoint stores. A collective.

    num_tokens: of the model's vocabulary.

    Raises BadFile where they are none of this run's.
    """
    if progress.sampled_ahead is None:
        return None
    (version, stored), step = progress.sampled_ahead, progress.step
    own, mine = requests(step), my_share(stored, world)
    fits = len(mine) == len(own) and version <= step
    for ids, logprobs, _ in mine:
        fits = fits and len(ids) == len(logprobs) > 0 and max(ids) < num_tokens
    problem = (
        f"{STATE_FILE} of step {step}: sampled_ahead: got {len(stored)} completions of the weights "
        f"after {version} steps; needs one for each problem of the next step, with a "
        f"log-probability for each of its tokens, and ids below {num_tokens}; it was changed by "
        "hand: restore it from a copy, or move that checkpoint away to resume from the one before"
    )
    raise_together(None if fits else BadFile(problem))
    completions = [Completion(tuple(ids), tuple(logprobs), cut) for ids, logprobs, cut in mine]
    return Sampled(step, version, own, completions)


def _load_progress(
    config: Config,
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    world: World,
    say: Callable[[str], object],
) -> SavedProgress:
    """Loads the newest intact checkpoint and returns its state."""
    replace_it = start_again(run_dir, config, overwrite=True)
    state = load_checkpoint(
        run_dir, model, optimizer, world=world, warn=say, teacher=teacher, replace_it=replace_it
    )
    num_steps = config.train.num_steps
    if state is None:
        raise ValueError(
            f"{run_dir} has no complete checkpoint under checkpoints/: the run stopped before its "
            f"first; start it again with {start_again(run_dir, config)}"
        )
    progress = checked(SavedProgress, state, f"{STATE_FILE} of step {state['step']}")
    if num_steps < progress.step:
        raise ValueError(
            f"train.num_steps is {num_steps}, but {run_dir} has already done {progress.step}: "
            "give at least as many with --train.num_steps"
        )
    return progress


def _check_before_loading(config: Config, say: Callable[[str], object]) -> None:
    check_loggers(tensorboard=config.run.tensorboard, wandb_project=config.run.wandb_project)
    check_engine_has_teacher(config)
    for note in recipe_of(config).notes() + server_notes(config.rollout, config.teacher):
        say(f"note: {note}")
    if config.eval.enabled and config.eval.path == "tiny" and config.data.path != "tiny":
        say(
            f"note: training on {config.data.path}, evaluating on the bundled word problems; name "
            "held-out problems of your own with --eval.path, or switch that off with "
            "--eval.enabled false"
        )
    if config.eval.enabled and config.eval.path == config.data.path != "tiny":
        say(
            f"note: {config.data.path} is both trained on and evaluated on; name held-out problems "
            "with --eval.path"
        )


def _open_reward(config: Config, warn: Callable[[str], object]) -> Reward:
    return open_reward(config.reward.function, config.reward.timeout_s, warn)


def _warner(world: World) -> Callable[[str], None]:
    return lambda text: Terminal(stderr=True).say(f"rank {world.rank}: {text}")


def plan_run(command: CommandLine, show: Callable[[str], object]) -> None:
    """Shows what `--dry-run` reports. Checks everything except the weights, and loads none.

    Raises ValueError as `build_run` does. For a run that does not fit, it is raised at the end.
    """
    config, device = command.config, pick_device(command.config.train.device)
    _check_before_loading(config, show)
    _open_reward(config, show).close()
    tokenizer, model = load_tokenizer(config.model), meta_model(config)
    # Of the hub, nothing is downloaded for it.
    path = resolve_model(config.model, with_weights=not is_on_hub(config.model))
    if not check_stored(path, config.model, show):
        show(f"note: {config.model.name_or_path} is not in the cache; its weights are not checked")
    logit_scale(causal_lm(model), f"model {config.model.name_or_path}")
    check_layers(causal_lm(model), config.model.attention)
    set_generation_config(causal_lm(model), path)
    teachers = open_teachers(config, tokenizer, show)
    check_teachers_stored(teachers, show)
    command, served = _with_served_model(_with_date(command, tokenizer, teachers))
    config = command.config
    if served is not None:
        show(f"the teacher is {one_line(served.name)}, served at {config.teacher.url}")
    for note in _check_tokenizer(config, tokenizer, model, teachers):
        show(f"note: {note}")
    readers = [teacher.reader for teacher in teachers]
    train_set, eval_set, record = _load_sets(config, tokenizer, model, readers, served, show)
    if command.resume is not None:
        allow = command.allow_changed_data
        sets = (train_set, eval_set)
        check_same_data(command.resume, record, sets, allow_changed=allow, say=show)
    num_ranks, models = launched_ranks(), [(one.shape, one.reader) for one in teachers]
    report = describe(
        *(config, tokenizer, train_set, eval_set, model),
        device=device,
        num_ranks=num_ranks,
        teachers=models,
    )
    for line in report.split("\n"):
        show(line)
    check_run_fits(
        *(config, tokenizer, train_set, model), device=device, num_ranks=num_ranks, teachers=models
    )


def _build_model(
    config: Config,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    world: World,
    teachers: Sequence[OpenedTeacher],
) -> tuple[nn.Module, FixedTeacher]:
    """Builds the student with its adapters, on its device or sharded, and the fixed teacher.

    teachers: those that are other models, for the estimate of memory.
    """
    device = world.device
    model = add_lora(base, config.lora, adapter_seed(config.train.seed))
    if isinstance(model, PeftModel):
        # Stands in every checkpoint's adapter configuration, beside the base's name.
        model.peft_config["default"].revision = hub_commit(config.model)
    # Sharding hides the layers that the estimate counts, so the check comes first.
    check_run_fits(
        *(config, tokenizer, train_set, model),
        device=device,
        num_ranks=world.size,
        teachers=[(teacher.shape, teacher.reader) for teacher in teachers],
    )
    teacher = FixedTeacher(model, copies=keeps_base(config))
    if config.parallel.activation_checkpointing:
        checkpoint_activations(model)
    if is_sharded(config, world):
        for module in filter(None, (model, teacher.copy)):
            shard_model(module, world)
    return model, teacher


def _build_sampler(
    config: Config,
    engine: RolloutEngine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    world: World,
    progress: SavedProgress,
) -> Sampler:
    num_tokens = lm_head_weight(model).shape[0]

    def requests(step: int) -> list[Request]:
        return step_requests(config, train_set, step, world)

    return Sampler(
        engine,
        requests,
        sampling_params(config.rollout, model, tokenizer),
        ahead=config.rollout.ahead == 1,
        timings=Timings(),
        warn=_warner(world),
        pending=_sampled_ahead(progress, requests, num_tokens, world),
    )


def _teacher_server(
    config: Config, served: ServedModel, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> TeacherServer:
    """Returns the teacher's server, tried on a token. A collective call; raises ValueError on every
    rank."""
    top_k = recipe_of(config).served_top_k
    assert top_k is not None
    asked = Asked(top_k, vocabulary_size(tokenizer), lm_head_weight(model).shape[0])
    server = TeacherServer(config.teacher, served, asked)
    raise_together(server.unfit())
    return server


def build_run(command: CommandLine, world: World) -> Run:
    """Locks the run's directory, then loads and builds everything. The run's files come last, so
    that a mistake leaves none.

    Raises ValueError for mistakes in data, model, lengths, device, directory and sampler, and
    WriteFailed if the run's files cannot be written.
    """
    with ExitStack() as stack:
        if (lock := _lock_run_dir(command, world)) is not None:
            stack.enter_context(lock)
        run = _build_locked(command, world, lock)
        # The run holds the lock from here on.
        stack.pop_all()
    return run


def _build_locked(command: CommandLine, world: World, lock: DirectoryLock | None) -> Run:
    say = Terminal().say if world.is_main else lambda text: None
    # The engine does not use the global generators. This makes libraries that do repeatable.
    set_seed(global_seed(command.config.train.seed))
    _check_before_loading(command.config, say)
    reward = _open_reward(command.config, _warner(world))
    tokenizer = load_tokenizer(command.config.model)
    opened = open_teachers(command.config, tokenizer, say)
    command, served = _with_served_model(_with_date(command, tokenizer, opened), world)
    config = command.config
    base, attention = _load_checked_base(config, tokenizer, world, opened, say)
    readers = tuple(teacher.reader for teacher in opened)
    train_set, eval_set, data = _load_sets(config, tokenizer, base, readers, served, say)
    model, fixed = _build_model(config, base, tokenizer, train_set, world, opened)
    check_forward(model, attention, f"model {config.model.name_or_path}")
    external = load_teachers(config, opened, world, say)
    teacher = make_teacher(config.teacher, model, fixed, external)
    server = served and _teacher_server(config, served, model, tokenizer)
    optimizer = build_optimizer(model, config.optim)
    run_dir, resumes = _find_run_dir(command, world, lock)
    commit, teacher_commits = hub_commit(config.model), hub_commits(opened)
    progress = SavedProgress(step=0, seconds_train=0.0, sampled_ahead=None)
    if resumes:
        _check_same_teachers(run_dir, teacher_commits)
        _check_same_start(command, run_dir, commit, data, (train_set, eval_set), say)
        progress = _load_progress(config, run_dir, model, optimizer, teacher, world, say)
    longest = min(longest_sequence(config, tokenizer, train_set, eval_set), max_context(base))
    engine, eval_engine = make_engines(config, model, fixed, teacher, world, longest)
    sampler = _build_sampler(config, engine, model, tokenizer, train_set, world, progress)
    run = Run(
        config=config,
        recipe=recipe_of(config),
        name=recorded_name(run_dir) if resumes else command.preset or "run",
        run_dir=run_dir,
        lock=lock,
        world=world,
        tokenizer=tokenizer,
        model=model,
        base=fixed,
        teacher=teacher,
        optimizer=optimizer,
        train_set=train_set,
        readers=readers,
        eval_set=eval_set,
        attention=attention,
        sampler=sampler,
        eval_engine=eval_engine,
        reward=reward,
        scorer=server and Scorer(server, timings=sampler.timings, warn=_warner(world)),
        step=progress.step,
        seconds_train=progress.seconds_train,
        skipped=progress.skipped,
        shortening=progress.shortening,
    )
    new = not resumes
    together(
        lambda: world.is_main and _write_start(run, data, commit, teacher_commits, new=new),
        (ValueError, *FILE_FAILURES),
    )
    return run


def _load_checked_base(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    teachers: Sequence[OpenedTeacher],
    say: Callable[[str], object],
) -> tuple[PreTrainedModel, str]:
    """Returns the base, which the tokenizer fits, and the attention over its packed sequences."""
    # Sharding moves each layer's shard to the device, which never holds the whole model.
    on_cpu, trains_base = is_sharded(config, world), not config.lora.enabled
    base = load_base(config.model, world.device, trains_base=trains_base, on_cpu=on_cpu, say=say)
    for note in _check_tokenizer(config, tokenizer, base, teachers):
        say(f"note: {note}")
    return base, choose_attention(base, config.model.attention, world.device, compute_dtype(base))


def _load_sets(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    base: nn.Module,
    readers: Sequence[Reader],
    served: ServedModel | None,
    say: Callable[[str], object],
) -> tuple[ProblemSet, ProblemSet | None, dict[str, Any]]:
    """Returns the training and the evaluation set, and the record of their rows. A collective.

    readers: the teachers that are other models.
    """
    context = max_context(base)
    if served is not None:
        # The student's tokenizer writes the prompts.
        readers = (Reader(tokenizer, served.room(context)),)
    train_set = load_train_set(config, tokenizer, context, say, readers)
    eval_set = load_eval_set(config, tokenizer, max_context(base), say)
    return train_set, eval_set, data_record(config, train_set, eval_set)


def _check_same_start(
    command: CommandLine,
    run_dir: Path,
    commit: str | None,
    data: dict[str, Any],
    sets: tuple[ProblemSet, ProblemSet | None],
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


def _check_same_teachers(run_dir: Path, commits: Mapping[str, str]) -> None:
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


def _write_start(
    run: Run,
    data: dict[str, Any],
    commit: str | None,
    teacher_commits: Mapping[str, str],
    *,
    new: bool,
) -> None:
    """Writes what the run is started with. The configuration comes last: it makes the directory a
    run's. It is written after a resume too, so that the next resume uses this command's settings.
    """
    if run.lock is not None:
        run.lock.check()
    if new:
        write_versions(run.run_dir, run.name, run.world.size, commit, teacher_commits)
    write_data_record(run.run_dir, data)
    if run.config.run.wandb_project is not None:
        wandb_id(run.run_dir)
    path, settings = run.run_dir / CONFIG_FILE, to_toml(run.config)
    # A full disk must not keep a run from being resumed.
    if new or read_bytes(path) != settings.encode():
        write_atomic(path, settings)
