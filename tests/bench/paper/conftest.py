"""Planted runs of the paper's tables: records as training would write them, without training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.paper.mechanisms import KINDS, STEPS_PER_BLOCK
from bench.paper.plan import (
    BASE,
    EVALUATED,
    PLANNED,
    RECIPES,
    TEACHERS,
    Job,
    PlannedRun,
    Scale,
    table_runs,
)
from bench.paper.runs import make_jobs
from bench.paper.stats import encode_counts


def planted_accuracy(run: PlannedRun) -> float:
    """OPSD 10 points and PAINT 20 above the base; masking prefixes 20 points below it."""
    gain = {BASE: 0.0, "opsd": 0.1, "paint": 0.2, "place-prefix": -0.2}
    return 0.6 + gain.get(run.setting, 0.1)


def planted_style(run: PlannedRun, step: int) -> dict[str, int]:
    """Of 20 solutions, those of PAINT go "together" more often from step to step."""
    together = 10 + step // 4 if run.setting == "paint" else 10
    return {"solutions": 20, "together": together, "checked": 5, "terse": 1}


def planted_mechanisms(run: PlannedRun, scale: Scale) -> dict[str, Any] | None:
    """Three quarters of the selected tokens of PAINT are digits of results, a quarter of all. The
    clip takes away a third of the divergence, of digits of results more than all."""
    if run.setting in EVALUATED or run.rate is not None:
        return None
    kinds = {kind: {"tokens": 100} for kind in KINDS}
    kinds["result"]["tokens"] = 200
    kinds["word"]["tokens"] = 300
    if run.setting not in ("sft", "grpo"):
        for kind in KINDS:
            by_chance = kinds[kind]["tokens"] * 32 / 800
            kinds[kind] |= {"selected": 2, "by_chance": by_chance, "clipped_mass": 0.5}
            kinds[kind] |= {"token_kl": 1.5, "token_loss": 1.0}
        kinds["result"] |= {"selected": 24, "token_loss": -0.5}
    ends = range(STEPS_PER_BLOCK, scale.num_steps + 1, STEPS_PER_BLOCK)
    return {
        "steps": {"teacher_entropy": [0.1 + 0.01 * run.seed] * scale.num_steps},
        "blocks": [{"step": step, **planted_style(run, step)} for step in ends],
        "kinds": kinds,
    }


def planted_record(job: Job) -> dict[str, Any]:
    """A run's record, with answers drawn from the planted accuracy."""
    run, scale = job.run, job.scale
    rng = np.random.default_rng([run.seed, *run.run_id.encode()])
    shape = (scale.num_problems, scale.num_samples)
    step = 0 if run.setting in EVALUATED else scale.num_steps
    correct = rng.random(shape) < planted_accuracy(run)
    evaluation = {
        "step": step,
        "avg_at_k": float(correct.mean()),
        "correct": encode_counts(correct),
        "style": planted_style(run, step),
        "seconds": 1.0,
    }
    return {
        "id": run.run_id,
        "size": run.size,
        "setting": run.setting,
        "seed": run.seed,
        "learning_rate": job.rate,
        **job.settings,
        "num_samples": scale.num_samples,
        "evaluations": [evaluation],
        "mechanisms": planted_mechanisms(run, scale),
        "seconds": 60.0,
        "commit": "0123456789ab",
        "versions": {"python": "3.11.7", "torch": "2.13.0" if run.seed else "2.12.1"},
        "device": "a CPU",
    }


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    for size in ("small", "10m", "30m"):
        directory = tmp_path / "bases" / size
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(size.encode())
    return tmp_path / "bases"


@pytest.fixture
def jobs_of(bases: Path, tmp_path: Path) -> Callable[..., list[Job]]:
    """The jobs of the planned tables, or of others, at one learning rate."""

    def jobs(scale: Scale, numbers: Sequence[int] = PLANNED) -> list[Job]:
        rates = {(size, recipe): 1e-4 for size in scale.sizes for recipe in RECIPES + TEACHERS}
        return make_jobs(table_runs(scale, numbers), scale, rates, bases, tmp_path / "runs")

    return jobs


@pytest.fixture(name="planted_record")
def planted_record_fixture() -> Callable[[Job], dict[str, Any]]:
    return planted_record
