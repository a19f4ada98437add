"""The answer in a completion: the content of a LaTeX box."""

import re

from paint_engine.prompts.boxes import with_braces

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")
_FIRST_BOX = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{}, \\fbox{} or \\framebox{}, with balanced braces or
    none, as in \\boxed 2; else None."""
    text = with_braces(text)
    closing = _closing_braces(text)
    content = None
    for match in _BOX.finditer(text):
        if match.end() in closing:
            content = text[match.end() + 1 : closing[match.end()]].strip()
    return content


def first_box_equals(text: str, answer: str) -> bool:
    """Returns whether the first \\boxed{} of `text` contains `answer`, both as lower-case text
    without outer spaces. Later boxes do not count, even if the first one is not closed."""
    brace = text.find(_FIRST_BOX) + len(_FIRST_BOX) - 1
    end = _closing_braces(text).get(brace) if _FIRST_BOX in text else None
    return end is not None and text[brace + 1 : end].strip().lower() == answer.strip().lower()


def _closing_braces(text: str) -> dict[int, int]:
    """Returns the position of the closing brace for each opening one. Escaped braces are text."""
    closing: dict[int, int] = {}
    open_braces: list[int] = []
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            open_braces.append(match.start())
        elif match.group() == "}" and open_braces:
            closing[open_braces.pop()] = match.start()
    return closing
