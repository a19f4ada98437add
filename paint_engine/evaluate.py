"""Evaluates a model on benchmarks: `python -m paint_engine.evaluate --model M --benchmarks aime24`.

The same command again, after a kill too, goes on where it was. Under torchrun every rank does its
share. `python -m paint_engine.evaluate compare RUN_A RUN_B` puts two evaluations side by side.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from paint_engine import compare
from paint_engine.answers import all_requests, evaluate
from paint_engine.benchmarks import KNOWN, Benchmark, load_benchmark, parse_benchmarks
from paint_engine.cli import user_errors
from paint_engine.config_sections import INSTRUCTION, EvalSection
from paint_engine.config_toml import LEAVES
from paint_engine.distributed import (
    World,
    barrier,
    close_world,
    gather_objects,
    init_world,
    raise_together,
)
from paint_engine.evaluation import (
    EvalSample,
    Evaluation,
    Header,
    SampleFiles,
    evaluation_settings,
    fingerprints,
    finished_evaluation,
    hold,
    unfinished_rows,
)
from paint_engine.evaluation_report import results_table, summarise_benchmarks, write_results
from paint_engine.metrics import Progress
from paint_engine.model import load_tokenizer, max_context, pick_device
from paint_engine.problem_sets import ProblemSet
from paint_engine.rollout import EngineDied, RolloutEngine, sampling_params, vllm_is_installed
from paint_engine.run_dir import VERSIONS_FILE, write_versions
from paint_engine.subject import (
    Subject,
    build_engine,
    check_adapter,
    compute_dtype_of,
    find_subject,
    skeleton,
)

# Of the configuration's keys that messages of its parts name: the flag that stands for each here.
_FLAGS = {"name_or_path": "model", "path": "benchmarks", "split": "benchmarks SOURCE:SPLIT"}
_KEY = re.compile(r"(?:--)?\b(?:rollout|eval|model|data|train)\.((?:columns\.)?[a-z_]+)")


# vLLM's share of a GPU, which nobody else uses, and of a CPU's memory, which others do.
_MEMORY_SHARES = {"cuda": 0.9, "cpu": 0.35}


@dataclass(frozen=True)
class Plan:
    """What the command line asks for, loaded and checked, but for the weights."""

    arguments: argparse.Namespace
    section: EvalSection
    subject: Subject
    tokenizer: PreTrainedTokenizerBase
    shape: nn.Module
    engine: str
    directory: Path
    sets: dict[str, ProblemSet]
    headers: dict[str, Header]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every flag")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs true or false")
    return text.lower() == "true"


def _parser() -> _Parser:
    paper = EvalSection()
    parser = _Parser(
        prog="python -m paint_engine.evaluate",
        description="Avg@k, pass@k and maj@k of a model on benchmarks, sampled as in the paper "
        "where nothing else is said. Or: compare RUN_A RUN_B ... (see compare --help). The same "
        "command goes on where a killed one was. More in docs/evaluation.md.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("--model", metavar="M", help="'tiny', a model directory or a Hugging Face id")
    add("--adapter", metavar="A", help="peft's directory, or a run's: RUN_DIR[:last|:best|:STEP]")
    names = ", ".join(benchmark.name for benchmark in KNOWN)
    add(
        "--benchmarks",
        required=True,
        help=f"with commas between: {names}, [NAME=]FILE, [NAME=]ID:SPLIT or ID:CONFIG:SPLIT",
    )
    add("--output", metavar="DIR", type=Path, help="else evaluations/MODEL-DIGEST")
    add("--num-samples", type=int, default=paper.num_samples, help="answers a problem")
    add("--num-problems", type=int, help="the first so many of each; else all")
    add("--temperature", type=float, default=paper.temperature, help="of sampling")
    add("--top-p", type=float, default=paper.top_p, help="nucleus mass")
    add("--top-k", type=int, default=paper.top_k, help="likeliest tokens kept; -1 = all")
    add("--max-new-tokens", type=int, default=paper.max_new_tokens, help="longest answer")
    add("--thinking", type=_flag, default=paper.thinking, help="chat template's switch")
    add("--instruction", default=INSTRUCTION, help="closing line of the prompt")
    add("--seed", type=int, default=0, help="of sampling")
    add("--engine", choices=("auto", "vllm", "builtin"), default="auto", help="auto: vLLM if there")
    add("--max-sequences", type=int, default=paper.max_sequences, help="decoded at once")
    add(
        "--gpu-memory-utilization",
        type=float,
        help="vLLM's; else 0.9 on a GPU, 0.35 on a CPU",
    )
    add("--tensor-parallel-size", type=int, default=1, help="GPUs of one vLLM engine")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--problem-column", metavar="NAME", help="column of the question, where not detected")
    add("--answer-column", metavar="NAME", help="column of the answer, where not detected")
    add("--on-bad-row", choices=("stop", "skip"), default="stop", help="at rows without an answer")
    return parser


def _section(arguments: argparse.Namespace) -> EvalSection:
    """The flags as the section of a training run's configuration, with its checks."""
    names = EvalSection.model_fields.keys() & vars(arguments).keys()
    columns = {"problem": arguments.problem_column, "answer": arguments.answer_column}
    try:
        return EvalSection(columns=columns, **{name: getattr(arguments, name) for name in names})  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        lines = [
            f"--{str(item['loc'][0]).replace('_', '-')}: got {item['input']!r}; "
            f"{item['msg'].removeprefix('Value error, ').removeprefix('Input ')}"
            for item in error.errors()
        ]
        raise ValueError("\n".join(lines)) from error


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


