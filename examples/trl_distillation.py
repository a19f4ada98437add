"""TRL's DistillationTrainer with the PAINT loss: on-policy distillation from a frozen teacher.

pip install trl
python examples/trl_distillation.py     # the bundled model on a CPU, in seconds

The student is the bundled base with noise on its weights, and the base teaches. For models that
matter pass their hub ids, a data set with a column "prompt", and your own DistillationConfig.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.distillation_config import DistillationConfig

from paint_engine.config.bundled import TINY_BASE
from paint_engine.integrations.trl import PaintDistillationTrainer
from paint_engine.tiny.problems import load_split

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def load_student(noise: float) -> torch.nn.Module:
    """Returns the base with noise on each weight: `noise` times its matrix's root mean square."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    with torch.no_grad():
        for weight in student.parameters():
            weight += noise * weight.square().mean().sqrt() * torch.randn_like(weight)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL with the PAINT loss")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", default="runs/trl-distillation", help="TRL's output directory")
    args = parser.parse_args()

    questions = [f"Problem: {row.problem}\n\n{INSTRUCTION}" for row in load_split("train", 64)]
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    trainer = PaintDistillationTrainer(
        model=load_student(noise=0.4),
        teacher_model=AutoModelForCausalLM.from_pretrained(TINY_BASE),
        # The paper's settings are the defaults; what is given here replaces them one by one.
        loss_settings={"top_fraction": 0.05},
        args=DistillationConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_completion_length=64,
            learning_rate=3e-3,  # for a million parameters; the paper has 5e-6
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            chat_template_kwargs={"enable_thinking": False},
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(TINY_BASE, padding_side="left"),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.4f}")


if __name__ == "__main__":
    main()
