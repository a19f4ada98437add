"""Rebuilds a run's report: `python -m paint_engine.report RUN_DIR`."""

import argparse
from collections.abc import Sequence

from paint_engine import as_command


@as_command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. A user's mistake prints one message and exits with code 2."""
    from paint_engine.files import argument_path

    parser = argparse.ArgumentParser(
        prog="python -m paint_engine.report", description="Rebuild a run's report.html."
    )
    parser.add_argument("run_dir", type=argument_path, help="the directory that training printed")
    parser.add_argument(
        "--recipe", metavar="MODULE:CLASS", help="your own recipe of the run; its code is run"
    )
    arguments = parser.parse_args(argv)
    if not arguments.run_dir.is_dir():
        parser.error(f"{arguments.run_dir} is not a directory; needs a run directory")

    from paint_engine.config.command_line import user_errors
    from paint_engine.files.terminal import Terminal
    from paint_engine.report.page import write_report

    console = Terminal()
    with user_errors(console):
        console.say(str(write_report(arguments.run_dir, trusted=arguments.recipe)))


if __name__ == "__main__":
    main()
