"""The sampler of a run, with the completions that a checkpoint has stored."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.schema import Config
from paint_engine.data import ProblemSet, step_requests
from paint_engine.distributed import World, my_share, raise_together
from paint_engine.files import STATE_FILE, BadFile
from paint_engine.model import lm_head_weight
from paint_engine.monitor.timings import Timings
from paint_engine.rollout import Completion, RolloutEngine, Sampled, Sampler, sampling_params
from paint_engine.training.run import SavedProgress
from paint_engine.types import Request


def build_sampler(
    config: Config,
    engine: RolloutEngine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    world: World,
    progress: SavedProgress,
    warn: Callable[[str], None],
) -> Sampler:
    """Returns the sampler, with the completions of `progress`. A collective call.

    warn: gets what the engine's restarts say.
    """
    num_tokens = lm_head_weight(model).shape[0]

    def requests(step: int) -> list[Request]:
        return step_requests(config, train_set, step, world)

    return Sampler(
        engine,
        requests,
        sampling_params(config.rollout, model, tokenizer),
        ahead=config.rollout.ahead == 1,
        timings=Timings(),
        warn=warn,
        pending=_sampled_ahead(progress, requests, num_tokens, world),
    )


def _sampled_ahead(
    progress: SavedProgress, requests: Callable[[int], list[Request]], num_tokens: int, world: World
) -> Sampled | None:
    """Returns this rank's share of the completions that a checkpoint stores. A collective.

    num_tokens: of the model's vocabulary.

    Raises BadFile where they are none of this run's.
    """
    if progress.sampled_ahead is None:
        return None
    (version, stored), step = progress.sampled_ahead, progress.step
    own, mine = requests(step), my_share(stored, world)
    fits = len(mine) == len(own) and version <= step
    for ids, logprobs, _ in mine:
        fits = fits and len(ids) == len(logprobs) > 0 and max(ids) < num_tokens
    problem = (
        f"{STATE_FILE} of step {step}: sampled_ahead: got {len(stored)} completions of the weights "
        f"after {version} steps; needs one for each problem of the next step, with a "
        f"log-probability for each of its tokens, and ids below {num_tokens}; it was changed by "
        "hand: restore it from a copy, or move that checkpoint away to resume from the one before"
    )
    raise_together(None if fits else BadFile(problem))
    completions = [Completion(tuple(ids), tuple(logprobs), cut) for ids, logprobs, cut in mine]
    return Sampled(step, version, own, completions)