def make_plan(arguments: argparse.Namespace, world: World) -> Plan:
    """Everything but the weights is loaded, and checked. Raises ValueError for what the user can
    mend."""
    section, engine = _section(arguments), _check_engine(arguments)
    benchmarks = parse_benchmarks(arguments.benchmarks)
    subject = find_subject(
        arguments.model,
        arguments.adapter,
        arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer, shape = load_tokenizer(subject.base), skeleton(subject)
    check_adapter(subject)
    settings = evaluation_settings(section, arguments.seed, arguments.instruction)
    identity = subject.identity(engine, compute_dtype_of(subject, world.device))

    def load(benchmark: Benchmark) -> ProblemSet:
        return load_benchmark(
            benchmark,
            tokenizer,
            section,
            arguments.instruction,
            max_context(shape),
            on_bad_row=arguments.on_bad_row,
            say=print if world.is_main else lambda text: None,
        )

    sets = {benchmark.name: load(benchmark) for benchmark in benchmarks}
    headers = {
        name: Header(name, settings, identity, fingerprints(problem_set.problems))
        for name, problem_set in sets.items()
    }
    directory = arguments.output or default_directory(identity, settings, section.num_problems)
    return Plan(arguments, section, subject, tokenizer, shape, engine, directory, sets, headers)


def default_directory(
    identity: Mapping[str, Any], settings: Mapping[str, Any], num_problems: int | None
) -> Path:
    """A directory that the same command finds again, and another one does not; more benchmarks go
    to the same."""
    text = json.dumps([identity, settings, num_problems], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Path("evaluations") / f"{Path(identity['model']).name}-{digest[:8]}"


def answer_benchmark(
    plan: Plan, name: str, engine: RolloutEngine, world: World, progress: Progress
) -> Evaluation:
    """What is left of one benchmark, each sample being written as it finishes. A collective."""
    started, problem_set, done = time.monotonic(), plan.sets[name], []
    with closing(
        SampleFiles(plan.directory, name, plan.headers[name], world, replace=False)
    ) as files:
        requests = all_requests(problem_set.problems, plan.section.num_samples)
        mine = files.share(requests)
        left = "" if len(mine) == len(requests) else f" ({len(mine)} left for this process)"
        with progress.evaluation(f"{name}{left}", len(mine)) as advance:

            def on_samples(group: list[EvalSample]) -> None:
                files.append(group)
                done.extend(sample.correct for sample in group)
                advance(len(group), sum(done) / len(done))

            evaluate(
                engine,
                plan.tokenizer,
                problem_set.problems,
                problem_set.prompts,
                mine,
                sampling_params(plan.section, plan.shape, plan.tokenizer),
                seed=plan.arguments.seed,
                base=plan.subject.adapter is None,
                on_samples=on_samples,
            )
        return files.finish(time.monotonic() - started)


def look(plan: Plan, world: World, stack: ExitStack) -> dict[str, Evaluation | None]:
    """By benchmark, the complete evaluation that is there, or None. A collective.

    stack: holds the directory until it is closed.

    Raises ValueError for what would be refused after hours, or after loading the weights: samples
    of another evaluation, another process at work there, a directory that cannot be written.
    """
    here, error = {}, None
    try:
        if world.is_main:
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
    """Every benchmark; the weights are loaded only where something is left to do.

    here: of `look`.
    """
    pending = [name for name, evaluation in here.items() if evaluation is None]
    if pending:
        arguments, share = plan.arguments, plan.arguments.gpu_memory_utilization
        prompts = [prompt for name in pending for prompt in plan.sets[name].prompts]
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
        with closing(engine):
            for name in pending:
                here[name] = answer_benchmark(plan, name, engine, world, progress)
    return [evaluation for evaluation in here.values() if evaluation is not None]


def report(plan: Plan, evaluations: Sequence[Evaluation], world: World, console: Console) -> None:
    """Prints the table, and writes `results.json`. For the main rank."""
    write_versions(plan.directory, "evaluate", world.size)
    results = {
        "model": plan.subject.base.name_or_path,
        "adapter": plan.arguments.adapter,
        **{key: asdict(evaluations[0].header)[key] for key in ("settings", "subject")},
        "versions": json.loads((plan.directory / VERSIONS_FILE).read_text()),
        **summarise_benchmarks(evaluations),
    }
    write_results(plan.directory, results)
    console.print(results_table(results))
    console.print(f"results: {plan.directory}", soft_wrap=True)


def _own_flags(message: str) -> str:
    """A message of the engine's parts, with this command's flags for the configuration's keys."""

    def flag(match: re.Match[str]) -> str:
        key = match[1]
        if match[0].removeprefix("--") not in LEAVES:
            # A file's name, as data.jsonl, or a weight's.
            return match[0]
        if key.startswith("columns."):
            return f"--{key.removeprefix('columns.')}-column"
        return "--" + _FLAGS.get(key, key.replace("_", "-"))

    message = message.replace("--checkpoint ", "--adapter RUN_DIR:")
    return _KEY.sub(flag, message).replace("NAME (.solution, .answer)", "or --answer-column NAME")


def run(argv: Sequence[str], console: Console) -> None:
    """The whole command. Raises ValueError, in this command's terms, for what the user can mend."""
    try:
        arguments = _parser().parse_args(argv)
        world = init_world(pick_device(arguments.device))
        plan = make_plan(arguments, world)
        with ExitStack() as stack:
            here = look(plan, world, stack)
            evaluations = answer_all(plan, here, world, Progress(console))
            if world.is_main:
                report(plan, evaluations, world, console)
    except ValueError as error:
        raise ValueError(_own_flags(str(error))) from error
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
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it was")
        sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    finally:
        close_world()
