"""Whether two final answers are equal: by structure, exact numbers and, where needed, algebra."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from paint_engine.rewards.answers.exact import Number, equal_numbers, read_number
from paint_engine.rewards.answers.structure import (
    Answer,
    Expression,
    Listing,
    Matrix,
    Relation,
    Union,
    read,
    single_letters,
    tidy,
)
from paint_engine.rewards.answers.units import are_different_units, split_unit, unwrap_text
from paint_engine.rewards.notation import normalize_answer

_REVERSED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_VARIABLE = re.compile(
    r"\\?[A-Za-z]+(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9,]+\}))?'*(?:\([A-Za-z0-9,+\- ]*\))?"
)
# What is named by letters alone: |AB|, A:B, \\frac{NO}{BO}, f(2).
_QUANTITY = re.compile(
    rf"{_VARIABLE.pattern}|(?:\\?[A-Za-z]+|[|{{}}():/'\s]|_(?:[0-9]|\{{[0-9A-Za-z]+\}}))+|\(.*\)"
)
_INFINITY = re.compile(r"([+-]?)\s*\\infty|([+-]?)\s*(?:infinity|inf|oo)")
# Names of points, words, choices: letters in their order. Lower-case letters are a product.
_NAME = re.compile(r"(?:[A-Za-z](?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?)+")
_LABELLED = re.compile(
    r"\\(?:angle|triangle|overline|overrightarrow|vec|widehat|odot)\s*\{?\s*(.*?)\}?"
)
_WORD = re.compile(r"\\text[a-z]*\s*\{[^{}]*[A-Za-z]{2}|(?<![\\A-Za-z])[A-Za-z]*[^\W\d_A-Za-z]{2}")
# math-verify drops these without a word, so an answer that has them is compared as text.
_UNREADABLE = re.compile(
    r"'|\\prime|\\[lc]?dots|\.\.\.|[0-9})]\s*_|\\[bp]mod|\\equiv|;|!!"
    r"|\^\s*\{?\s*(?:T(?![A-Za-z])|\\top|\\dagger)|\\frac\s*\{\s*d\s*[a-z]?\s*\}\s*\{\s*d\s*[a-z]"
)
_NEIGHBOURS = re.compile(r"[0-9] [0-9]")
_TIME = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_SHORT_WORDS = frozenset(
    ["yes", "no", "odd", "one", "two", "six", "ten", "all", "any", "nil", "am", "pm"]
)
_EMPTY = Expression("\\emptyset")
_RATIO = re.compile(r"[^:]+(?::[^:]+)+")


class TooLargeToCompare(Exception):
    """Two numbers of which not even residues can be had."""


class Algebra(Protocol):
    """What is equal as mathematics, beyond exact numbers."""

    def equal(self, gold: str, answer: str) -> bool: ...

    def stands_for(self, decimal: Number, text: str) -> bool: ...


def compare_answers(gold: str, answer: str, algebra: Algebra) -> bool:
    """Whether `answer` equals `gold`, the contents of two boxes."""
    gold, answer = tidy(gold), tidy(answer)
    return _Comparison(algebra).equal(read(gold), read(answer), gold, answer)


@dataclass(frozen=True)
class _Interval:
    """start and end are Expressions or texts of infinity; open ends are not part of it."""

    start: str
    end: str
    starts_open: bool
    ends_open: bool
    variable: str = ""


# A set of real numbers as disjoint, sorted pieces (start, starts open, end, ends open).
_Piece = tuple[float | Fraction, bool, float | Fraction, bool]


class _Comparison:
    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra

    def equal(self, gold: Answer, answer: Answer, gold_text: str, text: str) -> bool:
        gold, gold_text, answer, text = _without_names(gold, gold_text, answer, text)
        if isinstance(gold, Expression) and isinstance(answer, Expression):
            return self._expressions(gold.text, answer.text)
        gold_set, answer_set = _real_set(gold), _real_set(answer)
        if gold_set is not None and answer_set is not None and _is_set_like(gold, answer):
            return gold_set == answer_set and _same_variable(gold, answer)
        gold_interval, interval = _interval(gold), _interval(answer)
        if gold_interval is not None and interval is not None:
            return self._intervals(gold_interval, interval)
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            # x > 2 as (2,\\infty), beside 2x > 4.
            gold_text = _set_text(gold_interval) or gold_text
            text = _set_text(interval) or text
            if _is_set_text(gold_interval, answer) or _is_set_text(interval, gold):
                return self._algebra.equal(gold_text, text)
        match gold, answer:
            case Matrix(), Matrix():
                return self._matrices(gold, answer)
            case Listing(), Listing():
                return self._listings(gold, answer)
            case Relation(), Relation():
                return self._relations(gold, answer)
            case Union(), Union() if self._unordered(gold.parts, answer.parts):
                return True
            case Listing(items=(only,), brackets="{}"), Expression() if only != _EMPTY:
                return self.equal(only, answer, _text(only), text)
            case Expression(), Listing(items=(only,), brackets="{}") if only != _EMPTY:
                return self.equal(gold, only, gold_text, _text(only))
        return self._by_algebra_alone(gold, answer, gold_text, text)

    def _by_algebra_alone(self, gold: Answer, answer: Answer, gold_text: str, text: str) -> bool:
        """Two different structures: math-verify knows of R, of set differences and the like."""
        for one in (gold, answer):
            if isinstance(one, Expression) and read_number(split_unit(one.text).text) is not None:
                return False
            if isinstance(one, Relation) and "" in one.sides:
                return False
        listings = [one for one in (gold, answer) if isinstance(one, Listing)]
        if len(listings) == 2 or _is_unreadable(gold_text) or _is_unreadable(text):
            return False
        return self._algebra.equal(gold_text, text)

    def _expressions(self, gold: str, answer: str) -> bool:
        first = split_unit(gold, is_gold=True)
        # A letter is a unit where a number is asked for, and a variable elsewhere.
        second = split_unit(answer, is_gold=read_number(first.whole) is None)
        if are_different_units(first.unit, second.unit):
            return False
        number = read_number(first.whole), read_number(second.whole)
        if number[0] is not None and number[1] is not None:
            return self._numbers(number[0], number[1], first.whole, second.whole)
        gold, answer = single_letters(first.text), single_letters(second.text)
        normal = normalize_answer(gold), normalize_answer(answer)
        if normal[0] == normal[1]:
            return normal[0] != "" and first.magnitude == second.magnitude
        infinities = _infinity(unwrap_text(gold)), _infinity(unwrap_text(answer))
        if infinities != (None, None):
            return infinities[0] == infinities[1]
        names = _name(gold), _name(answer)
        if names[0] is not None and names[1] is not None:
            return names[0] == names[1]
        if _RATIO.fullmatch(gold) or _RATIO.fullmatch(answer):
            return _ratios(gold, answer)
        if first.magnitude or second.magnitude or _is_unreadable(gold) or _is_unreadable(answer):
            return _words(gold) == _words(answer)
        for decimal, other in ((number[0], answer), (number[1], gold)):
            if decimal is not None and decimal.shown is not None:
                return self._algebra.stands_for(decimal, other)
        return self._algebra.equal(gold, answer)

    def _numbers(self, gold: Number, answer: Number, gold_text: str, text: str) -> bool:
        verdict = equal_numbers(gold, answer)
        if verdict is None and self._algebra.equal(gold_text, text):
            raise TooLargeToCompare("the numbers are too large to be compared exactly")
        return verdict is True

    def _listings(self, gold: Listing, answer: Listing) -> bool:
        kinds = {gold.brackets, answer.brackets}
        if kinds <= {"", "{}"}:
            # A solution that is listed twice is one; but the list 1, 1, 2 is not 1, 2, 2.
            distinct = _distinct(gold.items), _distinct(answer.items)
            is_set = "{}" in kinds or len(distinct[0]) == len(gold.items)
            return self._unordered(*(distinct if is_set else (gold.items, answer.items)))
        is_pair = len(gold.items) == len(answer.items) == 2
        if "{}" in kinds or (is_pair and len(kinds) > 1 and kinds != {"", "()"}):
            return False
        return self._ordered(gold.items, answer.items)

    def _matrices(self, gold: Matrix, answer: Matrix) -> bool:
        return len(gold.rows) == len(answer.rows) and all(
            self._ordered(*rows) for rows in zip(gold.rows, answer.rows, strict=True)
        )

    def _ordered(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        return len(gold) == len(answer) and all(
            self.equal(one, other, _text(one), _text(other))
            for one, other in zip(gold, answer, strict=True)
        )

    def _unordered(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        if len(gold) != len(answer):
            return False
        # Those that are written alike first: the rest costs algebra for every pair.
        rest, unmatched = {_key(item): [] for item in answer}, []
        for item in answer:
            rest[_key(item)].append(item)
        for item in gold:
            same = rest.get(_key(item))
            if same:
                same.pop()
            else:
                unmatched.append(item)
        others = [item for items in rest.values() for item in items]
        for one in unmatched:
            equal = (other for other in others if self.equal(one, other, _text(one), _text(other)))
            found = next(equal, None)
            if found is None:
                return False
            others.remove(found)
        return True

    def _intervals(self, gold: _Interval, answer: _Interval) -> bool:
        return (
            (gold.starts_open, gold.ends_open) == (answer.starts_open, answer.ends_open)
            and ("" in (gold.variable, answer.variable) or gold.variable == answer.variable)
            and self._ends(gold.start, answer.start)
            and self._ends(gold.end, answer.end)
        )

    def _ends(self, gold: str, answer: str) -> bool:
        infinities = _infinity(gold), _infinity(answer)
        if infinities != (None, None):
            return infinities[0] == infinities[1]
        return self.equal(read(gold), read(answer), gold, answer)

    def _relations(self, gold: Relation, answer: Relation) -> bool:
        gold, answer = _ascending(gold), _ascending(answer)
        if gold.signs == answer.signs and len(gold.sides) == len(answer.sides):
            if "" in (*gold.sides, *answer.sides) and gold.sides[0] == answer.sides[0] == "":
                return self._side(gold.sides[1], answer.sides[1])
            same_start = normalize_answer(gold.sides[0]) == normalize_answer(answer.sides[0])
            if all(self._side(*sides) for sides in zip(gold.sides, answer.sides, strict=True)):
                return True
            if same_start and gold.signs == ("=",) and _VARIABLE.fullmatch(gold.sides[0]):
                return False
        if "" in (*gold.sides, *answer.sides) or any(map(_is_unreadable, (gold.text, answer.text))):
            return False
        return self._algebra.equal(gold.text, answer.text)

    def _side(self, gold: str, answer: str) -> bool:
        return self.equal(read(gold), read(answer), gold, answer)


def _without_names(
    gold: Answer, gold_text: str, answer: Answer, text: str
) -> tuple[Answer, str, Answer, str]:
    """Takes x = and x \\in off, where the other side has no name for its value."""
    gold_value, value = _value(gold), _value(answer)
    is_named = isinstance(gold, Relation) and "=" in gold.signs
    if isinstance(gold, Relation) and gold.signs == ("in",):
        is_named, gold, gold_text = False, read(gold.sides[1]), gold.sides[1]
    if isinstance(answer, Relation) and answer.signs == ("in",):
        answer, text = read(answer.sides[1]), answer.sides[1]
    elif value is not None and not is_named:
        answer, text = read(value), value
    elif gold_value is not None and value is None and _QUANTITY.fullmatch(_left(gold)):
        gold, gold_text = read(gold_value), gold_value
    elif gold_value is not None and value is not None and _has_same_left(gold, answer):
        gold, gold_text, answer, text = read(gold_value), gold_value, read(value), value
    return gold, gold_text, answer, text


def _value(answer: Answer) -> str | None:
    """5 of x = 5, of x = 2 + 3 = 5 \\approx 5.0 and of x \\approx 5; None for other relations."""
    if not isinstance(answer, Relation) or not set(answer.signs) <= {"=", "~"}:
        return None
    if answer.signs[0] == "~":
        is_name = answer.sides[0] == "" or _QUANTITY.fullmatch(answer.sides[0])
        return answer.sides[1] if is_name else answer.sides[0]
    exact = answer.signs.index("~") if "~" in answer.signs else len(answer.signs)
    return answer.sides[exact]


def _left(answer: Answer) -> str:
    return answer.sides[0] if isinstance(answer, Relation) else ""


def _has_same_left(gold: Answer, answer: Answer) -> bool:
    left = normalize_answer(_left(gold))
    return left != "" and left == normalize_answer(_left(answer))


def _text(answer: Answer) -> str:
    """The answer as math-verify reads it."""
    match answer:
        case Expression() | Relation():
            return answer.text
        case Union():
            return r" \cup ".join(map(_text, answer.parts))
        case Matrix():
            rows = r" \\ ".join(" & ".join(map(_text, row)) for row in answer.rows)
            return rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"
    left, right = {"{}": (r"\{", r"\}"), "": ("", "")}.get(answer.brackets) or answer.brackets
    return left + ",".join(map(_text, answer.items)) + right


def _key(item: Answer) -> Fraction | str:
    """Equal for two items that are equal without algebra, and only for those."""
    number = read_number(item.text) if isinstance(item, Expression) else None
    if number is not None and number.value is not None and not number.is_percent:
        return number.value
    text = _text(item)
    # The notation of matrices does not survive normalisation.
    return text.strip() if "\\begin" in text else normalize_answer(text)


def _distinct(items: Sequence[Answer]) -> Sequence[Answer]:
    return list({_key(item): item for item in reversed(items)}.values())


def _ascending(relation: Relation) -> Relation:
    """5 > x as x < 5."""
    if not set(relation.signs) <= {">", ">="}:
        return relation
    signs = tuple(_REVERSED[sign] for sign in reversed(relation.signs))
    return Relation(tuple(reversed(relation.sides)), signs, relation.text)


def _interval(answer: Answer) -> _Interval | None:
    if isinstance(answer, Listing):
        # Both relations hold: x > 1 and x < 2.
        parts = [_interval(item) for item in answer.items if isinstance(item, Relation)]
        if answer.brackets == "" and len(parts) == len(answer.items) == 2:
            return _both(parts[0], parts[1])
        if len(answer.items) != 2 or answer.brackets in ("", "{}"):
            return None
        start, end = map(_text, answer.items)
        return _Interval(start, end, answer.brackets[0] == "(", answer.brackets[1] == ")")
    if not isinstance(answer, Relation):
        return None
    relation = _ascending(answer)
    if not set(relation.signs) <= {"<", "<="}:
        return None
    opens = [sign == "<" for sign in relation.signs]
    match relation.sides:
        case (start, variable, end) if _VARIABLE.fullmatch(variable):
            return _Interval(start, end, opens[0], opens[1], variable)
        case ("", end):
            return _Interval(r"-\infty", end, True, opens[0])
        case (start, ""):
            return _Interval(start, r"\infty", opens[0], True)
        case (variable, end) if _VARIABLE.fullmatch(variable):
            return _Interval(r"-\infty", end, True, opens[0], variable)
        case (start, variable) if _VARIABLE.fullmatch(variable):
            return _Interval(start, r"\infty", opens[0], True, variable)
    return None


def _set_text(interval: _Interval | None) -> str:
    if interval is None or not interval.variable:
        return ""
    left, right = "[("[interval.starts_open], "])"[interval.ends_open]
    return f"{left}{interval.start},{interval.end}{right}"


def _is_set_text(interval: _Interval | None, other: Answer) -> bool:
    """Whether an inequality may be a set beside another one in the same variable."""
    return (
        interval is not None
        and interval.variable != ""
        and isinstance(other, Relation)
        and set(other.signs) <= {"<", "<=", ">", ">="}
        and "" not in other.sides
        and interval.variable in other.text
        and not _is_unreadable(other.text)
    )


def _both(first: _Interval | None, second: _Interval | None) -> _Interval | None:
    if first is None or second is None or first.variable != second.variable:
        return None
    for one, other in ((first, second), (second, first)):
        if _infinity(one.start) == float("-inf") and _infinity(other.end) == float("inf"):
            return _Interval(other.start, one.end, other.starts_open, one.ends_open, one.variable)
    return None


def _infinity(text: str) -> float | None:
    match = _INFINITY.fullmatch(text.strip().strip("{}"))
    if match is None:
        return None
    return float("-inf") if "-" in (match[1], match[2]) else float("inf")


def _is_set_like(gold: Answer, answer: Answer) -> bool:
    """A pair in brackets is a set only beside a union or a relation: it may be a point."""
    return any(isinstance(one, Union | Relation) for one in (gold, answer))


def _same_variable(gold: Answer, answer: Answer) -> bool:
    variables = {name for one in (gold, answer) for name in _variables(one) if name}
    return len(variables) <= 1


def _variables(answer: Answer) -> list[str]:
    if isinstance(answer, Union):
        return [name for part in answer.parts for name in _variables(part)]
    if isinstance(answer, Relation) and answer.signs == ("!=",):
        return [answer.sides[0]]
    interval = _interval(answer)
    return [interval.variable] if interval is not None else []


def _real_set(answer: Answer) -> list[_Piece] | None:
    """The set of numbers that an interval, a set, a union or an inequality is; None where its
    ends are no exact numbers."""
    if isinstance(answer, Union):
        parts = [_real_set(part) for part in answer.parts]
        pieces = [piece for part in parts if part is not None for piece in part]
        return None if None in parts else _merged(pieces)
    if isinstance(answer, Listing) and answer.brackets == "{}":
        values = [_end(_text(item)) for item in answer.items]
        points = [(value, False, value, False) for value in values if value is not None]
        return None if None in values else _merged(points)
    if isinstance(answer, Relation) and answer.signs == ("!=",):
        value = _end(answer.sides[1]) if _VARIABLE.fullmatch(answer.sides[0]) else None
        infinity = float("inf")
        if value is None:
            return None
        return [(-infinity, True, value, True), (value, True, infinity, True)]
    interval = _interval(answer)
    start, end = (_end(interval.start), _end(interval.end)) if interval else (None, None)
    if interval is None or start is None or end is None or start >= end:
        return None
    return [(start, interval.starts_open, end, interval.ends_open)]


def _end(text: str) -> float | Fraction | None:
    infinity = _infinity(text)
    if infinity is not None:
        return infinity
    number = read_number(text)
    return None if number is None or number.is_percent else number.value


def _merged(pieces: list[_Piece]) -> list[_Piece]:
    result: list[_Piece] = []
    for start, starts_open, end, ends_open in sorted(pieces):
        if result:
            before = result[-1]
            touches = start == before[2] and not (starts_open and before[3])
            if start < before[2] or touches:
                last, last_open = max((before[2], not before[3]), (end, not ends_open))
                result[-1] = (before[0], before[1], last, not last_open)
                continue
        result.append((start, starts_open, end, ends_open))
    return result


def _name(text: str) -> str | None:
    """A name in lower case, its letters in order; None where letters are a product."""
    label = _LABELLED.fullmatch(text.strip())
    inner = label[1] if label else text
    plain = unwrap_text(inner).replace(" ", "").strip("().:")
    if not _NAME.fullmatch(plain):
        return None
    letters = re.sub(r"_(?:\{\w+\}|\w)", "", plain)
    if len(letters) == 1 and label is None:
        return plain
    is_word = len(letters) > 3 or letters in _SHORT_WORDS or "\\text" in inner
    if not (is_word or letters != letters.lower()):
        return None
    kind = text[: label.start(1)].strip(" {") if label and "triangle" not in text else ""
    return kind + plain.replace("{", "").replace("}", "").lower()


def _words(text: str) -> str:
    return re.sub(r"[\s.]", "", normalize_answer(unwrap_text(text))).lower()


def _is_unreadable(text: str) -> bool:
    if _WORD.search(text) is not None or _UNREADABLE.search(text) is not None:
        return True
    # math-verify adds numbers that stand side by side.
    return "\\begin" not in text and _NEIGHBOURS.search(normalize_answer(text)) is not None


def _ratios(gold: str, answer: str) -> bool:
    """2:3 is 4:6, and 2/3. But 2:30 is not 1:15: they are times."""
    if _TIME.fullmatch(gold.strip()) and _TIME.fullmatch(answer.strip()):
        return gold.strip().lstrip("0") == answer.strip().lstrip("0")
    parts = [[read_number(part) for part in text.split(":")] for text in (gold, answer)]
    values = [[part.value if part else None for part in side] for side in parts]
    first, second = (side if len(side) > 1 else [*side, Fraction(1)] for side in values)
    if len(first) != len(second) or None in first or None in second:
        return False
    known = [
        (one, other)
        for one, other in zip(first, second, strict=True)
        if one is not None and other is not None
    ]
    (a, b) = known[0]
    return (
        any(one for one, _ in known)
        and any(other for _, other in known)
        and all(one * b == other * a for one, other in known)
        and (a != 0) == (b != 0)
    )
