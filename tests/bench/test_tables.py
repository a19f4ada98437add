"""Tables and figures depend on results only; the documents hold those of the committed ones."""

from pathlib import Path
from typing import Any

import pytest

from bench import plots
from bench.kernels.tables import kernel_group_table, kernels_table
from bench.tables import fill, markdown, markers

ENVIRONMENT = {
    "command": "python -m bench.kernels",
    "commit": "0123456789abcdef",
    "device": "a device",
    "num_threads": 2,
    "versions": {"python": "3.11", "torch": "2.13.0"},
}


def shape(num_tokens: int) -> dict[str, Any]:
    return {
        "model": "8b",
        "num_tokens": num_tokens,
        "rollout_tokens": 2048,
        "hidden": 4096,
        "vocab_size": 151936,
    }


def row(variant: str, kind: str, **values: Any) -> dict[str, Any]:
    fixed = {"variant": variant, "kind": kind, "lacks": [], "status": "measured", "products": 3}
    return {**fixed, **values}


def group(num_tokens: int) -> dict[str, Any]:
    ours = row("paint_loss", "ours", median_ms=190.0, ratio_to_floor=1.19, gemm_equivalents=3.56)
    ours |= {"extra_bytes": 3_500_000_000, "row_kernel_bytes_per_s": 2.9e12}
    ours |= {"gradient_error": 1.7e-3, "gradient_error_before_rounding": 4e-4}
    wrong = row("wrong", "plain", lacks=["speed", "memory"], gradient_error=0.2)
    wrong |= {"status": "failed accuracy", "reason": "failed accuracy: 2.0e-01"}
    absent = row("absent", "peer", status="cannot run", reason="not installed", products=5)
    floor = row("gemms", "floor", median_ms=160.0, ratio_to_floor=1.0, gemm_equivalents=3.0)
    return {
        "group": "PAINT",
        "shape": shape(num_tokens),
        "dtype": "bfloat16",
        "mean_kl": 0.002,
        "rows": [floor, ours, wrong, absent],
        "fastest_peer": {"variant": "a peer", "ratio": 2.5},
    }


KERNELS = {"name": "kernels", **ENVIRONMENT, "groups": [group(32768), group(131072)]}


def scaling() -> dict[str, Any]:
    points = [
        {
            "num_tokens": n,
            "rollout_tokens": 2048,
            "median_ms": n / 100,
            "extra_bytes": 10**8 + n * 1000,
            "kept_bytes": n * 1000,
            "working_bytes": 10**8,
        }
        for n in (4096, 8192)
    ]
    layout = {"layout": "rollouts of 2048", "points": points}
    layout |= {"time_exponent": 1.0, "memory_ratio": 1.0}
    sizes = {"hidden": 64, "vocab_size": 4096, "dtype": "float32"}
    return {"name": "scaling", **ENVIRONMENT, **sizes, "layouts": [layout]}


def test_a_group_says_what_was_measured_and_what_was_not() -> None:
    lines = kernel_group_table(group(32768)).splitlines()
    assert lines[3] == (
        "| `paint_loss` | 3 | 190 | 1.19 | 3.56 | 2.90 | 3,500 | 4.0e-04, rounded 1.7e-03 |  |"
    )
    assert lines[4] == "| wrong | 3 | failed accuracy: 2.0e-01 |  |  |  |  |  | speed, memory |"
    assert lines[5] == "| absent | 5 | not installed |  |  |  |  |  |  |"
    assert "a peer, takes 2.50 times as long" in lines[-1]


def test_the_headline_is_the_shape_of_32768_tokens() -> None:
    table = kernels_table(KERNELS)
    assert "N 32,768" in table and "N 131,072" not in table
    assert table.endswith("at 0123456789; by `python -m bench.kernels`.")


def test_a_document_is_filled_between_its_markers() -> None:
    document = (
        "a\n<!-- begin k:shapes -->\nold\n<!-- end k:shapes -->\nb <!-- begin s --><!-- end s -->"
    )
    results = {"k": KERNELS, "s": scaling()}
    filled = fill(document, results.__getitem__, plots.TABLES)
    assert filled.startswith("a\n<!-- begin k:shapes -->\n| H | N |")
    assert "old" not in filled
    assert "| 4,096 | 131,072 | 160 | 190 | 1.19 | 3,500 |" in filled
    assert "| 8,192 | 2,048 | 81.9 | 108 | 8 | 100 |" in filled
    assert fill(filled, results.__getitem__, plots.TABLES) == filled
    assert markers(filled) == ["k:shapes", "s"]


def test_logit_formats_show_median_and_largest() -> None:
    line = {"format": "bf16", "bytes": 4, "errors": [{"median": 0.5, "largest": 0.7}]}
    sizes = {"num_rows": 32, "hidden": 512, "vocab_size": 151936, "num_seeds": 5}
    result = {**ENVIRONMENT, **sizes, "mean_kls": [0.002], "formats": [line]}
    assert "| bf16 | 4 | 5.0e-01 (7.0e-01) |" in plots.TABLES["logit_formats", ""](result)


def test_markdown_aligns_numbers_right_and_words_left() -> None:
    assert markdown(["a", "b", "lacks"], [["x", "1", "y"]]).splitlines()[1] == (
        "| --- | ---: | --- |"
    )


@pytest.mark.parametrize("draw", [plots.draw_kernels, plots.draw_scaling])
def test_equal_results_give_equal_figures(draw: Any, tmp_path: Path) -> None:
    results = {"one": KERNELS if draw is plots.draw_kernels else scaling()}
    images = []
    for name in ("first.png", "second.png"):
        draw(results).savefig(tmp_path / name, metadata={"Software": None})
        images.append((tmp_path / name).read_bytes())
    assert images[0] == images[1]
    assert len(images[0]) > 5000


def test_documents_hold_the_tables_of_the_committed_results() -> None:
    texts = plots.generated()
    for path, text in texts.items():
        assert text == path.read_text(), f"run `python -m bench.plots`: {path}"
    for result in plots.RESULTS.glob("paper-tables*.json"):
        assert result.with_suffix(".md") in texts
    assert "tiny" in markers((plots.ROOT / "README.md").read_text())
