"""PAINT: a clipped divergence to the sparsely interpolated teacher. OPSD is a preset of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paint_engine.recipes.base import HeadWork, LossInputs, LossOutput
from paint_engine.recipes.display import (
    ACCURACY,
    CONTEXT_EXPOSURE,
    CONTEXT_SHARE,
    CONTEXT_SHARE_CURVE,
    LOSS,
    LOSS_IN_NATS,
    OVERLAP,
    SAMPLING_CURVES,
    SERVED_MASS,
    TAUGHT,
    TEACHER_COLUMNS,
    TOKENS_PER_S,
    ConsoleField,
    Display,
    Quantity,
    TokenColor,
)
from paint_engine.recipes.teacher_keys import check_served_temperature
from paint_engine.recipes.token_weights import load_weighting
from paint_engine.recipes.with_teacher import TeacherRecipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from paint_kernels import PaintLossOutput

# The name of each divergence, and the label of its curve in the report.
_NAMES = {"forward_kl": "KL", "reverse_kl": "reverse KL", "jsd": "JSD"}
_CURVES = {
    "forward_kl": ("Unclipped KL", "KL(teacher, student)"),
    "reverse_kl": ("Unclipped KL", "KL(student, teacher)"),
    "jsd": ("Unclipped JSD", "teacher and student"),
}
_CLIP_NOTE = (
    "The clip removes the correction where a vocabulary entry's term is above it. What is left "
    "lowers that entry's logit, and a loss can be below 0."
)


class Paint(TeacherRecipe):
    """Clipped divergence over the vocabulary to the sparsely interpolated teacher (Eq. 3, 12, 14).

    With full solutions and no interpolation it is OPSD.
    """

    keys = (
        *TeacherRecipe.keys,
        "objective.divergence",
        "objective.jsd_weight",
        "objective.pointwise_clip",
        "objective.top_fraction",
        "objective.interpolation_weight",
        "objective.entropy_floor",
        "objective.teacher_top_k",
        "objective.token_weights",
    )
    recorded_as = "token_kl"
    teacher_values = (
        "token_kl",
        "clipped_mass",
        "clipped_token_share",
        "teacher_entropy",
        "served_mass",
    )

    def check(self) -> None:
        """Raises ValueError for a JSD weight with another divergence."""
        super().check()
        objective = self.config.objective
        if objective.divergence != "jsd" and objective.jsd_weight != 0.5:
            raise ValueError(
                f"objective.jsd_weight: got {objective.jsd_weight} with objective.divergence "
                f"{objective.divergence!r}, which has no such weight; leave it out, or use "
                "--objective.divergence jsd"
            )

    def check_served(self) -> None:
        """Raises ValueError for settings of the loss over the whole vocabulary."""
        top_k, tail = self.config.objective.teacher_top_k, self.config.teacher.tail
        if top_k is not None:
            raise ValueError(
                f"objective.teacher_top_k: got {top_k} with teacher.url "
                f"{self.config.teacher.url}, whose list is the top-k; use --teacher.served_top_k "
                f"{top_k} --teacher.tail renormalise in its place"
            )
        if tail != "renormalise":
            check_served_temperature(
                self.config, ", or --teacher.tail renormalise, which needs the listed tokens alone"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if `teacher_top_k` exceeds the vocabulary."""
        from paint_engine.model import vocabulary_size

        top_k, size = self.config.objective.teacher_top_k, vocabulary_size(tokenizer)
        if top_k is not None and top_k > size:
            raise ValueError(
                f"objective.teacher_top_k is {top_k}, but the vocabulary has {size} "
                "tokens; lower it, or turn it off with --objective.teacher_top_k none"
            )

    def notes(self) -> list[str]:
        """Returns the context's notes, and one on the clip of the reverse KL."""
        objective, notes = self.config.objective, super().notes()
        if objective.divergence != "reverse_kl" or objective.pointwise_clip is None:
            return notes
        return [
            *notes,
            "the clip is designed for the forward KL; with the reverse KL it removes the penalty "
            "on tokens that the student overrates, and the student drifts away from the teacher; "
            "--objective.pointwise_clip none switches it off",
        ]

    @property
    def display(self) -> Display:
        """Curves of the divergence and its clip, and tokens coloured by the unclipped
        divergence."""
        objective = self.config.objective
        name, (title, series) = _NAMES[objective.divergence], _CURVES[objective.divergence]
        clips = objective.pointwise_clip is not None
        clip = Quantity(
            "Pointwise clip",
            "share",
            (
                ("clipped_mass", "teacher mass clipped"),
                ("clipped_token_share", "tokens with a clip"),
            ),
            percent=True,
        )
        divergence = ConsoleField("token_kl", name, "{:.4f} nats")
        return Display(
            console=(LOSS, divergence, CONTEXT_SHARE, OVERLAP, ACCURACY, TOKENS_PER_S),
            curves=(
                LOSS_IN_NATS,
                Quantity(title, "nats per token", (("token_kl", series),)),
                *((clip,) if clips else ()),
                *(() if self.served_top_k is None else (SERVED_MASS,)),
                CONTEXT_EXPOSURE,
                CONTEXT_SHARE_CURVE,
                TAUGHT,
                *SAMPLING_CURVES,
            ),
            token_color=TokenColor(
                "token_kl",
                title.replace("Unclipped", "unclipped"),
                "JSD" if objective.divergence == "jsd" else "KL",
            ),
            columns=TEACHER_COLUMNS,
            clips=clips,
            kinds_note=_CLIP_NOTE * (clips and objective.divergence == "forward_kl"),
            interpolates=objective.interpolation_weight > 0,
        )

    @property
    def takes_token_losses(self) -> bool:
        """Whether the loss may need the divergence of each token, and not only its mean: tokens of
        one micro-batch count differently."""
        return load_weighting(self.config.objective.token_weights) is not None

    def head_work(self, num_passes: int) -> HeadWork:
        """Returns the work of one loss for each second pass, or of the loss to a server's top-k."""
        frozen, top_k = self.config.lora.enabled, self.config.objective.teacher_top_k
        if self.served_top_k is not None:
            # The completion's own token is listed, too.
            return self._served_work(self.served_top_k + 1)
        if top_k is not None:
            # The logits of the rows, the gradient by the hidden states, and that by the rows.
            return HeadWork(student=0, rows=(2 if frozen else 3) * top_k * num_passes)
        if frozen or not self.takes_token_losses:
            return HeadWork(student=(2 if frozen else 3) * num_passes)
        # With a loss per token, the gradient by the head takes both models' logits again.
        return HeadWork(student=4 * num_passes, second=2)

    def _served_work(self, num_ids: int) -> HeadWork:
        frozen = self.config.lora.enabled
        if self.config.teacher.tail == "renormalise":
            return HeadWork(student=0, rows=(2 if frozen else 3) * num_ids)
        # The tail is of all logits; only the gradients are of the rows.
        return HeadWork(student=2 if frozen else 4, rows=(1 if frozen else 2) * num_ids)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes the divergence by `paint_kernels.paint_loss`, which never holds all logits at
        once, or from a server's top-k by `paint_loss_from_topk`. Weights its tokens as
        `objective.token_weights` and `objective.on` say."""
        section = self.config.objective
        output, weights = self._weighted(inputs, section.reduction, inputs.denominator)
        values = per_token(output)
        if weights is not None:
            values["token_weight"] = weights
        if self.served_top_k is not None:
            from paint_engine.recipes import served

            values["served_mass"] = served.mass(inputs)
        return LossOutput(output.loss, values)

    def divergence(
        self, inputs: LossInputs, *, reduction: str, denominator: int | None = None
    ) -> PaintLossOutput:
        """Computes `paint_loss` of the micro-batch with the configuration's options; of several
        teachers, the sum of the losses against each, times its weight; with a teacher's server,
        `paint_loss_from_topk`. `loss` and `token_loss` have the weights of
        `objective.token_weights` and `objective.on` in them.

        reduction: "sequence_mean" or "token_mean", with a `denominator`; or "none", which returns a
            loss per token.

        Raises ValueError for a mean without a denominator, if tokens are weighed or if there are
        several teachers: it would be over the rollouts of each teacher.
        """
        return self._weighted(inputs, reduction, denominator)[0]

    def _weighted(
        self, inputs: LossInputs, reduction: str, denominator: int | None
    ) -> tuple[PaintLossOutput, Tensor | None]:
        """Returns what `divergence` does, and the (N,) weights; None if each token counts 1."""
        if not self.weighs(inputs.examples):
            return self._paint_loss(inputs, reduction=reduction, denominator=denominator), None
        from paint_engine.recipes import tokens

        _check_denominator(reduction, denominator)
        output = self._paint_loss(inputs, reduction="none")
        weights = self.token_weights(
            inputs,
            student_entropy=output.student_entropy,
            teacher_entropy=output.teacher_entropy,
            divergence=output.token_kl,
        )
        loss = weights * output.loss
        output = output._replace(token_loss=loss.detach())
        if reduction != "none":
            assert denominator is not None, reduction
            loss = tokens.reduced(loss, inputs.cu_seqlens, reduction, denominator)
        return output._replace(loss=loss), weights

    def _paint_loss(self, inputs: LossInputs, **reduction: Any) -> PaintLossOutput:
        # Imported here because declarations are read without PyTorch.
        from paint_engine.recipes import served
        from paint_engine.recipes.passes import added_outputs, is_whole, parts_of
        from paint_kernels import LossOptions, paint_loss

        if self.served_top_k is not None:
            return served.divergence(self.config, inputs, **reduction)
        section = self.config.objective
        # The section has a key for each option of the loss, with the same name.
        options = LossOptions(**{key: getattr(section, key) for key in LossOptions.__annotations__})
        parts = parts_of(inputs)
        if not is_whole(parts):
            _check_denominator(**reduction)
        outputs = [
            paint_loss(
                part.inputs.student_hidden_states,
                part.second.hidden_states,
                inputs.lm_head_weight,
                part.inputs.cu_seqlens,
                teacher_lm_head_weight=part.second.lm_head_weight,
                vocab_size=inputs.vocab_size,
                **reduction,
                **options,
            )
            for part in parts
        ]
        if is_whole(parts):
            return outputs[0]
        return added_outputs(parts, outputs, len(inputs.completion_ids))


def _check_denominator(reduction: str, denominator: int | None = None) -> None:
    if reduction != "none" and denominator is None:
        raise ValueError(
            f"divergence: got reduction {reduction!r} without a denominator, with several teachers "
            "or weights of tokens; needs the step's number of rollouts or tokens; pass "
            "denominator=inputs.denominator"
        )


def per_token(output: PaintLossOutput) -> dict[str, Tensor]:
    """Returns the (N,) values that are logged, and kept for the report, of each token."""
    return {
        "token_loss": output.token_loss,
        "token_kl": output.token_kl,
        "clipped_mass": output.clipped_mass,
        "clipped_token_share": output.clipped_mass > 0,
        "student_entropy": output.student_entropy,
        "teacher_entropy": output.teacher_entropy,
        "selected": output.selected,
    }


RECIPE = Paint
