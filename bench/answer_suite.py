"""math-verify's own tests against the answer check: what the two judge differently.

python -m bench.answer_suite MATH_VERIFY [--output differences.json]

MATH_VERIFY is a checkout of github.com/huggingface/Math-Verify. Its tests are (gold, prediction,
expected) rows. math-verify looks for an answer in prose; the answer check takes the content of the
last box. So a prediction without a box has its last formula boxed, or its whole text where it has
none; rows with more words around it than _MAX_PLAIN_CHARS are counted as prose.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment
from paint_engine.files import write_atomic
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.rewards.checker import AnswerChecker

_FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$(.+?)\$|\\\((.+?)\\\)", re.DOTALL)
_MAX_PLAIN_CHARS = 40


def main() -> None:
    """Prints one JSON object: counts, and every row that is judged differently."""
    parser = argparse.ArgumentParser(description="math-verify's own tests against the answer check")
    parser.add_argument("math_verify", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    where = environment(torch.device("cpu"), "python -m bench.answer_suite MATH_VERIFY")
    result = {"environment": where, **compare_suite(options.math_verify)}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if options.output:
        write_atomic(options.output, text + "\n")


def compare_suite(math_verify: Path) -> dict[str, Any]:
    """The rows of all tests below math_verify/tests, judged."""
    counts = {"rows": 0, "prose": 0, "same": 0}
    differences = []
    with AnswerChecker(timeout_s=10.0) as checker:
        for test, gold, prediction, expected in _rows(math_verify):
            counts["rows"] += 1
            answer, boxed = answer_in(gold), answer_in(prediction)
            if answer is None or boxed is None:
                counts["prose"] += 1
                continue
            check = checker.check(answer, f"\\boxed{{{boxed}}}")
            if check.correct == bool(expected):
                counts["same"] += 1
                continue
            row = {"test": test, "gold": answer, "boxed": boxed, "math-verify": bool(expected)}
            differences.append(row | ({"error": check.error} if check.error else {}))
    return {**counts, "differences": differences}


def answer_in(text: str) -> str | None:
    """The answer as the answer check would get it; None where the text is prose."""
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed
    formulas = [next(filter(None, groups)) for groups in _FORMULA.findall(text)]
    if len(_FORMULA.sub("", text)) > _MAX_PLAIN_CHARS:
        return None
    return formulas[-1].strip() if formulas else text.strip()


def _rows(math_verify: Path) -> Iterator[tuple[str, str, str, Any]]:
    sys.path.insert(0, str(math_verify))
    for file in sorted((math_verify / "tests").glob("test_*.py")):
        module = importlib.import_module(f"tests.{file.stem}")
        for name, function in sorted(vars(module).items()):
            for mark in getattr(function, "pytestmark", []):
                names = mark.args[0] if mark.name == "parametrize" else ""
                names = names.replace(" ", "").split(",") if isinstance(names, str) else names
                if {"gold", "pred"} <= set(names):
                    for values in mark.args[1]:
                        row = dict(zip(names, values, strict=True))
                        expected = row.get("expected", row.get("result"))
                        yield f"{file.stem}::{name}", row["gold"], row["pred"], expected


if __name__ == "__main__":
    main()
