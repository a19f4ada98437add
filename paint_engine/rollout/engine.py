"""What the sampling engines share: the protocol, sampling parameters and completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import EvalSection, RolloutSection
from paint_engine.model.forward import causal_lm


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. top_k = -1 and top_p = 1 switch the truncations off.

    `stop_token_ids` end a completion and stay in it. `vocab_size` is the tokenizer's: the rows of
    the head above it (padding) are never drawn.
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
    """Every token that ends an answer: the generation settings' (often several) and the
    tokenizer's."""
    settings = causal_lm(model).generation_config
    declared = settings.eos_token_id if settings is not None else None
    own = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    candidates = own + (declared if isinstance(declared, list) else [declared])
    return tuple(sorted({stop for stop in candidates if isinstance(stop, int)}))


def sampling_params(
    section: RolloutSection | EvalSection, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> SamplingParams:
    """Every field of the sampler set, from the rollout's or the evaluation's section."""
    return SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        vocab_size=len(tokenizer),
    )


class EngineDied(Exception):
    """What samples has died; one restart is worth a try."""


class RolloutEngine(Protocol):
    """What completions come from. vLLM's two forms are in `rollout_vllm` and `rollout_server`."""

    @property
    def can_restart(self) -> bool:
        """Whether this rank can build the engine anew by itself."""
        ...

    def sync(self, weights_version: int) -> None:
        """Makes the student's present weights the ones to sample from. A collective of all ranks.

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
        """One completion for each of this rank's prompts, in their order.

        base: from the model as it was before training.
        on_batch: called with the indices and the completions of those that have finished.

        Raises EngineDied.
        """
        ...

    def restart(self) -> None:
        """Builds what has died anew, with the weights of the last `sync`. Raises EngineDied where
        that cannot be done."""
        ...

    def close(self) -> None:
        """Frees what the engine holds, files in shared memory included."""
        ...
