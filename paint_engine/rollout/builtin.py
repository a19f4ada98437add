"""The built-in sampler: batched decoding with any Hugging Face causal language model.

Every request has its own seed. A completion therefore does not depend (except for floating-point
rounding) on the other requests of its batch, on the number of processes, or on earlier samples.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from inspect import signature
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from paint_engine.model import causal_lm, compute_dtype
from paint_engine.model.forward import backbone_states
from paint_engine.model.rounding import is_rounding, relative_error, shares_half_the_digits
from paint_engine.model.sharding import unsharded
from paint_engine.monitor import NotFinite
from paint_engine.rollout.engine import Completion, SamplingParams

# Finished rows are dropped from the batch when they are this share of it. This is rare enough that
# copying the cache costs little, and often enough that stragglers do not decode in a mostly
# finished batch.
COMPACTION_SHARE = 0.25

# transformers' own method: false for models whose caches are of another kind.
_TAKES_STANDARD_CACHE = "_supports_default_dynamic_cache"

# Attribute set on a causal language model: the result of `_rows_are_independent`.
_INDEPENDENT = "paint_rows_are_independent"


def kept_distribution(
    logits: Float[Tensor, "B V"], params: SamplingParams
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Returns what temperature, top-k and top-p leave of each row: (B, K) float32 probabilities in
    falling order, without renormalisation, and their (B, K) token ids."""
    logits = logits[:, : params.vocab_size].float()
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if params.top_k > 0:
        ordered, order = ordered[:, : params.top_k], order[:, : params.top_k]
    probabilities = torch.softmax(ordered / params.temperature, dim=-1)
    if params.top_p < 1:
        # A token stays if the mass of the tokens before it is below top_p. The first token always
        # stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    return probabilities, order


def sample_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], params: SamplingParams
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Samples one token per row by inverting the cumulative distribution at `uniforms` in [0, 1).

    Returns the (B,) token ids and their (B,) log-probabilities after temperature, top-k and top-p.
    """
    probabilities, order = kept_distribution(logits, params)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # The count of entries at or below the target is the index of the first entry above it. Rounding
    # can raise the target to the total itself; the last entry with mass is then the sample.
    places = (cumulative <= uniforms[:, None] * total).sum(-1, keepdim=True)
    places = torch.minimum(places, (probabilities > 0).sum(-1, keepdim=True) - 1)
    # NaN logits of a diverged model have no entry with mass. The NaN propagates to the
    # log-probability.
    places = places.clamp(min=0)
    logprobs = (probabilities.gather(1, places) / total).log()
    return order.gather(1, places).squeeze(1), logprobs.squeeze(1)


def _uniforms(seeds: Sequence[int], num_draws: int, device: torch.device) -> Float[Tensor, "B T"]:
    """Returns one stream of uniform numbers per request, drawn on the CPU so that every device gets
    the same."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(num_draws, generator=generator))
    return torch.stack(rows).to(device)


