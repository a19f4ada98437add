"""The command lines of `python -m paint_engine.evaluate`, of its `compare` and of its `table1`, and
the translation of other modules' messages into these flags."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from paint_engine.config import templates
from paint_engine.config.benchmarks import KNOWN, Benchmark, parse_benchmarks
from paint_engine.config.command_line import parse_value
from paint_engine.config.schema import evaluation_prompts
from paint_engine.config.sections import (
    BESIDE_RUN,
    INSTRUCTION,
    EvalSection,
    PromptsSection,
    RewardSection,
)
from paint_engine.config.toml import LEAVES
from paint_engine.files import argument_path, argument_text, shown

# The flag for each configuration key in other modules' messages, where the names differ.
_FLAGS = {
    **{"name_or_path": "model", "path": "benchmarks", "split": "benchmarks SOURCE:SPLIT"},
    **{"function": "reward-function", "timeout_s": "reward-timeout-s"},
}
_KEY = re.compile(r"(?:--)?\b(?:rollout|eval|model|data|train|reward)\.((?:columns\.)?[a-z_]+)")


@dataclass(frozen=True)
class EvaluationCommand:
    """What the user asked for, with every check of a flag that needs no model and no data.

    arguments: all flags by name; the other fields are built from some of them.
    """

    arguments: argparse.Namespace
    section: EvalSection
    prompts: PromptsSection
    reward: RewardSection
    benchmarks: tuple[Benchmark, ...]


@dataclass(frozen=True)
class Table1Command:
    """What the user asked `table1` for.

    runs: directories of training runs, as they were given.
    steps: whose checkpoints are evaluated; None = all that each run has.
    base: evaluate the base too, as step 0.
    seeds: decoding seeds.
    evaluation: what is common to all evaluations.
    """

    runs: tuple[str, ...]
    steps: tuple[int, ...] | None
    base: bool
    seeds: tuple[int, ...]
    json: Path | None
    evaluation: EvaluationCommand

    @property
    def arguments(self) -> argparse.Namespace:
        """All flags by name."""
        return self.evaluation.arguments

    def of_checkpoint(self, adapter: str) -> EvaluationCommand:
        """Returns the command that evaluates one checkpoint.

        adapter: as `--adapter` takes it.
        """
        arguments = argparse.Namespace(**vars(self.arguments) | {"adapter": adapter})
        return replace(self.evaluation, arguments=arguments)


_BENCHMARKS = (
    f"comma-separated: {', '.join(benchmark.name for benchmark in KNOWN)}, [NAME=]FILE, "
    "[NAME=]ID:SPLIT or ID:CONFIG:SPLIT"
)


_BASE_CACHE: dict[str, Any] = {
    "metavar": "DIR",
    "type": argument_text,
    "help": "as eval.base_cache of a training run: evaluations of whole models are reused from "
    "there and kept there; auto = base-evaluations beside the run directory, or in runs",
}


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


def _template(text: str) -> str:
    try:
        return templates.check_student(parse_value(text, "prompts.student_template"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; needs {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m paint_engine.evaluate",
        description="Avg@k, pass@k and maj@k of a model on benchmarks, by default sampled as in "
        "the paper. Or: compare RUN_A RUN_B ..., or table1 RUN_DIR ... (see compare --help and "
        "table1 --help). The same command resumes an interrupted evaluation. More in "
        "docs/evaluation.md.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    _add_model(parser.add_argument)
    _add_subject(parser.add_argument)
    _add_answers(parser.add_argument)
    _add_machine(parser.add_argument)
    return parser


def _add_model(add: Callable[..., object]) -> None:
    """Adds the flags that select the model."""
    add(
        "--model",
        metavar="M",
        type=argument_text,
        help="'tiny', a model directory or a Hugging Face id",
    )
    add(
        "--revision",
        metavar="R",
        help="commit, tag or branch of a Hugging Face id; default: the adapter's run's, else the "
        "newest",
    )


def _add_subject(add: Callable[..., object]) -> None:
    """Adds the flags that select what of it is evaluated, on what, and where the results go."""
    add(
        "--adapter",
        metavar="A",
        type=argument_text,
        help="directory in peft's format, or RUN_DIR[:last|:best|:STEP]",
    )
    add("--benchmarks", required=True, help=_BENCHMARKS)
    add("--output", metavar="DIR", type=argument_path, help="default: evaluations/NAME-DIGEST")
    add("--seed", type=int, default=0, help="sampling seed")
    add("--base-cache", default="none", **_BASE_CACHE)
    _add_rows(add)


def _add_rows(add: Callable[..., object]) -> None:
    """Adds the flags that say how the problems' rows are read."""
    add("--problem-column", metavar="NAME", help="column of the question, if not detected")
    add("--answer-column", metavar="NAME", help="column of the answer, if not detected")
    add(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a row without an answer",
    )


