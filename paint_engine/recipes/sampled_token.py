"""Sampled-token distillation: a policy gradient with the teacher's log-ratio of each token."""

from __future__ import annotations

from paint_engine.recipes.base import LossInputs, LossOutput, stale_rollouts_note
from paint_engine.recipes.display import (
    ACCURACY,
    CONTEXT_EXPOSURE,
    CONTEXT_SHARE,
    CONTEXT_SHARE_CURVE,
    LOSS,
    LOSS_IN_NATS,
    OVERLAP,
    SAMPLING_CURVES,
    TAUGHT,
    TEACHER_COLUMNS,
    TOKEN_WEIGHTS,
    TOKENS_PER_S,
    ConsoleField,
    Display,
    Quantity,
    TokenColor,
)
from paint_engine.recipes.teacher_keys import check_served_temperature
from paint_engine.recipes.with_teacher import TeacherRecipe


class SampledToken(TeacherRecipe):
    """Policy gradient with the log-ratio of the sampled tokens, A_t = log p_T(y_t) - log p_S(y_t).

    The token loss is w_t (log p_S - log p_T), a sample of the reverse KL. Its gradient is -w_t A_t
    grad log p_S(y_t), whose mean over samples from p_S is the gradient of each token's reverse KL.
    The identity needs a sampler without truncation: samples with top-p or top-k, or of another
    temperature, are not from p_S and have another mean. w_t = min(p_S / p_sampler, importance_cap),
    or 1 if the cap is None. Weights of tokens multiply the token loss.
    """

    keys = (*TeacherRecipe.keys, "objective.importance_cap", "objective.token_weights")
    # A server is asked for the sampled token alone.
    unread = ("teacher.served_top_k", "teacher.tail")
    recorded_as = "sampled_kl"

    @property
    def served_top_k(self) -> int | None:
        """0 with a server: the sampled token alone is compared."""
        return None if super().served_top_k is None else 0

    def check_served(self) -> None:
        """Raises ValueError for another temperature than the server's."""
        check_served_temperature(self.config)

    def notes(self) -> list[str]:
        """Returns the context's notes, and one on rollouts that are one step old."""
        return super().notes() + stale_rollouts_note(self.config)

    @property
    def display(self) -> Display:
        """Curves of the sampled KL, and tokens coloured by its magnitude."""
        sampled = ConsoleField("sampled_kl", "sampled KL", "{:.4f} nats")
        return Display(
            console=(LOSS, sampled, CONTEXT_SHARE, OVERLAP, ACCURACY, TOKENS_PER_S),
            curves=(
                LOSS_IN_NATS,
                Quantity(
                    "Sampled KL",
                    "nats per token",
                    (("sampled_kl", "mean of log p_S - log p_T"),),
                ),
                CONTEXT_EXPOSURE,
                CONTEXT_SHARE_CURVE,
                TAUGHT,
                TOKEN_WEIGHTS,
                *SAMPLING_CURVES,
            ),
            token_color=TokenColor("sampled_kl", "|log p_S - log p_T|", "sampled KL"),
            columns=TEACHER_COLUMNS,
            absent="The teacher scores only the sampled tokens: no entry of the vocabulary is "
            "clipped and no target is interpolated.",
        )

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes the weighted log-ratio of the sampled tokens."""
        import torch

        from paint_engine.recipes import served, tokens

        section = self.config.objective
        student = tokens.student_logprobs(inputs, section.temperature)
        present = student.logprobs.detach()
        if self.served_top_k is None:
            second = tokens.second_logprobs(inputs, section.temperature)
            teacher, entropy = second.logprobs, {"teacher_entropy": second.entropy}
        else:
            # Of the teacher's distribution, a server sends the sampled token alone.
            teacher, entropy = served.sampled_logprobs(inputs).to(present), {}
        sampled_kl = present - teacher
        weight = tokens.importance_weight(present, inputs, section.importance_cap)
        # The factor is 1 and carries the gradient of log p_S.
        token_loss = weight * sampled_kl * torch.exp(student.logprobs - present)
        per_token = {
            "sampled_kl": sampled_kl,
            "importance_weight": weight,
            "student_entropy": student.entropy,
            **entropy,
        }
        if self.weighs(inputs.examples):
            per_token["token_weight"] = self.token_weights(
                inputs,
                student_entropy=student.entropy,
                teacher_entropy=entropy.get("teacher_entropy"),
                divergence=sampled_kl,
            )
            token_loss = per_token["token_weight"] * token_loss
        per_token["token_loss"] = token_loss.detach()
        loss = tokens.reduced(token_loss, inputs.cu_seqlens, section.reduction, inputs.denominator)
        return LossOutput(loss, per_token)


RECIPE = SampledToken
