"""Text of others as it may be printed: what it says is seen, and moves no cursor."""

import unicodedata

# Controls, formats (which change direction or are not seen), surrogates, line and paragraph
# separators.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_KEPT = frozenset("\n\t")


def is_hidden(character: str) -> bool:
    """Returns whether a terminal obeys the character, or does not show it."""
    return unicodedata.category(character) in _HIDDEN


class _Escapes(dict[int, str]):
    """What each code point is printed as, made when it is first met."""

    def __init__(self, kept: frozenset[str]) -> None:
        super().__init__()
        self._kept = kept

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_seen = character in self._kept or not is_hidden(character)
        # Python's notation: \r, \x1b, \u202e.
        text = character if is_seen else character.encode("unicode_escape").decode("ascii")
        self[code] = text
        return text


_LINES, _LINE = _Escapes(_KEPT), _Escapes(frozenset())


def printable(text: str) -> str:
    """Returns the text with every character that a terminal would obey, or not show, as an escape:
    `\\x1b`, `\\u202e`. Line breaks and tabs stay.

    Some scripts and emoji join letters by characters that are not seen (U+200D); these are escaped
    too.
    """
    return text.translate(_LINES)


def one_line(text: str) -> str:
    """As `printable`, with line breaks and tabs as escapes too: for a name or a value in a line of
    ours, which a line break in it would end."""
    return text.translate(_LINE)
