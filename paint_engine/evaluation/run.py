"""One evaluation from its command to its results."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import cache, partial

from paint_engine.checkpoint.choose import present
from paint_engine.distributed import (
    World,
    barrier,
    gather_objects,
    init_world,
    together,
)
from paint_engine.evaluation.answers import FAILURES, all_requests, check_answers, evaluate
from paint_engine.evaluation.base_cache import cache_header, copy_base, share_base
from paint_engine.evaluation.compare import is_training_run
from paint_engine.evaluation.flags import EvaluationCommand, own_flags
from paint_engine.evaluation.plan import Plan, make_plan
from paint_engine.evaluation.results import (
    add_versions,
    read_versions,
    results_table,
    summarise_benchmarks,
)
from paint_engine.evaluation.store import (
    Evaluation,
    SampleFiles,
    check_same_headers,
    read_finished,
    read_unfinished,
    remove_shares,
)
from paint_engine.evaluation.target import build_engine, compute_dtype_of
from paint_engine.files import (
    FILE_FAILURES,
    RESULTS_FILE,
    DirectoryLock,
    LockLost,
    ReadFailed,
    WriteFailed,
    check_links,
    one_line,
    write_json,
)
from paint_engine.files.terminal import Terminal
from paint_engine.model import pick_device
from paint_engine.monitor import NotFinite, Progress
from paint_engine.rewards import Reward, RewardFailed, open_reward
from paint_engine.rollout import EngineDied, RolloutEngine, sampling_params

# vLLM's share of the memory: a GPU has no other user, a CPU's memory has.
_MEMORY_SHARES = {"cuda": 0.9, "cpu": 0.35}


Loader = Callable[[], tuple[RolloutEngine, Reward]]
"""loads what answers and what judges, at its first call"""


def run_evaluation(command: EvaluationCommand, console: Terminal) -> None:
    """Samples the missing answers of every benchmark, prints the table, writes `results.json`.

    Ends the program as `ends_with_one_message` says. Raises ValueError, in terms of this command's
    flags, for a user's mistake.
    """
    with ends_with_one_message(console.say):
        world = init_world(pick_device(command.arguments.device))
        plan = make_plan(command, world)
        with opened(plan, world) as load:
            evaluate_plan(plan, load, world, console)
    barrier()


@contextmanager
def ends_with_one_message(say: Callable[..., object]) -> Iterator[None]:
    """Around an evaluation: what cannot continue ends the program with one message.

    A dead engine, a full disk and Ctrl-C end it (exit codes 1, 1 and 130); the samples so far are
    kept, and the same command resumes. A reward function that fails on every answer ends it too
    (1), and so does a model whose numbers are not finite. A ValueError, for a user's mistake, is
    raised in terms of this command's flags.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(own_flags(str(error))) from error
    except EngineDied as death:
        say(f"the engine failed ({death}); the same command resumes the evaluation", style="red")
        sys.exit(1)
    except (WriteFailed, ReadFailed) as failure:
        say(
            f"error: {failure}",
            "safe: every answer that was finished before; the same command resumes the evaluation",
            style="red",
        )
        sys.exit(1)
    except (LockLost, RewardFailed, NotFinite) as failure:
        say(f"error: {own_flags(str(failure))}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the same command resumes the evaluation")
        sys.exit(130)


def evaluate_plan(
    plan: Plan, load: Loader, world: World, console: Terminal, *, show: bool = True
) -> list[Evaluation]:
    """Samples the missing answers of every benchmark, writes `results.json`, and returns the
    evaluations. A collective call.

    load: `opened`'s, of this plan or of one that differs in the seed. show: print the table.
    """
    with ExitStack() as stack:
        if (lock := lock_output(plan, world)) is not None:
            stack.enter_context(lock)
        found = find_complete(plan, world)
        if complete := [name for name, evaluation in found.items() if evaluation is not None]:
            console.say(f"{', '.join(complete)}: complete already, nothing was sampled")
        found |= reuse_bases(plan, found, lock, console.say)
        evaluations = answer_benchmarks(plan, found, load, lock, world, Progress(console))
        together(
            lambda: lock and report_results(plan, evaluations, lock, console, show=show),
            FILE_FAILURES,
        )
    return evaluations


