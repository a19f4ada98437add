"""The paper's four tables in small: `python -m bench.paper_tables [--quick] [--scale laptop|gpu]`.

Every recipe, mask ratio, placement and interpolation of the paper on the laptop domain: equal base,
steps and rollouts, learning rates from one sweep on validation problems, several seeds. Runs are
kept in --runs and a killed command goes on with those that are missing. --list shows them. `--rerun
ID` makes one row or run of the committed result from scratch, and exits with 1 where its accuracies
differ.
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
    SCALES,
    TABLES,
    Scale,
    needed_sizes,
    quick,
    sweep_runs,
    table_runs,
)
from bench.paper.result import build_result, rerun
from bench.paper.runs import describe_bases, make_bases, make_pool, run_tables, visible_gpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NUMBERS = tuple(table.number for table in TABLES)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size, two seeds, ten minutes")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="laptop",
        help="laptop: bases of 0.9 to 1.9 million parameters, an hour and a half on two cores; "
        "gpu: of 10 to 100 million",
    )
    parser.add_argument(
        "--tables",
        type=int,
        nargs="+",
        choices=NUMBERS,
        default=NUMBERS,
        help="1: recipes; 2: mask ratios; 3: placements; 4: interpolation (default: all)",
    )
    parser.add_argument("--workers", type=int, help="default: 2, or the number of GPUs")
    parser.add_argument("--runs", type=Path, help="default: runs/paper-tables-SCALE")
    parser.add_argument(
        "--bases",
        type=Path,
        default=Path("runs/bases"),
        help="where the larger bases are, or are pretrained first (default: runs/bases)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON; Markdown and a figure go beside it (default: paper-tables.json in "
        "bench/results, or paper-tables-1-2.json where --tables is 1 2)",
    )
    parser.add_argument("--rerun", metavar="ID", help="such as small/paint or small/paint/seed-0")
    parser.add_argument("--list", action="store_true", help="the runs by id, and nothing else")
    return parser


def list_runs(scale: Scale, numbers: Sequence[int]) -> list[str]:
    return [run.run_id for run in (*sweep_runs(scale, numbers), *table_runs(scale, numbers))]


def default_workers(scale: Scale) -> int:
    if not scale.name.startswith("gpu"):
        return 2
    num_gpus = len(visible_gpus())
    if num_gpus == 0:
        raise ValueError(
            "--scale gpu: no GPU here; needs one or more, a worker each; use --scale laptop, or "
            "--list to see the runs"
        )
    return num_gpus


def output_path(arguments: argparse.Namespace, scale: Scale) -> Path:
    """The result file: of the tables that are made, or of those that a rerun is compared with."""
    parts = ["paper-tables", *([] if scale.name == "laptop" else [scale.name])]
    numbers = sorted(set(arguments.tables))
    # A part of the tables does not take the place of all; a rerun is compared with all.
    is_part = numbers != list(NUMBERS) and not arguments.rerun
    parts += map(str, numbers) if is_part else []
    return arguments.output or RESULTS / f"{'-'.join(parts)}.json"


def make_tables(arguments: argparse.Namespace, scale: Scale, num_workers: int) -> Path:
    """Everything that is missing, then the result file."""
    numbers = tuple(sorted(set(arguments.tables)))
    directory = arguments.runs or Path("runs") / f"paper-tables-{scale.name}"
    output = output_path(arguments, scale)
    sizes = needed_sizes(scale, numbers)
    make_bases(sizes, arguments.bases)
    with make_pool(num_workers, on_gpus=arguments.scale == "gpu") as pool:
        records, choices, swept = run_tables(scale, numbers, arguments.bases, directory, pool)
    bases = describe_bases(sizes, arguments.bases)
    result = build_result(scale, numbers, bases, records, choices, swept, num_workers)
    if len(result["commits"]) > 1:
        print(
            f"note: the runs are of {len(result['commits'])} commits; where code or presets "
            "changed between them, make them again with another --runs"
        )
    write(result, output)
    return output


def write(result: dict[str, Any], output: Path) -> None:
    """The result file, and the same as a page and a figure beside it."""
    # PyTorch comes with it, which the workers are to import with their own settings.
    from bench.paper.figures import save

    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(dump(result))
    figure = output.with_suffix(".png")
    output.with_suffix(".md").write_text(document(result, figure.name))
    save(result, figure)


def dump(result: dict[str, Any]) -> str:
    """JSON with a line a run, so that a changed run is a changed line."""
    head = {name: value for name, value in result.items() if name != "runs"}
    runs = ",\n".join(json.dumps(run) for run in result["runs"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def rerun_from(arguments: argparse.Namespace, scale: Scale, num_workers: int) -> int:
    """The exit status: 1 where a run's answers are not those of the result.

    Raises ValueError where there is no result of this scale.
    """
    output = output_path(arguments, scale)
    if not output.exists():
        raise ValueError(f"--rerun: {output} is not there; needs a result; make the tables first")
    result = json.loads(output.read_text())
    if result["scale"]["name"] != scale.name:
        raise ValueError(
            f"--rerun: {output} is of the scale {result['scale']['name']}, not {scale.name}; "
            "needs the --scale and --quick that it was made with"
        )
    with (
        tempfile.TemporaryDirectory() as directory,
        make_pool(num_workers, on_gpus=arguments.scale == "gpu") as pool,
    ):
        lines = rerun(result, arguments.rerun, arguments.bases, Path(directory), pool)
    print("\n".join(lines))
    return int(any(line.endswith("DIFFERS") for line in lines))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
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
