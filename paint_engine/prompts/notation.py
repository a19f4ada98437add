"""One canonical notation for the mathematics in solutions and rollouts (Norm in Eq. 4).

Text is split into tokens (a number, a word, a TeX command or any other sign). The tokens are then
rewritten so that two spellings of one expression become the same tokens. Both steps take time
linear in the length of the text.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple
from unicodedata import normalize

from paint_engine.prompts.boxes import with_braces

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)")
# Commands that only format their argument, and commands that are removed together with it.
_UNWRAPPED = re.compile(
    rf"{_BOX.pattern}|\\(?:text[a-z]{{0,6}}|math[a-z]{{2,4}}|mbox|emph|operatorname|boldsymbol|bm)"
)
_REMOVED = re.compile(r"\\(?:begin|end|tag|label|[hv]space|[hv]?phantom|color)")
_SPLITTING = re.compile(r"\\(?:q?quad|newline|implies|(?:Long)?[Rr]ightarrow|iff|Leftrightarrow)")
_IGNORED = re.compile(
    rf"{_SPLITTING.pattern}|\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text)style"
    r"|(?:no)?limits|(?:thin|en)space|degree|hfill|hline)"
)
_RENAMED = {
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\dbinom", "\\tbinom"), "\\binom"),
    **dict.fromkeys(("\\times", "\\cdot", "\\ast"), "*"),
    **dict.fromkeys(("\\leq", "\\leqslant"), "\\le"),
    **dict.fromkeys(("\\geq", "\\geqslant"), "\\ge"),
    **dict.fromkeys(("\\vert", "\\lvert", "\\rvert", "\\mid", "\\|"), "|"),
    **dict.fromkeys(("\\ldots", "\\cdots"), "\\dots"),
    **{"\\div": "/", "\\neq": "\\ne", "\\%": "%", "\\#": "#", "\\_": "_"},
    **{"\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]"},
}
# Number of arguments in TeX: \frac12 is \frac{1}{2}.
_NUM_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "\\overline": 1, "\\pmod": 1}
_REWRITTEN = frozenset(_NUM_ARGUMENTS) | {"{", "}", "\\circ"}

_SIGNS = (
    "≤ le ≥ ge ≠ ne ≈ approx ≡ equiv ± pm ∞ infty ∑ sum √ sqrt ∈ in … dots ⇒ implies ⟹ implies "
    "⇔ iff \u03b1 alpha β beta δ delta θ theta λ lambda μ mu π pi φ phi ω omega Δ Delta Ω Omega"
)
_CHARACTERS = str.maketrans(
    {
        # Minus sign, hyphens and dashes; multiplication signs; division signs.
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2219\u2217\u2715", "*"),
        **dict.fromkeys("\u00f7\u2215\u2044", "/"),
        # Degree sign, code quotes, and zero-width characters.
        **dict.fromkeys("\u00b0`\u200b\u2061\u2062\ufeff", " "),
        **{sign: f"\\{name} " for sign, name in re.findall(r"(\S) (\w+)", _SIGNS)},
        **{"½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}"},
    }
)
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_LOWERED = re.compile("[\u2080-\u2089]+")
_ROOT = re.compile(r"√([0-9]+(?:\.[0-9]+)?)")

_TOKEN = re.compile(
    r"""
      (?P<dropped> <<[^<>\n]*>>                          # GSM8K's calculator marks
                 | \\(?:left|right)\s*\.(?![0-9]) )      # null delimiters
    | (?P<bullet>  (?m:^)[ \t]*[-*•][ \t]+ )
    | (?P<power>   (?<=[0-9A-Za-z)])\*\*(?=[0-9]) )      # 2**3; elsewhere ** is Markdown
    | (?P<index>   (?m:^)[ \t]*[0-9]{1,3}(?=[.)][ \t]) ) # the 12 of a line "12. Then"
    | (?P<number>  [1-9][0-9]{0,2}(?:(?:,|\{,\}|\\,|,?\\!|[\u2009\u202f])[0-9]{3})+(?![0-9])
                                  (?:\.[0-9]+)?
                 | [0-9]+(?:\.[0-9]+)? | \.[0-9]+ )
    | (?P<word>    [^\W0-9_]+ )
    | (?P<command> \\[A-Za-z]+ )
    | (?P<newline> \\\\(?:\s*\[[0-9.]+[a-z]{2}\])? )
    | (?P<symbol>  \\. )
    | (?P<space>   \s+ | \*{2,} | [$~&\\] )
    | (?P<other>   . )
    """,
    re.VERBOSE | re.DOTALL,
)
_DELIMITER = re.compile(
    r"\\\\|\\\$|\$\$|\$|\\[()\[\]]"
    r"|\\(?:begin|end)\{(?:equation|align|aligned|gather|multline|eqnarray|cases)\*?\}"
)
_TEXT_IN_FORMULA = re.compile(r"\\(?:text[a-z]*|mbox)\s*\{[^{}]*\}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z][a-z]+[\s,]+[a-z]{2,}")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


class Token(NamedTuple):
    """One canonical token and its place in the text.

    In "so $2x = \\boxed{12}$" the last token is Token("12", spaced=True, formula=1, box=1).
    """

    text: str
    # True if white space in prose, a delimiter or a dropped command separates it from the token
    # before.
    spaced: bool
    # Number of the delimited formula, or line of one, that contains it; 0 in prose.
    formula: int
    # Number of the box that contains it; 0 outside boxes.
    box: int = 0
    # True if it numbers an item of a list.
    is_index: bool = False

    @property
    def is_number(self) -> bool:
        return self.text[0] in "0123456789"

    @property
    def is_word(self) -> bool:
        return self.text[0].isalnum() and not self.is_number


def formula_spans(text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of the content of each delimited formula, in order and disjoint.

    A dollar sign that opens no plausible formula ("costs $5 and") is a currency sign.
    """
    spans: list[tuple[int, int]] = []
    opener: re.Match[str] | None = None
    for match in _DELIMITER.finditer(text):
        delimiter = match.group()
        if delimiter in ("\\\\", "\\$"):
            continue
        if opener is not None and _closes(text, opener, match):
            spans.append((opener.end(), match.start()))
            opener = None
        elif delimiter not in ("\\)", "\\]") and not delimiter.startswith("\\end"):
            opener = match
    return spans


