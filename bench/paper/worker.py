"""Makes one run in this process: training, evaluations and the record."""

import platform
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.measure import commit, version
from bench.paper.mechanisms import read_mechanisms, style_counts
from bench.paper.plan import EVALUATED, NOT_CODE, Job, arguments, overrides, preset_of
from bench.paper.stats import encode_counts
from paint_engine import train
from paint_engine.config.command_line import load_config
from paint_engine.distributed import init_world
from paint_engine.evaluation.accuracy import correct_matrix
from paint_engine.evaluation.store import read_evaluations
from paint_engine.files.terminal import Terminal
from paint_engine.model.load import pick_device
from paint_engine.monitor.progress import Progress
from paint_engine.training.build import build_run
from paint_engine.training.evaluations import evaluate_at
from paint_engine.training.interrupt import StopRequest

PACKAGES = ("torch", "transformers", "peft")


def perform(job: Job) -> dict[str, Any]:
    """Makes the run from scratch, with its output in `log.txt`; returns its record.

    Raises RuntimeError with the path of the log if training ended early.
    """
    started, made_at = time.process_time(), code_version()
    run_dir = job.directory / "training"
    values = overrides(job.scale, job.run, job.rate)
    places = {"model.name_or_path": str(job.base), "run.dir": str(run_dir)}
    argv = arguments(preset_of(job.run), {**values, **places})
    log = job.directory / "log.txt"
    with log.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            if job.run.setting in EVALUATED:
                _evaluate_base(argv)
            else:
                train.main(argv)
        except SystemExit as stop:
            raise RuntimeError(
                f"{job.run.run_id}: training ended early with status {stop.code}; see {log}"
            ) from stop
    # No longer needed, and hundreds of runs would keep many. The base's evaluation has none.
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    has_rollouts = job.run.rate is None and job.run.setting not in EVALUATED
    return {
        "id": job.run.run_id,
        "size": job.run.size,
        "setting": job.run.setting,
        "seed": job.run.seed,
        "learning_rate": job.rate,
        **job.settings,
        "num_samples": int(values["eval.num_samples"]),
        "evaluations": _evaluations(run_dir),
        "mechanisms": read_mechanisms(run_dir) if has_rollouts else None,
        # Processor time of this process, which has one thread: the time of a run on a core of its
        # own, whatever else the machine does. The answer checker's process takes little.
        "seconds": round(time.process_time() - started, 1),
        "commit": made_at,
        "versions": versions(),
        "device": device_name(),
    }


def _evaluate_base(argv: list[str]) -> None:
    """Evaluates the base on the problems and random numbers of the runs with the same seed."""
    command = load_config(argv)
    with StopRequest() as stop:
        run = build_run(command, init_world(pick_device(command.config.train.device)))
        evaluate_at(run, 0, Progress(Terminal()), stop)
        run.sampler.close()


def _evaluations(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for step, evaluations in read_evaluations(run_dir).items():
        (evaluation,) = evaluations.values()
        correct = correct_matrix(evaluation.samples)
        found.append(
            {
                "step": step,
                "avg_at_k": float(correct.mean()),
                "correct": encode_counts(correct),
                "style": style_counts(sample.text for sample in evaluation.samples),
                "seconds": round(evaluation.seconds, 1),
            }
        )
    return found


def versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


@cache
def code_version() -> str:
    """Returns the commit of the code when this process started, even if it has changed since."""
    return commit(but=NOT_CODE)


def device_name() -> str:
    """Returns the GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
