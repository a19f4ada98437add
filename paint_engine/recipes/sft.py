"""SFT: cross-entropy of the reference solutions, which replace the rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paint_engine.recipes.base import LossInputs, LossOutput, Recipe
from paint_engine.recipes.display import (
    ENTROPY,
    GRADIENT_NORM,
    LOSS,
    LOSS_IN_NATS,
    TOKENS_PER_S,
    Display,
    Quantity,
    TokenColor,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sft(Recipe):
    """Cross-entropy of the reference solutions' tokens."""

    samples = False

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError for a tokenizer without a token that ends a solution."""
        from paint_engine.prompts.target import stop_token

        if stop_token(tokenizer) is None:
            raise ValueError(
                f"the tokenizer of {self.config.model.name_or_path} has no eos_token, and its chat "
                "template ends a turn with no token of its own; one of them ends the solutions "
                "that sft trains on; set eos_token in tokenizer_config.json"
            )

    @property
    def display(self) -> Display:
        """The loss, and tokens coloured by their loss."""
        cut = Quantity(
            "Reference solutions",
            "share",
            (("truncation_rate", "truncated at the token limit"),),
            percent=True,
        )
        return Display(
            console=(LOSS, TOKENS_PER_S),
            curves=(
                LOSS_IN_NATS,
                ENTROPY,
                cut,
                GRADIENT_NORM,
                Quantity("Solution length", "tokens", (("completion_length", "mean"),)),
                Quantity(
                    "Step time",
                    "seconds",
                    (("seconds_rollout", "reading the solutions"), ("seconds_update", "update")),
                ),
            ),
            token_color=TokenColor("token_loss", "loss", "loss"),
            columns="The left column shows the problem; the right column shows the reference "
            "solution that was trained on",
            absent="SFT trains on the reference solutions: nothing is sampled, and there is no "
            "teacher.",
            thing="solution",
            things="reference solutions",
        )

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes minus the student's log-probability of each token."""
        from paint_engine.recipes import tokens

        section = self.config.objective
        student = tokens.student_logprobs(inputs, section.temperature)
        token_loss = -student.logprobs
        per_token = {"token_loss": token_loss.detach(), "student_entropy": student.entropy}
        loss = tokens.reduced(token_loss, inputs.cu_seqlens, section.reduction, inputs.denominator)
        return LossOutput(loss, per_token)


RECIPE = Sft