def _closes(text: str, opener: re.Match[str], closer: re.Match[str]) -> bool:
    opening, closing = opener.group(), closer.group()
    if opening != "$":
        pairs = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
        return pairs.get(opening, opening.replace("begin", "end")) == closing
    start, end = opener.end(), closer.start()
    if closing != "$" or start == end or text[closer.end() : closer.end() + 1].isdigit():
        return False
    content = _TEXT_IN_FORMULA.sub(" ", text[start:end])
    return _PROSE.search(content) is None and _BLANK_LINE.search(content) is None


def _segments(text: str) -> Iterator[tuple[int, int, bool]]:
    """Yields (start, end, is_formula) over the whole text; \\text{} inside a formula is prose."""
    position = 0
    for start, end in formula_spans(text):
        yield position, start, False
        position = start
        for match in _TEXT_IN_FORMULA.finditer(text, start, end):
            yield position, match.start(), True
            yield match.start(), match.end(), False
            position = match.end()
        yield position, end, True
        position = end
    yield position, len(text), False


def tokenize(text: str) -> list[Token]:
    """Returns the canonical tokens of `text`."""
    text = _ROOT.sub(r"\\sqrt{\1}", with_braces(text))
    text = _RAISED.sub(lambda match: f"^{{{normalize('NFKC', match.group())}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{normalize('NFKC', match.group())}}}", text)
    text = text.translate(_CHARACTERS)
    tokens: list[Token] = []
    num_formulas = 0
    for start, end, in_formula in _segments(text):
        num_formulas += 1
        spaced = True
        for match in _TOKEN.finditer(text, start, end):
            kind, raw = match.lastgroup, match.group()
            splits = kind == "newline" or (kind == "command" and bool(_SPLITTING.fullmatch(raw)))
            num_formulas += splits
            is_plain = kind == "other" or kind == "word"
            canonical = raw if is_plain else _canonical(kind, raw, in_formula)
            if canonical is None:
                # White space has no meaning inside a formula: 2 x is 2x.
                spaced = spaced or splits or not in_formula
            else:
                formula = num_formulas if in_formula else 0
                tokens.append(Token(canonical, spaced, formula, is_index=kind == "index"))
                spaced = False
    return _merge(_Rewriter().run(_unwrap(tokens)))


