"""Numbers in final answers, compared exactly: integers of any size, rationals, powers, factorials.

A text that writes a rational number without variables becomes a `Number`. Values up to MAX_BITS are
Python integers. Larger ones, as 3^{10^{30}} or 100000!, are compared by their residues modulo a
prime of 510 bits: two different numbers have equal ones with a probability of about 2^-500. A
tower of powers whose exponent is too large for that is left undecided.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import comb, factorial, isqrt, log2
from typing import Generic, TypeVar

from paint_engine.rewards.notation import normalize_answer

# A decimal stands for a number that no decimal writes, as 1/3, if it shows so many digits.
MIN_SHOWN_DIGITS = 6
# Of a numerator or denominator: 2004! has 19,000 bits.
MAX_BITS = 1 << 15
_MAX_FACTORIAL = 1_000_000
_MAX_DEPTH = 40
# The first prime after the first 154 digits of pi, read as an integer: nothing that is written
# in an answer has a small order modulo it.
PRIME = int(
    "31415926535897932384626433832795028841971693993751058209749445923078164062862089"
    "98628034825342117067982148086513282306647093844609550582231725359408128543"
)

_BASE_WORDS = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9},
    **{"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16, "bin": 2, "oct": 8, "dec": 10},
    "hex": 16,
}
_PREFIXES = {"0b": 2, "0o": 8, "0x": 16}
_PREFIXED = re.compile(r"(-?)0([box])([0-9a-f]+)", re.IGNORECASE)
_IN_BASE = re.compile(
    r"(-?)(?:\(|\\overline\{|\{)?"
    r"([0-9][0-9A-Za-z]*(?:\.[0-9A-Za-z]+)?|[A-F]{2,}(?=[)}]?_\{16\}))[)}]?"
    r"_\{\(?(?:base ?)?([0-9]{1,2}|[a-z]{2,})\)?\}"
)
_BASE_SUFFIX = re.compile(
    r"(.*?)[(\s]*(?:in )?\bbase[\s-]*([0-9]{1,2}|[a-z]+)\s*\)?", re.IGNORECASE
)
_TEXT = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox)\s*\{([^{}]*)\}")
_SCIENTIFIC = re.compile(r"([+-]?)([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?[0-9]{1,6})")
_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\\(?:[A-Za-z]+|.)|.)", re.DOTALL)
_OPENING = {"(": ")", "{": "}", "[": "]"}


_T = TypeVar("_T")


class _NotANumber(Exception):
    """The text is not a rational number that is written without variables."""


class _TooLarge(Exception):
    """The value exceeds the limits of this kind of arithmetic."""


@dataclass(frozen=True)
class _Node:
    """An operation and its arguments; a literal has its digits as text."""

    operation: str
    arguments: tuple["_Node", ...] = ()
    digits: str = ""


@dataclass(frozen=True)
class Shown:
    """A decimal as it is written: its value, the unit of its last digit, its significant digits."""

    value: Fraction
    unit: Fraction
    num_digits: int

    def stands_for(self, value: Fraction) -> bool:
        """Whether the decimal is `value`, rounded or cut to the digits that it shows."""
        difference = abs(value) - abs(self.value)
        same_sign = value * self.value > 0
        is_long = self.num_digits >= MIN_SHOWN_DIGITS
        return is_long and same_sign and -self.unit / 2 <= difference < self.unit


@dataclass(frozen=True)
class Number:
    """A number as an answer writes it. `is_percent`: a percent sign follows, no part of `node`."""

    node: _Node
    is_percent: bool = False

    @cached_property
    def value(self) -> Fraction | None:
        """The exact value; None where it exceeds MAX_BITS. A percent sign does not count."""
        try:
            return _Exact().evaluate(self.node)
        except _TooLarge:
            return None

    @cached_property
    def residue(self) -> int | None:
        """The value modulo PRIME; None where even that takes too long."""
        try:
            return _Residues().evaluate(self.node)
        except _TooLarge:
            return None

    @cached_property
    def shown(self) -> Shown | None:
        """The decimal, where the number is written as one."""
        return _shown(self.node)

    def over(self, divisor: int) -> "Number":
        """This number divided by `divisor`, without its percent sign."""
        scale = _Node("power", (_literal(divisor), _Node("negative", (_literal(1),))))
        return Number(_Node("product", (self.node, scale)))


def read_number(text: str) -> Number | None:
    """The rational number that `text` writes: 12, 3\\frac12, 1e-07, 0.\\overline{3}, 2^{100}-1,
    \\frac{1}{2004!}, 101_2, \\binom{9}{4}, 50\\%; None for anything else."""
    try:
        number = _read(text)
        if number.value is None:
            # Roots that are not rational show here.
            _ = number.residue
    except (_NotANumber, ZeroDivisionError, _TooLarge):
        return None
    return number


def is_arithmetic(text: str) -> bool:
    """Whether `text` is written like a number, as 2\\sqrt{2} and 9^{9^9} are. Computes nothing."""
    try:
        _read(text)
    except (_NotANumber, ZeroDivisionError, _TooLarge):
        return False
    return True


def equal_numbers(first: Number, second: Number) -> bool | None:
    """Whether two numbers are equal; None where they are too large to be compared.

    A decimal is the number that it writes: 0.33 is 33/100. It also stands for a number that no
    decimal writes exactly, as 1/3, if it shows MIN_SHOWN_DIGITS significant digits or more and is
    that number rounded, or cut, to the digits that it shows. A percent sign may be left out, or
    stand for the division by 100: 50% equals 50 and 1/2.
    """
    if first.is_percent == second.is_percent:
        return _equal(replace(first, is_percent=False), replace(second, is_percent=False))
    percent, plain = (first, second) if first.is_percent else (second, first)
    as_written = _equal(replace(percent, is_percent=False), plain)
    return as_written or _equal(percent.over(100), plain)


def is_finite_decimal(value: Fraction) -> bool:
    """Whether a decimal with finitely many digits writes `value`."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _equal(first: Number, second: Number) -> bool | None:
    if first.value is not None and second.value is not None:
        if first.value == second.value:
            return True
        return any(
            decimal.shown is not None
            and other.shown is None
            and not is_finite_decimal(other.value)
            and decimal.shown.stands_for(other.value)
            for decimal, other in ((first, second), (second, first))
            if other.value is not None
        )
    if first.node == second.node:
        return True
    if first.residue is None or second.residue is None:
        return None
    return first.residue == second.residue


