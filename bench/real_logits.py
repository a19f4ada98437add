"""Measures the loss's gradient on a real model's logits: clipped rows, and a float8 product.

    python -m bench.real_logits --model FILE.gguf --problems FILE.jsonl

The model answers problems, and scores its answers again with a part of each solution in the prompt,
as PAINT's teacher does. From the logits of both roles come, in float64, the share of rows with a
clipped entry, the share of these whose clipped mass the kernels predict wrong, and the gradient by
the logits. Its product with the head is then emulated in two classes of columns: the most probable
ones in float16, the others in float8. The order of the columns is that of the mean probability over
the solutions of other problems, or, as a bound, over these rollouts themselves. Nothing of the
model is kept; the result holds figures alone. The last line of stdout is JSON.

float8 is e4m3. Before it is rounded, a column of the gradient is divided by a power of its mean
probability, and the same row of the head multiplied by it; then each row of the gradient and each
column of the head are scaled to the largest float8. None of these factors is left in the sum over
the columns.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import measure
from bench.floor.loss import CLIPPED_SHARES, GRADIENT_BYTES, NUM_TOKENS, count
from bench.kernels.limits import DEVICES
from bench.losses import EQUAL, QWEN3_HIDDEN, QWEN3_VOCAB_SIZE
from bench.measure import progress
from bench.tables import real_logits_predicted_table, real_logits_table
from paint_engine.config.sections import PromptsSection
from paint_engine.prompts.chat import encode_student_prompt, encode_teacher_prompt
from paint_engine.prompts.masking import mask_solution
from paint_engine.types import Problem
from paint_kernels import reference
from paint_kernels._matmul import GRADIENT_SCALE
from paint_kernels._triton_backend import GROUPS

TEMPERATURE, MASK_RATIO, SEED = 1.1, 0.35, 0
LARGEST_FLOAT8 = 448.0
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward KL": {"pointwise_clip": None},
    "forward KL, clipped": {"pointwise_clip": 0.06},
    "reverse KL": {"divergence": "reverse_kl", "pointwise_clip": None},
    "JSD": {"divergence": "jsd", "pointwise_clip": None},
}
SHARES, TRIED_SHARE = (1 / 4, 1 / 8, 1 / 16), 1 / 8
"""of the columns in float16"""
POWER, OTHER_POWERS = 0.5, (0.0, 1.0)
"""of the mean probability, by which a column is divided; the others at one share"""


class Rollout(NamedTuple):
    student: Tensor
    """(n, H) float64: the hidden states that predict the rollout's tokens"""
    teacher: Tensor
    """(n, H) float64, after the prompt with a part of the solution"""


class Sampler:
    """Answers problems with a model, and returns the hidden states of both roles."""

    def __init__(self, file: Path, max_new_tokens: int) -> None:
        options = {"gguf_file": file.name}
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **options
        )
        self.max_new_tokens = max_new_tokens

    @property
    def head(self) -> Tensor:
        return self.model.lm_head.weight.detach().double()

    @torch.no_grad()
    def hidden_states(self, prompt: tuple[int, ...], completion: Tensor) -> Tensor:
        ids = torch.cat([torch.tensor(prompt), completion])[None]
        states = self.model.model(ids).last_hidden_state[0]
        return states[len(prompt) - 1 : -1].double()

    @torch.no_grad()
    def rollout(self, problem: Problem) -> Rollout:
        prompts = PromptsSection()
        prompt = encode_student_prompt(self.tokenizer, problem, prompts, thinking=False)
        shown = mask_solution(problem.solution, MASK_RATIO, marker="")
        teacher, _ = encode_teacher_prompt(self.tokenizer, problem, shown, prompts, marker="")
        answered = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
        )
        completion = answered[0, len(prompt) :]
        return Rollout(
            self.hidden_states(prompt, completion), self.hidden_states(teacher, completion)
        )

    @torch.no_grad()
    def solution_states(self, problem: Problem) -> Tensor:
        """Returns (n, H) float64: the student's hidden states for a solution of the data."""
        prompt = encode_student_prompt(self.tokenizer, problem, PromptsSection(), thinking=False)
        ids = self.tokenizer.encode(problem.solution, add_special_tokens=False)
        return self.hidden_states(prompt, torch.tensor(ids))

    def rollouts(self, problems: Iterator[Problem], num_tokens: int) -> list[Rollout]:
        """Returns rollouts of the next problems, of about `num_tokens` tokens together."""
        found, left = [], num_tokens
        while left > 0:
            found.append(self.rollout(next(problems)))
            left -= len(found[-1].student)
            progress(f"  {len(found)} rollouts, {max(left, 0)} tokens left")
        return found


