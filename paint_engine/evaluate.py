"""Evaluates a model on benchmarks: `python -m paint_engine.evaluate --model M --benchmarks aime24`.

The same command again, after a kill too, goes on where it was. Under torchrun every rank does its
share. `python -m paint_engine.evaluate compare RUN_A RUN_B` puts two evaluations side by side.
"""

import argparse
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from paint_engine.config.command_line import user_errors
from paint_engine.config.sections import EvalSection, PromptsSection, RewardSection
from paint_engine.data.problem_sets import ProblemSet
from paint_engine.distributed import (
    World,
    barrier,
    close_world,
    gather_objects,
    init_world,
    raise_together,
)
from paint_engine.evaluation import compare
from paint_engine.evaluation.answers import all_requests, check_reward, evaluate
from paint_engine.evaluation.benchmarks import load_benchmark, parse_benchmarks
from paint_engine.evaluation.flags import (
    own_flags,
    parse_arguments,
    prompts_of,
    reward_of,
    section_of,
)
from paint_engine.evaluation.results import (
    add_versions,
    read_versions,
    results_table,
    summarise_benchmarks,
    write_results,
)
from paint_engine.evaluation.store import (
    Evaluation,
    Header,
    SampleFiles,
    check_ranks,
    evaluation_settings,
    fingerprints,
    finished_evaluation,
    hold,
    unfinished_rows,
)
from paint_engine.evaluation.target import (
    Subject,
    build_engine,
    check_adapter,
    compute_dtype_of,
    default_directory,
    find_subject,
    other_base,
    other_prompts,
    skeleton,
)
from paint_engine.model.forward import max_context
from paint_engine.model.load import load_tokenizer, pick_device
from paint_engine.monitor.progress import Progress
from paint_engine.rewards import Reward, RewardFailed, open_reward
from paint_engine.rollout.choose import vllm_is_installed
from paint_engine.rollout.engine import EngineDied, RolloutEngine, sampling_params

# vLLM's share of a GPU, which nobody else uses, and of a CPU's memory, which others do.
_MEMORY_SHARES = {"cuda": 0.9, "cpu": 0.35}


@dataclass(frozen=True)
class Plan:
    """What the command line asks for, loaded and checked, but for the weights."""

    arguments: argparse.Namespace
    section: EvalSection
    reward: RewardSection
    subject: Subject
    tokenizer: PreTrainedTokenizerBase
    shape: nn.Module
    engine: str
    directory: Path
    sets: dict[str, ProblemSet]
    headers: dict[str, Header]


def _check_engine(arguments: argparse.Namespace) -> str:
    wanted = arguments.engine
    if wanted == "vllm" and not vllm_is_installed():
        raise ValueError(
            "--engine vllm: vLLM is not installed; install it (pip install '.[vllm]' in the "
            "clone), or use --engine builtin"
        )
    share = arguments.gpu_memory_utilization
    if not (share is None or 0 < share < 1) or arguments.tensor_parallel_size < 1:
        raise ValueError(
            f"got --gpu-memory-utilization {share} and "
            f"--tensor-parallel-size {arguments.tensor_parallel_size}; needs a share between 0 and "
            "1, and at least 1 GPU"
        )
    if wanted == "auto":
        return "vllm" if vllm_is_installed() else "builtin"
    return wanted


def _notes(subject: Subject, prompts: PromptsSection) -> list[str]:
    """In what the subject is not used as it was trained."""
    found = []
    if (trained_on := other_base(subject)) is not None:
        found.append(
            f"the adapter {subject.adapter} was trained on {trained_on}, and is put on "
            f"{subject.base.name_or_path} here, which --model names; unless both are the same "
            "weights, this evaluates what was never trained"
        )
    if (trained_with := other_prompts(subject, prompts)) is not None:
        words = []
        if trained_with.student_template != prompts.student_template:
            words += ["--student-template", trained_with.student_template]
        if "{instruction}" in trained_with.student_template and (
            trained_with.instruction != prompts.instruction
        ):
            words += ["--instruction", trained_with.instruction]
        found.append(
            f"{subject.adapter or subject.checkpoint} was trained on another message than it is "
            f"asked with here; to ask as in training, give {shlex.join(words)}"
        )
    return found


