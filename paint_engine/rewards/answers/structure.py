"""The structure of a final answer: a list, a tuple, a set, an interval, a union of them, a matrix,
a relation, or an expression that has none.

`read` looks at brackets, separators and signs of relation only. What an expression means is not
decided here.
"""

import re
from dataclasses import dataclass
from typing import Literal

from paint_engine.rewards.answers.units import split_bound, unwrap_all
from paint_engine.rewards.notation import to_tex

Brackets = Literal["", "()", "[]", "(]", "[)", "{}"]

_MAX_DEPTH = 20

_NULL_DELIMITER = re.compile(r"\\(?:left|right)\s*\.(?![0-9])")
_SIZE = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text)style|(?:no)?limits)(?![A-Za-z])"
)
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:! ]|(?:q?quad|(?:thin|en)space|nolinebreak)(?![A-Za-z]))|~")
_THOUSANDS = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:\{,\}|\\,|,?\\!)\s?[0-9]{3})+(?![0-9])")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}")
_SPACED_NUMBER = re.compile(r"-?[1-9][0-9]{0,2}(?:\s[0-9]{3})+(?:\.[0-9]+)?")
_TEXT_COMMA = re.compile(r"\\text[a-z]*\s*\{\s*[,;]\s*\}")
_SIGNS = {
    **{"\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]"},
    **{"\\geqslant": "\\ge", "\\geq": "\\ge", "\\leqslant": "\\le", "\\leq": "\\le"},
    **{"\\gt": ">", "\\lt": "<", "\\neq": "\\ne", "\\mid": "|"},
    "\\varnothing": "\\emptyset",
}
_SIGN = re.compile(r"\\(?:[lr]brac[ek]|[gl]eqslant|[gl]eq|gt|lt|neq|mid|varnothing)(?![A-Za-z])")
_ASCII_RELATION = re.compile(r"[<>!]=|=[<>]")
_LETTER = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|it|bf|sf|normal)|operatorname|mbox)\s*\{\s*([A-Za-z])\s*\}"
)
_PERIOD = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*(?:\{([0-9]+)\}|([0-9]))")
_DOTTED = re.compile(
    r"(?<![0-9.])([0-9]*)\.([0-9]*)\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?"
)
_IN_PARENTHESES = re.compile(r"(?<![0-9.])([0-9]+)\.([0-9]*)\(([0-9]+)\)(?!\^)")
_ELLIPSIS = re.compile(r"(?<![0-9.])([0-9]+)\.([0-9]+)\s*(?:\.{2,}|\\[lc]?dots)")

