"""Makes the paper's four tables at laptop scale, and one of other teachers and signals.

    python -m bench.paper_tables --quick    # ten minutes on two cores
    python -m bench.paper_tables --tables 5
    python -m bench.paper_tables --rerun small/paint/seed-0

Every recipe, mask ratio, placement and interpolation of the paper runs on the laptop problems, with
equal bases, steps and rollouts, learning rates from one sweep on validation problems, and several
seeds. Finished runs are kept in --runs, and a command that was killed resumes with the missing
ones. --rerun repeats one row or run of the committed result from scratch and exits with 1 if its
accuracies differ. --list prints the runs' ids.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.markdown import document
from bench.paper.plan import (
    PAPER,
    SCALES,
    TABLES,
    Scale,
    needed_bases,
    quick,
    sweep_runs,
    table_runs,
)
from bench.paper.result import build_result, rerun
from bench.paper.runs import describe_bases, make_bases, make_pool, run_tables, visible_gpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NUMBERS = tuple(table.number for table in TABLES)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper_tables", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one base, two seeds, half the steps: ten minutes on two cores",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="laptop",
        help="laptop: bases of 0.9 to 1.9 million parameters, 90 minutes on two cores; "
        "gpu: bases of 10 to 100 million parameters",
    )
    parser.add_argument(
        "--tables",
        type=int,
        nargs="+",
        choices=NUMBERS,
        default=PAPER,
        help="1: recipes; 2: mask ratios; 3: placements; 4: interpolation; 5: other teachers, "
        "contexts and signals, not in the paper (default: 1 2 3 4)",
    )
    parser.add_argument("--workers", type=int, help="default: 2, or the number of GPUs")
    parser.add_argument("--runs", type=Path, help="default: runs/paper-tables-SCALE")
    parser.add_argument(
        "--bases",
        type=Path,
        default=Path("runs/bases"),
        help="directory of the larger bases; missing ones are pretrained (default: runs/bases)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; Markdown and a figure are written beside it (default: paper-tables.json "
        "in bench/results, or paper-tables-1-2.json for --tables 1 2)",
    )
    parser.add_argument(
        "--rerun", metavar="ID", help="repeat a row or run, such as small/paint/seed-0"
    )
    parser.add_argument("--list", action="store_true", help="print the runs' ids and exit")
    return parser


def list_runs(scale: Scale, numbers: Sequence[int]) -> list[str]:
    return [run.run_id for run in (*sweep_runs(scale, numbers), *table_runs(scale, numbers))]


def default_workers(scale: Scale) -> int:
    if not scale.name.startswith("gpu"):
        return 2
    num_gpus = len(visible_gpus())
    if num_gpus == 0:
        raise ValueError(
            "--scale gpu: found no GPU; needs one or more, with a worker each; use --scale "
            "laptop, or --list to see the runs"
        )
    return num_gpus


def output_path(arguments: argparse.Namespace, scale: Scale) -> Path:
    """Returns the result file to write, or the one that a rerun is compared with."""
    parts = ["paper-tables", *([] if scale.name == "laptop" else [scale.name])]
    numbers = sorted(set(arguments.tables))
    # Some of the paper's tables do not replace the file of all, which a rerun is compared with.
    is_part = numbers != list(PAPER) and not (arguments.rerun and set(numbers) <= set(PAPER))
    parts += map(str, numbers) if is_part else []
    return arguments.output or RESULTS / f"{'-'.join(parts)}.json"


def make_tables(arguments: argparse.Namespace, scale: Scale, num_workers: int) -> Path:
    """Makes the missing bases and runs and writes the result file; returns its path."""
    numbers = tuple(sorted(set(arguments.tables)))
    directory = arguments.runs or Path("runs") / f"paper-tables-{scale.name}"
    output = output_path(arguments, scale)
    names = needed_bases(scale, numbers)
    make_bases(names, arguments.bases)
    with make_pool(num_workers, on_gpus=arguments.scale == "gpu") as pool:
        records, choices, swept = run_tables(scale, numbers, arguments.bases, directory, pool)
    bases = describe_bases(names, arguments.bases)
    result = build_result(scale, numbers, bases, records, choices, swept, num_workers)
    if len(result["commits"]) > 1:
        print(
            f"note: the runs come from {len(result['commits'])} commits; if code or presets "
            "changed between them, repeat all runs with another --runs"
        )
    write(result, output)
    return output


def write(result: dict[str, Any], output: Path) -> None:
    """Writes the result file, and beside it the same as a Markdown page and a figure."""
    # Imported late, because it imports PyTorch, which workers import after their own settings.
    from bench.paper.figures import save

    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(dump(result))
    figure = output.with_suffix(".png")
    output.with_suffix(".md").write_text(document(result, figure.name))
    save(result, figure)


def dump(result: dict[str, Any]) -> str:
    """Returns JSON with one line per run, so that a changed run is a changed line."""
    head = {name: value for name, value in result.items() if name != "runs"}
    runs = ",\n".join(json.dumps(run) for run in result["runs"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def rerun_from(arguments: argparse.Namespace, scale: Scale, num_workers: int) -> int:
    """Returns the exit status: 1 if a run's answers differ from those in the result.

    Raises ValueError if there is no result of this scale.
    """
    output = output_path(arguments, scale)
    if not output.exists():
        raise ValueError(f"--rerun: {output} does not exist; needs a result; make the tables first")
    result = json.loads(output.read_text())
    if result["scale"]["name"] != scale.name:
        raise ValueError(
            f"--rerun: {output} has scale {result['scale']['name']}, not {scale.name}; pass the "
            "--scale and --quick that it was made with"
        )
    with (
        tempfile.TemporaryDirectory() as directory,
        make_pool(num_workers, on_gpus=arguments.scale == "gpu") as pool,
    ):
        lines = rerun(result, arguments.rerun, arguments.bases, Path(directory), pool)
    print("\n".join(lines))
    return int(any(line.endswith("DIFFERS") for line in lines))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    scale = quick(SCALES[arguments.scale]) if arguments.quick else SCALES[arguments.scale]
    if arguments.list:
        print("\n".join(list_runs(scale, arguments.tables)))
        return
    try:
        default = default_workers(scale)
        num_workers = arguments.workers or default
        if arguments.rerun:
            sys.exit(rerun_from(arguments, scale, num_workers))
        print(f"wrote {make_tables(arguments, scale, num_workers)}")
    except (ValueError, RuntimeError) as failure:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