class _Arithmetic(Generic[_T]):
    """Evaluates a tree in one of the two kinds of numbers."""

    def evaluate(self, node: _Node) -> _T:
        arguments = node.arguments
        match node.operation:
            case "literal":
                return self.rational(Fraction(node.digits))
            case "sum":
                return self.add(*map(self.evaluate, arguments))
            case "product":
                return self.multiply(*map(self.evaluate, arguments))
            case "quotient":
                return self.divide(*map(self.evaluate, arguments))
            case "negative":
                return self.multiply(self.rational(Fraction(-1)), self.evaluate(arguments[0]))
            case "power":
                return self.power(self.evaluate(arguments[0]), _Exact().evaluate(arguments[1]))
            case "root":
                return self.root(_Exact().evaluate(arguments[1]), _integer(arguments[0]))
            case "factorial":
                return self.factorial(_integer(arguments[0]), int(node.digits))
            case "binomial":
                return self.binomial(*map(_integer, arguments))
            case "absolute":
                return self.rational(abs(_Exact().evaluate(arguments[0])))
        raise AssertionError(node.operation)

    def rational(self, value: Fraction) -> _T:
        raise NotImplementedError

    def add(self, first: _T, second: _T) -> _T:
        raise NotImplementedError

    def multiply(self, first: _T, second: _T) -> _T:
        raise NotImplementedError

    def divide(self, first: _T, second: _T) -> _T:
        raise NotImplementedError

    def power(self, base: _T, exponent: Fraction) -> _T:
        raise NotImplementedError

    def factorial(self, n: int, step: int) -> _T:
        raise NotImplementedError

    def binomial(self, n: int, k: int) -> _T:
        raise NotImplementedError

    def root(self, value: Fraction, degree: int) -> _T:
        return self.rational(_exact_root(value, degree))


class _Exact(_Arithmetic[Fraction]):
    def rational(self, value: Fraction) -> Fraction:
        if _bits(value) > MAX_BITS:
            raise _TooLarge
        return value

    def add(self, first: Fraction, second: Fraction) -> Fraction:
        return self.rational(first + second)

    def multiply(self, first: Fraction, second: Fraction) -> Fraction:
        return self.rational(first * second)

    def divide(self, first: Fraction, second: Fraction) -> Fraction:
        return self.rational(first / second)

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            base = _exact_root(base, exponent.denominator)
        power = exponent.numerator
        if abs(base) in (0, 1):
            power = min(power, 2 + power % 2) if power > 0 else max(power, -2 - power % 2)
        if abs(power) * _bits(base) > MAX_BITS:
            raise _TooLarge
        return base**power

    def factorial(self, n: int, step: int) -> Fraction:
        if n > MAX_BITS or n * log2(n + 1) / step > MAX_BITS:
            raise _TooLarge
        return Fraction(factorial(n) if step == 1 else _product(range(n, 0, -step)))

    def binomial(self, n: int, k: int) -> Fraction:
        if min(k, n - k) * log2(n + 1) > MAX_BITS:
            raise _TooLarge
        return Fraction(comb(n, k))


