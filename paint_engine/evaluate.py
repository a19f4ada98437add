"""Evaluates a model on benchmarks: `python -m paint_engine.evaluate --model M --benchmarks aime24`.

The same command resumes an evaluation that was killed. Under torchrun every rank answers its share.
`python -m paint_engine.evaluate compare RUN_A RUN_B` puts two evaluations side by side, and
`python -m paint_engine.evaluate table1 RUN_DIR` evaluates the checkpoints of runs as the paper's
Table 1 does.
"""

import os
import sys
from collections.abc import Sequence

from paint_engine import as_command


@as_command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, then evaluates or compares.

    A user's mistake ends the program with one message and exit code 2. PyTorch and the libraries
    on it take seconds to import, so this comes after parsing.
    """
    from paint_engine.config import user_errors
    from paint_engine.evaluation.flags import (
        EvaluationCommand,
        parse_command,
        parse_comparison,
        parse_table1,
    )
    from paint_engine.files.terminal import Terminal

    rank = int(os.environ.get("RANK", "0"))
    console = Terminal(quiet=rank > 0)
    given = sys.argv[1:] if argv is None else list(argv)
    with user_errors(console, rank):
        if given[:1] == ["compare"]:
            comparison = parse_comparison(given[1:])

            from paint_engine.evaluation.compare import run_comparison

            run_comparison(comparison, console)
            return
        command = parse_table1(given[1:]) if given[:1] == ["table1"] else parse_command(given)

        from paint_engine.prompts.renderer import start_renderer

        # Its imports run beside those below.
        start_renderer()

        from paint_engine.evaluation.run import run_evaluation
        from paint_engine.evaluation.table1 import run_table1
        from paint_engine.model.load import quiet_libraries

        quiet_libraries()
        if isinstance(command, EvaluationCommand):
            run_evaluation(command, console)
        else:
            run_table1(command, console)


if __name__ == "__main__":
    main()
