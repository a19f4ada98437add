"""Builds a run, in order: data, prompts, base, adapters, teacher, optimizer, directory, sampler. Or
shows what it would be."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from transformers import set_seed

from paint_engine.config.command_line import CommandLine
from paint_engine.data import check_same_data, longest_answer, longest_sequence
from paint_engine.distributed import World, launched_ranks, together
from paint_engine.estimate import check_run_fits, describe
from paint_engine.files import FILE_FAILURES, DirectoryLock, one_line, recorded_name
from paint_engine.files.terminal import Terminal
from paint_engine.model import (
    causal_lm,
    hub_commit,
    is_on_hub,
    load_tokenizer,
    make_teacher,
    max_context,
    meta_model,
    pick_device,
    resolve_model,
)
from paint_engine.model.attention import check_layers
from paint_engine.model.probe import check_forward, logit_scale
from paint_engine.model.stored import check_stored, set_generation_config
from paint_engine.model.teachers.external import (
    check_teachers_stored,
    hub_commits,
    load_teachers,
    open_teachers,
)
from paint_engine.recipes import recipe_of
from paint_engine.rewards import open_reward
from paint_engine.rollout import make_engines
from paint_engine.rollout.choose import evaluates_alone, open_eval_engine
from paint_engine.scoring import Scorer
from paint_engine.seeds import global_seed
from paint_engine.training.optim import build_optimizer
from paint_engine.training.parts.checks import (
    check_before_loading,
    check_same_start,
    check_same_teachers,
    check_tokenizer,
)
from paint_engine.training.parts.directory import (
    find_run_dir,
    load_progress,
    lock_for_run,
    write_start,
)
from paint_engine.training.parts.models import build_server, build_student, load_checked_base
from paint_engine.training.parts.ping import ping_ranks, started_by_torchrun
from paint_engine.training.parts.sampler import build_sampler
from paint_engine.training.parts.sets import load_sets
from paint_engine.training.parts.settle import with_date, with_served_model
from paint_engine.training.run import Run, SavedProgress


def plan_run(command: CommandLine, show: Callable[[str], object]) -> None:
    """Shows what `--dry-run` reports. Checks everything except the weights, and loads none. Under
    torchrun, it first connects every pair of ranks.

    Raises ValueError as `build_run` does. For a run that does not fit, it is raised at the end.
    """
    config, device = command.config, pick_device(command.config.train.device)
    if started_by_torchrun():
        ping_ranks(device, show)
    check_before_loading(config, launched_ranks(), show)
    open_reward(config.reward.function, config.reward.timeout_s, show).close()
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
    command, served = with_served_model(with_date(command, tokenizer, teachers))
    config = command.config
    if served is not None:
        show(f"the teacher is {one_line(served.name)}, served at {config.teacher.url}")
    for note in check_tokenizer(config, tokenizer, model, teachers):
        show(f"note: {note}")
    readers = [teacher.reader for teacher in teachers]
    train_set, eval_sets, record = load_sets(config, tokenizer, model, readers, served, show)
    if command.resume is not None:
        allow = command.allow_changed_data
        sets = (train_set, eval_sets)
        check_same_data(command.resume, record, sets, allow_changed=allow, say=show)
    num_ranks, models = launched_ranks(), [(one.shape, one.reader) for one in teachers]
    report = describe(
        *(config, tokenizer, train_set, eval_sets, model),
        device=device,
        num_ranks=num_ranks,
        teachers=models,
    )
    for line in report.split("\n"):
        show(line)
    check_run_fits(
        *(config, tokenizer, train_set, model), device=device, num_ranks=num_ranks, teachers=models
    )


def build_run(command: CommandLine, world: World) -> Run:
    """Locks the run's directory, then loads and builds everything. The run's files come last, so
    that a mistake leaves none.

    Raises ValueError for mistakes in data, model, lengths, device, directory and sampler, and
    WriteFailed if the run's files cannot be written.
    """
    with ExitStack() as stack:
        if (lock := lock_for_run(command, world)) is not None:
            stack.enter_context(lock)
        run = _build_locked(command, world, lock)
        # The run holds the lock from here on.
        stack.pop_all()
    return run


def _build_locked(command: CommandLine, world: World, lock: DirectoryLock | None) -> Run:
    say, warn = Terminal().say if world.is_main else lambda text: None, _warner(world)
    # The engine does not use the global generators. This makes libraries that do repeatable.
    set_seed(global_seed(command.config.train.seed))
    check_before_loading(command.config, world.size, say)
    reward = open_reward(command.config.reward.function, command.config.reward.timeout_s, warn)
    tokenizer = load_tokenizer(command.config.model)
    opened = open_teachers(command.config, tokenizer, say)
    command, served = with_served_model(with_date(command, tokenizer, opened), world)
    config = command.config
    base, attention = load_checked_base(config, tokenizer, world, opened, say)
    readers = tuple(teacher.reader for teacher in opened)
    train_set, eval_sets, data = load_sets(config, tokenizer, base, readers, served, say)
    model, fixed = build_student(config, base, tokenizer, train_set, world, opened)
    check_forward(model, attention, f"model {config.model.name_or_path}")
    external = load_teachers(config, opened, world, say)
    teacher = make_teacher(config.teacher, model, fixed, external)
    server = served and build_server(config, served, model, tokenizer)
    optimizer = build_optimizer(model, config.optim)
    run_dir, resumes = find_run_dir(command, world, lock)
    commit, teacher_commits = hub_commit(config.model), hub_commits(opened)
    progress = SavedProgress(step=0, seconds_train=0.0, sampled_ahead=None)
    if resumes:
        check_same_teachers(run_dir, teacher_commits)
        check_same_start(command, run_dir, commit, data, (train_set, eval_sets), say)
        progress = load_progress(config, run_dir, model, optimizer, teacher, world, say)
    alone, context = evaluates_alone(config), max_context(base)
    sampled_for = {} if alone else eval_sets
    longest = min(longest_sequence(config, tokenizer, train_set, sampled_for), context)
    engine, eval_engine = make_engines(config, model, fixed, teacher, world, longest, warn)
    sampler = build_sampler(config, engine, model, tokenizer, train_set, world, progress, warn)
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
        eval_sets=eval_sets,
        attention=attention,
        sampler=sampler,
        eval_engine=eval_engine,
        open_eval_engine=partial(
            *(open_eval_engine, config, model, world),
            max_model_len=min(longest_answer(config, eval_sets), context),
        )
        if alone
        else None,
        reward=reward,
        scorer=server and Scorer(server, timings=sampler.timings, warn=warn),
        step=progress.step,
        seconds_train=progress.seconds_train,
        skipped=progress.skipped,
        shortening=progress.shortening,
    )
    new = not resumes
    together(
        lambda: world.is_main and write_start(run, data, commit, teacher_commits, new=new),
        (ValueError, *FILE_FAILURES),
    )
    return run


def _warner(world: World) -> Callable[[str], None]:
    return lambda text: Terminal(stderr=True).say(f"rank {world.rank}: {text}")
