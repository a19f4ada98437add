"""The base class of recipes, with their declarations. Declarations are read without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from paint_engine.config.plugins import load_class, plugin_names
from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, flag, value_of
from paint_engine.contexts import Context, context_of
from paint_engine.recipes.display import Display

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from paint_engine.types import Problem, Reader, Request, TrainExample

PACKAGE, ATTRIBUTE = "paint_engine.recipes", "RECIPE"
# Values that switch a part off. They are valid for a recipe that lacks the part.
_SWITCHED_OFF = {
    "objective.pointwise_clip": None,
    "objective.top_fraction": 0.0,
    "objective.interpolation_weight": 0.0,
}


@dataclass(frozen=True)
class StepContext:
    """What a recipe may use while it prepares this rank's rollouts of one step.

    step: counts from 0.
    requests: the requests of the rollouts, in their order.
    tokenizer: the student's.
    max_context: maximum number of tokens of a prompt and its completion together: the student's, or
        what the teacher's server takes, if that is less.
    complete: samples one completion for each prompt, as token ids. A collective call:
        complete(prompts, seeds, max_new_tokens=512, base=True); `base` selects the base's weights.
    batch: the judged rollouts of all ranks; `Request.index` is a rollout's place in it.
    group_size: number of consecutive rollouts of one problem in it.
    problems: the training problems.
    teachers: the teachers that are other models in this process, as readers of prompts, each with a
        tokenizer and a maximum of its own; empty if there are none.
    """

    step: int
    requests: Sequence[Request]
    tokenizer: PreTrainedTokenizerBase
    max_context: int
    complete: Callable[..., list[tuple[int, ...]]]
    batch: Sequence[TrainExample]
    group_size: int
    problems: Sequence[Problem]
    teachers: Sequence[Reader] = ()


@dataclass(frozen=True)
class SecondPass:
    """What a teacher, or the base, made of the rollouts of a micro-batch, or of some.

    hidden_states: (N_i, H_i) final hidden states at the positions that predict the tokens of its
        rollouts, rollout after rollout, detached. H_i is the scoring model's width.
    lm_head_weight: (V_i, H_i) its head; None if it uses the student's head.
    weight: factor on the loss against it.
    rollouts: the places of its rollouts in the micro-batch, rising; None for all.
    """

    hidden_states: Float[Tensor, "N_i H_i"]
    lm_head_weight: Float[Tensor, "V_i H_i"] | None = None
    weight: float = 1.0
    rollouts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LossInputs:
    """The inputs of one micro-batch's loss: N completion tokens of B rollouts.

    student_hidden_states: (N, H) final hidden states (after the last norm) that predict
        `completion_ids`, with gradients.
    lm_head_weight: (V, H) weight of the student's head.
    second_passes: those of the recipe's second pass: one, or one for each of several teachers;
        empty without a second pass. `passes.parts_of` cuts the inputs to the rollouts of each.
    cu_seqlens: (B + 1,) bounds of the rollouts, on the CPU.
    old_logprobs: (N,) `per_token["logprobs"]` of the first update on these rollouts; None in that
        update.
    vocab_size: number of rows of the head that are tokens.
    denominator: number of rollouts ("sequence_mean", where a rollout without tokens counts as 0) or
        tokens ("token_mean") of the whole step, on all ranks. The losses of the micro-batches add
        up to the loss of the step.
    """

    student_hidden_states: Float[Tensor, "N H"]
    lm_head_weight: Float[Tensor, "V H"]
    second_passes: tuple[SecondPass, ...]
    completion_ids: Int[Tensor, " N"]
    cu_seqlens: Int[Tensor, " B+1"]
    examples: Sequence[TrainExample]
    old_logprobs: Float[Tensor, " N"] | None
    vocab_size: int
    denominator: int


@dataclass(frozen=True)
class HeadWork:
    """The products of a token's hidden states with rows of the heads, in a loss and its backward
    pass. A product with (V, H) weights is 2 V H floating-point operations.

    student: number of products with the student's whole head.
    second: number of products with the whole head of each second pass.
    rows: number of products with single rows of the student's head.
    losses: number of gradients by the hidden states, and by the head if it is trained, that exist
        together where there is one second pass or none.
    """

    student: int
    second: int = 1
    rows: int = 0
    losses: int = 1


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch.

    loss: 0-d, with the gradient.
    per_token: detached (N,) tensors by name, bool or float32 (float64 for float64 inputs).
        Log-probabilities, KL and entropies are in nats. Their means over the step's tokens are
        logged under these names.
    parts: detached 0-d losses by name, one for each of the recipe's `loss_parts`. Like the losses,
        those of the micro-batches add up to the step's, which is logged.
    """

    loss: Float[Tensor, ""]
    per_token: dict[str, Tensor]
    parts: dict[str, Tensor] = field(default_factory=dict)


