"""Control tokens, such as <|im_end|> and <think>, and texts of data that spell them.

What the chat template and the configuration's own templates write are control tokens. What
problems, solutions and rationales bring is text, whatever it spells: otherwise a row could end its
own turn and begin another.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
"""what models write around a thought"""

# Marks of this form are no ordinary text, even where the tokenizer does not call them special.
_BARS = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
# Noncharacters of Unicode, and a number that no data can know: hidden text cannot be forged.
_NONCE = secrets.token_hex(8)
_HIDDEN = re.compile(f"\ufdd0{_NONCE}([0-9]+)\ufdd1")


def without_thought(text: str) -> str:
    """Returns what a model wrote outside of its thought: what follows the end of the thought, and
    no thought that is not closed.

    A prompt may open the thought; the text then has only its end.
    """
    for begin, end in THOUGHT_MARKS:
        text = text.rpartition(end)[2].partition(begin)[0]
    return text


@dataclass(frozen=True)
class _Vocabulary:
    """The control tokens of a tokenizer.

    ids: by content.
    pattern: finds any of them, the longest first.
    normalize: if some of them are found in normalised text, such as a full-width <think>, the
        function that normalises; else None.
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]
    normalize: Callable[[str], str] | None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the id of each control token by its content.

    They are the special tokens, and of the other added tokens those in the chat template, those
    in bars (<|fim_prefix|>) and the marks of a thought. Other added tokens are ordinary text that
    the tokenizer keeps whole, such as Gemma's line breaks and <table>.
    """
    return _vocabulary(tokenizer).ids


def spelled_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Returns the control tokens that the text spells, in order."""
    return _vocabulary(tokenizer).pattern.findall(text)


class DataTexts:
    """The texts from data in one prompt or target.

    data = DataTexts(tokenizer)
    data.encode(f"<|im_start|>{data.hide(problem)}<|im_end|>")

    `hide` replaces what spells a control token by a placeholder, so that templates see none.
    `encode` puts the text back and encodes it as text, and what else the argument spells as control
    tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._hidden: list[str] = []

    @property
    def spelled(self) -> list[str]:
        """The control tokens that the texts spell, in order."""
        return [text for text in self._hidden if text]

    def hide(self, text: str) -> str:
        """Returns the text with placeholders for the control tokens that it spells."""
        vocabulary = _vocabulary(self._tokenizer)
        hidden = vocabulary.pattern.sub(lambda found: self._placeholder(found.group()), text)
        normalize = vocabulary.normalize
        if hidden == text and normalize and vocabulary.pattern.search(normalize(text)):
            return self._placeholder("") + text
        return hidden

    def _placeholder(self, text: str) -> str:
        self._hidden.append(text)
        return f"\ufdd0{_NONCE}{len(self._hidden) - 1}\ufdd1"

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a text with placeholders.

        Raises ValueError if this tokenizer cannot encode the hidden text as text.
        """
        if not self._hidden:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))
        spelled = next(iter(self.spelled), "a control token")
        if _backend(self._tokenizer) is None:
            raise ValueError(
                f"the data spells {spelled!r}, and {type(self._tokenizer).__name__} of "
                f"{self._tokenizer.name_or_path} cannot encode it as text; needs a tokenizer with "
                "a tokenizer.json; convert it, or leave such rows out"
            )
        vocabulary = _vocabulary(self._tokenizer)
        plain = _plain_backend(self._tokenizer, str(self._tokenizer.chat_template))
        written: Counter[int] = Counter()

        def stand_in(found: re.Match[str]) -> str:
            written[vocabulary.ids[found.group()]] += 1
            return _stand_in(vocabulary.ids[found.group()])

        marked = vocabulary.pattern.sub(stand_in, text)
        marked = _HIDDEN.sub(lambda found: self._hidden[int(found[1])], marked)
        ids = plain.encode(marked, add_special_tokens=False).ids
        unknown = self._tokenizer.unk_token_id
        for token, number in vocabulary.ids.items():
            if number != unknown and ids.count(number) > written[number]:
                raise ValueError(
                    f"the data spells {spelled!r}, and the tokenizer of "
                    f"{self._tokenizer.name_or_path} makes its control token {token!r} from text; "
                    "leave such rows out, or correct the tokenizer"
                )
        return tuple(ids)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def _stand_in(token_id: int) -> str:
    return f"\ufdd2{_NONCE}{token_id}\ufdd3"


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    return _read_vocabulary(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _read_vocabulary(tokenizer: PreTrainedTokenizerBase, template: str) -> _Vocabulary:
    """template: the chat template, which decides with the tokenizer."""
    marks = {mark for pair in THOUGHT_MARKS for mark in pair}
    # transformers' own list, where a model's maker gives one.
    marks |= set(getattr(tokenizer, "chat_control_tokens", None) or ())
    ids, normalized = {}, False
    for number, token in tokenizer.added_tokens_decoder.items():
        content = token.content
        is_mark = content in marks or _BARS.fullmatch(content) is not None
        # A plain word in a template is text.
        in_template = content in template and not content.isalnum()
        if (token.special or is_mark or in_template) and content.strip():
            ids[content] = number
            normalized = normalized or token.normalized
    longest_first = sorted(ids, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    backend = _backend(tokenizer)
    normalizer = backend.normalizer if backend is not None and normalized else None
    return _Vocabulary(ids, pattern, normalizer.normalize_str if normalizer else None)


@lru_cache(maxsize=2)
def _plain_backend(tokenizer: PreTrainedTokenizerBase, template: str) -> Tokenizer:
    """Returns the tokenizer with other, unspellable contents for its control tokens, with the same
    ids. All else is equal, so that ordinary text is encoded as before.

    `split_special_tokens` of transformers does not do this: it leaves added tokens that are not
    special, such as <think>, and applies to the template's own tokens too.
    """
    ids, backend = _read_vocabulary(tokenizer, template).ids, _backend(tokenizer)
    assert backend is not None
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        if token["content"] in ids:
            token["content"] = _stand_in(ids[token["content"]])
            token["normalized"] = False
    _rename_pieces(state["model"], ids)
    state |= {"post_processor": None, "truncation": None, "padding": None}
    plain = Tokenizer.from_str(json.dumps(state))
    for content, number in ids.items():
        assert plain.token_to_id(_stand_in(number)) == number, (content, number)
    return plain


def _rename_pieces(model: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Renames the control tokens in the vocabulary of the tokenizer's model, which would make them
    from text: Unigram always, WordLevel and some BPE from whole words."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        for number in ids.values():
            if number < len(vocabulary):
                vocabulary[number][0] = _stand_in(number)
        return
    if "merges" in model:
        pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        model["merges"] = [pair for pair in pairs if ids.keys().isdisjoint((*pair, "".join(pair)))]
    for content, number in ids.items():
        vocabulary.pop(content, None)
        vocabulary[_stand_in(number)] = number
    if model.get("unk_token") in ids:
        model["unk_token"] = _stand_in(ids[model["unk_token"]])
