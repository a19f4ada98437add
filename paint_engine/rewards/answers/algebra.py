"""math-verify, with its known errors guarded: the equality of expressions beyond plain numbers.

Runs in the checker's child process, where it replaces the parts of math-verify that compare numbers
to 15 digits, and equations without solutions as equal.
"""

import re
from fractions import Fraction
from itertools import product
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    latex2sympy,
    normalize_latex,
)
from math_verify import grader, verify
from sympy import Expr, MatrixBase, MatrixExpr, S, Symbol

from paint_engine.rewards.answers.exact import Number, is_finite_decimal

_NORMALIZATION = NormalizationConfig(
    # A unit is taken off before, and not where a variable may stand.
    **{"basic_latex": True, "units": False, "malformed_operators": True, "nits": True},
    **{"boxed": "none", "equations": False},
)
_ORIGINAL_COMPARE_SYMBOLS = grader.sympy_compare_symbols
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)")
_DEGREES = re.compile(
    r"([0-9]+(?:\.[0-9]+)?|\\frac\{[0-9]+\}\{[0-9]+\})\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})"
)
_TRIGONOMETRY = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
# Digits of a decimal expansion beyond which two constants that sympy cannot tell apart are equal.
_MAX_DIGITS = 1000
_MAX_SYMBOLS = 3


class MathVerify:
    """Compares texts in LaTeX by math-verify."""

    def __init__(self) -> None:
        grader.__dict__.update(
            sympy_numeric_eq=_equal_numerically,
            sympy_symbolic_eq=_equal_symbolically,
            sympy_solve_and_compare=_solve_and_compare,
            sympy_compare_symbols=_compare_symbols,
        )

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two expressions, relations or sets are equal; False where one cannot be read."""
        is_real = not any(map(grader.should_treat_as_complex, (gold, answer)))
        parsed = [_parse(text, is_real) for text in (gold, answer)]
        if parsed[0] is None or parsed[1] is None:
            return False
        return verify(
            parsed[0],
            parsed[1],
            timeout_seconds=0,
            raise_on_error=False,
            # 1 < x < 2 is (1, 2), whichever of them is the reference.
            allow_set_relation_comp=True,
        )

    def stands_for(self, decimal: Number, text: str) -> bool:
        """Whether the decimal is the constant that `text` writes, to the digits that it shows."""
        parsed = _parse(text, is_real=True)
        if not isinstance(parsed, Expr) or parsed.free_symbols or decimal.shown is None:
            return False
        value = parsed.doit()
        if value.is_Rational:
            exact = Fraction(*map(int, value.as_numer_denom()))
            is_shown = not is_finite_decimal(exact) and decimal.shown.stands_for(exact)
            return exact == decimal.value or is_shown
        if value.is_extended_real is not True or not value.is_finite:
            return False
        digits = decimal.shown.num_digits + 30
        return decimal.shown.stands_for(Fraction(str(sympy.N(value, digits))))


def _parse(text: str, is_real: bool) -> Any:
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"\\circ(?![A-Za-z])", "", text) if "f" not in text else text
    # Both would be Euler's constant.
    text = re.sub(r"\\Gamma(?![A-Za-z])", r"\\Lambda_{g}", text)
    text = _DECIMAL.sub(_as_fraction, normalize_latex(text, _NORMALIZATION))
    try:
        parsed: Any = latex2sympy(
            text,
            is_real=True if is_real else None,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    # The parser raises Exception itself.
    except Exception as error:
        if isinstance(error, MemoryError | RecursionError):
            raise
        return None
    if is_real or re.search(r"\\(?:sum|prod)(?![A-Za-z])", text):
        return parsed
    return parsed.subs(sympy.Symbol("i"), sympy.I)


def _as_fraction(match: re.Match[str]) -> str:
    whole, decimals = match.groups()
    return f"\\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}"


def _equal_numerically(
    first: Any, second: Any, float_rounding: int, numeric_precision: int
) -> bool:
    """In place of math-verify's comparison to `numeric_precision` digits: without a tolerance."""
    if isinstance(first, MatrixBase | MatrixExpr) and isinstance(second, MatrixBase | MatrixExpr):
        first, second = first.doit(), second.doit()
    if isinstance(first, MatrixBase) and isinstance(second, MatrixBase):
        return first.shape == second.shape and all(
            grader.sympy_expr_eq(one, other, float_rounding, numeric_precision)
            for one, other in zip(first.flat(), second.flat(), strict=True)
        )
    if not isinstance(first, Expr) or not isinstance(second, Expr):
        return False
    difference = first.doit() - second.doit()
    return _is_zero(difference) if not difference.free_symbols else difference.expand() == 0