def _pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns token ids and mask (1 on the prompts' own tokens). Every prompt ends in the last
    column."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class _Drawn:
    """The tokens sampled so far for each of B requests, and which requests have met a stop
    token."""

    def __init__(self, num_rows: int, params: SamplingParams, device: torch.device) -> None:
        shape = (num_rows, params.max_new_tokens)
        self._stops = torch.tensor(params.stop_token_ids, device=device)
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(shape, device=device)
        self._lengths = torch.full((num_rows,), params.max_new_tokens, device=device)
        self._stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def record(self, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Writes one token for each of `rows`. Returns which of them continue, as booleans."""
        self._tokens[rows, step], self._logprobs[rows, step] = tokens, logprobs
        ending = rows[torch.isin(tokens, self._stops) & ~self._stopped[rows]]
        self._lengths[ending] = step + 1
        self._stopped[ending] = True
        return ~self._stopped[rows]

    def completions(self) -> list[Completion]:
        columns = (self._tokens, self._logprobs, self._lengths, self._stopped)
        return [
            Completion(tuple(tokens[:length]), tuple(logprobs[:length]), not stopped)
            for tokens, logprobs, length, stopped in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]


def _cache_argument(model: PreTrainedModel) -> str:
    """Returns the argument by which the model's forward takes transformers' standard cache.

    Raises ValueError for a model that keeps another kind.
    """
    names = signature(model.base_model.forward).parameters
    if getattr(model, _TAKES_STANDARD_CACHE)():
        for name in ("past_key_values", "cache_params"):
            if name in names:
                return name
    raise ValueError(
        f"the built-in sampler got a {type(model).__name__}, whose forward pass does not take "
        "transformers' DynamicCache; sample with vLLM (--rollout.engine vllm; --engine vllm for "
        "evaluations), or use another model"
    )


class _Decoding:
    """B texts that the model reads in one batch: what it has read is in its cache, the next tokens
    are in `_ids`."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._ids, self._mask = _pad_left(prompts, next(model.parameters()).device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache_argument = _cache_argument(model)
        self._cache = DynamicCache(config=model.config)

    def read(self) -> Float[Tensor, "B H"]:
        """Reads the next tokens. Returns the final hidden states of the last of each row."""
        # After the prompt, Mamba takes no mask: it has no attention, and multiplies the tokens by
        # the whole of a mask.
        masks = self._cache_argument == "past_key_values" or self._mask.shape == self._ids.shape
        return backbone_states(
            self._model,
            input_ids=self._ids,
            attention_mask=self._mask if masks else None,
            position_ids=self._positions,
            use_cache=True,
            **{self._cache_argument: self._cache},
        )[:, -1]

    def append(self, tokens: Int[Tensor, " B"]) -> None:
        """Sets one next token for each row."""
        self._ids, self._positions = tokens[:, None], self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Drops all but these rows."""
        # Caches of recurrent layers have no method that selects rows, but every cache can be
        # reordered, by any indices.
        self._cache.reorder_cache(cast(torch.LongTensor, rows))
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        self._positions = self._positions[rows]


def _decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    params: SamplingParams,
) -> list[Completion]:
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    # A linear layer, or an adapter's wrapper around it.
    assert head is not None
    uniforms = _uniforms(seeds, params.max_new_tokens, device)
    drawn = _Drawn(len(prompts), params, device)
    decoding = _Decoding(model, prompts)
    rows = torch.arange(len(prompts), device=device)
    for step in range(params.max_new_tokens):
        # Some models, such as Mamba, keep their states in float32 up to the head.
        logits = head(decoding.read().to(head.weight.dtype))
        tokens, logprobs = sample_tokens(logits, uniforms[rows, step], params)
        live = drawn.record(step, rows, tokens, logprobs)
        num_live = int(live.sum())
        if num_live == 0:
            break
        decoding.append(tokens)
        if num_live <= (1 - COMPACTION_SHARE) * len(rows):
            kept = live.nonzero().squeeze(1)
            decoding.keep(kept)
            rows = rows[kept]
    return drawn.completions()


def _states_by_cache(
    model: PreTrainedModel, text: Sequence[int], others: Sequence[Sequence[int]]
) -> Float[Tensor, "3 H"]:
    """Returns the last three states of a text: one after its prompt, one after a single token, and
    one after the other texts of its batch were dropped."""
    decoding = _Decoding(model, [text[:-2], *others])
    states = [decoding.read()[0]]
    for token in text[-2:]:
        num_rows = 1 + len(others) if len(states) == 1 else 1
        decoding.append(torch.tensor([token] * num_rows, device=states[0].device))
        states.append(decoding.read()[0])
        decoding.keep(torch.tensor([0], device=states[0].device))
    return torch.stack(states)


def _rows_are_independent(model: PreTrainedModel) -> bool:
    """Whether a row's states stay as they are when other rows share its batch, pad it on the left
    and leave it. The model is asked once, with a few tokens.

    Attention masks padding out. A recurrent layer or a convolution has to skip it by code of its
    own, and has to keep its state in the cache. Not every architecture does.

    Raises ValueError if the states by the cache are not those of the whole text, and NotFinite if
    these are not finite.
    """
    if hasattr(model, _INDEPENDENT):
        return getattr(model, _INDEPENDENT)
    generator = torch.Generator().manual_seed(0)
    num_tokens = model.config.get_text_config().vocab_size
    drawn = torch.randint(num_tokens, (16,), generator=generator).tolist()
    text, other = drawn[:5], drawn[5:]
    ids = torch.tensor([text], device=next(model.parameters()).device)
    whole = backbone_states(model, input_ids=ids, use_cache=False)[0, -3:]
    if not whole.isfinite().all():
        raise NotFinite(
            f"the built-in sampler got a {type(model).__name__} whose hidden states are not "
            "finite: its weights or its adapter hold NaN or infinity; use another checkpoint"
        )
    alone = relative_error(_states_by_cache(model, text, []), whole)
    if not shares_half_the_digits(alone, compute_dtype(model)):
        raise ValueError(
            f"the built-in sampler got a {type(model).__name__}, whose hidden states with a cache "
            f"differ from those without by {alone:.0%}: what it samples would not be what is "
            "trained; sample with vLLM (--rollout.engine vllm; --engine vllm for evaluations)"
        )
    batched = relative_error(_states_by_cache(model, text, [other]), whole)
    setattr(model, _INDEPENDENT, is_rounding(batched, alone, compute_dtype(model)))
    return getattr(model, _INDEPENDENT)


def _forget(model: PreTrainedModel) -> None:
    """Clears states that a model keeps in its layers: a pass without a cache does."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    backbone_states(model, input_ids=ids, use_cache=False)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    params: SamplingParams,
    *,
    max_sequences: int,
    on_batch: Callable[[list[int], list[Completion]], None] | None = None,
) -> list[Completion]:
    """Returns one completion for each prompt, in the order of the prompts.

    model: a causal language model; adapters inside it are used as they are.
    seeds: one per request, below 2^63.
    max_sequences: number of requests that are decoded at once. Requests are grouped by prompt
        length, so little of a batch is padding. A model whose rows would depend on each other
        decodes one request at a time.
    on_batch: is called with the indices and the completions of each finished group.

    Raises ValueError for a model whose cache the sampler cannot use, and NotFinite for one whose
    hidden states are not finite.
    """
    assert len(prompts) == len(seeds)
    was_training = model.training
    model.eval()
    completions: dict[int, Completion] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    independent = not prompts or _rows_are_independent(model)
    size = max_sequences if independent else 1
    for start in range(0, len(order), size):
        group = order[start : start + size]
        if not independent:
            _forget(model)
        batch = _decode_batch(model, [prompts[i] for i in group], [seeds[i] for i in group], params)
        completions.update(zip(group, batch, strict=True))
        if on_batch is not None:
            on_batch(group, batch)
    model.train(was_training)
    return [completions[i] for i in range(len(prompts))]


class BuiltinEngine:
    """The built-in sampler on the model that trains.

    base: a context that yields the model before training; for rationales, the teacher.
    max_sequences: number of requests that are decoded at once.

    Raises ValueError for a model whose cache the sampler cannot use.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Callable[[], AbstractContextManager[nn.Module]],
        max_sequences: int,
    ) -> None:
        _cache_argument(causal_lm(model))
        self._model = model
        self._base = base
        self._max_sequences = max_sequences

    @property
    def always_has_logprobs(self) -> bool:
        """True: the distribution that draws a token has its probability."""
        return True

    @property
    def can_restart(self) -> bool:
        """True: the engine has no state of its own that could be lost."""
        return True

    def sync(self, weights_version: int) -> None:
        """Does nothing: the weights are the trainer's own."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool = False,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Returns the completions of `generate` for this rank's prompts."""
        with ExitStack() as stack:
            model = stack.enter_context(self._base()) if base else self._model
            stack.enter_context(unsharded(model))
            return generate(
                causal_lm(model),
                prompts,
                seeds,
                params,
                max_sequences=self._max_sequences,
                on_batch=on_batch,
            )

    def pause(self) -> None:
        """Does nothing: the engine has no memory of its own here."""

    def restart(self) -> None:
        """Does nothing: the engine has no state of its own."""

    def close(self) -> None:
        """Does nothing: there is nothing to free."""
