"""Text of others as it may be printed: what it says is seen, and moves no cursor."""

import math
import reprlib
import unicodedata

# Controls, formats (which change direction or are not seen), surrogates, line and paragraph
# separators.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_KEPT = frozenset("\n\t")
_MAX_SHOWN_CHARS = 60


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


class _Short(reprlib.Repr):
    """Looks at the start of a value alone: it may be huge, or nested deeper than `repr` can go."""

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[: _MAX_SHOWN_CHARS + 1])

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no number of more than 4,300 digits.
        if (bits := x.bit_length()) < 1000:
            return repr(x)
        return f"an integer of about {bits * math.log10(2):,.0f} digits"


_SHORT = _Short()


def shown(value: object) -> str:
    """Returns a value as a message shows it: as Python writes it, cut to about 60 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
