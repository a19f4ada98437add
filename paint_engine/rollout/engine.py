"""The protocol of sampling engines, with their parameters and completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import EvalSection, RolloutSection
from paint_engine.model import causal_lm


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. top_k = -1 and top_p = 1 disable truncation.

    A token of `stop_token_ids` ends a completion and stays in it. `vocab_size` is the tokenizer's:
    the padding rows of the head above it are never sampled.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True)
class Completion:
    """Sampled token ids, the log-probability of each under the processed distribution (temperature
    and truncation applied), and whether the length limit ended it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns every token that ends a completion: those of the generation settings, often several,
    and the tokenizer's."""
    settings = causal_lm(model).generation_config
    declared = settings.eos_token_id if settings is not None else None
    own = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    candidates = own + (declared if isinstance(declared, list) else [declared])
    return tuple(sorted({stop for stop in candidates if isinstance(stop, int)}))


def sampling_params(
    section: RolloutSection | EvalSection, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> SamplingParams:
    """Builds complete sampling parameters from the rollout's or the evaluation's section."""
    return SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        vocab_size=len(tokenizer),
    )


class EngineDied(Exception):
    """The engine has died. One restart may help."""


class RolloutEngine(Protocol):
    """Samples completions. Implemented by `builtin`, `vllm_engine` and `vllm_server`."""

    @property
    def can_restart(self) -> bool:
        """Whether this rank can rebuild the engine on its own."""
        ...

    def sync(self, weights_version: int) -> None:
        """Makes the engine sample from the student's current weights. A collective call.

        weights_version: the number of finished steps.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool = False,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Returns one completion for each of this rank's prompts, in their order.

        base: samples from the model before training.
        on_batch: is called with the indices and the completions that have finished.

        Raises EngineDied.
        """
        ...

    def restart(self) -> None:
        """Rebuilds the engine with the weights of the last `sync`. Raises EngineDied if that
        fails."""
        ...

    def close(self) -> None:
        """Frees the engine's resources, including files in shared memory."""
        ...
