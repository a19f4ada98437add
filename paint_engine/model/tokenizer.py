"""Loads the base's tokenizer."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from paint_engine.config.sections import ModelSection
from paint_engine.model.load import resolve_model
from paint_engine.model.stored import load_failure


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Loads the base's tokenizer.

    Raises ValueError if there is none, or if it has no chat template.
    """
    path = resolve_model(section.name_or_path, with_weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except OSError as error:
        raise load_failure("tokenizer of", section.name_or_path, error) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {section.name_or_path} has no chat template, which the prompts of "
            "student and teacher are built with: use an instruct model, or add a "
            "chat_template.jinja beside it"
        )
    return tokenizer