def _equal_symbolically(first: Any, second: Any) -> bool:
    if isinstance(first, MatrixBase) and isinstance(second, MatrixBase):
        return first.shape == second.shape and sympy.simplify(first - second).is_zero_matrix is True
    if not isinstance(first, Expr) or not isinstance(second, Expr):
        return False
    difference = first.doit() - second.doit()
    if not difference.free_symbols:
        # Decided exactly before.
        return False
    if _differ_at_a_point(difference):
        return False
    return sympy.simplify(difference) == 0 or _equal_where_real(first.doit(), second.doit())


def _differ_at_a_point(difference: Expr) -> bool:
    """Whether a difference is not zero at one point: much faster to see than that it is zero."""
    if difference.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
        return False
    symbols = sorted(difference.free_symbols, key=str)
    point = [(symbol, S(17 + 10 * i) / 13) for i, symbol in enumerate(symbols)]
    value = difference.subs(point).evalf(30, maxn=100)
    return bool(value.is_number and value.is_finite and abs(value) > S(10) ** -10)


def _is_zero(constant: Expr) -> bool:
    """Whether a constant is 0: not if any of its first _MAX_DIGITS digits says otherwise."""
    if constant.is_Rational:
        return bool(constant == 0)
    if constant.has(S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity):
        return False
    value = constant.evalf(2, maxn=_MAX_DIGITS)
    parts = value.as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        return sympy.simplify(constant) == 0
    # sympy returns a precision of one bit if it could not determine any digit.
    return all(part == 0 or (part.is_Float and getattr(part, "_prec", 0) == 1) for part in parts)


def _equal_where_real(first: Expr, second: Expr) -> bool:
    """Whether two expressions with roots or logarithms are equal for all signs of their variables
    for which they are real: \\sqrt{1/n} and 1/\\sqrt{n}, but not \\sqrt{x^2} and x."""
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    has_branches = any(
        expression.has(sympy.log, sympy.Abs)
        or any(power.exp.is_Integer is not True for power in expression.atoms(sympy.Pow))
        for expression in (first, second)
    )
    if not has_branches or not 0 < len(symbols) <= _MAX_SYMBOLS:
        return False
    is_real_somewhere = False
    for signs in product((1, -1), repeat=len(symbols)):
        values: dict[Any, Any] = {
            symbol: sign * sympy.Dummy(positive=True)
            for symbol, sign in zip(symbols, signs, strict=True)
        }
        one, other = (sympy.simplify(side.subs(list(values.items()))) for side in (first, second))
        if one.is_real is False and other.is_real is False:
            continue
        if sympy.simplify(one - other) != 0:
            return False
        is_real_somewhere = True
    return is_real_somewhere


def _compare_symbols(gold: Any, answer: Any) -> bool:
    """math-verify's comparison of names, but \\Delta is not \\delta."""
    if isinstance(gold, Symbol) and isinstance(answer, Symbol):
        return gold.name == answer.name
    return _ORIGINAL_COMPARE_SYMBOLS(gold, answer)


def _solve_and_compare(gold: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    """math-verify's comparison of solutions; equations that have none are not equal by that."""
    if gold.free_symbols != answer.free_symbols:
        return False
    solved = [
        list(sympy.ordered(sympy.solve(relation, relation.free_symbols)))
        for relation in (gold, answer)
    ]
    if not all(solved) or len(solved[0]) != len(solved[1]):
        return False
    if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)):
        return solved[0] == solved[1]
    return all(
        one.keys() == other.keys()
        and all(
            grader.sympy_expr_eq(one[symbol], other[symbol], float_rounding, numeric_precision)
            for symbol in one
        )
        for one, other in zip(*solved, strict=True)
    )
