"""Merges a run's adapter into its base: `python -m paint_engine.export RUN_DIR OUTPUT_DIR`.

The result is a Hugging Face checkpoint that needs neither peft nor this package. Each weight is
W + scaling * B A in float32, rounded once at the end: in bfloat16 the sum itself loses an update as
small as a run at 5e-6 makes.

Memory: the base in the dtype that it is stored in, or in the exported one where that is wider, and
one weight in float32; merging goes matrix by matrix.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from paint_engine import require_engine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paint_engine.export",
        description="Merges a run's adapter into its base, as a Hugging Face checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN_DIR", type=Path)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="new or empty")
    parser.add_argument(
        "--model", metavar="BASE", help="the base, if it has moved since it was trained"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto (default): the base's own",
    )
    parser.add_argument(
        "--checkpoint", metavar="last|best|step-N", help="of a run directory (default: last)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, finds the checkpoint and its base, and exports.

    A user's mistake ends the program with one message and exit code 2. PyTorch is imported last,
    since that takes seconds.
    """
    require_engine()
    arguments = _parser().parse_args(argv)
    from rich.console import Console

    from paint_engine.checkpoint import choose_checkpoint, find_base
    from paint_engine.config import user_errors

    console = Console(highlight=False, markup=False)
    with user_errors(console):
        checkpoint = choose_checkpoint(arguments.source, arguments.checkpoint)
        section = find_base(checkpoint, arguments.model)

        import torch

        from paint_engine.checkpoint.merge import export
        from paint_engine.model.load import quiet_libraries

        quiet_libraries()
        dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        export(checkpoint, arguments.output_dir, section, dtype)
    console.print(f"exported {checkpoint} to {arguments.output_dir}", soft_wrap=True)


if __name__ == "__main__":
    main()
