"""One notation for the final answers that are compared.

Two answers that become the same text here are equal without algebra. This decides rewards, so it is
separate from the notation of anchors (`prompts/notation.py`): a change to either must not affect
the other.

An answer becomes tokens (a number, a word, a TeX command, any other sign), and the tokens are
rewritten so that two ways of writing one thing become the same, in time linear in the length.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unicodedata import decimal, normalize

# Commands that only format their argument, and commands that are removed together with it.
_UNWRAPPED = re.compile(
    r"\\(?:boxed|fbox|framebox|text[a-z]{0,6}|math[a-z]{2,4}|mbox|emph|operatorname|boldsymbol|bm)"
)
_REMOVED = re.compile(r"\\(?:begin|end|tag|label|[hv]space|[hv]?phantom|color)")
# Commands that mean nothing here; the first group separates two words, as a space in a text does.
_SPACING = re.compile(r"\\(?:q?quad|newline|implies|(?:Long)?[Rr]ightarrow|iff|Leftrightarrow)")
_IGNORED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text)style|(?:no)?limits"
    r"|(?:thin|en)space|degree|hfill|hline)"
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

_SIGNS = (
    "≤ le ≥ ge ≠ ne ≈ approx ≡ equiv ± pm ∞ infty ∑ sum √ sqrt ∈ in … dots ⇒ implies ⟹ implies "
    "⇔ iff \u03b1 alpha β beta δ delta θ theta λ lambda μ mu π pi φ phi ω omega Δ Delta Ω Omega "
    "\u222a cup ∩ cap ∅ emptyset \u2216 setminus ∠ angle △ triangle ∧ land \u2228 lor "
    "⩽ le ⩾ ge ≦ le ≧ ge ⟨ langle ⟩ rangle ⌊ lfloor ⌋ rfloor ⌈ lceil ⌉ rceil"
)
_CHARACTERS = str.maketrans(
    {
        # Minus sign, hyphens and dashes; the signs of multiplication; those of division.
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2219\u2217\u2715", "*"),
        **dict.fromkeys("\u00f7\u2215\u2044", "/"),
        # Signs without width.
        **dict.fromkeys("\u200b\u2061\u2062\ufeff", " "),
        **{sign: f"\\{name} " for sign, name in re.findall(r"(\S) (\w+)", _SIGNS)},
        # Commas, points and the percent sign of other scripts; primes; the degree sign.
        **{"\u3001": ",", "\u060c": ",", "\u3002": ".", "\u066b": ".", "\u066c": ","},
        **{"\u066a": "%", "\u2032": "'", "\u2019": "'", "°": r"^{\circ}", "\u211d": r"\mathbb{R}"},
    }
)
_DROPPED = str.maketrans({"`": " "})
# Full-width forms, letters and digits of mathematical alphabets: the same signs in ASCII.
_COMPATIBLE = re.compile(
    "[\u2103\u2109\u3000\u3371-\u33df\uff01-\uff5e\uffe0-\uffe6\U0001d400-\U0001d7ff]"
)
_DIGIT = re.compile(r"(?![0-9])\d")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+")
_LOWERED = re.compile("[\u2080-\u2089]+")
_ROOT = re.compile(r"√([0-9]+(?:\.[0-9]+)?)")
_PROSE = re.compile(r"\\(?:text[a-z]*|mbox)\s*\{[^{}]*\}")
_DOLLARS = re.compile(r"(?<!\\)\$")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z][a-z]+[\s,]+[a-z]{2,}")
_TOKEN = re.compile(
    r"""
      (?P<dropped> <<[^<>\n]*>>                          # GSM8K's calculator marks
                 | \\(?:left|right)\s*\.(?![0-9]) )      # null delimiters
    | (?P<power>   (?<=[0-9A-Za-z)])\*\*(?=[0-9]) )      # 2**3; elsewhere ** is Markdown
    | (?P<number>  [1-9][0-9]{0,2}(?:(?:,|\{,\}|\\,|,?\\!)[0-9]{3})+(?![0-9]) (?:\.[0-9]+)?
                 | [0-9]+(?:\.[0-9]+)? | \.[0-9]+ )
    | (?P<word>    [^\W0-9_]+ )
    | (?P<command> \\[A-Za-z]+ )
    | (?P<newline> \\\\(?:\s*\[[0-9.]+[a-z]{2}\])? )
    | (?P<symbol>  \\. )
    | (?P<space>   \s+ | \*{2,} | [$~&] | \\(?!\Z) )      # a last \ is cut off from its command
    | (?P<other>   . )
    """,
    re.VERBOSE | re.DOTALL,
)
_DEGREE = re.compile(r"\^(?:\\circ(?![A-Za-z])|\{\\circ\})")
_BARE_ARGUMENT = re.compile(
    r"(\\(?:frac|binom|sqrt|overline|pmod))(?: (?=[A-Za-z])|(?=[0-9]))([0-9A-Za-z])"
)
_SECOND_ARGUMENT = re.compile(r"(\\(?:frac|binom)\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z])")
_SCRIPT = re.compile(r"([\^_])([0-9]+(?:\.[0-9]+)?|[A-Za-z](?![0-9A-Za-z]))")
# The space is of a mixed number: 3 1/2 is 3\frac{1}{2}.
# A denominator that is raised, has an index or a factorial is more than its digits: 3/2^2.
_QUOTIENT = re.compile(r" ?(?<![0-9.])([0-9]+(?:\.[0-9]+)?)/([0-9]+(?:\.[0-9]+)?)(?![0-9.^_!])")


class _Token(NamedTuple):
    text: str
    # Set apart from the token before: by white space in a text, or by a command that was dropped.
    spaced: bool

    @property
    def is_number(self) -> bool:
        return self.text[0] in "0123456789"

    @property
    def is_word(self) -> bool:
        return self.text[0].isalnum() and not self.is_number


def normalize_answer(answer: str, *, keeps_digits: bool = False) -> str:
    """`answer`, the content of a box, in one notation.

    keeps_digits: decimals keep the zeros at their end, which show how precise they are.

    Delimiters, sizes (\\left, \\big), boxes, text commands, degrees and GSM8K's <<...>> go.
    Fractions are \\frac{a}{b}, exponents and indices in braces; products are *; minus signs are -;
    numbers lose thousands separators and needless zeros. White space stays between words of a
    \\text{}, and after a comma or point before a digit, where it tells a list from a number.
    """
    return _brace(_join(_merge(_unwrap(_tokenize(answer, keeps_digits)))))


def to_tex(answer: str) -> str:
    """`answer` with TeX for the signs of Unicode: ASCII for the digits of every script and for
    full-width characters, powers for raised digits, \\le for the sign of it."""
    if answer.isascii():
        return answer
    answer = _ROOT.sub(r"\\sqrt{\1}", answer)
    answer = _RAISED.sub(lambda match: f"^{{{normalize('NFKC', match.group())}}}", answer)
    answer = _LOWERED.sub(lambda match: f"_{{{normalize('NFKC', match.group())}}}", answer)
    answer = _FRACTION.sub(_spell_fraction, answer)
    answer = _COMPATIBLE.sub(lambda match: normalize("NFKC", match.group()), answer)
    answer = _DIGIT.sub(lambda match: str(decimal(match.group())), answer)
    return answer.translate(_CHARACTERS)


def _spell_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = normalize("NFKC", match.group()).partition("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _tokenize(answer: str, keeps_digits: bool) -> list[_Token]:
    answer = to_tex(answer).translate(_DROPPED)
    tokens: list[_Token] = []
    for start, end, is_prose in _segments(answer):
        spaced = True
        for match in _TOKEN.finditer(answer, start, end):
            kind, raw = match.lastgroup, match.group()
            # 1B00_{16} is not 1B0_{16}.
            follows_letter = (
                raw.isdigit() and answer[max(match.start() - 1, 0) : match.start()].isalpha()
            )
            text = raw if follows_letter else _canonical(kind, raw, keeps_digits)
            if text is not None:
                tokens.append(_Token(text, spaced))
                spaced = False
            elif is_prose or kind == "newline" or _SPACING.fullmatch(raw):
                # Elsewhere white space means nothing: 2 x is 2x.
                spaced = True
    return tokens


def _segments(answer: str) -> Iterator[tuple[int, int, bool]]:
    """Yields (start, end, is_prose) over the whole answer. \\text{} and similar commands are prose,
    and so is an answer in which a dollar sign begins no formula: $5 per hour."""
    parts = _DOLLARS.split(_PROSE.sub(" ", answer))
    is_prose = len(parts) > 1 and not (
        len(parts) == 3 and not parts[0] and not parts[2] and _WORDS.search(parts[1]) is None
    )
    position = 0
    for match in _PROSE.finditer(answer):
        yield position, match.start(), is_prose
        yield match.start(), match.end(), True
        position = match.end()
    yield position, len(answer), is_prose


def _canonical(kind: str | None, raw: str, keeps_digits: bool) -> str | None:
    """The token that stands for `raw`; None where it means nothing, or only separates."""
    match kind:
        case "word" | "other":
            return raw
        case "number":
            return _canonical_number(raw, keeps_digits)
        case "command" if _SPACING.fullmatch(raw) or _IGNORED.fullmatch(raw):
            return None
        case "command":
            return _RENAMED.get(raw, raw)
        case "symbol":
            return raw if raw in ("\\{", "\\}") else _RENAMED.get(raw)
        case "power":
            return "^"
        case _:
            return None


def _canonical_number(raw: str, keeps_digits: bool) -> str:
    whole, _, decimals = re.sub(r"[^0-9.]", "", raw).partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals if keeps_digits else decimals.rstrip("0")
    return f"{whole}.{decimals}" if decimals else whole


def _closing_braces(tokens: Sequence[_Token]) -> dict[int, int]:
    closing: dict[int, int] = {}
    unclosed: list[int] = []
    for position, token in enumerate(tokens):
        if token.text == "{":
            unclosed.append(position)
        elif token.text == "}" and unclosed:
            closing[unclosed.pop()] = position
    return closing


def _unwrap(tokens: Sequence[_Token]) -> list[_Token]:
    """Drop _UNWRAPPED commands with their braces, and _REMOVED ones with all inside."""
    closing = _closing_braces(tokens)
    result: list[_Token] = []
    dropped: set[int] = set()
    command, spaced, resume = "", False, 0
    for position, token in enumerate(tokens):
        if position < resume:
            continue
        if _UNWRAPPED.fullmatch(token.text) or _REMOVED.fullmatch(token.text):
            command, spaced = token.text, True
        elif token.text == "{" and command:
            end = closing.get(position)
            if end is not None and _REMOVED.fullmatch(command):
                resume = end + 1
            elif end is not None:
                dropped.add(end)
            command = ""
        elif position in dropped:
            spaced = True
        else:
            result.append(_Token(token.text, token.spaced or spaced))
            command, spaced = "", False
    return result


def _merge(tokens: Sequence[_Token]) -> list[_Token]:
    """2 x 3 -> 2*3; letters that touch become one word; ** and << become one sign."""
    result: list[_Token] = []
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


def _join(tokens: Sequence[_Token]) -> str:
    text, before = "", None
    for token in tokens:
        text += (_joint(before, token) if before is not None else "") + token.text
        before = token
    return text


def _joint(left: _Token, right: _Token) -> str:
    """Returns a space if the two tokens would otherwise be read as other tokens, else ""."""
    if not right.text[0].isalnum():
        return ""
    last = left.text[-1]
    if left.text[0] == "\\":
        return " " if right.is_word and last.isalpha() else ""
    if right.is_number and (left.is_number or last in ".,"):
        return " "
    return " " if right.spaced and last.isalnum() else ""


def _brace(text: str) -> str:
    """Braces around what TeX takes as an argument without them: \\frac12, 1/2 and x^2."""
    text = _DEGREE.sub("", text)
    text = _BARE_ARGUMENT.sub(r"\1{\2}", text)
    text = _SECOND_ARGUMENT.sub(r"\1{\2}", text)
    text = _SCRIPT.sub(r"\1{\2}", text)
    return _QUOTIENT.sub(r"\\frac{\1}{\2}", text)
