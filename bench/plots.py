"""Fills tables and draws figures from the committed results.

A table between `<!-- begin NAME -->` and `<!-- end NAME -->` in one of DOCUMENTS is generated from
bench/results/NAME.json (see bench/tables.py). The page beside paper-tables*.json is
generated as a whole. docs/kernels.png shows the variants of kernels-*.json, docs/scaling.png the
runs of scaling-*.json. With --check, nothing is written and the exit status is 1 if a table differs
from its result; figures are not compared.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib import rc_context

from bench.cluster.tables import (
    changes_table,
    constants_table,
    cpu_table,
    gpus_table,
    splits_table,
)
from bench.figures import STYLE, draw_scaling
from bench.floor.tables import head_table, lengths_table, parts_table, top_k_table
from bench.hours import hours_table
from bench.kernels.figures import draw_kernels
from bench.kernels.tables import kernel_shapes_table, kernels_first_table, kernels_table
from bench.measure import ROOT
from bench.paper.markdown import PAPER_TABLES, document
from bench.properties import properties_table
from bench.soak.tables import kills_table, starts_table, steps_table
from bench.step.tables import engine_table, estimates_table
from bench.tables import (
    Result,
    Table,
    architectures_table,
    fill,
    logit_formats_table,
    real_logits_predicted_table,
    real_logits_table,
    scaling_table,
    tiny_table,
)

RESULTS = ROOT / "bench" / "results"
TABLES: dict[tuple[str, str], Table] = {
    ("tiny", ""): tiny_table,
    ("properties", ""): properties_table,
    ("architectures", ""): architectures_table,
    ("kernels", ""): kernels_table,
    ("kernels", "first"): kernels_first_table,
    ("kernels", "shapes"): kernel_shapes_table,
    ("scaling", ""): scaling_table,
    ("logit_formats", ""): logit_formats_table,
    ("real_logits", ""): real_logits_table,
    ("real_logits", "predicted"): real_logits_predicted_table,
    ("floor", ""): parts_table,
    ("floor", "lengths"): lengths_table,
    ("floor", "head"): head_table,
    ("floor", "topk"): top_k_table,
    ("engine", ""): engine_table,
    ("step_estimates", ""): estimates_table,
    ("hours", ""): hours_table,
    ("cluster", "splits"): splits_table,
    ("cluster", "gpus"): gpus_table,
    ("cluster", "changes"): changes_table,
    ("cluster", "constants"): constants_table,
    ("cluster_cpu", ""): cpu_table,
    ("soak", "steps"): steps_table,
    ("soak", "kills"): kills_table,
    ("soak", "starts"): starts_table,
    **PAPER_TABLES,
}
"""keyed by the result's name and the view in the marker"""
DOCUMENTS = (
    *(
        "README.md",
        "docs/cluster.md",
        "docs/decisions.md",
        "docs/evidence.md",
        "docs/loss.md",
        "docs/models.md",
        "docs/recipes.md",
        "docs/reproducing.md",
    ),
    "bench/README.md",
)


def result_of(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text())


def results_named(prefix: str) -> dict[str, Result]:
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{prefix}-*.json"))
    }


def draw(directory: Path) -> None:
    """Writes kernels.png and scaling.png to `directory`, if there are results for them."""
    for name, drawn in (("kernels", draw_kernels), ("scaling", draw_scaling)):
        results = results_named(name)
        if results:
            with rc_context(STYLE):
                # Omits matplotlib's version, so that equal results give equal files.
                drawn(results).savefig(directory / f"{name}.png", metadata={"Software": None})


def documents() -> list[Path]:
    return [path for path in (ROOT / name for name in DOCUMENTS) if path.exists()]


def generated() -> dict[Path, str]:
    """Returns what each document and each page of the paper's tables should contain."""
    texts = {path: fill(path.read_text(), result_of, TABLES) for path in documents()}
    for path in RESULTS.glob("paper-tables*.json"):
        texts[path.with_suffix(".md")] = document(json.loads(path.read_text()), path.stem)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plots", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a table is out of date"
    )
    arguments = parser.parse_args()
    texts = generated()
    changed = [path for path, text in texts.items() if text != path.read_text()]
    if arguments.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
        message = f"{names}: tables differ from bench/results; run `python -m bench.plots`"
        sys.exit(message if changed else 0)
    for path in changed:
        path.write_text(texts[path])
    draw(ROOT / "docs")


if __name__ == "__main__":
    main()
