r"""Boxes without braces, which TeX reads too: \boxed 2 and \boxed\frac12."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
# Authors box a whole number, though TeX would take its first digit alone.
_NUMBER = re.compile(r"[-+\u2212]?\s*(?:\\\$\s*)?\d+(?:[.,]\d+)*")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_GROUP = re.compile(r"\{[^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}")
_OPTION = re.compile(r"\[[^\]\n]*\]")
# What two commands enclose, without another such pair in it.
_ENCLOSED = re.compile(
    r"\\left\b(?:(?!\\left\b)[^\n])*?\\right\b\s*(?:\\[A-Za-z]+|\\?.)|\\\{[^{}\n]*?\\\}"
)
_MAX_CONTENT_CHARS = 256
_LETTER = re.compile(r"[^\W\d_](?![^\W\d_])")
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac", "binom", "dbinom", "tbinom")
_NUM_ARGUMENTS = {"\\sqrt": 1} | {f"\\{name}": 2 for name in _FRACTIONS}
_NO_CONTENT = {"\\begin", "\\end", "\\left", "\\right", "\\quad", "\\qquad", "\\hspace"}


def with_braces(text: str) -> str:
    r"""Returns the text with braces around the content of each box that has none.

    The content is a number, a letter, or a command with its arguments, bare ones among them:
    \boxed -12, \fbox x, \boxed\frac12, \boxed\sqrt{2}, \boxed\text{no}. A box within such a content
    gets its braces too. What is no content, such as a dollar sign, leaves the box as it is.
    """
    parts, start = [], 0
    for found in _BOX.finditer(text):
        if found.start() < start:
            continue
        # The window bounds the time and the depth that hostile text takes.
        window = text[found.end() : found.end() + _MAX_CONTENT_CHARS]
        length = _end_of_content(window, 0)
        if length is not None:
            content = with_braces(window[:length])
            parts += [text[start : found.start()], found.group().rstrip(), f"{{{content}}}"]
            start = found.end() + length
    return "".join([*parts, text[start:]])


def _end_of_content(text: str, start: int) -> int | None:
    """Returns where the bare content ends that starts at a place; None if there is none."""
    if number := _NUMBER.match(text, start):
        return number.end()
    # A longer word is prose about boxes.
    if whole := _ENCLOSED.match(text, start) or _LETTER.match(text, start):
        return whole.end()
    command = _COMMAND.match(text, start)
    name = command.group() if command else ""
    if command is None or not name[1].isalpha() or name in _NO_CONTENT:
        return None
    if _BOX.fullmatch(name):
        end = _after_space(text, command.end())
        group = _GROUP.match(text, end)
        return group.end() if group else _end_of_content(text, end)
    return _end_of_arguments(text, command.end(), _NUM_ARGUMENTS.get(name))


def _after_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _end_of_arguments(text: str, start: int, num_arguments: int | None) -> int:
    """Returns where a command's arguments end. With None, the command takes the groups that follow
    it."""
    end = start
    if option := _OPTION.match(text, start):
        end = option.end()
    for _ in range(9 if num_arguments is None else num_arguments):
        place = end if num_arguments is None else _after_space(text, end)
        if group := _GROUP.match(text, place):
            end = group.end()
        elif num_arguments is None:
            break
        elif command := _COMMAND.match(text, place):
            end = _end_of_arguments(text, command.end(), _NUM_ARGUMENTS.get(command.group()))
        elif text[place : place + 1].isalnum():
            end = place + 1
        else:
            break
    return end