def read_problems(file: Path) -> Iterator[Problem]:
    for index, line in enumerate(file.read_text().splitlines()):
        row = json.loads(line)
        solution = row.get("solution") or row["answer"]
        yield Problem(f"{index}", row.get("problem") or row["question"], solution, "")


def mean_probabilities(hidden_states: Iterable[Tensor], head: Tensor) -> Tensor:
    """Returns (V,): the student's, over all tokens."""
    total, count = torch.zeros(len(head), dtype=torch.float64), 0
    for states in hidden_states:
        logits = states.float() @ head.float().T / TEMPERATURE
        total += torch.softmax(logits, dim=-1).sum(dim=0)
        count += len(states)
    return total / count


def logit_gradient(rollout: Rollout, head: Tensor, settings: dict[str, Any]) -> Tensor:
    """Returns (n, V) float64: the gradient of the sum of the token losses by the student's
    logits."""
    logits = (rollout.student @ head.T).requires_grad_()
    teacher, bounds = rollout.teacher @ head.T, torch.tensor([0, len(logits)])
    output = reference.paint_loss_from_logits(
        logits, teacher, bounds, temperature=TEMPERATURE, reduction="sum", **settings
    )
    (gradient,) = torch.autograd.grad(output.loss, logits)
    return gradient


def rounded_product(gradient: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient @ head of factors rounded to the dtype, accumulated in float32."""
    return (gradient.to(dtype).float() @ head.to(dtype).float()).double()


def float16_product(gradient: Tensor, head: Tensor) -> Tensor:
    """Returns gradient @ head with float16 factors, as `GradientProduct` scales them."""
    scale = GRADIENT_SCALE * TEMPERATURE
    return rounded_product(gradient * scale, head, torch.float16) / scale


def float8_product(gradient: Tensor, head: Tensor, factors: Tensor) -> Tensor:
    """Returns gradient @ head with float8 factors.

    factors: (columns,), folded into the gradient and out of the head.
    """
    gradient, head = gradient * factors, head / factors[:, None]
    row_scale = LARGEST_FLOAT8 / gradient.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)
    column_scale = LARGEST_FLOAT8 / head.abs().amax(dim=0, keepdim=True).clamp(min=1e-300)
    float8 = torch.float8_e4m3fn
    product = rounded_product(gradient * row_scale, head * column_scale, float8)
    return product / row_scale / column_scale


def two_class_product(
    gradient: Tensor, head: Tensor, order: Tensor, probabilities: Tensor, share: float, power: float
) -> Tensor:
    """Returns gradient @ head: the first share of `order` in float16, the others in float8."""
    count = round(share * len(order))
    first, others = order[:count], order[count:]
    result = float16_product(gradient[:, first], head[first])
    if len(others):
        factors = probabilities[others].clamp(min=1e-30) ** -power
        result += float8_product(gradient[:, others], head[others], factors)
    return result


def clipped_rows(rollout: Rollout, head: Tensor) -> tuple[int, int]:
    """Returns the number of rows with a clipped entry, and of those whose clipped entries are not
    all among the teacher's largest of each group of columns, which the kernels predict from."""
    student = torch.log_softmax(rollout.student @ head.T / TEMPERATURE, dim=-1)
    teacher = torch.log_softmax(rollout.teacher @ head.T / TEMPERATURE, dim=-1)
    clipped = (
        teacher.exp() * (teacher - student) > OBJECTIVES["forward KL, clipped"]["pointwise_clip"]
    )
    padded = torch.nn.functional.pad(teacher, (0, -teacher.shape[1] % GROUPS), value=-torch.inf)
    largest = padded.unflatten(1, (-1, GROUPS)).argmax(dim=1)
    candidates = largest * GROUPS + torch.arange(GROUPS)
    caught = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, candidates, True)
    missed = clipped & ~caught[:, : teacher.shape[1]]
    return int(clipped.any(dim=1).sum()), int(missed.any(dim=1).sum())


class Errors:
    """The relative error of one emulated product over all rollouts, by norm, and of its rows."""

    def __init__(self) -> None:
        self.difference, self.norm, self.rows = 0.0, 0.0, list[float]()

    def add(self, result: Tensor, exact: Tensor) -> None:
        difference, norm = (result - exact).norm(dim=1), exact.norm(dim=1)
        self.difference += difference.square().sum().item()
        self.norm += norm.square().sum().item()
        self.rows += (difference[norm > 0] / norm[norm > 0]).tolist()

    def summary(self) -> dict[str, float]:
        rows = sorted(self.rows)
        return {
            "error": (self.difference / self.norm) ** 0.5,
            "row_p99": rows[int(0.99 * (len(rows) - 1))],
        }


