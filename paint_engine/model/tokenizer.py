"""Loads the base's tokenizer, and compares its vocabulary with the model's head."""

from functools import lru_cache

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from paint_engine.config.sections import ModelSection
from paint_engine.model.forward import lm_head_weight
from paint_engine.model.load import resolve_model
from paint_engine.model.stored import load_failure


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Loads the base's tokenizer.

    Raises ValueError if there is none, if it cannot be read, or if it has no chat template.
    """
    path = resolve_model(section, with_weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        # The tokenizers library raises the bare class for a damaged file.
        raise load_failure("tokenizer of", section.name_or_path, error) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {section.name_or_path} has no chat template, which the prompts of "
            "student and teacher are built with: use an instruct model, or add a "
            "chat_template.jinja beside it"
        )
    return tokenizer


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Raises ValueError with the first token of the first tokenizer that is another one in the
    second, or that the second lacks. Special tokens count; the second may have further tokens.

    names: of the student's and of the teacher's model, for the message.
    """
    tokens, others = (
        {number: token for token, number in one.get_vocab().items()} for one in (tokenizer, other)
    )
    for number in sorted(tokens):
        if others.get(number) != tokens[number]:
            found = repr(others[number]) if number in others else "no token"
            raise ValueError(
                f"teacher {names[1]}: token id {number} is {found}, and it is {tokens[number]!r} "
                f"for the student {names[0]}; needs the same token for every id of the student, "
                "because the loss compares the two vocabularies entry by entry; use a teacher "
                "with the student's tokenizer, such as a larger model of its family"
            )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest token id plus 1. `len(tokenizer)` is less if ids are left out."""
    return _vocabulary_size(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _vocabulary_size(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> int:
    """num_tokens: counts the tokens, to which a caller may have added some since."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raises ValueError if a token of the tokenizer has no row in the model's head.

    name: of the model, for the message.
    """
    num_rows, size = lm_head_weight(model).shape[0], vocabulary_size(tokenizer)
    if size > num_rows:
        last = tokenizer.convert_ids_to_tokens(size - 1)
        raise ValueError(
            f"the tokenizer of {name} has token ids up to {size - 1} ({last!r}), but the model's "
            f"head has {num_rows} rows: they do not belong together; save the model's own "
            "tokenizer beside it, or resize the model's embeddings"
        )