class _Residues(_Arithmetic[int]):
    def rational(self, value: Fraction) -> int:
        return self.divide(value.numerator % PRIME, value.denominator % PRIME)

    def add(self, first: int, second: int) -> int:
        return (first + second) % PRIME

    def multiply(self, first: int, second: int) -> int:
        return first * second % PRIME

    def divide(self, first: int, second: int) -> int:
        if second == 0:
            raise _TooLarge
        return first * pow(second, -1, PRIME) % PRIME

    def power(self, base: int, exponent: Fraction) -> int:
        if exponent.denominator != 1 or (base == 0 and exponent <= 0):
            raise _TooLarge
        # Fermat: the exponent counts modulo PRIME - 1.
        return pow(base, exponent.numerator % (PRIME - 1), PRIME) if base else 0

    def factorial(self, n: int, step: int) -> int:
        if n > _MAX_FACTORIAL:
            raise _TooLarge
        return _product(range(n, 0, -step), PRIME)

    def binomial(self, n: int, k: int) -> int:
        k = min(k, n - k)
        if k > _MAX_FACTORIAL:
            raise _TooLarge
        return self.divide(
            _product(range(n - k + 1, n + 1), PRIME), _product(range(1, k + 1), PRIME)
        )


def _product(factors: range, modulus: int | None = None) -> int:
    result = 1
    for factor in factors:
        result = result * factor if modulus is None else result * factor % modulus
    return result


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _integer(node: _Node) -> int:
    value = _Exact().evaluate(node)
    if value.denominator != 1 or value < 0:
        raise _NotANumber
    return value.numerator


def _exact_root(value: Fraction, degree: int) -> Fraction:
    """The root where it is rational; sympy has the others."""
    if value < 0 or not 2 <= degree <= 64:
        raise _NotANumber
    parts = [_integer_root(part, degree) for part in (value.numerator, value.denominator)]
    return Fraction(*parts)


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        root = isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise _NotANumber
    return root


def _literal(digits: int | str) -> _Node:
    return _Node("literal", digits=str(digits))


def _shown(node: _Node) -> Shown | None:
    match node.operation:
        case "literal" if "." in node.digits:
            whole, _, decimals = node.digits.partition(".")
            unit = Fraction(1, 10 ** len(decimals))
            return Shown(Fraction(node.digits), unit, len((whole + decimals).lstrip("0")))
        case "negative":
            inner, scale = _shown(node.arguments[0]), Fraction(-1)
        case "product" if _is_power_of_ten(node.arguments[1]):
            inner = _shown(node.arguments[0])
            try:
                scale = _Exact().evaluate(node.arguments[1])
            except _TooLarge:
                return None
        case _:
            return None
    if inner is None:
        return None
    return Shown(inner.value * scale, inner.unit * abs(scale), inner.num_digits)


def _is_power_of_ten(node: _Node) -> bool:
    return node.operation == "power" and node.arguments[0].digits in ("10", "100")


def _read(text: str) -> Number:
    text = _TEXT.sub(r"\1", text).strip()
    suffix = _BASE_SUFFIX.fullmatch(text)
    if suffix is not None:
        text = f"{suffix[1].strip()}_{{{suffix[2].lower()}}}"
    prefixed = _PREFIXED.fullmatch(text)
    if prefixed is not None:
        base = _PREFIXES[f"0{prefixed[2].lower()}"]
        return Number(_signed(prefixed[1], _in_base(prefixed[3], base)))
    scientific = _SCIENTIFIC.fullmatch(text.rstrip("\\%").strip())
    if scientific is not None:
        ten = _Node("power", (_literal(10), _signed_literal(scientific[3])))
        mantissa = _literal("0" + scientific[2].rstrip("."))
        node = _Node("product", (mantissa, ten))
        return Number(_signed(scientific[1], node), text.endswith("%"))
    normal = normalize_answer(text, keeps_digits=True)
    in_base = _IN_BASE.fullmatch(normal)
    if in_base is not None:
        return Number(_signed(in_base[1], _in_base(in_base[2], _base(in_base[3]))))
    return Number(_Reader(normal.rstrip("%")).whole(), normal.endswith("%"))


def _signed(sign: str, node: _Node) -> _Node:
    return _Node("negative", (node,)) if sign == "-" else node


