"""Makes the paper's tables at laptop scale, and further ones of teachers and of the clip.

    python -m bench.paper_tables --quick          # fifteen minutes on two cores
    python -m bench.paper_tables --minutes 120    # resumes; again until no run is left
    python -m bench.paper_tables --rerun small/paint/seed-0

Every recipe, mask ratio, placement and interpolation of the paper runs on the laptop problems, with
equal bases, steps and rollouts, learning rates from one sweep on validation problems, and several
seeds. Finished runs are kept in --ledger, and the command resumes with the missing ones. --rerun
repeats one row or run of the ledger from scratch and exits with 1 if its accuracies differ. --list
prints the runs' ids.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.ledger import Ledger
from bench.paper.markdown import document, mechanisms_figure
from bench.paper.plan import (
    NOT_CODE,
    NUMBERS,
    PLANNED,
    SCALES,
    Scale,
    needed_bases,
    quick,
    sweep_runs,
    table_runs,
)
from bench.paper.result import build_result, rerun
from bench.paper.runs import Crew, describe_bases, make_bases, make_pool, run_tables, visible_gpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
# Models of a few million parameters leave most of a GPU idle.
WORKERS_PER_GPU = 4


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper_tables", description=(__doc__ or "").split("\n")[0]
    )
    add_choices(parser)
    add_places(parser)
    parser.add_argument(
        "--rerun", metavar="ID", help="repeat a row or run, such as small/paint/seed-0"
    )
    parser.add_argument("--list", action="store_true", help="print the runs' ids and exit")
    return parser


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Adds what is run, by how many and for how long."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one base, two seeds, a quarter of the steps: fifteen minutes on two cores",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="laptop",
        help="laptop: the bundled base, six hours on two cores; gpu: bases of 10 and 30 million "
        "parameters",
    )
    parser.add_argument(
        "--tables",
        type=int,
        nargs="+",
        choices=NUMBERS,
        default=PLANNED,
        help="1: recipes; 2: mask ratios; 3: placements; 4: interpolation; 5: other teachers, "
        "contexts and signals, not in the paper; 6: the clip, exploratory (default: 1 to 5)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="no run starts after so many minutes; the command resumes (default: no limit)",
    )
    parser.add_argument(
        "--workers", type=int, help=f"default: 2, or {WORKERS_PER_GPU} for each GPU"
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="run with uncommitted changes of the code: for tries, not for results",
    )


def add_places(parser: argparse.ArgumentParser) -> None:
    """Adds the files and folders."""
    parser.add_argument(
        "--ledger",
        type=Path,
        help="JSON Lines file of the finished runs (default: paper-runs.jsonl in bench/results, or "
        "paper-runs-SCALE.jsonl)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="directory of logs and run directories (default: runs/paper-tables-SCALE)",
    )
    parser.add_argument(
        "--bases",
        type=Path,
        default=Path("runs/bases"),
        help="directory of the larger bases; missing ones are pretrained (default: runs/bases)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; Markdown and figures are written beside it (default: paper-tables.json "
        "in bench/results, or paper-tables-1-2.json for --tables 1 2)",
    )


def list_runs(scale: Scale, numbers: Sequence[int]) -> list[str]:
    return [run.run_id for run in (*sweep_runs(scale, numbers), *table_runs(scale, numbers))]


def default_workers(scale: Scale) -> int:
    if not scale.name.startswith("gpu"):
        return 2
    num_gpus = len(visible_gpus())
    if num_gpus == 0:
        raise ValueError(
            "--scale gpu: found no GPU; needs one or more; use --scale "
            "laptop, or --list to see the runs"
        )
    return WORKERS_PER_GPU * num_gpus


def output_path(arguments: argparse.Namespace, scale: Scale) -> Path:
    """Returns the result file to write."""
    parts = ["paper-tables", *([] if scale.name == "laptop" else [scale.name])]
    numbers = sorted(set(arguments.tables))
    # Other tables do not replace the file of all that are planned.
    parts += map(str, numbers) if numbers != list(PLANNED) else []
    return arguments.output or RESULTS / f"{'-'.join(parts)}.json"


def ledger_path(arguments: argparse.Namespace, scale: Scale) -> Path:
    name = "paper-runs" if scale.name == "laptop" else f"paper-runs-{scale.name}"
    return arguments.ledger or RESULTS / f"{name}.jsonl"


def check_committed() -> None:
    """Raises ValueError for uncommitted changes of what runs depend on: each run records the commit
    that it can be repeated with."""
    # Imported late, as below.
    from bench.measure import changes

    if found := changes(but=NOT_CODE):
        raise ValueError(
            f"the checkout has uncommitted changes outside of {', '.join(NOT_CODE)}:\n{found}\n"
            "needs a commit, which each run records; commit them, or pass --allow-changes for a try"
        )


def make_tables(arguments: argparse.Namespace, scale: Scale, num_workers: int) -> str:
    """Makes the missing bases and runs, and writes the result file if no run is left; returns a
    line on the outcome."""
    started, minutes = time.monotonic(), arguments.minutes
    numbers = tuple(sorted(set(arguments.tables)))
    directory = arguments.runs or Path("runs") / f"paper-tables-{scale.name}"
    ledger = Ledger(ledger_path(arguments, scale))
    names = needed_bases(scale, numbers)
    make_bases(names, arguments.bases)
    with make_pool(num_workers, on_gpus=arguments.scale == "gpu") as pool:
        crew = Crew(pool, num_workers, None if minutes is None else started + 60 * minutes)
        finished = run_tables(scale, numbers, arguments.bases, directory, crew, ledger)
    if isinstance(finished, int):
        return (
            f"{finished} runs are left; {len(ledger.records)} are in {ledger.path}; the same "
            "command resumes with the missing ones"
        )
    bases = describe_bases(names, arguments.bases)
    result = build_result(scale, numbers, bases, finished, num_workers)
    if len(result["commits"]) > 1:
        print(
            f"note: the runs come from {len(result['commits'])} commits; if code or presets "
            "changed between them, repeat all runs with another --ledger"
        )
    output = output_path(arguments, scale)
    write(result, output)
    return f"wrote {output}"


def write(result: dict[str, Any], output: Path) -> None:
    """Writes the result file, and beside it the same as a Markdown page and two figures."""
    # Imported late, because it imports PyTorch, which workers import after their own settings.
    from bench.paper.figures import draw_mechanisms, draw_tables, save

    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(dump(result))
    output.with_suffix(".md").write_text(document(result, output.stem))
    save(draw_tables, result, output.with_suffix(".png"))
    save(draw_mechanisms, result, output.with_name(mechanisms_figure(output.stem)))


def dump(result: dict[str, Any]) -> str:
    """Returns JSON with one line for the mechanisms of each row, which are the last entry."""
    head = {name: value for name, value in result.items() if name != "mechanisms"}
    rows = ",\n".join(json.dumps(row) for row in result["mechanisms"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "mechanisms": [\n{rows}\n ]\n}}\n'


def rerun_from(arguments: argparse.Namespace, scale: Scale, num_workers: int) -> int:
    """Returns the exit status: 1 if a run's answers differ from those in the ledger.

    Raises ValueError if there is no ledger.
    """
    path = ledger_path(arguments, scale)
    if not path.exists():
        raise ValueError(
            f"--rerun: {path} does not exist; needs the ledger of the runs; pass the --scale and "
            "--quick that it was made with, or --ledger"
        )
    with (
        tempfile.TemporaryDirectory() as directory,
        make_pool(num_workers, on_gpus=arguments.scale == "gpu") as pool,
    ):
        bases = arguments.bases
        lines = rerun(Ledger(path), scale, arguments.rerun, bases, Path(directory), pool)
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
        if not arguments.allow_changes:
            check_committed()
        print(make_tables(arguments, scale, num_workers))
    except (ValueError, RuntimeError) as failure:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