class Recipe:
    """One way to train: what it needs, what it prepares, its loss, and what the displays show.

    A recipe is bound to a configuration. A built-in recipe is `RECIPE` of its own file in
    `paint_engine/recipes/`; `objective.name = "my_module:MyRecipe"` names a user's own. A subclass
    overrides what differs from the defaults below and implements `loss` and `display`.

    keys: configuration keys that this recipe reads and others may not ("objective.divergence",
        "grpo.*"). A key that only other recipes read is refused.
    unread: keys of a section in `keys` that this recipe does not read.
    samples: the student samples rollouts. If false, training uses the reference solutions.
    uses_teacher: a teacher that sees more than the student scores the same tokens.
    loss_parts: names of losses that are logged beside "loss".
    teacher_values: names in `LossOutput.per_token` that only rollouts with a teacher view have;
        those of the others are 0, and not in the means that are logged.
    recorded_as: a metric that identifies the recipe's runs if a run directory has no configuration;
        "" for none. A recipe that is derived from others may record theirs, too.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()
    samples: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = False
    loss_parts: ClassVar[tuple[str, ...]] = ()
    teacher_values: ClassVar[tuple[str, ...]] = ()
    recorded_as: ClassVar[str] = ""

    def __init__(self, config: Config) -> None:
        self.config = config

    # ---- declarations ----------------------------------------------------------------------------

    @cached_property
    def context(self) -> Context | None:
        """What the teacher is shown, bound to the configuration; None without a teacher."""
        return context_of(self.config) if self.uses_teacher else None

    @property
    def needs_solution(self) -> bool:
        """Rows of the data must have a reference solution. A teacher's context decides."""
        return True if self.context is None else self.context.needs_solution

    @property
    def needs_answer(self) -> bool:
        """Rows of the data must have a reference answer, because verdicts are trained on. Without
        it, a row without an answer is trained on and gets no verdict. A teacher's context decides.
        """
        return self.context is not None and self.context.needs_answer

    @property
    def second_pass(self) -> Literal["teacher", "base"] | None:
        """The pass whose hidden states the loss needs besides the student's: the teacher over its
        own prompt, the base over the student's prompt, or None."""
        return "teacher" if self.uses_teacher else None

    @property
    def served_top_k(self) -> int | None:
        """Number of likeliest tokens that the teacher's server (`teacher.url`) lists for each token
        of a rollout, beside the rollout's own; None without a server. The examples then have
        `served`."""
        return None

    @property
    def group_size(self) -> int:
        """Number of rollouts of one problem, consecutive in the batch."""
        if self.context is None or not self.context.needs_group:
            return 1
        return self.config.teacher.group_size

    @property
    def num_updates(self) -> int:
        """Number of optimizer steps on each batch of rollouts."""
        return 1

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other or that nothing reads."""
        _check_idle_keys(self)
        _check_instruction(self)
        if not self.samples and self.config.rollout.ahead:
            raise ValueError(
                f"rollout.ahead: got 1 with objective.name {self.config.objective.name!r}, which "
                "trains on the reference solutions, so nothing is sampled; leave it out"
            )
        if self.config.objective.importance_cap is not None:
            _check_comparable(self.config)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError for a tokenizer that the recipe cannot train with."""

    def notes(self) -> list[str]:
        """Returns notes on settings that are allowed but may surprise, for the console."""
        return []

    @property
    def display(self) -> Display:
        """What the console and the report show."""
        raise NotImplementedError

    # ---- a step ----------------------------------------------------------------------------------

    def prepare(
        self, context: StepContext, examples: Sequence[TrainExample]
    ) -> Sequence[TrainExample]:
        """Adds to this rank's examples what the loss needs besides the rollouts, such as the
        teacher view. Every rank calls it."""
        return examples

    def prepare_batch(self, examples: Sequence[TrainExample]) -> Sequence[TrainExample]:
        """Adds to all ranks' examples what depends on all of them, such as the advantages of a
        group."""
        return examples

    def trained(self, examples: Sequence[TrainExample]) -> Sequence[TrainExample]:
        """Returns the examples, of all ranks, that the models process."""
        return examples

    @property
    def leaves_out(self) -> bool:
        """Whether `trained` may leave rollouts out of the passes, for the estimates."""
        return False

    def head_work(self, num_passes: int) -> HeadWork:
        """Returns the work of `loss` with the heads, for the estimates. By default, it is that of
        `token_logprobs` of the student and of each second pass.

        num_passes: number of second passes over each rollout.
        """
        # The logits, and the gradient back through them; a trained head's takes the logits again.
        return HeadWork(student=2 if self.config.lora.enabled else 4)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes the loss of one micro-batch."""
        raise NotImplementedError

    def metrics(self, examples: Sequence[TrainExample]) -> dict[str, float]:
        """Returns means over all ranks' examples of values that the loss does not compute."""
        metrics = {
            "truncation_rate": mean(e.rollout.truncated for e in examples),
            "completion_length": mean(len(e.rollout.completion_ids) for e in examples),
        }
        if not self.samples:
            return metrics
        verdicts = [e.verdict for e in examples if e.verdict is not None]
        overlaps = [e.overlap for e in examples if e.overlap is not None]
        if overlaps:
            metrics["overlap"] = mean(overlaps)
        if not verdicts:
            # Rows without an answer are neither right nor wrong.
            return metrics
        return metrics | {
            "accuracy": mean(verdict.correct for verdict in verdicts),
            "checker_errors": sum(verdict.error is not None for verdict in verdicts),
        }