def _canonical(kind: str | None, raw: str, in_formula: bool) -> str | None:
    """Returns the canonical token of `raw`, which is neither a word nor a plain sign, or None if
    `raw` only separates tokens."""
    match kind:
        case "number" | "index":
            return _canonical_number(raw)
        case "command":
            return None if _IGNORED.fullmatch(raw) else _RENAMED.get(raw, raw)
        case "symbol":
            return raw if raw in ("\\{", "\\}") else _RENAMED.get(raw)
        case "power":
            return "^"
        case "bullet":
            return raw.strip() if in_formula else None
        case _:
            return None


def _canonical_number(raw: str) -> str:
    if raw.isdigit() and raw[0] != "0":
        return raw
    whole, _, decimals = re.sub(r"[^0-9.]", "", raw).partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    return f"{whole}.{decimals}" if decimals else whole


def _closing_braces(tokens: Sequence[Token]) -> dict[int, int]:
    closing: dict[int, int] = {}
    unclosed: list[int] = []
    for position, token in enumerate(tokens):
        if token.text == "{":
            unclosed.append(position)
        elif token.text == "}" and unclosed:
            closing[unclosed.pop()] = position
    return closing


def _unwrap(tokens: Sequence[Token]) -> list[Token]:
    """Drops _UNWRAPPED commands with their braces, numbers the boxes, and drops _REMOVED commands
    with their content."""
    closing = _closing_braces(tokens)
    result: list[Token] = []
    dropped: set[int] = set()
    command, spaced = "", False
    num_boxes, box_end, resume = 0, -1, 0
    for position, token in enumerate(tokens):
        if position < resume:
            continue
        is_command = token.text[0] == "\\"
        if is_command and (_UNWRAPPED.fullmatch(token.text) or _REMOVED.fullmatch(token.text)):
            command, spaced = token.text, True
        elif token.text == "{" and command:
            end = closing.get(position)
            if end is not None and _REMOVED.fullmatch(command):
                resume = end + 1
            elif end is not None:
                dropped.add(end)
                if _BOX.fullmatch(command) and position > box_end:
                    num_boxes, box_end = num_boxes + 1, end
            command = ""
        elif position in dropped:
            spaced = True
        else:
            box = num_boxes if position < box_end else 0
            if spaced or box:
                token = token._replace(spaced=token.spaced or spaced, box=box)
            result.append(token)
            command, spaced = "", False
    return result


