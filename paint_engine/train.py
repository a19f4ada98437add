"""Trains a model with PAINT or one of its baselines:
`python -m paint_engine.train [--preset NAME] [--section.key value ...]`."""

import os
import sys
from collections.abc import Sequence

from paint_engine import as_command


@as_command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, builds the run and trains.

    A user's mistake ends the program with one message and exit code 2. PyTorch and the libraries
    on it take seconds to import, so this comes after parsing: help, the printed configuration and
    the refusal of a key or value do not wait for it.
    """
    from paint_engine.config import load_config, to_toml, user_errors
    from paint_engine.files.terminal import Terminal

    rank = int(os.environ.get("RANK", "0"))
    console = Terminal(quiet=rank > 0)
    with user_errors(console, rank):
        command = load_config(sys.argv[1:] if argv is None else argv)
    if command.print_config:
        console.print(to_toml(command.config), soft_wrap=True, end="")
        return

    from paint_engine.prompts.renderer import start_renderer

    # Its imports run beside those below.
    start_renderer()

    from paint_engine.distributed import barrier, init_world
    from paint_engine.model import pick_device
    from paint_engine.model.load import quiet_libraries
    from paint_engine.training import StopRequest, build_run, plan_run, run_training

    quiet_libraries()
    if command.dry_run:
        with user_errors(console, rank):
            plan_run(command, console.say)
        return
    # From here on, so that a scheduler's signal while the model is loaded is not lost.
    with StopRequest() as stop:
        with user_errors(console, rank):
            run = build_run(command, init_world(pick_device(command.config.train.device)))
        console.say(f"run directory: {run.run_dir}")
        stop.begin()
        run_training(run, console, stop)
    # The main rank writes to the end. A rank that left earlier would end the process group.
    barrier()


if __name__ == "__main__":
    main()