def errors(
    rollouts: list[Rollout], head: Tensor, orders: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Returns the error of every product for every objective.

    orders: mean probabilities by the texts that they come from.
    """
    found, first = [], next(iter(orders))
    choices = [(first, 1.0, POWER)]
    choices += [(name, share, POWER) for name in orders for share in SHARES]
    choices += [(first, TRIED_SHARE, power) for power in OTHER_POWERS]
    ranked = {name: values.argsort(descending=True) for name, values in orders.items()}
    for objective, settings in OBJECTIVES.items():
        progress(f"  {objective}")
        by_choice, in_bfloat16 = {choice: Errors() for choice in choices}, Errors()
        for rollout in rollouts:
            gradient = logit_gradient(rollout, head, settings)
            exact = gradient @ head
            in_bfloat16.add(rounded_product(gradient, head, torch.bfloat16), exact)
            for (name, share, power), result in by_choice.items():
                product = two_class_product(
                    gradient, head, ranked[name], orders[name], share, power
                )
                result.add(product, exact)
        rows = [
            {"order": name, "float16_share": share, "power": power, **result.summary()}
            for (name, share, power), result in by_choice.items()
        ]
        found.append({"objective": objective, "bfloat16": in_bfloat16.summary(), "products": rows})
    return found


def predicted(share: float) -> list[dict[str, Any]]:
    """Predicts the time at Qwen3-8B, 32,768 tokens in equal rollouts, from `bench.floor`'s counts:
    float8 products have twice float16's rate, and a float8 entry of the gradient one byte."""
    found = []
    entries = NUM_TOKENS * QWEN3_VOCAB_SIZE
    for device in DEVICES:
        now = count("8b", device, EQUAL, "forward_kl", clipped_share=CLIPPED_SHARES[0])
        back_s = 2 * entries * QWEN3_HIDDEN["8b"] / device.flops_per_s
        saved = {
            "product_s": back_s * (1 - share) / 2,
            "gradient_s": entries * (1 - share) * (GRADIENT_BYTES - 1) / device.bytes_per_s,
        }
        found.append(
            {
                "device": device.name,
                "float16_share": share,
                "exact_s": now["predicted_s"],
                "gemms_s": now["gemms_s"],
                "saved": saved,
                "fast_s": now["predicted_s"] - sum(saved.values()),
                "extra_bytes": round((2 * share + (1 - share)) * QWEN3_VOCAB_SIZE)
                * QWEN3_HIDDEN["8b"],
            }
        )
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.real_logits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--problems", type=Path, required=True, help="a JSON Lines file")
    parser.add_argument("--num-tokens", type=int, default=2000)
    parser.add_argument("--num-solutions", type=int, default=150, help="for the columns' order")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args(argv)
    torch.manual_seed(SEED)
    sampler = Sampler(arguments.model, arguments.max_new_tokens)
    problems = read_problems(arguments.problems)
    progress("the order of the columns")
    others = [
        sampler.solution_states(p) for p in itertools.islice(problems, arguments.num_solutions)
    ]
    progress("rollouts")
    rollouts = sampler.rollouts(problems, arguments.num_tokens)
    head = sampler.head
    orders = {
        "other solutions": mean_probabilities(others, head),
        "these rollouts": mean_probabilities([r.student for r in rollouts], head),
    }
    counts = [clipped_rows(rollout, head) for rollout in rollouts]
    num_tokens = sum(len(rollout.student) for rollout in rollouts)
    command = f"python -m bench.real_logits --model {arguments.model.name} --problems "
    command += arguments.problems.name
    result = {
        "name": "real_logits",
        **measure.environment(torch.device("cpu"), command),
        "model": arguments.model.stem,
        "vocab_size": len(head),
        "hidden": head.shape[1],
        "num_tokens": num_tokens,
        "clipped_rows": sum(clipped for clipped, _ in counts),
        "mispredicted_rows": sum(missed for _, missed in counts),
        "order_tokens": sum(map(len, others)),
        "errors": errors(rollouts, head, orders),
        "predicted": list(itertools.chain(*(predicted(share) for share in (1 / 8, 1 / 4)))),
    }
    print(real_logits_table(result), real_logits_predicted_table(result), sep="\n\n")
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
