"""The problem sets of a run, with the record of their rows."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.schema import Config
from paint_engine.data import ProblemSet, data_record, load_eval_sets, load_train_set
from paint_engine.model import max_context
from paint_engine.scoring import ServedModel
from paint_engine.types import Reader


def load_sets(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    base: nn.Module,
    readers: Sequence[Reader],
    served: ServedModel | None,
    say: Callable[[str], object],
) -> tuple[ProblemSet, dict[str, ProblemSet], dict[str, Any]]:
    """Returns the training and the evaluation sets, and the record of their rows. A collective.

    readers: the teachers that are other models.
    """
    context = max_context(base)
    if served is not None:
        # The student's tokenizer writes the prompts.
        readers = (Reader(tokenizer, served.room(context)),)
    train_set = load_train_set(config, tokenizer, context, say, readers)
    eval_sets = load_eval_sets(config, tokenizer, max_context(base), say)
    return train_set, eval_sets, data_record(config, train_set, eval_sets)