_SPECIAL = re.compile(
    r"\\begin\{[a-z]*\}|\\end\{[a-z]*\}|\\(?:[lr]angle|[lr]floor|[lr]ceil|text[a-z]*|mbox|[a-z]+)"
    r"(?![A-Za-z])|\\.|[<>!]?=|[<>]|.",
    re.IGNORECASE | re.DOTALL,
)
_OPENING = frozenset(("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"))
_CLOSING = frozenset((")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"))
_PAIRS: dict[tuple[str, str], Brackets] = {
    **{("(", ")"): "()", ("[", "]"): "[]", ("(", "]"): "(]", ("[", ")"): "[)"},
    **{("\\{", "\\}"): "{}", ("\\langle", "\\rangle"): "()"},
}
_RELATIONS = {
    **{"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "!=": "!="},
    **{"\\in": "in", "\\approx": "~", "\\simeq": "~"},
}
_WORDS = {
    "or": re.compile(
        r"\\text[a-z]*\s*\{\s*,?\s*or\s*\}|,?(?<![A-Za-z\\])\bor\b(?![A-Za-z])|\\lor(?![a-z])"
    ),
    "and": re.compile(
        r"\\text[a-z]*\s*\{\s*,?\s*and\s*\}|,?(?<![A-Za-z\\])\band\b(?![A-Za-z])|\\land(?![a-z])"
        r"|\\wedge(?![a-z])|和"
    ),
}
_MATRIX = re.compile(
    r"[\[(]?\\begin\{([pbB]?matrix|array|smallmatrix)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}[\])]?",
    re.DOTALL,
)
_DESCRIBED = re.compile(
    r"\s*([A-Za-z])(?:\s*\\in\s*(?:\\mathbb\s*\{?R\}?|\\R))?\s*[|:]\s*(.*\1.*)", re.DOTALL
)
_ROW = re.compile(r"\\\\(?:\s*\[[0-9.]+[a-z]{2}\])?|\\cr(?![a-z])")
_FRENCH = re.compile(r"(?:(\])|([\[(]))([^\[\](){},;]+)[,;]([^\[\](){},;]+)(?:(\[)|([\])]))")
_GROUPED_NUMBER = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")


@dataclass(frozen=True)
class Expression:
    """What has no structure: Expression("2\\\\sqrt{3}\\\\text{ cm}")."""

    text: str


@dataclass(frozen=True)
class Listing:
    """(1, 2), [1, 2), {1, 2} or, with `brackets` empty, 1, 2."""

    items: tuple["Answer", ...]
    brackets: Brackets


@dataclass(frozen=True)
class Union:
    """Sets that are joined by \\cup, or relations that are joined by `or`."""

    parts: tuple["Answer", ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Relation:
    """1 < x <= 2 is Relation(("1", "x", "2"), ("<", "<=")). A side may be blank: >= 5."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]
    text: str


Answer = Expression | Listing | Union | Matrix | Relation


def tidy(text: str) -> str:
    """`text` without what only lays it out, in ASCII as far as it goes: no sizes, no spacing
    commands, no thousands separators but commas, repeating decimals as fractions."""
    text = to_tex(text).strip()
    text = _THOUSANDS.sub(lambda match: re.sub(r"[^0-9]", "", match.group()), text)
    text = _SIZE.sub("", _NULL_DELIMITER.sub("", text))
    text = _TEXT_COMMA.sub(", ", _SPACE.sub(" ", text))
    text = _SIGN.sub(lambda match: _SIGNS[match.group()] + " ", text)
    text = _ASCII_RELATION.sub(_spell_relation, text)
    text = re.sub(r"\\not\s*=", r"\\ne ", re.sub(r"\\not\s*\\in(?![a-z])", r"\\notin ", text))
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    if _SPACED_NUMBER.fullmatch(text):
        text = re.sub(r"\s", "", text)
    if "\\begin" not in text:
        # Escaped twice, as in a JSON string within a string.
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = re.sub(r"\$\$|\\\[(?![0-9])|\\\]|\\\(|\\\)", "", text).strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    for pattern in (_PERIOD, _DOTTED, _IN_PARENTHESES):
        text = pattern.sub(_period_as_fraction, text)
    return _ELLIPSIS.sub(_ellipsis_as_number, text)


def read(text: str, depth: int = 0) -> Answer:
    """The structure of a tidy text."""
    text = _trim(text)
    if depth > _MAX_DEPTH:
        return Expression(text)
    bound = split_bound(text)
    if bound is not None:
        return Relation(("", bound[1]), (bound[0],), text)
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None and "\\begin" not in matrix[2]:
        return _matrix(matrix[2], depth)
    for word in ("or", "and"):
        parts = _split(_WORDS[word].sub(f" \0{word} ", text), (f"\0{word}",))
        if len(parts) > 1 and all(part.strip(" ,") for part in parts):
            return _joined([read(part.strip(" ,"), depth + 1) for part in parts], word)
    groups = _split(text, (";",))
    if len(groups) > 1 and all(len(_split(group, (",",))) > 1 for group in groups):
        # Tuples without brackets: 1, 2; 3, 4.
        return Listing(tuple(read(f"({group})", depth + 1) for group in groups), "")
    parts = _split(_protect(text, at_top=True), (",", ";"))
    if len(parts) > 1:
        return Listing(tuple(_items(parts, depth)), "")
    relation = _relation(text)
    if relation is not None:
        return relation
    parts = _split(text, ("\\cup",))
    if len(parts) > 1:
        return Union(tuple(read(part, depth + 1) for part in parts))
    return _bracketed(text, depth) or _plus_or_minus(text) or Expression(text)


def single_letters(text: str) -> str:
    """`text` with \\mathrm{e} and its like as plain letters."""
    return _LETTER.sub(r" \1", text)


def _trim(text: str) -> str:
    text = text.strip()
    while text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    while text.startswith("{") and _closes(text) == len(text) - 1:
        text = text[1:-1].strip()
    return unwrap_all(text).strip()


def _spell_relation(match: re.Match[str]) -> str:
    text = match.group()
    return "\\ne " if "!" in text else "\\ge " if ">" in text else "\\le "


def _period_as_fraction(match: re.Match[str]) -> str:
    groups = [group or "" for group in match.groups()]
    whole, start = groups[:2]
    period = "".join(groups[2:])
    plain, repeated = int(f"0{whole}{start}"), int(f"0{whole}{start}{period}")
    denominator = 10 ** len(start) * (10 ** len(period) - 1)
    return f"\\frac{{{repeated - plain}}}{{{denominator}}}"


def _ellipsis_as_number(match: re.Match[str]) -> str:
    whole, digits = match.groups()
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        copies = 2 if length > 1 or digits == period * len(digits) else 3
        if digits.endswith(period * copies):
            start = digits[: len(digits) - length]
            return _period_as_fraction_of(whole, start, period)
    return match.group().rstrip(".").rstrip() if "." in match.group()[-2:] else f"{whole}.{digits}"


def _period_as_fraction_of(whole: str, start: str, period: str) -> str:
    match = _PERIOD.fullmatch(f"{whole}.{start}\\overline{{{period}}}")
    assert match is not None
    return _period_as_fraction(match)


def _tokens(text: str) -> list[tuple[str, int]]:
    return [(match.group(), match.start()) for match in _SPECIAL.finditer(text)]


def _closes(text: str) -> int:
    """Where the bracket closes that the text starts with; -1 where it does not."""
    depth = 0
    for token, start in _tokens(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return start + len(token) - 1
    return -1


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts of `text` between separators outside of all brackets and environments."""
    parts, depth, begin = [], 0, 0
    for token, start in _tokens(text):
        if token in _OPENING or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSING or token.startswith("\\end"):
            depth -= 1
        elif depth == 0:
            for separator in separators:
                if text.startswith(separator, start) and token == separator[: len(token)]:
                    parts.append(text[begin:start])
                    begin = start + len(separator)
    return [*parts, text[begin:]] if depth == 0 else [text]


def _protect(text: str, *, at_top: bool) -> str:
    """Takes the commas out of numbers. In brackets, 100,200 is a list unless the other commas
    have a space after them, or a group starts with 0."""
    loose = ", " in text

    def join(match: re.Match[str]) -> str:
        is_number = at_top or loose or re.search(r",0", match.group())
        return match.group().replace(",", "") if is_number else match.group()

    return _GROUPED_NUMBER.sub(join, text)


def _items(parts: list[str], depth: int) -> list[Answer]:
    items: list[Answer] = []
    for part in parts:
        item = read(part, depth + 1)
        # 1 \pm 2, 3 are three items; so are 1, 2 \text{ and } 3.
        is_open = isinstance(item, Listing) and item.brackets == ""
        items.extend(item.items if is_open and isinstance(item, Listing) else [item])
    return [item for item in items if item != Expression("")]


def _joined(parts: list[Answer], word: str) -> Answer:
    """`or` joins sets and relations; else both words make a list."""
    if word == "or" and any(isinstance(part, Relation) and "=" not in part.signs for part in parts):
        return Union(tuple(parts))
    items: list[Answer] = []
    for part in parts:
        is_open = isinstance(part, Listing) and part.brackets == ""
        items.extend(part.items if is_open and isinstance(part, Listing) else [part])
    return Listing(tuple(items), "")


def _relation(text: str) -> Relation | None:
    sides, signs, depth, begin = [], [], 0, 0
    for token, start in _tokens(text):
        if token in _OPENING or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSING or token.startswith("\\end"):
            depth -= 1
        elif depth == 0 and token in _RELATIONS:
            sides.append(text[begin:start].strip())
            signs.append(_RELATIONS[token])
            begin = start + len(token)
    if not signs or depth:
        return None
    return Relation((*sides, text[begin:].strip()), tuple(signs), text)


def _bracketed(text: str, depth: int) -> Answer | None:
    french = _FRENCH.fullmatch(text)
    if french is not None and (french[1] or french[5]):
        left = "(" if french[1] else french[2]
        right = ")" if french[5] else french[6]
        return read(f"{left}{french[3]},{french[4]}{right}", depth + 1)
    tokens = _tokens(text)
    if len(tokens) < 2 or _closes(text) != len(text) - 1:
        return None
    brackets = _PAIRS.get((tokens[0][0], tokens[-1][0]))
    if brackets is None:
        return None
    inner = text[len(tokens[0][0]) : tokens[-1][1]]
    if brackets == "{}" and ("|" in inner or ":" in inner):
        # The elements are described, not listed.
        described = _DESCRIBED.fullmatch(inner)
        condition = read(described[2], depth + 1) if described else None
        return condition if isinstance(condition, Relation | Union) else None
    parts = _split(_protect(inner, at_top=False), (",", ";"))
    if len(parts) == 1 and brackets == "()":
        return read(inner, depth + 1)
    if len(parts) == 1 and brackets != "{}":
        return None
    return Listing(tuple(_items(parts, depth)), brackets)


def _plus_or_minus(text: str) -> Answer | None:
    signs = re.findall(r"\\(?:pm|mp)(?![A-Za-z])", text)
    if not signs:
        return None
    upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return Listing((Expression(upper.strip().lstrip("+").strip()), Expression(lower.strip())), "")


def _matrix(content: str, depth: int) -> Answer:
    rows = [row for row in _ROW.split(content.replace("\\hline", "")) if row.strip()]
    return Matrix(
        tuple(tuple(read(entry, depth + 1) for entry in _split(row, ("&",))) for row in rows)
    )
