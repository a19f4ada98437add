"""Exports a run's trained model: `python -m paint_engine.export RUN_DIR OUTPUT_DIR`.

`--form merged`, the default: a Hugging Face checkpoint that needs neither peft nor this package.
Each weight is W + scaling * B A in float64, rounded once at the end: to float32, which keeps an
update as small as a run at 5e-6 makes, or with `--dtype bfloat16` to bfloat16, which loses much of
it. The command measures and prints what is left. `--form adapter`: the adapter as it is, with the
command that serves it.

Memory of a merge: the base in the dtype that it is stored in, or in the exported one where that is
wider, and the largest weight in float64; merging goes matrix by matrix. Of a run that trained all
weights: both models.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paint_engine import as_command
from paint_engine.keys import with_key

if TYPE_CHECKING:
    from paint_engine.checkpoint.merge import Survival
    from paint_engine.config.sections import ModelSection


def _parser() -> argparse.ArgumentParser:
    from paint_engine.files import argument_path, argument_text

    parser = argparse.ArgumentParser(
        prog="python -m paint_engine.export",
        description="Exports a run's trained model: merged as a Hugging Face checkpoint, or as "
        "its adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN_DIR", type=argument_path)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=argument_path, help="new or empty")
    parser.add_argument(
        "--model",
        metavar="BASE",
        type=argument_text,
        help="the base, if it has moved since it was trained",
    )
    parser.add_argument(
        "--revision", metavar="R", help="of the base on the hub; default: the one it was trained on"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the base that --model names",
    )
    parser.add_argument(
        "--form",
        choices=("merged", "adapter"),
        default="merged",
        help="merged (default): one model, the adapter added to its base; adapter: the adapter "
        "as it is, with the command that serves it",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of a merged model; float32 (default) keeps the update, bfloat16 loses the printed "
        "part of it",
    )
    parser.add_argument(
        "--checkpoint", metavar="last|best|step-N", help="of a run directory (default: last)"
    )
    return parser


@as_command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, finds the checkpoint and its base, and exports.

    A user's mistake ends the program with one message and exit code 2. PyTorch is imported last,
    since that takes seconds.
    """
    arguments = _parser().parse_args(argv)
    from paint_engine.checkpoint import choose_checkpoint, find_base, present
    from paint_engine.config import user_errors
    from paint_engine.files.terminal import Terminal

    console = Terminal()
    with user_errors(console):
        checkpoint = choose_checkpoint(arguments.source, arguments.checkpoint)
        with present(checkpoint):
            section = find_base(
                checkpoint,
                arguments.model,
                arguments.revision,
                trust_remote_code=arguments.trust_remote_code,
            )

            from paint_engine.model.load import quiet_libraries

            quiet_libraries()
            lines = _export(checkpoint, section, arguments)
    console.say(*lines)


def _export(checkpoint: Path, section: "ModelSection", arguments: argparse.Namespace) -> list[str]:
    """Returns the lines to print."""
    if arguments.form == "merged":
        return _export_merged(checkpoint, arguments.output_dir, section, arguments.dtype)
    if arguments.dtype is not None:
        raise ValueError(
            f"--dtype {arguments.dtype}: --form adapter copies the adapter as it was trained; "
            "leave one of the two out"
        )
    return _export_adapter(checkpoint, arguments.output_dir, section)


def _export_merged(
    checkpoint: Path, output_dir: Path, section: "ModelSection", dtype: str | None
) -> list[str]:
    import torch

    from paint_engine.checkpoint.exported import export_merged
    from paint_engine.checkpoint.merge import Survival

    chosen, bfloat16 = Survival(getattr(torch, dtype or "float32")), Survival(torch.bfloat16)
    is_known = export_merged(checkpoint, output_dir, section, [chosen, bfloat16])
    lines = [f"exported {checkpoint} to {output_dir}", _survival_line(chosen)]
    if not is_known:
        lines.append("transformers 4 has no names for this model's rotary embeddings; use 5")
    if chosen.dtype == torch.bfloat16:
        return [*lines, "float32 (the default) and --form adapter keep the update"]
    return [
        *lines,
        f"{_survival_line(bfloat16)} (--dtype bfloat16)",
        "vLLM rounds a float32 model to bfloat16 unless it is served with --dtype float32; "
        "--form adapter exports what it serves unrounded",
    ]


def _survival_line(survival: "Survival") -> str:
    name = str(survival.dtype).removeprefix("torch.")
    if not survival.num_updated:
        return f"{name}: no weight was updated"
    return (
        f"{name}: {survival.share:.1%} of {survival.num_updated:,} updated weights in "
        f"{survival.num_tensors} tensors differ from the base; relative error of the update "
        f"{survival.relative_error:.2g}"
    )


def _export_adapter(checkpoint: Path, output_dir: Path, section: "ModelSection") -> list[str]:
    from paint_engine.checkpoint.adapters.config import largest_rank
    from paint_engine.checkpoint.adapters.fit import tensor_names, vllm_obstacles
    from paint_engine.checkpoint.exported import export_adapter
    from paint_engine.rollout.vllm_core import reserved_rank

    config = export_adapter(checkpoint, output_dir, section)
    base = config["base_model_name_or_path"]
    lines = [f"exported {checkpoint} to {output_dir}, an adapter of {base}"]
    if found := vllm_obstacles(config, tensor_names(output_dir)):
        return [
            *lines,
            f"vLLM does not load it, because of {'; '.join(found)}: use peft, or --form merged",
        ]
    rank = reserved_rank(largest_rank(config))
    served = f"{output_dir.resolve().name}={output_dir}"
    command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
    command += ["--trust-remote-code"] if section.trust_remote_code else []
    # vLLM listens on all interfaces unless it is given one.
    serve = shlex.join([*command, "--host", "127.0.0.1", "--lora-modules", served])
    return [*lines, with_key(serve)]


if __name__ == "__main__":
    main()
