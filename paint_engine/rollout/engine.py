"""The protocol of sampling engines, with their parameters and completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import EvalSection, RolloutSection
from paint_engine.model import causal_lm, vocabulary_size
from paint_engine.prompts.template import end_of_turn


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. top_k = -1 and top_p = 1 disable truncation.

    A token of `stop_token_ids` ends a completion and stays in it. `vocab_size` is the tokenizer's
    largest id plus 1: the padding rows of the head above it are never sampled.

    logprobs: whether a completion needs the log-probabilities of its tokens. An engine computes
        none for a completion that does not, unless it has them already.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    logprobs: bool = True


@dataclass(frozen=True)
class Completion:
    """Sampled token ids, the log-probability of each under the processed distribution (temperature
    and truncation applied) or none where they were not asked for, and whether the length limit
    ended it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool


def _stops_by_source(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, frozenset[int]]:
    """Returns the tokens that end a completion, by what declares them."""
    settings = causal_lm(model).generation_config
    declared = settings.eos_token_id if settings is not None else None
    found = {
        "the tokenizer's eos_token": [tokenizer.eos_token_id],
        "the generation configuration's": declared if isinstance(declared, list) else [declared],
        "the chat template's end of turn": [end_of_turn(tokenizer)],
    }
    return {
        source: frozenset(stop for stop in stops if isinstance(stop, int))
        for source, stops in found.items()
    }


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns every token that ends a completion: those of the generation settings, often several,
    the tokenizer's, and the chat template's end of turn."""
    found = frozenset().union(*_stops_by_source(model, tokenizer).values())
    padding = tokenizer.pad_token_id
    return tuple(sorted(found | ({padding} if isinstance(padding, int) else set())))


def stop_notes(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns a note if tokenizer, generation settings and chat template name no stop token that
    all of them have."""
    sources = {source: ids for source, ids in _stops_by_source(model, tokenizer).items() if ids}
    if not sources or frozenset.intersection(*sources.values()):
        return []
    named = [
        f"{source} is {' and '.join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ids))))}"
        for source, ids in sources.items()
    ]
    return [f"stop tokens differ: {', '.join(named)}; each of them ends a completion"]


def sampling_params(
    section: RolloutSection | EvalSection, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> SamplingParams:
    """Builds complete sampling parameters from the rollout's or the evaluation's section. No
    evaluation uses log-probabilities: an answer's text is judged."""
    return SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        vocab_size=vocabulary_size(tokenizer),
        logprobs=isinstance(section, RolloutSection),
    )


class EngineDied(Exception):
    """The engine has died, or a server's reply is not what was asked for. One restart may help.

    part: of the run, for messages.
    """

    part = "the rollout engine"


class RolloutEngine(Protocol):
    """Samples completions. Implemented by `builtin`, `vllm_engine` and `vllm_server`."""

    @property
    def can_restart(self) -> bool:
        """Whether this rank can rebuild the engine on its own."""
        ...

    @property
    def always_has_logprobs(self) -> bool:
        """Whether completions have log-probabilities where `SamplingParams.logprobs` is false, too,
        since they cost nothing more."""
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

    def pause(self) -> None:
        """Frees the memory of an engine that has some of its own, until `restart`."""
        ...

    def restart(self) -> None:
        """Rebuilds the engine with the weights of the last `sync`. Raises EngineDied if that
        fails."""
        ...

    def close(self) -> None:
        """Frees the engine's resources, including files in shared memory."""
        ...
