"""Measures steps with other models as teachers, two losses or a server's scores, beside what the
counts of `--dry-run` predict for them from the plain step.

The models have random weights in three widths, the problems are the bundled ones, and completions
are random ids, all of the longest length. Every case trains on the same problems and completions.
"""

import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from bench.measure import progress
from bench.step.loops import OwnLoop
from paint_engine.config.bundled import TINY_BASE
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.data import batch_requests
from paint_engine.distributed import World
from paint_engine.estimate.arithmetic import rollout_flops, scoring_of
from paint_engine.estimate.lengths import prompt_lengths
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model.teachers import ExternalTeacher
from paint_engine.recipes import Recipe, recipe_of
from paint_engine.training.build import build_run
from paint_engine.training.rollouts import step_context
from paint_engine.training.run import Run
from paint_engine.types import Rollout, TopK, TrainExample, Verdict

NUM_TOKENS = 4096
"""rows of the heads, more than the bundled tokenizer has tokens: the student's head has 18% of its
parameters, as that of Qwen3 1.7B"""
MODELS = {"student": (384, 4), "wide": (512, 6), "narrow": (256, 4)}
"""hidden size and number of layers"""
HEAD_DIM = 32
PLAIN = "the base"
SERVED_URL = "http://127.0.0.1:1"
"""never asked: the scores are random"""


@dataclass(frozen=True)
class Sizes:
    """Numbers of rollouts in a step, and of tokens in a completion."""

    rollouts: int = 4
    completion: int = 96


@dataclass(frozen=True)
class EstimatedCase:
    """arguments: of paint_engine.train; they name models by their directories' names in MODELS.
    served: the rollouts come with a server's scores."""

    arguments: tuple[str, ...] = ()
    served: bool = False


def _external(*names: str) -> tuple[str, ...]:
    listed = ", ".join(f'"{{{name}}}"' for name in names)
    return ("--teacher.weights", "external", "--teacher.models", f"[{listed}]")


_BOTH = _external("wide", "narrow")
_TWO_LOSSES = ("--objective.name", "grpo_paint", "--grpo.group_size", "2")
CASES = {
    PLAIN: EstimatedCase(),
    "a wider model": EstimatedCase(_external("wide")),
    "a narrower model": EstimatedCase(_external("narrow")),
    "both, mixed": EstimatedCase(_BOTH),
    "the base, `grpo_paint`": EstimatedCase(_TWO_LOSSES),
    "both, `grpo_paint`": EstimatedCase((*_BOTH, *_TWO_LOSSES)),
    "both, half of the rollouts": EstimatedCase((*_BOTH, "--objective.on", "wrong")),
    "a server": EstimatedCase(("--objective.temperature", "1.0"), served=True),
}


def write_models(folder: Path) -> dict[str, str]:
    """Writes the models with one tokenizer; returns their directories by name."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    tokenizer.add_tokens([f"word{number}" for number in range(NUM_TOKENS - len(tokenizer))])
    for seed, (name, (hidden, layers)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=NUM_TOKENS,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // HEAD_DIM,
            num_key_value_heads=hidden // HEAD_DIM // 2,
            head_dim=HEAD_DIM,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in MODELS}


def open_case(case: EstimatedCase, models: Mapping[str, str], sizes: Sizes, directory: Path) -> Run:
    """Builds the run of a case as the engine does before its first step, on the CPU."""
    arguments = [
        *("--preset", "tiny", "--model.name_or_path", models["student"], "--eval.enabled", "false"),
        *("--train.device", "cpu", "--train.batch_size", str(sizes.rollouts)),
        *("--rollout.max_new_tokens", str(sizes.completion), "--run.dir", str(directory)),
        *(part.format(**models) for part in case.arguments),
    ]
    return build_run(load_config(arguments), World(0, 1, 0, torch.device("cpu")))


def with_server(config: Config) -> Config:
    """Returns the configuration with a teacher's server in place of the base."""
    return config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"url": SERVED_URL})}
    )


def random_scores(number: int, own: Sequence[int], rng: random.Random) -> TopK:
    """Returns a server's scores: `number` tokens beside each of its own, all as likely."""
    rows = [[token, *rng.sample(range(token), number)] for token in own]
    ids = torch.tensor(rows, dtype=torch.int32)
    return TopK(ids, torch.full(ids.shape, -math.log(2 * (number + 1))))