def make_plan(arguments: argparse.Namespace, world: World) -> Plan:
    """Everything but the weights is loaded, and checked. Raises ValueError for what the user can
    mend."""
    section, prompts = section_of(arguments), prompts_of(arguments)
    reward = reward_of(arguments)
    engine = _check_engine(arguments)
    benchmarks = parse_benchmarks(arguments.benchmarks)
    subject = find_subject(
        arguments.model,
        arguments.adapter,
        arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer, shape = load_tokenizer(subject.base), skeleton(subject)
    check_adapter(subject)
    say = print if world.is_main else lambda text: None
    for note in _notes(subject, prompts):
        say(f"note: {note}")
    settings = evaluation_settings(section, arguments.seed, prompts, reward.function)
    identity = subject.identity(engine, compute_dtype_of(subject, world.device))
    load = partial(load_benchmark, on_bad_row=arguments.on_bad_row, say=say)
    sets = {
        benchmark.name: load(benchmark, tokenizer, section, prompts, max_context(shape))
        for benchmark in benchmarks
    }
    headers = {
        name: Header(name, settings, identity, fingerprints(problem_set.problems))
        for name, problem_set in sets.items()
    }
    directory = arguments.output or default_directory(
        subject, identity | settings | {"num_problems": section.num_problems}
    )
    return Plan(
        arguments, section, reward, subject, tokenizer, shape, engine, directory, sets, headers
    )


def answer_benchmark(
    plan: Plan,
    name: str,
    engine: RolloutEngine,
    reward: Reward,
    world: World,
    progress: Progress,
) -> Evaluation:
    """What is left of one benchmark, each sample being written as it finishes. A collective.

    Raises RewardFailed where the reward function fails on every answer.
    """
    failure: str | None = None
    started, problem_set = time.monotonic(), plan.sets[name]
    with closing(
        SampleFiles(plan.directory, name, plan.headers[name], world, replace=False)
    ) as files:
        requests = all_requests(problem_set.problems, plan.section.num_samples)
        mine = files.share(requests)
        if world.is_main and files.missing(requests):
            add_versions(plan.directory, world.size)
        left = "" if len(mine) == len(requests) else f" ({len(mine)} left for this process)"
        with progress.evaluation(f"{name}{left}", len(mine)) as advance:
            try:
                evaluate(
                    engine,
                    plan.tokenizer,
                    problem_set.problems,
                    problem_set.prompts,
                    mine,
                    sampling_params(plan.section, plan.shape, plan.tokenizer),
                    reward,
                    seed=plan.arguments.seed,
                    base=plan.subject.adapter is None,
                    on_samples=files.recorder(advance),
                )
            except RewardFailed as failed:
                failure = str(failed)
        check_reward(reward, files, failure)
        return files.finish(time.monotonic() - started)


def look(plan: Plan, world: World, stack: ExitStack) -> dict[str, Evaluation | None]:
    """By benchmark, the complete evaluation that is there, or None. A collective.

    stack: holds the directory until it is closed.

    Raises ValueError for what would be refused after hours, or after loading the weights: samples
    of another evaluation, another process at work there, a directory that cannot be written or is a
    training run's, ranks that would not evaluate the same.
    """
    check_ranks(plan.headers)
    here, error = {}, None
    try:
        if world.is_main:
            if compare.is_training_run(plan.directory):
                raise ValueError(
                    f"--output {plan.directory}: is the directory of a training run, whose records "
                    "would be mixed with this evaluation's; needs a directory of its own; give "
                    "another one, or leave out --output for one under evaluations"
                )
            stack.enter_context(hold(plan.directory))
            for name, header in plan.headers.items():
                here[name] = finished_evaluation(plan.directory, name, header)
                unfinished_rows(plan.directory, name, header)
    except ValueError as refused:
        error = str(refused)
    except OSError as failure:
        error = f"--output {plan.directory}: cannot be written ({failure}); give another directory"
    raise_together(error)
    return gather_objects(here)[0]


def answer_all(
    plan: Plan, here: dict[str, Evaluation | None], world: World, progress: Progress
) -> list[Evaluation]:
    """Every benchmark; the weights, and a reward function of the user's, are loaded only where
    something is left to do.

    here: of `look`.
    """
    pending = [name for name, evaluation in here.items() if evaluation is None]
    if pending:
        arguments, share = plan.arguments, plan.arguments.gpu_memory_utilization
        prompts = [prompt for name in pending for prompt in plan.sets[name].prompts]
        reward = open_reward(
            plan.reward.function,
            plan.reward.timeout_s,
            lambda text: print(f"rank {world.rank}: {text}", file=sys.stderr),
        )
        engine = build_engine(
            plan.subject,
            plan.shape,
            world,
            kind="vllm" if plan.engine == "vllm" else "builtin",
            max_model_len=max(map(len, prompts)) + plan.section.max_new_tokens,
            max_sequences=plan.section.max_sequences,
            gpu_memory_utilization=share or _MEMORY_SHARES[world.device.type],
            tensor_parallel_size=arguments.tensor_parallel_size,
        )
        with closing(engine), closing(reward):
            for name in pending:
                here[name] = answer_benchmark(plan, name, engine, reward, world, progress)
    return [evaluation for evaluation in here.values() if evaluation is not None]


def report(plan: Plan, evaluations: Sequence[Evaluation], console: Console) -> None:
    """Prints the table, and writes `results.json`. For the main rank."""
    results = {
        "model": plan.subject.base.name_or_path,
        "adapter": plan.arguments.adapter,
        **{key: asdict(evaluations[0].header)[key] for key in ("settings", "subject")},
        "versions": read_versions(plan.directory),
        **summarise_benchmarks(evaluations),
    }
    write_results(plan.directory, results)
    console.print(results_table(results))
    console.print(f"results: {plan.directory}", soft_wrap=True)


def run(argv: Sequence[str], console: Console) -> None:
    """The whole command. Raises ValueError, in this command's terms, for what the user can mend."""
    try:
        arguments = parse_arguments(argv)
        world = init_world(pick_device(arguments.device))
        plan = make_plan(arguments, world)
        with ExitStack() as stack:
            here = look(plan, world, stack)
            if complete := [name for name, evaluation in here.items() if evaluation is not None]:
                console.print(
                    f"{', '.join(complete)}: complete already, nothing was sampled", soft_wrap=True
                )
            evaluations = answer_all(plan, here, world, Progress(console))
            if world.is_main:
                report(plan, evaluations, console)
    except ValueError as error:
        raise ValueError(own_flags(str(error))) from error
    barrier()


def main(argv: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends with one message and exit code 2; a kill loses no sample."""
    rank = int(os.environ.get("RANK", "0"))
    console = Console(highlight=False, markup=False, quiet=rank > 0)
    say = partial(console.print, soft_wrap=True)
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        with user_errors(console, rank):
            if given[:1] == ["compare"]:
                compare.main(given[1:], console)
            else:
                run(given, console)
    except EngineDied as death:
        say(f"the engine died ({death}); the same command goes on where it was", style="red")
        sys.exit(1)
    except RewardFailed as failure:
        say(f"error: {own_flags(str(failure))}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it was")
        sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    finally:
        close_world()