def _add_answers(add: Callable[..., object]) -> None:
    """Adds the flags that set how answers are sampled and judged."""
    paper, reward = EvalSection(), RewardSection()
    add("--num-samples", type=int, default=paper.num_samples, help="answers per problem")
    add("--num-problems", type=int, help="use only the first so many of each")
    add("--temperature", type=float, default=paper.temperature, help="sampling temperature")
    add("--top-p", type=float, default=paper.top_p, help="nucleus mass")
    add("--top-k", type=int, default=paper.top_k, help="most likely tokens kept; -1 = all")
    add("--max-new-tokens", type=int, default=paper.max_new_tokens, help="tokens of an answer")
    add("--thinking", type=_flag, default=paper.thinking, help="chat template's thinking switch")
    add(
        "--prompt",
        choices=("student", "opsd"),
        default=paper.prompt,
        help="opsd: OPSD's message, the problem without 'Problem: ', in place of "
        "--student-template's",
    )
    add(
        "--instruction",
        # As in training: TOML's quotes are not part of the text.
        type=partial(parse_value, key="prompts.instruction"),
        default=INSTRUCTION,
        help="closing line of the prompt",
    )
    add(
        "--student-template",
        type=_template,
        default=templates.STUDENT,
        help="prompt template, as prompts.student_template in training",
    )
    add(
        "--reward-function",
        default=reward.function,
        metavar="NAME",
        help="judges an answer: math, first_box or module:function, as reward.function of a "
        "training run",
    )
    add(
        "--reward-timeout-s",
        type=float,
        default=reward.timeout_s,
        help="time limit for judging one answer, in seconds",
    )
    add(
        "--date",
        metavar="YYYY-MM-DD",
        help="date in a chat template that shows it; default: that of the run's training, else "
        "today's",
    )


def _add_machine(add: Callable[..., object]) -> None:
    """Adds the flags that select what the evaluation runs on."""
    add(
        "--engine",
        choices=("auto", "vllm", "builtin"),
        default="auto",
        help="auto: vLLM if installed",
    )
    add(
        "--max-sequences",
        type=int,
        default=EvalSection().max_sequences,
        help="sequences decoded at once",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        help="vLLM's share; default: 0.9 on a GPU, 0.35 on a CPU",
    )
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per vLLM engine")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the weights",
    )
    add(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if available"
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model that --model names",
    )


def parse_command(argv: Sequence[str]) -> EvaluationCommand:
    """Parses and checks the command line; `-h` prints all flags and exits.

    argv: without the program's name, such as ["--model", "tiny", "--benchmarks", "tiny"].

    Raises ValueError with what was given, what is needed and what to do.
    """
    arguments = parse_arguments(argv)
    command = _checked(arguments)
    if arguments.model is None and arguments.adapter is None:
        raise ValueError("got neither --model nor --adapter; needs at least one of them")
    return command


def _checked(arguments: argparse.Namespace) -> EvaluationCommand:
    benchmarks = parse_benchmarks(arguments.benchmarks)
    share, size = arguments.gpu_memory_utilization, arguments.tensor_parallel_size
    if not (share is None or 0 < share < 1) or size < 1:
        raise ValueError(
            f"got --gpu-memory-utilization {share} and --tensor-parallel-size {size}; needs a "
            "share between 0 and 1, and at least 1 GPU"
        )
    section, prompts = section_of(arguments), prompts_of(arguments)
    reward = reward_of(arguments)
    return EvaluationCommand(arguments, section, prompts, reward, tuple(benchmarks))


def parse_table1(argv: Sequence[str]) -> Table1Command:
    """Parses and checks the command line of `table1`; `-h` prints all flags and exits.

    Raises ValueError with what was given, what is needed and what to do.
    """
    arguments = _parse_known(_table1_parser(), argv)
    runs, seeds, steps = arguments.runs, arguments.seeds, arguments.steps
    for flag, values in (("RUN_DIR", runs), ("--seeds", seeds), ("--steps", steps or ())):
        if len(set(values)) < len(values):
            raise ValueError(
                f"{flag}: got {', '.join(map(str, values))}; needs each once; leave out the "
                "repeated ones"
            )
    return Table1Command(
        tuple(runs),
        None if steps is None else tuple(steps),
        arguments.base,
        tuple(seeds),
        arguments.json,
        # Each evaluation has one of the seeds.
        _checked(argparse.Namespace(**vars(arguments) | {"seed": seeds[0]})),
    )


