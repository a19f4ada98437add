"""Measures the properties of a tiny base that PAINT's argument rests on.

    python -m paint_engine.tiny.properties [--model DIR] [--split validation]

The base answers held-out problems at the paper's sampling: alone, with the reference whole or its
end hidden, with another problem's reference, and alone with its checks forbidden. The last line of
the output is JSON; accuracies are shares, and differences have 95% intervals over problems.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config import user_errors
from paint_engine.config.bundled import BUNDLED
from paint_engine.config.sections import EvalSection, ModelSection, PromptsSection
from paint_engine.contexts.other import draw_other
from paint_engine.evaluation.accuracy import Estimate, bootstrap, correct_matrix
from paint_engine.evaluation.answers import all_requests, evaluate
from paint_engine.evaluation.store import EvalSample
from paint_engine.files import write_json
from paint_engine.files.terminal import Terminal
from paint_engine.model import load_base, load_tokenizer
from paint_engine.model.load import quiet_libraries
from paint_engine.prompts.chat import encode_student_prompts, encode_teacher_prompt
from paint_engine.prompts.masking import OMISSION_MARKER, mask_solution
from paint_engine.rewards.math import MathReward
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import sampling_params
from paint_engine.tiny.problems import load_split, way_of
from paint_engine.tiny.writer import CHECK

HIDDEN = {"whole": 0.0, "hidden_25": 0.25, "hidden_35": 0.35, "hidden_50": 0.5, "hidden_75": 0.75}
SEED = 0


@dataclass(frozen=True)
class Answers:
    """The answers of one condition.

    correct, together, apart, checked: (P, k) booleans: right; by which way; with a check.
    num_tokens: (P, k) lengths, with the token that ends an answer.
    """

    correct: np.ndarray
    together: np.ndarray
    apart: np.ndarray
    checked: np.ndarray
    num_tokens: np.ndarray


class Examination:
    """A base with its tokenizer, and the held-out problems that it answers."""

    def __init__(self, model: str, split: str, num_problems: int, num_samples: int) -> None:
        section = ModelSection(name_or_path=model, dtype="float32")
        self.model: PreTrainedModel = load_base(section, torch.device("cpu"))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(section)
        self.problems = load_split(split, num_problems)
        # The paper's sampling, with room for the longest solutions.
        self.section = EvalSection(
            num_samples=num_samples, temperature=1.0, top_p=0.95, max_new_tokens=256
        )
        self.prompts = PromptsSection(teacher_thinking=False)

    def answer(self, prompts: Sequence[tuple[int, ...]]) -> Answers:
        """Samples and judges answers to all problems, one prompt for each."""
        samples = evaluate(
            BuiltinEngine(self.model, self._model_in_use, self.section.max_sequences),
            self.tokenizer,
            self.problems,
            prompts,
            all_requests(self.problems, self.section.num_samples),
            sampling_params(self.section, self.model, self.tokenizer),
            MathReward(5.0),
            seed=SEED,
            base=False,
            on_samples=lambda group: None,
        )
        return _answers(samples, self.section.num_samples)

    def _model_in_use(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)

    def alone(self) -> Answers:
        return self.answer(
            encode_student_prompts(self.tokenizer, self.problems, self.prompts, thinking=False)
        )

    def without_checks(self) -> Answers:
        """Answers alone, with the word that begins a check forbidden."""
        first = self.tokenizer.encode(CHECK)[:1]

        def forbid(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return logits.index_fill(-1, torch.tensor(first), float("-inf"))

        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        handle = head.register_forward_hook(forbid)
        try:
            return self.alone()
        finally:
            handle.remove()

    def shown(self, hidden: float) -> Answers:
        """Answers with the reference in the prompt, this share of its end hidden."""
        return self._with([p.solution for p in self.problems], hidden)

    def other(self) -> Answers:
        """Answers with the whole reference of another problem in the prompt."""
        rng = random.Random(SEED)
        return self._with([draw_other(p, self.problems, rng).solution for p in self.problems], 0.0)

    def _with(self, references: Sequence[str], hidden: float) -> Answers:
        prompts = []
        for problem, reference in zip(self.problems, references, strict=True):
            shown = mask_solution(reference, hidden, marker=OMISSION_MARKER)
            ids, _ = encode_teacher_prompt(
                self.tokenizer,
                problem,
                shown,
                self.prompts,
                text=reference,
                marker=OMISSION_MARKER,
            )
            prompts.append(ids)
        return self.answer(prompts)

    def reference_tokens(self) -> np.ndarray:
        """Returns (P,) lengths of the references, with the token that would end them."""
        return np.array([len(self.tokenizer.encode(p.solution)) + 1 for p in self.problems])


def _answers(samples: Sequence[EvalSample], num_samples: int) -> Answers:
    def matrix(values: list[bool] | list[int]) -> np.ndarray:
        return np.array(values).reshape(-1, num_samples)

    ways = [way_of(sample.text) for sample in samples]
    return Answers(
        correct=correct_matrix(samples),
        together=matrix([way == "together" for way in ways]),
        apart=matrix([way == "apart" for way in ways]),
        checked=matrix([CHECK in s.text for s in samples]),
        num_tokens=matrix([s.num_tokens for s in samples]),
    )


def _mean(values: np.ndarray) -> Estimate:
    return bootstrap([values.mean(axis=1)])


def _rise(before: np.ndarray, after: np.ndarray) -> Estimate:
    return bootstrap([after.mean(axis=1) - before.mean(axis=1)])


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Returns the ratio of two (P,) means. Its interval is that of its linear terms (delta
    method)."""
    mean = denominators.mean()
    ratio = numerators.mean() / mean
    return bootstrap([ratio + (numerators - ratio * denominators) / mean])