class _Rewriter:
    """Adds braces around TeX's bare arguments (\\frac12) and shortens common groups.

    {,} -> comma; ^{\\circ} -> nothing; ^{2} -> ^2; \\frac{1}{2} -> 1/2. It takes one pass. Each
    rule reads only the end of the written tokens, so the next rule sees the result of the one
    before.
    """

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        # Number of arguments that TeX still expects: now, before each written token, after each
        # open group.
        self.num_due = 0
        self.num_due_before: list[int] = []
        self.num_due_after_group: list[int] = []

    def run(self, tokens: Sequence[Token]) -> list[Token]:
        spaced = False
        for token in tokens:
            if spaced:
                token = token._replace(spaced=True)
            if self.num_due or token.text in _REWRITTEN:
                spaced = self._step(token)
            else:
                self._write(token, 0)
                spaced = False
        return self.tokens

    def _step(self, token: Token) -> bool:
        """Writes one token. Returns whether a rule removed something before the next token."""
        text = token.text
        if text == "{":
            self.num_due_after_group.append(max(self.num_due - 1, 0))
            self._write(token, 0)
        elif text == "}":
            self._write(token, self.num_due_after_group.pop() if self.num_due_after_group else 0)
            return self._reduce_group()
        elif text == "\\circ" and self._ends_with("^"):
            self._cut(1)
            return True
        elif self.num_due and text.isascii() and text.isalnum():
            self._write_arguments(token)
        else:
            self._write(token, _NUM_ARGUMENTS.get(text, 0))
        return False

    def _write(self, token: Token, num_due: int) -> None:
        self.tokens.append(token)
        self.num_due_before.append(self.num_due)
        self.num_due = num_due

    def _write_arguments(self, token: Token) -> None:
        """Splits a bare argument: \\frac followed by 123 is \\frac{1}{2}3."""
        arguments, rest = token.text[: self.num_due], token.text[self.num_due :]
        for argument in arguments:
            for text in ("{", argument, "}"):
                self._step(token._replace(text=text))
        if rest:
            self._step(token._replace(text=_canonical_number(rest) if token.is_number else rest))

    def _ends_with(self, *texts: str) -> bool:
        return tuple(token.text for token in self.tokens[-len(texts) :]) == texts

    def _cut(self, length: int) -> None:
        self.num_due = self.num_due_before[-length]
        del self.tokens[-length:], self.num_due_before[-length:]

    def _reduce_group(self) -> bool:
        if self._ends_with("{", ",", "}"):
            comma = self.tokens[-2]
            self._cut(3)
            self._write(comma, 0)
        elif self._ends_with("^", "{", "\\circ", "}"):
            self._cut(4)
            return True
        elif len(self.tokens) > 3 and self.tokens[-4].text in ("^", "_") and self._is_group(-3):
            atom = self.tokens[-2]
            if atom.is_number or len(atom.text) == 1:
                self._cut(3)
                self._write(atom, 0)
        elif len(self.tokens) > 6 and self.tokens[-7].text == "\\frac":
            self._reduce_fraction()
        return False

    def _is_group(self, start: int) -> bool:
        opening, atom, closing = self.tokens[start : start + 3 or None]
        return opening.text == "{" and closing.text == "}" and (atom.is_number or atom.is_word)

    def _reduce_fraction(self) -> None:
        if not (self._is_group(-6) and self._is_group(-3)):
            return
        fraction, numerator, denominator = self.tokens[-7], self.tokens[-5], self.tokens[-2]
        if not (numerator.is_number and denominator.is_number):
            return
        self._cut(7)
        num_due = self.num_due
        # x^\frac12 and \sqrt\frac12 take the fraction as one argument; a bare 1/2 would not be one.
        is_argument = num_due > 0 or self._ends_with("^") or self._ends_with("_")
        slash = fraction._replace(text="/", spaced=False)
        quotient = [numerator._replace(spaced=fraction.spaced), slash, denominator]
        if is_argument:
            quotient = [fraction._replace(text="{"), *quotient, slash._replace(text="}")]
        for token in quotient:
            self._write(token, 0)
        self.num_due = max(num_due - 1, 0)


def _merge(tokens: Sequence[Token]) -> list[Token]:
    """Merges tokens: 2 x 3 becomes 2*3, letters that touch become one word, ** and << become one
    sign."""
    result: list[Token] = []
    for token in tokens:
        before = result[-1] if result else None
        if before is not None and before.is_word and token.is_word and not token.spaced:
            result[-1] = before._replace(text=before.text + token.text)
            continue
        if before is not None and token.text in ("*", "<") and before.text == token.text:
            continue
        if before is not None and before.text in ("x", "X") and token.is_number:
            is_product = len(result) > 1 and result[-2].is_number
            result[-1] = before._replace(text="*") if is_product else before
        result.append(token)
    return result


def joint(left: Token, right: Token) -> str:
    """Returns a space if the two tokens would otherwise be read as other tokens, else ""."""
    if not right.text[0].isalnum():
        return ""
    last = left.text[-1]
    if left.text[0] == "\\":
        return " " if right.is_word and last.isalpha() else ""
    if right.is_number and (left.is_number or last in ".,"):
        return " "
    return " " if right.spaced and last.isalnum() else ""


def join(tokens: Sequence[Token]) -> str:
    """Returns the text of a run of tokens."""
    joints = ["", *(joint(left, right) for left, right in pairwise(tokens))]
    return "".join(between + token.text for between, token in zip(joints, tokens, strict=False))


def are_glued(left: Token, right: Token) -> bool:
    """Returns whether a number or word touches the next one, as in 2x."""
    is_pair = left.text[0].isalnum() and right.text[0].isalnum()
    return is_pair and not joint(left, right)