def _table1_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m paint_engine.evaluate table1",
        description="Avg@k of the checkpoints of training runs by the protocol of the paper's "
        "Table 1: on several benchmarks, with their macro average, the best step and the maximum "
        "of each benchmark. The same command resumes. More in docs/reproducing.md.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("runs", metavar="RUN_DIR", nargs="+", type=argument_text, help="of a training run")
    add("--steps", type=int, nargs="+", metavar="N", help="default: all checkpoints")
    add("--base", action="store_true", help="evaluate the model before training too")
    add("--seeds", type=int, nargs="+", metavar="N", default=[0], help="sampling seeds")
    add("--benchmarks", default="aime24,aime25,hmmt25", help=_BENCHMARKS)
    add(
        "--output",
        metavar="DIR",
        type=argument_path,
        help="directory of the evaluations' directories; default: evaluations",
    )
    add("--json", metavar="FILE", type=argument_path, help="also write the numbers to this file")
    add("--base-cache", default=BESIDE_RUN, **_BASE_CACHE)
    _add_model(add)
    _add_rows(add)
    _add_answers(add)
    _add_machine(add)
    return parser


def parse_comparison(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments of `compare`: first, others, json."""
    parser = argparse.ArgumentParser(
        prog="python -m paint_engine.evaluate compare",
        description="The difference of each run to the first one, on the same problems.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "first",
        metavar="RUN_A",
        type=argument_text,
        help="directory of an evaluation or of a training run",
    )
    parser.add_argument(
        "others",
        metavar="RUN_B",
        type=argument_text,
        nargs="+",
        help="another; a training run may have :STEP, :best or :last (default) after it, and "
        ":final-STEP, :final-best or :final-last",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=argument_path, help="also write the numbers to this file"
    )
    return parser.parse_args(argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags by name. Raises ValueError for an unknown flag, with the most similar
    ones."""
    return _parse_known(_parser(), argv)


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    arguments, unknown = parser.parse_known_args(argv)
    if not unknown:
        return arguments
    flags = ["--" + name.replace("_", "-") for name in vars(arguments)]
    given = [word.partition("=")[0].replace("_", "-").lower() for word in unknown]
    near = [get_close_matches(word, flags, n=1) for word in given if word.startswith("--")]
    meant = ", ".join(flag for found in near for flag in found)
    raise ValueError(
        f"unrecognized arguments: {' '.join(unknown)}; "
        + (f"did you mean {meant}? " if meant else "")
        + "--help lists every flag"
    )


@contextmanager
def _named_as_flags(prefix: str = "") -> Iterator[None]:
    """Turns pydantic's errors into a ValueError that names the flags: --PREFIX-KEY."""
    try:
        yield
    except ValidationError as error:
        lines = [
            f"--{prefix}{str(item['loc'][0]).replace('_', '-')}: got {shown(item['input'])}; "
            f"{item['msg'].removeprefix('Value error, ').removeprefix('Input ')}"
            for item in error.errors()
        ]
        raise ValueError("\n".join(lines)) from error


def section_of(arguments: argparse.Namespace) -> EvalSection:
    """Returns the flags as the section of a training run's configuration, with its checks."""
    # This command has its benchmarks apart, with files and names.
    names = (EvalSection.model_fields.keys() & vars(arguments).keys()) - {"benchmarks"}
    columns = {"problem": arguments.problem_column, "answer": arguments.answer_column}
    with _named_as_flags():
        return EvalSection(columns=columns, **{name: getattr(arguments, name) for name in names})  # pyright: ignore[reportArgumentType]


def reward_of(arguments: argparse.Namespace) -> RewardSection:
    """Returns the reward that judges the answers, as the section of a training run's
    configuration."""
    with _named_as_flags("reward-"):
        return RewardSection(
            function=arguments.reward_function, timeout_s=arguments.reward_timeout_s
        )


def prompts_of(arguments: argparse.Namespace) -> PromptsSection:
    """Returns the student's prompt as a `PromptsSection`. Raises ValueError for an instruction that
    the template does not use."""
    instruction, template = arguments.instruction, arguments.student_template
    if instruction != INSTRUCTION and "{instruction}" not in template:
        raise ValueError(
            f"--instruction: got {instruction!r} with a --student-template that has no "
            "{instruction}; leave it out, or put {instruction} into the template"
        )
    if arguments.prompt != "student" and template != templates.STUDENT:
        raise ValueError(
            f"--prompt: got {arguments.prompt!r} with --student-template {template!r}; needs one "
            "of them; leave out the other"
        )
    with _named_as_flags():
        prompts = PromptsSection(
            instruction=instruction, student_template=template, date=arguments.date
        )
    return evaluation_prompts(prompts, section_of(arguments))


def own_flags(message: str) -> str:
    """Returns another module's message, with this command's flags in place of configuration
    keys."""

    def flag(match: re.Match[str]) -> str:
        key = match[1]
        if match[0].removeprefix("--") not in LEAVES:
            # Not a key, but a name such as data.jsonl or model.layers.
            return match[0]
        if key.startswith("columns."):
            return f"--{key.removeprefix('columns.')}-column"
        return "--" + _FLAGS.get(key, key.replace("_", "-"))

    return _KEY.sub(flag, message).replace("NAME (.solution, .answer)", "or --answer-column NAME")
