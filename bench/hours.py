"""Predicts the hours of the presets for Qwen3 on eight H100s, as `--dry-run` does.

    python -m bench.hours --output bench/results/hours.json

Nothing runs on a GPU. A dry run has the prompts of the data; here, all have the same length, and
the models are Qwen3's sizes on the meta device. The last line of stdout is JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.cluster.splits import MODELS, shape_of_model
from bench.tables import Result, markdown, number
from paint_engine.config.command_line import load_config
from paint_engine.data import ProblemSet
from paint_engine.estimate.arithmetic import passes_flops, rollout_flops, scoring_of
from paint_engine.estimate.hours import GPUS, evaluations_of, predicted_seconds
from paint_engine.estimate.lengths import PromptLengths
from paint_engine.types import Problem

RECIPES = ("paint", "grpo")
GPU, NUM_GPUS = "h100", 8
STUDENT_PROMPT, TEACHER_PROMPT = 150, 900
"""tokens"""
NUM_HELD_OUT = 30
"""problems of AIME 2024, on which the presets evaluate"""
HOUR_S = 3600.0


def predict(recipe: str, model: str) -> dict[str, Any]:
    """Returns the row of a preset."""
    arguments = ["--preset", f"{recipe}-{model}", "--rollout.engine", "vllm"]
    config = load_config(arguments).config
    shape = shape_of_model(model, config)
    lengths = PromptLengths([STUDENT_PROMPT], [TEACHER_PROMPT], [])
    flops = rollout_flops(
        config,
        shape,
        student_prompt=STUDENT_PROMPT,
        completion=config.rollout.max_new_tokens,
        scoring=scoring_of(config, shape, lengths, [], []),
    )
    problems = tuple(Problem(f"p:{place}", "", "", "0") for place in range(NUM_HELD_OUT))
    held_out = ProblemSet(problems, ((0,) * STUDENT_PROMPT,) * NUM_HELD_OUT, 0)
    evaluations = evaluations_of(config.eval, config.train.num_steps, {"aime24": held_out})
    found = predicted_seconds(
        *(config, shape, evaluations),
        step_flops=passes_flops(flops) * config.train.batch_size,
        prompt=STUDENT_PROMPT,
        gpu=GPUS[GPU],
        num_ranks=NUM_GPUS,
    )
    return {
        "preset": f"{recipe}-{model}",
        "num_steps": config.train.num_steps,
        "num_rollouts": config.train.batch_size,
        "max_new_tokens": config.rollout.max_new_tokens,
        "training_h": found.training / HOUR_S,
        "num_evaluations": evaluations[0].number,
        "num_answers": evaluations[0].num_answers,
        "max_answer_tokens": evaluations[0].max_new_tokens,
        "evaluations_h": found.evaluations[0] / HOUR_S,
    }


def hours_table(result: Result) -> str:
    header = [
        f"{result['num_gpus']} x {result['gpu'].upper()}",
        "steps",
        "tokens a rollout, at most",
    ]
    header += ["training, h", "evaluations", "all of them, at most, h", "one, at most, h"]
    rows = [
        [
            f"`{row['preset']}`",
            str(row["num_steps"]),
            f"{row['max_new_tokens']:,}",
            number(row["training_h"], 2),
            str(row["num_evaluations"]),
            number(row["evaluations_h"], 1),
            number(row["evaluations_h"] / row["num_evaluations"], 1),
        ]
        for row in result["rows"]
    ]
    first = result["rows"][0]
    caption = (
        f"A prediction, not a measurement: {first['num_rollouts']} rollouts a step, evaluations of "
        f"{first['num_answers']} answers of {first['max_answer_tokens']:,} tokens, prompts of "
        f"{result['student_prompt']} tokens (teacher {result['teacher_prompt']}), every completion "
        f"as long as its limit. By `{result['command']}`."
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hours", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args(argv)
    result = {
        "name": "hours",
        "gpu": GPU,
        "num_gpus": NUM_GPUS,
        "student_prompt": STUDENT_PROMPT,
        "teacher_prompt": TEACHER_PROMPT,
        "rows": [predict(recipe, model) for recipe in RECIPES for model in MODELS],
        **measure.environment(torch.device("cpu"), " ".join(["python -m bench.hours", *argv])),
    }
    print(f"{hours_table(result)}\n", flush=True)
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
