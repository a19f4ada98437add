"""Everything a run is built from, in order: data, prompts, base, adapters, teacher, optimizer,
directory."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.checkpoint import load_checkpoint
from paint_engine.cli import CommandLine
from paint_engine.config import Config, OptimSection, to_toml
from paint_engine.data import load_problems
from paint_engine.masking import mask_solution
from paint_engine.model import (
    add_lora,
    lm_head_weight,
    load_base,
    load_tokenizer,
    max_context,
    pick_device,
)
from paint_engine.prompts import encode_student_prompt, encode_teacher_prompt
from paint_engine.report import CONFIG_FILE
from paint_engine.teacher import FixedTeacher
from paint_engine.types import Problem

VERSIONS_FILE = "versions.json"
_PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "math-verify", "safetensors")


@dataclass(frozen=True)
class ProblemSet:
    """Problems and the student's prompt ids for each, in one order.

    `num_skipped` rows of the source were bad or too long, and were skipped as asked.
    """

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    num_skipped: int


@dataclass
class Run:
    """What the loop works with. `step` counts finished steps; `seconds_train` adds up over resumes.

    `name` is the preset's, or "run" for a configuration of the user's.
    """

    config: Config
    name: str
    run_dir: Path
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    teacher: FixedTeacher
    optimizer: torch.optim.Optimizer
    train_set: ProblemSet
    eval_set: ProblemSet | None
    step: int = 0
    seconds_train: float = 0.0

    @property
    def attention(self) -> str:
        """Rows padded to a rectangle, unless the configuration asks for packing."""
        return "packed" if self.config.model.attention == "packed" else "padded"

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def max_teacher_prompt(self) -> int:
        """Tokens that the teacher's prompt may take beside the longest completion."""
        return max_context(self.model) - self.config.rollout.max_new_tokens