def _signed_literal(text: str) -> _Node:
    return _signed(text[:1], _literal(text.lstrip("+-")))


def _base(text: str) -> int:
    base = int(text) if text.isdigit() else _BASE_WORDS.get(text, 0)
    if not 2 <= base <= 36:
        raise _NotANumber
    return base


def _in_base(digits: str, base: int) -> _Node:
    whole, _, decimals = digits.partition(".")
    try:
        value = int(whole + decimals, base)
    except ValueError:
        raise _NotANumber from None
    scale = _Node("power", (_literal(base), _Node("negative", (_literal(len(decimals)),))))
    return _Node("product", (_literal(value), scale)) if decimals else _literal(value)


class _Reader:
    """Recursive descent over a text in the answers' one notation."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(text.strip())
        self._position = 0
        self._depth = 0

    def whole(self) -> _Node:
        node = self._sum()
        if self._next():
            raise _NotANumber
        return node

    def _next(self) -> str:
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def _take(self, *expected: str) -> bool:
        if self._next() in expected and self._next():
            self._position += 1
            return True
        return False

    def _need(self, token: str) -> None:
        if not self._take(token):
            raise _NotANumber

    def _nested(self, read: Callable[[], _Node]) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _NotANumber
        result = read()
        self._depth -= 1
        return result

    def _sum(self) -> _Node:
        node = self._signed_product()
        while self._next() in ("+", "-"):
            node = _Node("sum", (node, self._signed_product()))
        return node

    def _signed_product(self) -> _Node:
        sign = ""
        while self._next() in ("+", "-"):
            sign = "-" if (self._next() == "-") != (sign == "-") else ""
            self._position += 1
        return _signed(sign, self._product())

    def _product(self) -> _Node:
        node = self._factor()
        while True:
            if self._take("*"):
                node = _Node("product", (node, self._signed_factor()))
            elif self._take("/"):
                node = _Node("quotient", (node, self._signed_factor()))
            elif self._next() in ("(", "\\frac", "\\sqrt", "\\binom"):
                node = _Node("product", (node, self._factor()))
            else:
                return node

    def _signed_factor(self) -> _Node:
        return _signed("-" if self._take("-") else "", self._factor())

    def _factor(self) -> _Node:
        node = self._atom()
        while True:
            if self._take("!"):
                step = 1
                while self._take("!"):
                    step += 1
                node = _Node("factorial", (node,), str(step))
            elif self._take("^"):
                node = _Node("power", (node, self._exponent()))
                if self._next() == "^":
                    raise _NotANumber
            else:
                return node

    def _exponent(self) -> _Node:
        if self._next() == "{" or self._next() == "(":
            return self._group()
        sign = "-" if self._take("-") else ""
        return _signed(sign, self._plain_literal())

    def _group(self) -> _Node:
        closing = _OPENING.get(self._next())
        if closing is None:
            raise _NotANumber
        self._position += 1
        node = self._nested(self._sum)
        self._need(closing)
        return node

    def _plain_literal(self) -> _Node:
        token = self._next()
        if not token[:1].isdigit() or not token.isascii():
            raise _NotANumber
        self._position += 1
        return _literal(token)

    def _atom(self) -> _Node:
        token = self._next()
        if token in _OPENING:
            return self._group()
        if token == "|":
            self._position += 1
            node = self._nested(self._sum)
            self._need("|")
            return _Node("absolute", (node,))
        if token == "." and self._position + 1 < len(self._tokens):
            self._position += 1
            return _literal("0." + self._plain_literal().digits)
        if self._take("\\frac"):
            return _Node("quotient", (self._group(), self._group()))
        if self._take("\\binom"):
            return _Node("binomial", (self._group(), self._group()))
        if self._take("\\sqrt"):
            degree = self._group() if self._next() == "[" else _literal(2)
            return _Node("root", (degree, self._group()))
        return self._number()

    def _number(self) -> _Node:
        node = self._plain_literal()
        if self._next() == "_":
            self._position += 1
            return _in_base(node.digits, _integer(self._group()))
        if self._next() == "\\frac" and "." not in node.digits:
            fraction = self._mixed_part()
            return node if fraction is None else _Node("sum", (node, fraction))
        return node

    def _mixed_part(self) -> _Node | None:
        """The \\frac{1}{2} of 3\\frac{1}{2}, which is a sum; None where it is a factor."""
        start = self._position
        self._position += 1
        fraction = _Node("quotient", (self._group(), self._group()))
        if all(part.operation == "literal" for part in fraction.arguments):
            return fraction
        self._position = start
        return None