@contextmanager
def opened(plan: Plan, world: World) -> Iterator[Loader]:
    """Yields a function that loads the weights, and a user's reward function, at its first call.
    Both are closed at the end."""
    with ExitStack() as stack:

        @cache
        def load() -> tuple[RolloutEngine, Reward]:
            arguments, section = plan.command.arguments, plan.command.section
            share = arguments.gpu_memory_utilization or _MEMORY_SHARES[world.device.type]
            prompts = [prompt for held_out in plan.sets.values() for prompt in held_out.prompts]
            reward = open_reward(
                plan.command.reward.function,
                plan.command.reward.timeout_s,
                lambda text: Terminal(stderr=True).say(f"rank {world.rank}: {text}"),
            )
            stack.enter_context(closing(reward))
            with present(plan.target.trained):
                engine = build_engine(
                    plan.target,
                    plan.shape,
                    world,
                    kind=plan.engine,
                    max_model_len=max(map(len, prompts)) + section.max_new_tokens,
                    max_sequences=section.max_sequences,
                    gpu_memory_utilization=share,
                    tensor_parallel_size=arguments.tensor_parallel_size,
                )
            stack.enter_context(closing(engine))
            return engine, reward

        yield load


def lock_output(plan: Plan, world: World) -> DirectoryLock | None:
    """Returns the main rank's lock on the plan's directory; None on the others. A collective call.

    Raises ValueError, before the weights are loaded, for a directory that is a training run's, that
    holds links, in which another process is at work, or that cannot be made; WriteFailed if it
    cannot be written.
    """
    directory = plan.directory

    def take() -> DirectoryLock | None:
        if not world.is_main:
            return None
        if is_training_run(directory):
            raise ValueError(
                f"--output {directory}: is the directory of a training run, whose records would be "
                "mixed with this evaluation's; needs a directory of its own; give another one, or "
                "leave out --output for one under evaluations"
            )
        if directory.is_dir():
            check_links(directory)
        return DirectoryLock(
            directory, f"--output {directory}:", "give another directory with --output"
        )

    return together(take, (ValueError, *FILE_FAILURES))


def find_complete(plan: Plan, world: World) -> dict[str, Evaluation | None]:
    """Returns the complete evaluation of each benchmark in the plan's directory, or None. A
    collective call.

    Raises ValueError, before the weights are loaded, for samples of another evaluation, for what no
    evaluation has written and for ranks that would not evaluate the same; ReadFailed where it
    cannot be read.
    """
    check_same_headers(plan.headers)

    def find() -> dict[str, Evaluation | None]:
        found = {}
        for name, header in plan.headers.items() if world.is_main else ():
            found[name] = read_finished(plan.directory, name, header)
            read_unfinished(plan.directory, name, header)
            if found[name] is not None:
                remove_shares(plan.directory, name)
        return found

    return gather_objects(together(find, (ValueError, *FILE_FAILURES)))[0]


def reuse_bases(
    plan: Plan,
    found: Mapping[str, Evaluation | None],
    lock: DirectoryLock | None,
    say: Callable[[str], object],
) -> dict[str, Evaluation]:
    """Copies the missing evaluations of a model before training that a run or another command has
    made, says so, and returns them. A collective call.

    Raises BadFile, ReadFailed, WriteFailed and LockLost on every rank.
    """
    directory = plan.base_cache
    missing = [name for name, evaluation in found.items() if evaluation is None]
    if directory is None:
        return {}

    def reuse() -> dict[str, Evaluation]:
        copies: dict[str, Evaluation] = {}
        if lock is None:
            return copies
        for name in missing:
            header = plan.headers[name]
            entry = cache_header(header)
            if entry is None:
                continue
            copy = copy_base(directory, entry, plan.directory, name, header, lock)
            if copy is not None:
                file, copies[name] = copy
                say(f"{one_line(name)}: reused, from {file}; nothing was sampled")
        return copies

    return gather_objects(together(reuse, FILE_FAILURES))[0]


