"""PAINT in one file: transformers samples, peft adapts, `paint_loss` trains. No engine, one device.

python examples/minimal_loop.py                        # the bundled model on a CPU, in seconds
python examples/minimal_loop.py --model Qwen/Qwen3-1.7B --max-new-tokens 1024 --learning-rate 5e-6
"""

import argparse
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from paint_engine.config.bundled import TINY_BASE
from paint_engine.prompts.anchors import overlap
from paint_engine.prompts.masking import mask_ratio, mask_solution
from paint_engine.tiny.problems import load_split
from paint_engine.types import Problem
from paint_kernels import paint_loss

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TEMPERATURE = 1.1  # of sampling, and of both roles' logits in the loss
REFERENCE = """
Here is a part of reference solution to this problem:
=== Reference Solution Begin ===
{solution}
=== Reference Solution End ===
After reading the reference solution above, derive the same final answer in your own words.
"""


class Rollout(NamedTuple):
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]


def encode_prompt(tokenizer: Any, message: str) -> list[int]:
    chat = [{"role": "user", "content": message}]
    options = {"add_generation_prompt": True, "enable_thinking": False}
    return tokenizer.apply_chat_template(chat, **options)["input_ids"]


def encode_student_prompt(tokenizer: Any, problem: Problem) -> list[int]:
    return encode_prompt(tokenizer, f"Problem: {problem.problem}\n\n{INSTRUCTION}")


def encode_teacher_prompt(tokenizer: Any, problem: Problem, completion: str) -> list[int]:
    """Returns the teacher's prompt. The more of the solution the completion contains, the more of
    it is hidden (Eq. 4-6)."""
    ratio = mask_ratio(overlap(completion, problem.solution), rho_wrong=0.3, rho_correct=0.4)
    reference = REFERENCE.replace("{solution}", mask_solution(problem.solution, ratio))
    return encode_prompt(tokenizer, f"Problem: {problem.problem}\n{reference}{INSTRUCTION}")


@torch.no_grad()
def roll_out(
    model: Any, tokenizer: Any, problems: list[Problem], max_new_tokens: int
) -> list[Rollout]:
    """Samples one completion per problem. Also returns the teacher's prompt for it."""
    prompts = [encode_student_prompt(tokenizer, problem) for problem in problems]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": 0.95, "top_k": 20}
    sequences = model.generate(**batch.to(model.device), **sampling, max_new_tokens=max_new_tokens)
    sampled = sequences[:, batch["input_ids"].shape[1] :].tolist()
    stop_ids = model.generation_config.eos_token_id
    stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    rollouts = []
    for problem, prompt_ids, ids in zip(problems, prompts, sampled, strict=True):
        # Padding follows the stop token, which is part of the completion; a cut one has none.
        last = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
        completion_ids = ids[: last + 1]
        # The text serves the overlap alone: the loss reads the sampled ids.
        text = tokenizer.decode(completion_ids, skip_special_tokens=True)
        teacher_prompt_ids = encode_teacher_prompt(tokenizer, problem, text)
        rollouts.append(Rollout(prompt_ids, teacher_prompt_ids, completion_ids))
    return rollouts


def completion_states(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
    """Returns (n, H): the final hidden states that predict the n completion tokens."""
    ids = torch.tensor([prompt_ids + completion_ids], device=model.device)
    states = model.get_base_model().base_model(ids, use_cache=False).last_hidden_state[0]
    return states[len(prompt_ids) - 1 : -1]  # the state at position i predicts token i + 1


def backward(model: Any, rollouts: list[Rollout]) -> float:
    """Adds the gradient of the mean loss over the rollouts, and returns that loss."""
    head = model.get_output_embeddings().weight
    total = 0.0
    for rollout in rollouts:
        student = completion_states(model, rollout.prompt_ids, rollout.completion_ids)
        # The teacher is the base itself, with a longer prompt and the same completion.
        with torch.no_grad(), model.disable_adapter():
            teacher = completion_states(model, rollout.teacher_prompt_ids, rollout.completion_ids)
        bounds = torch.tensor([0, len(rollout.completion_ids)], dtype=torch.int32)
        settings = {"temperature": TEMPERATURE, "denominator": len(rollouts)}
        output = paint_loss(student, teacher, head, bounds, **settings)
        output.loss.backward()
        total += output.loss.item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="PAINT in one file")
    parser.add_argument("--model", default=str(TINY_BASE), help="directory or hub id")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="problems a step")
    parser.add_argument("--max-new-tokens", type=int, default=224)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", help="directory for the adapter")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base: Any = AutoModelForCausalLM.from_pretrained(args.model, use_safetensors=True)
    lora = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear")
    model = get_peft_model(base.to(device), lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)

    problems = load_split("train", args.steps * args.batch_size)
    for step in range(args.steps):
        batch = problems[step * args.batch_size : (step + 1) * args.batch_size]
        rollouts = roll_out(model, tokenizer, batch, args.max_new_tokens)
        loss = backward(model, rollouts)
        torch.nn.utils.clip_grad_norm_(trained, max_norm=0.1)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        print(f"step {step}: loss {loss:.6f} over {num_tokens} tokens")
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
