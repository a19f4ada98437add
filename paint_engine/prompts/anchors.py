"""Anchors: what a rollout shares with the verified solution, and their recall (Sec. 3.2, Eq. 4).

An anchor is a run of canonical tokens of the solution. It is found where the same run of whole
tokens occurs: 12 is one token, so neither 3124 nor 12.5 contains it.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from paint_engine.prompts.notation import Token, are_glued, join, joint, tokenize

_RELATIONS = frozenset("=<>") | {"\\le", "\\ge", "\\ne", "\\approx", "\\equiv"}
_OPERATORS = _RELATIONS | frozenset("+-*/^") | {"\\frac", "\\sqrt", "\\binom", "\\pm", "\\sum"}
_OPENING = frozenset("([{") | {"\\{"}
_CLOSING = frozenset(")]}") | {"\\}"}
# A leading minus and a trailing factorial belong to the anchor.
_LEADING = frozenset(".,;:!?+*/^_%") | _RELATIONS
_TRAILING = frozenset(".,;:?+-*/^_") | _RELATIONS
# A longer formula is a derivation, which no rollout repeats sign by sign.
_MAX_FORMULA_TOKENS = 100
_NOT_IN_FORMULAS = frozenset(".,;:!?|#\"'")
# Source code of drawings, which occurs in solutions from the AoPS wiki.
_DRAWING = re.compile(r"\[asy\][^\[]*(?:\[(?!/?asy\])[^\[]*)*\[/asy\]")


def normalize_math(text: str) -> str:
    """Returns `text` in one canonical mathematical notation (Norm in Eq. 4). Idempotent.

    Delimiters ($, \\(, \\[, environments), sizes (\\left, \\big), boxes, text commands, degree
    signs, GSM8K's <<...>> and Markdown's ** are removed. Fractions become \\frac{a}{b}, and a/b
    between numbers. Products become *, and minus signs become -. Numbers lose thousands separators
    and redundant zeros. White space remains between words. It also remains after a comma or point
    before a digit, where it distinguishes a list from a number.
    """
    return join(tokenize(text))


def extract_anchors(solution: str) -> tuple[str, ...]:
    """Returns the anchors A(y*) of a verified solution: normalised, unique, in order of appearance.

    - Boxed answers, with any content.
    - Formula-like spans: each delimited formula or line of one, and each run such as 48/2 = 24 in
      prose, that relates at least two operands (in at most 100 tokens). Listed formulas are split
      at their commas. A chain a = b = c gives a = b and b = c, because a rollout seldom repeats it
      whole.
    - Informative numbers: integers of at least two digits and decimals, also inside formulas. A
      single digit is not informative because every numbered list has it. List indices, exponents
      and subscripts are not informative either.
    """
    tokens = _read(solution)
    found: list[tuple[int, str]] = []
    start = 0
    for (formula, box), group in groupby(tokens, key=lambda token: (token.formula, token.box)):
        run = list(group)
        if box:
            found.append((start, join(_strip(run))))
        parts = _formula_parts(run) if formula else _formula_runs(run)
        found += [(start + offset, join(part)) for offset, part in parts if _is_formula(part)]
        start += len(run)
    found += [
        (position, token.text)
        for position, token in enumerate(tokens)
        if len(token.text) > 1 and _is_value(tokens, position)
    ]
    found.sort(key=lambda item: item[0])
    unique = tuple(dict.fromkeys(text for _, text in found if text))
    # An anchor that its own solution does not contain cannot be recalled.
    return tuple(anchor for anchor, kept in zip(unique, _find(tokens, unique), strict=True) if kept)


def find_anchors(completion: str, anchors: Sequence[str]) -> tuple[bool, ...]:
    """Returns, for each of `anchors`, whether it occurs in `completion` as whole numbers, words and
    signs."""
    return _find(_read(completion), anchors)


def overlap(completion: str, solution: str) -> float:
    """Returns alpha of Eq. 4: the fraction of the solution's anchors that occur in the completion.

    The result is 0.0 for a solution without anchors.
    """
    anchors = extract_anchors(solution)
    if not anchors:
        return 0.0
    return sum(find_anchors(completion, anchors)) / len(anchors)


def _read(text: str) -> list[Token]:
    return tokenize(_DRAWING.sub(" ", text))


def _is_value(tokens: Sequence[Token], position: int) -> bool:
    """Returns whether the token is a number and no list index, exponent, subscript or part of a
    name."""
    token = tokens[position]
    if not token.is_number or token.is_index:
        return False
    if position == 0:
        return True
    before = tokens[position - 1]
    return before.text not in ("^", "_") and not are_glued(before, token)


def _symbols(tokens: Sequence[Token]) -> list[tuple[str, bool, bool]]:
    """Returns each token with two flags: whether a letter or digit directly precedes it, and
    whether one directly follows it.

    The x in 2x therefore differs from a standalone x, and the anchor x=1 is found neither in 2x=1
    nor in x=1y.
    """
    glued = [False, *(are_glued(left, right) for left, right in pairwise(tokens)), False]
    return [(token.text, glued[i], glued[i + 1]) for i, token in enumerate(tokens)]


def _find(tokens: Sequence[Token], anchors: Sequence[str]) -> tuple[bool, ...]:
    numbers = {token.text for i, token in enumerate(tokens) if _is_value(tokens, i)}
    # Each symbol becomes one character, so a run of whole tokens is found by string search.
    symbols = _symbols(tokens)
    codes = {symbol: chr(code) for code, symbol in enumerate(dict.fromkeys(symbols), start=1)}
    haystack = "".join(codes[symbol] for symbol in symbols)

    def is_found(anchor: str) -> bool:
        wanted = tokenize(anchor)
        if len(wanted) == 1 and wanted[0].is_number:
            return wanted[0].text in numbers
        needle = [codes.get(symbol) for symbol in _symbols(wanted)]
        return bool(needle) and None not in needle and "".join(map(str, needle)) in haystack

    return tuple(is_found(anchor) for anchor in anchors)


def _strip(run: Sequence[Token]) -> list[Token]:
    """Removes punctuation, relations and unmatched or enclosing brackets from the ends of `run`."""
    partner: dict[int, int] = {}
    unclosed: list[int] = []
    for position, token in enumerate(run):
        if token.text in _OPENING:
            unclosed.append(position)
        elif token.text in _CLOSING and unclosed:
            partner[position] = unclosed.pop()
            partner[partner[position]] = position
    is_list = any(token.text == "," for token in run)
    first, last = 0, len(run) - 1
    while first <= last:
        left, right = run[first].text, run[last].text
        if left in _LEADING or (
            left in _OPENING | _CLOSING and partner.get(first, len(run)) > last
        ):
            first += 1
        elif right in _TRAILING or (right in _OPENING | _CLOSING and partner.get(last, -1) < first):
            last -= 1
        elif partner.get(first) == last and first < last and left in "({" and not is_list:
            first, last = first + 1, last - 1
        else:
            break
    return list(run[first : last + 1])


def _split(run: Sequence[Token], separators: frozenset[str]) -> list[tuple[int, int]]:
    """Returns (start, end) of the parts of `run` between separators that are outside brackets."""
    parts: list[tuple[int, int]] = []
    depth, start = 0, 0
    for position, token in enumerate(run):
        if token.text in _OPENING:
            depth += 1
        elif token.text in _CLOSING:
            depth -= 1
        elif depth <= 0 and token.text in separators:
            parts.append((start, position))
            start = position + 1
    return [*parts, (start, len(run))]


def _formula_parts(run: Sequence[Token]) -> Iterator[tuple[int, list[Token]]]:
    """Yields (offset, tokens) of the listed formulas in `run`, and of the links of a = b = c."""
    for start, end in _split(run, frozenset(",;")):
        part = _strip(run[start:end])
        sides = _split(part, frozenset("="))
        if len(sides) < 3:
            yield start, part
        for (left, _), (_, right) in pairwise(sides) if len(sides) > 2 else ():
            yield start + left, _strip(part[left:right])


def _formula_runs(run: Sequence[Token]) -> Iterator[tuple[int, list[Token]]]:
    """Yields (offset, tokens) of the formulas in prose that have no delimiters."""
    start = 0
    for position in range(len(run) + 1):
        if position < len(run) and _may_continue(run, start, position):
            continue
        formula = run[start:position]
        if formula and formula[0].text in ("*", "/", "+"):
            # The left side began with words (5 cups * 3 = 15), so only the part after the = is
            # whole.
            formula = formula[_split(formula, frozenset("="))[0][1] :]
        for offset, part in _formula_parts(formula):
            yield start + offset, part
        start = position + (position < len(run) and not _is_formula_token(run[position], None))


def _may_continue(run: Sequence[Token], start: int, position: int) -> bool:
    before = run[position - 1] if position > start else None
    if not _is_formula_token(run[position], before):
        return False
    return before is None or joint(before, run[position]) == "" or before.text[0] == "\\"


def _is_formula_token(token: Token, before: Token | None) -> bool:
    if token.is_word:
        is_factor = before is not None and before.is_number and not token.spaced
        return len(token.text) <= (3 if is_factor or token.text.isupper() else 1)
    return not token.is_index and token.text not in _NOT_IN_FORMULAS


def _is_formula(part: Sequence[Token]) -> bool:
    """Returns whether `part` has at least two operands and something that relates them.

    Between delimiters a digit is enough, as in (0, 1). In prose an operator is needed, together
    with a digit or a relation: w/o is no formula.
    """
    texts = {token.text for token in part}
    num_operands = sum(token.text[-1].isalnum() and token.text not in _OPERATORS for token in part)
    has_digit = any(token.is_number for token in part)
    if num_operands < 2 or len(part) > _MAX_FORMULA_TOKENS:
        return False
    if part[0].formula:
        return has_digit or not texts.isdisjoint(_OPERATORS)
    return not texts.isdisjoint(_OPERATORS if has_digit else _RELATIONS)