def keep_base_of(plan: Plan, evaluation: Evaluation, say: Callable[[str], object]) -> None:
    """Keeps the evaluation of a model before training for others. The main rank calls it."""
    entry = cache_header(evaluation.header)
    if plan.base_cache is not None and entry is not None:
        share_base(plan.base_cache, entry, evaluation, say, "--base-cache")


def answer_benchmarks(
    plan: Plan,
    found: dict[str, Evaluation | None],
    load: Loader,
    lock: DirectoryLock | None,
    world: World,
    progress: Progress,
) -> list[Evaluation]:
    """Returns every benchmark's evaluation. The weights, and a user's reward function, are loaded
    only if one is not complete.

    found: `find_complete`'s. load: `opened`'s. lock: `lock_output`'s.
    """
    pending = [name for name, evaluation in found.items() if evaluation is None]
    if pending:
        engine, reward = load()
        check_still_same(plan, world)
        for name in pending:
            answered = answer_benchmark(plan, name, engine, reward, lock, world, progress)
            keep = partial(keep_base_of, plan, answered, progress.note)
            together(lambda keep=keep: world.is_main and keep(), FILE_FAILURES)
            found[name] = answered
    return [evaluation for evaluation in found.values() if evaluation is not None]


def check_still_same(plan: Plan, world: World) -> None:
    """Raises ValueError if other weights were trained into the place of the planned ones before
    these were loaded, as by a run that replaces an earlier one. A collective call."""

    def check() -> None:
        identity = plan.target.identity(plan.engine, compute_dtype_of(plan.target, world.device))
        if any(header.subject != identity for header in plan.headers.values()):
            raise ValueError(
                f"{plan.target.trained} has changed while this command loaded it; see which run "
                "writes there, and give the same command again once it is done"
            )

    together(lambda: plan.target.trained and check(), (ValueError,))


def answer_benchmark(
    plan: Plan,
    name: str,
    engine: RolloutEngine,
    reward: Reward,
    lock: DirectoryLock | None,
    world: World,
    progress: Progress,
) -> Evaluation:
    """Answers what is missing of one benchmark, and writes each sample as it finishes. A collective
    call.

    Raises RewardFailed if the reward function fails on every answer, NotFinite if the model does
    not compute finite numbers, WriteFailed, and LockLost.
    """
    failure: Exception | None = None
    started, problem_set, section = time.monotonic(), plan.sets[name], plan.command.section
    with closing(
        SampleFiles(plan.directory, name, plan.headers[name], world, replace=False, lock=lock)
    ) as files:
        requests = all_requests(problem_set.problems, section.num_samples)
        mine = files.share(requests)
        is_first = world.is_main and files.missing(requests)
        together(lambda: is_first and add_versions(plan.directory, world.size), FILE_FAILURES)
        left = "" if len(mine) == len(requests) else f" ({len(mine)} left for this process)"
        with progress.evaluation(f"{name}{left}", len(mine)) as advance:
            try:
                evaluate(
                    engine,
                    plan.tokenizer,
                    problem_set.problems,
                    problem_set.prompts,
                    mine,
                    sampling_params(section, plan.shape, plan.tokenizer),
                    reward,
                    seed=plan.command.arguments.seed,
                    base=plan.target.adapter is None,
                    on_samples=files.recorder(advance),
                )
            except FAILURES as failed:
                failure = failed
        check_answers(reward, files, failure)
        return files.finish(time.monotonic() - started)


def report_results(
    plan: Plan,
    evaluations: Sequence[Evaluation],
    lock: DirectoryLock,
    console: Terminal,
    *,
    show: bool,
) -> None:
    """Writes `results.json`, and prints the table. The main rank calls it."""
    lock.check()
    results = {
        "model": plan.target.base.name_or_path,
        "adapter": plan.command.arguments.adapter if plan.target.trained else None,
        **{key: asdict(evaluations[0].header)[key] for key in ("settings", "subject")},
        "versions": read_versions(plan.directory),
        **summarise_benchmarks(evaluations),
    }
    write_json(plan.directory / RESULTS_FILE, results)
    if show:
        console.print(results_table(results))
        console.say(f"results: {plan.directory}")