def mean(values: Any) -> float:
    """Returns the mean of numbers, or 0 for none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def stale_rollouts_note(config: Config) -> list[str]:
    """Returns a note for policy gradients whose rollouts are one step old and not reweighted."""
    if not config.rollout.ahead or config.objective.importance_cap is not None:
        return []
    return [
        "with rollout.ahead 1 the rollouts are one step older than the weights that train on them; "
        "only importance weights correct this; --objective.importance_cap 2.0 adds them and needs "
        "--rollout.top_p 1.0 --rollout.top_k -1"
    ]


def recipe_class(name: str) -> type[Recipe]:
    """Returns the recipe of a name, built in or "module:Class". Raises ValueError if there is
    none."""
    return load_class(name, PACKAGE, ATTRIBUTE, "objective.name", Recipe, ("display", "loss"))


def recipe_of(config: Config) -> Recipe:
    """Returns the recipe that the configuration names, bound to it."""
    return recipe_class(config.objective.name)(config)


def draws(config: Config) -> bool:
    """Returns whether the run samples from the model: rollouts, or answers in evaluations."""
    return recipe_of(config).samples or config.eval.enabled


def keeps_base(config: Config) -> bool:
    """Returns whether a run that trains all weights holds a frozen copy of the base beside them:
    not if other models are the teachers, in this process or on a server."""
    recipe = recipe_of(config)
    if recipe.second_pass == "base":
        return True
    return recipe.served_top_k is None and config.teacher.weights != "external"


def recipe_that_recorded(keys: Collection[str]) -> Recipe:
    """Returns the built-in recipe whose runs record these keys, with the default settings."""
    names = plugin_names(PACKAGE, ATTRIBUTE)

    def order(name: str) -> tuple[bool, bool, int]:
        found = recipe_class(name)
        # The recipe without a mark comes last: it is used if no mark is recorded. One that is
        # derived from others comes before them.
        mark = found.recorded_as
        return mark not in keys, mark != "", -len(found.__mro__)

    name = min(names, key=order)
    return recipe_of(Config.model_validate({"objective": {"name": name}}))


def reads(recipe: type[Recipe], key: str) -> bool:
    """Returns whether `key` is in the recipe's `keys`, by name or by its section ("grpo.*")."""
    named = key in recipe.keys or f"{key.partition('.')[0]}.*" in recipe.keys
    return named and key not in recipe.unread


