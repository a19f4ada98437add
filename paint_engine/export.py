"""Merges a run's adapter into its base: `python -m paint_engine.export RUN_DIR OUTPUT_DIR`.

The result is a Hugging Face checkpoint that needs neither peft nor this package. Each weight is
W + scaling * B A in float32, rounded once at the end: in bfloat16 the sum itself loses an update as
small as a run at 5e-6 makes.

Memory: the base in the dtype that it is stored in, or in the exported one where that is wider, and
one weight in float32; merging goes matrix by matrix.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from paint_engine.checkpoint.choose import choose_checkpoint, find_base
from paint_engine.checkpoint.merge import _DTYPES, export
from paint_engine.config.command_line import user_errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paint_engine.export",
        description="Merges a run's adapter into its base, as a Hugging Face checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN_DIR", type=Path)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="new or empty")
    parser.add_argument("--model", metavar="BASE", help="the base, if it is not where it was")
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="auto", help="auto (default): the base's own"
    )
    parser.add_argument(
        "--checkpoint", metavar="last|best|step-N", help="of a run directory (default: last)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends with one message and exit code 2."""
    console = Console(highlight=False, markup=False)
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    arguments = _parser().parse_args(argv)
    with user_errors(console):
        checkpoint = choose_checkpoint(arguments.source, arguments.checkpoint)
        section = find_base(checkpoint, arguments.model)
        export(checkpoint, arguments.output_dir, section, _DTYPES[arguments.dtype])
    console.print(f"{checkpoint} is exported to {arguments.output_dir}", soft_wrap=True)


if __name__ == "__main__":
    main()
