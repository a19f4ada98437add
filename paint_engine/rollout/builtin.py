"""The built-in sampler: batched decoding with any Hugging Face causal language model.

Every request has its own seed. A completion therefore does not depend (except for floating-point
rounding) on the other requests of its batch, on the number of processes, or on earlier samples.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from paint_engine.model import causal_lm
from paint_engine.model.forward import backbone_states
from paint_engine.model.sharding import unsharded
from paint_engine.rollout.engine import Completion, SamplingParams

# Finished rows are dropped from the batch when they are this share of it. This is rare enough that
# copying the cache costs little, and often enough that stragglers do not decode in a mostly
# finished batch.
_COMPACTION_SHARE = 0.25


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


def _decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    params: SamplingParams,
) -> list[Completion]:
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    assert head is not None
    ids, mask = _pad_left(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    uniforms = _uniforms(seeds, params.max_new_tokens, device)
    drawn = _Drawn(len(prompts), params, device)
    cache = DynamicCache(config=model.config)
    rows = torch.arange(len(prompts), device=device)
    for step in range(params.max_new_tokens):
        hidden = backbone_states(
            model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )[:, -1]
        tokens, logprobs = sample_tokens(head(hidden), uniforms[rows, step], params)
        live = drawn.record(step, rows, tokens, logprobs)
        num_live = int(live.sum())
        if num_live == 0:
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if num_live <= (1 - _COMPACTION_SHARE) * len(rows):
            kept = live.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, mask, ids, positions = rows[kept], mask[kept], ids[kept], positions[kept]
    return drawn.completions()


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
        length, so little of a batch is padding.
    on_batch: is called with the indices and the completions of each finished group.
    """
    assert len(prompts) == len(seeds)
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), max_sequences):
        group = order[start : start + max_sequences]
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
    """

    def __init__(
        self,
        model: nn.Module,
        base: Callable[[], AbstractContextManager[nn.Module]],
        max_sequences: int,
    ) -> None:
        self._model = model
        self._base = base
        self._max_sequences = max_sequences

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

    def restart(self) -> None:
        """Does nothing: the engine has no state of its own."""

    def close(self) -> None:
        """Does nothing: there is nothing to free."""