def as_given(value: object) -> str:
    """Returns a setting's value for a message; tuples are the user's lists."""
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def _check_idle_keys(recipe: Recipe) -> None:
    """Raises ValueError for values that only other recipes read."""
    config = recipe.config
    builtin = {name: recipe_class(name) for name in plugin_names(PACKAGE, ATTRIBUTE)}
    idle: dict[tuple[str, ...], list[str]] = {}
    for key, leaf in LEAVES.items():
        users = tuple(name for name, other in builtin.items() if reads(other, key))
        value = value_of(config, key)
        harmless = (leaf.default, _SWITCHED_OFF.get(key, leaf.default))
        if users and not reads(type(recipe), key) and value not in harmless:
            idle.setdefault(users, []).append(key)
    if not idle:
        return
    lines = []
    for users, keys in idle.items():
        got = ", ".join(f"{key}: got {as_given(value_of(config, key))}" for key in keys)
        back = " ".join(flag(key, LEAVES[key].default) for key in keys)
        lines.append(
            f"{got} with objective.name {config.objective.name!r}, which does not read "
            f"{'it' if len(keys) == 1 else 'them'}; set {back}, or use --objective.name "
            f"{' or '.join(users)}"
        )
    raise ValueError("\n".join(lines))


def _check_instruction(recipe: Recipe) -> None:
    """Raises ValueError for an instruction that no prompt of the run shows."""
    prompts, teacher = recipe.config.prompts, recipe.config.teacher
    if recipe.context is not None:
        prompts = recipe.context.prompts
    shown = prompts.student_template + (prompts.teacher_template if recipe.uses_teacher else "")
    shown += prompts.reason_template if teacher.reason_first else ""
    default = type(prompts).model_fields["instruction"].default
    if prompts.instruction != default and "{instruction}" not in shown:
        raise ValueError(
            f"prompts.instruction: got {prompts.instruction!r} with templates that have no "
            "{instruction}; leave it out, or put {instruction} into prompts.student_template"
        )


def _check_comparable(config: Config) -> None:
    """Raises ValueError if importance weights are used and the sampler's and the trainer's
    probabilities are not comparable."""
    objective, rollout = config.objective, config.rollout
    truncated = rollout.top_p < 1 or rollout.top_k != -1
    if truncated or rollout.temperature != objective.temperature:
        raise ValueError(
            f"objective.importance_cap: got {objective.importance_cap} with rollout.top_p "
            f"{rollout.top_p}, rollout.top_k {rollout.top_k}, rollout.temperature "
            f"{rollout.temperature} and objective.temperature {objective.temperature}; the "
            "sampler's and the trainer's probabilities are comparable only without truncation "
            "and at one temperature; use --rollout.top_p 1.0 --rollout.top_k -1 and equal "
            "temperatures, or --objective.importance_cap none"
        )
