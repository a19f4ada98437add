"""Trains a model with PAINT or one of its baselines:
`python -m paint_engine.train [--preset NAME] [--section.key value ...]`."""

import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from transformers.utils import logging as transformers_logging

from paint_engine.config.command_line import load_config, user_errors
from paint_engine.config.toml import to_toml
from paint_engine.distributed import barrier, close_world, init_world
from paint_engine.model.load import pick_device
from paint_engine.training.build import build_run, plan_run
from paint_engine.training.interrupt import StopRequest
from paint_engine.training.loop import run_training


def main(argv: Sequence[str] | None = None) -> None:
    """Build in order, then the loop. A mistake of the user's ends with one message and exit code
    2."""
    rank = int(os.environ.get("RANK", "0"))
    console = Console(highlight=False, markup=False, quiet=rank > 0)
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    with user_errors(console, rank):
        command = load_config(sys.argv[1:] if argv is None else argv)
        if command.print_config:
            console.print(to_toml(command.config), soft_wrap=True, end="")
            return
        if command.dry_run:
            plan_run(command, partial(console.print, soft_wrap=True))
            return
    # From here on, so that a scheduler's signal while the model is loaded is not lost.
    with StopRequest() as stop:
        with user_errors(console, rank):
            run = build_run(command, init_world(pick_device(command.config.train.device)))
        console.print(f"run directory: {run.run_dir}", soft_wrap=True)
        stop.begin()
        run_training(run, console, stop)
    # The others wait for what the main rank still writes: none leaves the group under another.
    barrier()


if __name__ == "__main__":
    try:
        main()
    finally:
        close_world()