def learning_rate(section: OptimSection, step: int, num_steps: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then the schedule down to zero at the
    end."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    if section.schedule == "linear":
        return section.learning_rate * (1 - done)
    if section.schedule == "cosine":
        return section.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return section.learning_rate


def build_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """AdamW on whatever is trainable."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
    )


def _check_length(problem: Problem, num_tokens: int, room: int, role: str, limit_key: str) -> None:
    if num_tokens > room:
        raise ValueError(
            f"{problem.problem_id}: the {role}'s prompt takes {num_tokens} tokens, but the model's "
            f"context leaves {room} beside a completion: lower --{limit_key}, or leave out this "
            "problem" + ("" if role == "evaluation" else " with --data.max_prompt_tokens")
        )


def _check_vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase, base: nn.Module) -> None:
    num_rows = lm_head_weight(base).shape[0]
    top_k = config.objective.teacher_top_k
    if top_k is not None and top_k > len(tokenizer):
        raise ValueError(
            f"objective.teacher_top_k is {top_k}, but the vocabulary has {len(tokenizer)} tokens: "
            "lower it, or turn it off with --objective.teacher_top_k none"
        )
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"the tokenizer of {config.model.name_or_path} has {len(tokenizer)} tokens, but the "
            f"model's head has {num_rows} rows: they do not belong together; save the model's own "
            "tokenizer beside it, or resize the model's embeddings"
        )


def load_train_set(config: Config, tokenizer: PreTrainedTokenizerBase, context: int) -> ProblemSet:
    """Training problems with prompts that fit: the student's, and the teacher's without its
    solution."""
    data, prompts = config.data, config.prompts
    loaded = load_problems(
        data.path,
        split=data.split,
        columns=data.columns,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
    )
    room = context - config.rollout.max_new_tokens
    kept: list[Problem] = []
    kept_prompts: list[tuple[int, ...]] = []
    for problem in loaded.problems:
        student = encode_student_prompt(
            tokenizer, problem, prompts.instruction, thinking=prompts.student_thinking
        )
        if data.max_prompt_tokens is not None and len(student) > data.max_prompt_tokens:
            continue
        _check_length(problem, len(student), room, "student", "rollout.max_new_tokens")
        teacher, _ = encode_teacher_prompt(
            tokenizer,
            problem,
            config.masking.marker,
            prompts.instruction,
            thinking=prompts.teacher_thinking,
            suffix=prompts.teacher_suffix,
            marker=config.masking.marker,
        )
        _check_length(problem, len(teacher), room, "teacher", "rollout.max_new_tokens")
        kept.append(problem)
        kept_prompts.append(student)
    if not kept:
        raise ValueError(
            f"{data.path}: all {len(loaded.problems)} problems have prompts longer than "
            f"data.max_prompt_tokens = {data.max_prompt_tokens}: raise it"
        )
    num_long = len(loaded.problems) - len(kept)
    if loaded.num_skipped or num_long:
        long = f" and {num_long} with more than {data.max_prompt_tokens} prompt tokens"
        print(
            f"{data.path}: kept {len(kept)} problems, skipped {loaded.num_skipped} bad rows"
            + (long if num_long else "")
        )
    return ProblemSet(tuple(kept), tuple(kept_prompts), loaded.num_skipped + num_long)


def load_eval_set(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int
) -> ProblemSet | None:
    """Held-out problems with the prompts that the student is evaluated on; None where that is
    off."""
    section = config.eval
    if not section.enabled:
        return None
    loaded = load_problems(
        section.path,
        split=section.split,
        columns=section.columns,
        on_bad_row=config.data.on_bad_row,
        max_rows=section.num_problems,
        section="eval",
    )
    if loaded.num_skipped:
        print(f"{section.path}: skipped {loaded.num_skipped} bad rows")
    encoded = []
    for problem in loaded.problems:
        ids = encode_student_prompt(
            tokenizer, problem, config.prompts.instruction, thinking=section.thinking
        )
        room = context - section.max_new_tokens
        _check_length(problem, len(ids), room, "evaluation", "eval.max_new_tokens")
        encoded.append(ids)
    return ProblemSet(loaded.problems, tuple(encoded), loaded.num_skipped)


def _make_run_dir(config: Config, name: str) -> Path:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    run_dir = Path(config.run.dir or f"runs/{name}-{stamp}-{os.getpid()}")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        # Only what is recognisably a run may be replaced: a mistyped directory must not be emptied.
        is_run = (run_dir / CONFIG_FILE).is_file() and (run_dir / VERSIONS_FILE).is_file()
        is_around = Path.cwd().is_relative_to(run_dir.resolve())
        if not config.run.overwrite or not is_run or is_around:
            raise ValueError(
                f"run directory {run_dir} exists already: go on with it by --resume {run_dir}, "
                "choose another with --run.dir, or replace an earlier run with --run.overwrite true"
            )
        shutil.rmtree(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run directory {run_dir} cannot be made ({error}): choose another with --run.dir"
        ) from error
    return run_dir


def _write_versions(run_dir: Path, name: str) -> None:
    versions: dict[str, object] = {"preset": name, "command": sys.argv}
    versions |= {"python": platform.python_version(), "num_threads": torch.get_num_threads()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    (run_dir / VERSIONS_FILE).write_text(json.dumps(versions, indent=2) + "\n")


def _recorded_name(run_dir: Path | None) -> str:
    if run_dir is None:
        return "run"
    return json.loads((run_dir / VERSIONS_FILE).read_text())["preset"]


def build_run(command: CommandLine) -> Run:
    """Loads and builds everything; the run directory comes last, so that a mistake leaves none
    behind.

    Raises ValueError for whatever the user can mend: data, model, lengths, device, directory.
    """
    config = command.config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this version trains on one device: "
            "start it without torchrun"
        )
    device = pick_device(config.train.device)
    tokenizer = load_tokenizer(config.model)
    base = load_base(config.model, device, trains_base=not config.lora.enabled)
    _check_vocabulary(config, tokenizer, base)
    context = max_context(base)
    train_set = load_train_set(config, tokenizer, context)
    eval_set = load_eval_set(config, tokenizer, context)
    model = add_lora(base, config.lora, config.train.seed)
    teacher = FixedTeacher(model)
    optimizer = build_optimizer(model, config.optim)
    name = command.preset or _recorded_name(command.resume)
    if command.dry_run:
        run_dir = Path(config.run.dir or "runs")
    elif command.resume is not None:
        run_dir = command.resume
    else:
        run_dir = _make_run_dir(config, name)
        _write_versions(run_dir, name)
    run = Run(
        config, name, run_dir, device, tokenizer, model, teacher, optimizer, train_set, eval_set
    )
    if command.resume is not None:
        state = load_checkpoint(run_dir, model, optimizer)
        run.step, run.seconds_train = int(state["step"]), state["seconds_train"]
        if config.train.num_steps < run.step:
            raise ValueError(
                f"train.num_steps is {config.train.num_steps}, but {run_dir} has already done "
                f"{run.step}: give at least as many with --train.num_steps"
            )
    if not command.dry_run:
        # After a resume too: the next one is to go on with what this one was told.
        (run_dir / CONFIG_FILE).write_text(to_toml(config))
    return run


def describe(run: Run) -> str:
    """What `--dry-run` prints: the configuration, the sizes and the first prompts, special tokens
    shown."""
    config, problem = run.config, run.train_set.problems[0]
    num_parameters = sum(p.numel() for p in run.model.parameters())
    num_trainable = sum(p.numel() for p in run.parameters)
    partial_solution = mask_solution(
        problem.solution,
        config.masking.rho_wrong,
        placement=config.masking.placement,
        generator=random.Random(0),
        marker=config.masking.marker,
    )
    teacher_prompt, _ = encode_teacher_prompt(
        run.tokenizer,
        problem,
        partial_solution,
        config.prompts.instruction,
        thinking=config.prompts.teacher_thinking,
        suffix=config.prompts.teacher_suffix,
        max_tokens=run.max_teacher_prompt,
        marker=config.masking.marker,
    )
    num_held_out = len(run.eval_set.problems) if run.eval_set else 0
    student_prompt = run.train_set.prompts[0]
    longest = config.train.batch_size * config.rollout.max_new_tokens
    share = num_trainable / num_parameters
    return "\n".join(
        (
            to_toml(config),
            f"# {len(run.train_set.problems)} training problems, {num_held_out} held-out problems",
            f"# {num_parameters:,} parameters, {num_trainable:,} trainable ({share:.1%}), "
            f"on {run.device}",
            f"# at most {longest:,} completion tokens a step",
            "",
            f"# student's prompt of {problem.problem_id} ({len(student_prompt)} tokens)",
            str(run.tokenizer.decode(list(student_prompt))),
            "",
            f"# teacher's prompt of the same at mask ratio {config.masking.rho_wrong} "
            f"({len(teacher_prompt)} tokens)",
            str(run.tokenizer.decode(list(teacher_prompt))),
        )
    )