def rollouts_of(run: Run, recipe: Recipe) -> list[TrainExample]:
    """Returns the first step's rollouts as the recipe prepares them: random completions of the
    longest length, every second one right."""
    rng, judged = random.Random(0), []
    # Every case gets the problems of the plain step, also one whose recipe would sample groups.
    plain = run.config.model_copy(update={"objective": Config().objective})
    requests = batch_requests(plain, run.train_set, 0)
    for request in requests:
        ids = tuple(
            rng.randrange(NUM_TOKENS // 2, NUM_TOKENS)
            for _ in range(run.config.rollout.max_new_tokens)
        )
        rollout = Rollout(request.problem, request.prompt_ids, ids, (-1.0,) * len(ids), True, "")
        verdict = Verdict(float(request.index % 2), bool(request.index % 2))
        judged.append(TrainExample(rollout, verdict, overlap=0.0))
    prepared = recipe.prepare(step_context(run, 0, requests, judged), judged)
    if recipe.served_top_k is None:
        return list(recipe.prepare_batch(prepared))
    scores = [random_scores(recipe.served_top_k, e.rollout.completion_ids, rng) for e in prepared]
    return [replace(e, served=one) for e, one in zip(prepared, scores, strict=True)]


def predicted_flops(run: Run, recipe: Recipe, rollouts: Sequence[TrainExample]) -> dict[str, float]:
    """Returns the operations of a step by part, as `--dry-run` counts them from the data's prompts,
    without the sampling. Rollouts that `objective.on` leaves out do not go through the models."""
    config, shape = recipe.config, shape_of(run.model)
    lengths = prompt_lengths(config, run.tokenizer, run.train_set, run.max_context, run.readers)
    others = [m.model for m in run.teacher.members if isinstance(m, ExternalTeacher)]
    scoring = scoring_of(
        config, shape, lengths, run.train_set.problems, [shape_of(model) for model in others]
    )
    typical = lengths.typical(config.rollout.max_new_tokens)
    parts = rollout_flops(
        config,
        shape,
        student_prompt=typical.student_prompt,
        completion=typical.completion,
        scoring=scoring,
    )
    del parts["rollout"]
    number = len(recipe.trained(rollouts))
    return {name: number * size for name, size in parts.items()}


def make_loop(case: EstimatedCase, run: Run) -> tuple[OwnLoop, dict[str, float]]:
    """Returns the steps of a case, and their predicted operations."""
    config = with_server(run.config) if case.served else run.config
    recipe = recipe_of(config)
    rollouts = rollouts_of(run, recipe)
    loop = OwnLoop(run, rollouts, lambda _: recipe)
    return loop, predicted_flops(run, recipe, rollouts)


def processor_seconds(loops: Mapping[str, OwnLoop], rounds: int) -> dict[str, list[float]]:
    """Returns the processor time of each loop's steps, of which the loops take one a round. The
    first round warms up. Other processes of the machine do not lengthen it as they do a time on
    the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            begin = time.process_time()
            loop.step()
            if number > 0:
                seconds[name].append(time.process_time() - begin)
    return seconds


def row_of(
    flops: Mapping[str, float],
    ratios: Sequence[float],
    plain: Mapping[str, float],
) -> dict[str, Any]:
    """Returns a case's measured and predicted time over those of the plain step.

    ratios: measured, of each round.
    plain: the plain step's operations by part.
    """
    measured = statistics.median(ratios)
    predicted = sum(flops.values()) / sum(plain.values())
    return {
        "flops": dict(flops),
        "measured": measured,
        "lowest": min(ratios),
        "highest": max(ratios),
        "predicted": predicted,
        "error": predicted / measured - 1,
    }


def measure_estimates(
    names: Sequence[str], sizes: Sizes, rounds: int, folder: Path
) -> dict[str, Any]:
    """Measures the plain step and those of the named cases by turns; returns the result's part
    of the JSON. Ratios are taken within a round, because the machine's speed changes."""
    models, loops, flops = write_models(folder), {}, {}
    for place, name in enumerate(dict.fromkeys((PLAIN, *names))):
        progress(f"building {name}")
        run = open_case(CASES[name], models, sizes, folder / f"run-{place}")
        loops[name], flops[name] = make_loop(CASES[name], run)
    progress(f"{rounds} rounds of {len(loops)} cases")
    seconds = processor_seconds(loops, rounds)
    rows = []
    for name, own_s in seconds.items():
        ratios = [own / plain for own, plain in zip(own_s, seconds[PLAIN], strict=True)]
        rows.append({"teacher": name, **row_of(flops[name], ratios, flops[PLAIN])})
    plain_s = statistics.median(seconds[PLAIN])
    return {
        "models": {name: list(size) for name, size in MODELS.items()},
        "num_tokens": NUM_TOKENS,
        "rollouts": sizes.rollouts,
        "completion": sizes.completion,
        "rounds": rounds,
        "plain_ms": 1e3 * plain_s,
        "flops_per_s": sum(flops[PLAIN].values()) / plain_s,
        "rows": rows,
    }