def conditions(examination: Examination) -> dict[str, Answers]:
    """Returns the answers of each condition."""
    found = {"alone": examination.alone()}
    found |= {name: examination.shown(hidden) for name, hidden in HIDDEN.items()}
    return found | {"other": examination.other(), "without_checks": examination.without_checks()}


def record(
    found: Mapping[str, Answers], reference_tokens: np.ndarray
) -> dict[str, float | list[float]]:
    """Returns every share and difference by name, with its 95% interval as NAME_ci95."""
    alone = found["alone"]
    estimates = {name: _mean(answers.correct) for name, answers in found.items()}
    for name in ("whole", "hidden_35", "hidden_75", "other"):
        estimates[f"{name}_minus_alone"] = _rise(alone.correct, found[name].correct)
    doses = ("whole", "hidden_25", "hidden_50", "hidden_75")
    for before, after in pairwise(doses):
        estimates[f"{before}_minus_{after}"] = _rise(found[after].correct, found[before].correct)
    for name, answers in found.items():
        estimates[f"{name}_together"] = _mean(answers.together)
        estimates[f"{name}_apart"] = _mean(answers.apart)
        estimates[f"{name}_checked"] = _mean(answers.checked)
    estimates["whole_minus_hidden_50_together"] = _rise(
        found["hidden_50"].together, found["whole"].together
    )
    estimates["alone_minus_without_checks"] = _rise(found["without_checks"].correct, alone.correct)
    lengths = alone.num_tokens.mean(axis=1)
    estimates["reference_length_share"] = _ratio(reference_tokens, lengths)
    values: dict[str, float | list[float]] = {}
    for name, estimate in estimates.items():
        values[name] = round(estimate.value, 4)
        values[f"{name}_ci95"] = [round(estimate.low, 4), round(estimate.high, 4)]
    for name, kept in (
        ("together", alone.together),
        ("apart", alone.apart),
        ("checked", alone.checked),
        ("unchecked", ~alone.checked),
    ):
        if kept.any():
            values[f"alone_if_{name}"] = round(float(alone.correct[kept].mean()), 4)
    values["alone_tokens"] = round(float(lengths.mean()), 1)
    values["reference_tokens"] = round(float(reference_tokens.mean()), 1)
    return values


def _weights_sha256(model: str) -> str:
    """Returns the hash of a model's one file of weights; empty if it has several or none here."""
    file = Path(BUNDLED.get(model, model)) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the properties of a tiny base.")
    parser.add_argument("--model", default="tiny", help="a directory (default: the bundled base)")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--num-problems", type=int, default=512)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--output", type=Path, help="file for the last line, too")
    arguments = parser.parse_args()
    if min(arguments.num_problems, arguments.num_samples) < 1:
        parser.error("--num-problems and --num-samples: need 1 or more")
    with user_errors(Terminal()):
        quiet_libraries()
        examination = Examination(
            arguments.model, arguments.split, arguments.num_problems, arguments.num_samples
        )
        values = record(conditions(examination), examination.reference_tokens())
    for name, value in values.items():
        if not name.endswith("_ci95"):
            interval = values.get(f"{name}_ci95")
            shown = f"  ({interval[0]} to {interval[1]})" if isinstance(interval, list) else ""
            print(f"{name}: {value}{shown}")
    option = "" if arguments.split == "test" else f" --split {arguments.split}"
    made = {
        "name": "properties",
        "command": f"python -m paint_engine.tiny.properties{option}",
        "model": arguments.model,
        "sha256": _weights_sha256(arguments.model),
        "split": arguments.split,
        "num_problems": len(examination.problems),
        "num_samples": arguments.num_samples,
        "torch": torch.__version__,
    }
    if arguments.output:
        write_json(arguments.output, made | values)
    print(json.dumps(made | values))


if __name__ == "__main__":
    main()
