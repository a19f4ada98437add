"""The flags of `python -m paint_engine.evaluate`, and messages of the engine's parts in their
terms."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from paint_engine.config import templates
from paint_engine.config.command_line import parse_value
from paint_engine.config.sections import INSTRUCTION, EvalSection, PromptsSection, RewardSection
from paint_engine.config.toml import LEAVES
from paint_engine.evaluation.benchmarks import KNOWN

# Of the configuration's keys that messages of its parts name: the flag that stands for each here.
_FLAGS = {
    **{"name_or_path": "model", "path": "benchmarks", "split": "benchmarks SOURCE:SPLIT"},
    **{"function": "reward-function", "timeout_s": "reward-timeout-s"},
}
_KEY = re.compile(r"(?:--)?\b(?:rollout|eval|model|data|train|reward)\.((?:columns\.)?[a-z_]+)")


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


def make_parser() -> argparse.ArgumentParser:
    """Of the flags as they are; `parse_arguments` also says which one was meant."""
    paper, reward = EvalSection(), RewardSection()
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
    add("--output", metavar="DIR", type=Path, help="else evaluations/NAME-DIGEST")
    add("--num-samples", type=int, default=paper.num_samples, help="answers a problem")
    add("--num-problems", type=int, help="the first so many of each; else all")
    add("--temperature", type=float, default=paper.temperature, help="of sampling")
    add("--top-p", type=float, default=paper.top_p, help="nucleus mass")
    add("--top-k", type=int, default=paper.top_k, help="likeliest tokens kept; -1 = all")
    add("--max-new-tokens", type=int, default=paper.max_new_tokens, help="longest answer")
    add("--thinking", type=_flag, default=paper.thinking, help="chat template's switch")
    add(
        "--instruction",
        # As the training's command line reads it: TOML's quotes are no part of a text.
        type=partial(parse_value, key="prompts.instruction"),
        default=INSTRUCTION,
        help="closing line of the prompt",
    )
    add(
        "--student-template",
        type=_template,
        default=templates.STUDENT,
        help="the prompt, as prompts.student_template of a training run",
    )
    add(
        "--reward-function",
        default=reward.function,
        metavar="NAME",
        help="what judges an answer: math, first_box or module:function, as reward.function of a "
        "training run",
    )
    add(
        "--reward-timeout-s",
        type=float,
        default=reward.timeout_s,
        help="longest judgement of one answer",
    )
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


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags by name. Raises ValueError for what is none, with the one that it is most like."""
    arguments, unknown = make_parser().parse_known_args(argv)
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
            f"--{prefix}{str(item['loc'][0]).replace('_', '-')}: got {item['input']!r}; "
            f"{item['msg'].removeprefix('Value error, ').removeprefix('Input ')}"
            for item in error.errors()
        ]
        raise ValueError("\n".join(lines)) from error


def section_of(arguments: argparse.Namespace) -> EvalSection:
    """The flags as the section of a training run's configuration, with its checks."""
    names = EvalSection.model_fields.keys() & vars(arguments).keys()
    columns = {"problem": arguments.problem_column, "answer": arguments.answer_column}
    with _named_as_flags():
        return EvalSection(columns=columns, **{name: getattr(arguments, name) for name in names})  # pyright: ignore[reportArgumentType]


def reward_of(arguments: argparse.Namespace) -> RewardSection:
    """What judges the answers, as the section of a training run's configuration."""
    with _named_as_flags("reward-"):
        return RewardSection(
            function=arguments.reward_function, timeout_s=arguments.reward_timeout_s
        )


def prompts_of(arguments: argparse.Namespace) -> PromptsSection:
    """What the flags say of the student's message. Raises ValueError for an instruction that it has
    no place for."""
    instruction, template = arguments.instruction, arguments.student_template
    if instruction != INSTRUCTION and "{instruction}" not in template:
        raise ValueError(
            f"--instruction: got {instruction!r} with a --student-template that has no "
            "{instruction}; leave it out, or put {instruction} into the template"
        )
    return PromptsSection(instruction=instruction, student_template=template)


def own_flags(message: str) -> str:
    """A message of the engine's parts, with this command's flags for the configuration's keys."""

    def flag(match: re.Match[str]) -> str:
        key = match[1]
        if match[0].removeprefix("--") not in LEAVES:
            # A file's name, as data.jsonl, or a weight's.
            return match[0]
        if key.startswith("columns."):
            return f"--{key.removeprefix('columns.')}-column"
        return "--" + _FLAGS.get(key, key.replace("_", "-"))

    return _KEY.sub(flag, message).replace("NAME (.solution, .answer)", "or --answer-column NAME")
