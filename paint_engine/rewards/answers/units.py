# ruff: noqa: RUF001 (words of other scripts look like Latin ones)
"""Words beside a number: its unit, its order of magnitude, and what makes a bound of it.

A unit does not hide a number: 7 cm, 7\\text{ apples} and 7个 answer 7. A word that changes what is
said does: 5\\text{ or more} is no 5, and 7\\text{ million} is 7000000.
"""

import re
from dataclasses import dataclass
from unicodedata import name

from paint_engine.rewards.answers.exact import is_arithmetic

_ALIASES = {
    "m": "meter meters metre metres 米 м метр метра метров metro metros",
    "cm": "centimeter centimeters centimetre centimetres 厘米 см",
    "mm": "millimeter millimeters millimetre millimetres 毫米 мм",
    "km": "kilometer kilometers kilometre kilometres 千米 公里 км",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "g": "gram grams 克 г",
    "kg": "kgs kilogram kilograms 千克 公斤 кг",
    "mg": "milligram milligrams",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "s": "sec secs second seconds 秒 с",
    "min": "mins minute minutes 分钟 мин",
    "h": "hr hrs hour hours 小时 ч",
    "day": "days 天",
    "week": "weeks 周",
    "month": "months 月",
    "year": "years yr yrs 年",
    "l": "liter liters litre litres 升 л",
    "ml": "milliliter milliliters millilitre millilitres 毫升 мл",
    "$": "dollar dollars usd us$",
    "cent": "cents ¢",
    "€": "euro euros eur",
    "£": "gbp",
    "¥": "yen yuan rmb cny 元",
    "₹": "rupee rupees rs inr",
    "mph": "mi/h milesperhour",
    "km/h": "kmh kph kilometersperhour",
    "m/s": "meterspersecond",
    "am": "a.m.",
    "pm": "p.m.",
    "degree": "degrees deg",
    "rad": "radian radians",
    "c": "celsius",
    "f": "fahrenheit",
    "n": "newton newtons",
    "j": "joule joules",
    "w": "watt watts",
    "v": "volt volts",
    "k": "kelvin",
    "hz": "hertz",
    "unit": "units",
}
_UNITS = {alias: unit for unit, names in _ALIASES.items() for alias in (unit, *names.split())}
_MAGNITUDES = {
    **{"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "lakh": 5},
    **{"crore": 7, "百": 2, "千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8, "тысяч": 3, "тыс": 3},
    **{"миллион": 6, "миллиона": 6, "миллионов": 6, "млн": 6, "миллиард": 9, "млрд": 9},
}
_COMMAND = r"\\(?:text[a-z]*|mbox|math(?:rm|it|bf|sf)|operatorname|rm|units?|si)"
_TEXT = rf"{_COMMAND}\s*\{{[^{{}}]*\}}"
_POWER = r"(?:\s*\^(?:-?[0-9]|\{-?[0-9]\}))?"
_RATIO_OF_UNITS = rf"\\[dt]?frac\s*\{{{_TEXT}{_POWER}\}}\s*\{{{_TEXT}{_POWER}\}}"
_TEXT_UNIT = re.compile(
    rf"(?:(?:[\s/*~]|\\cdot)*(?:{_TEXT}{_POWER}|\(\s*{_TEXT}{_POWER}\s*\)|{_RATIO_OF_UNITS}))+[\s.]*$"
)
_UNWRAP = re.compile(rf"{_COMMAND}\s*\{{([^{{}}]*)\}}")
# A whole answer in \text{} that is more than words.
_ALL_TEXT = re.compile(
    r"\s*\\(?:text[a-z]*|mbox)\s*\{([^{}]*(?:[0-9,]|\b(?:and|or)\b)[^{}]*)\}[\s.]*"
)
_DEGREES = re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*([CF]?)$")
# In the box without \text{}: letters after a number.
_BARE_WORDS = re.compile(r"\s((?:[^\W\d_]{3,}|a|an|the)(?:[\s-]+[^\W\d_]+)*)[\s.]*$")
_BARE_SYMBOL = re.compile(rf"(\s*)([A-Za-z]+(?:[/*][A-Za-z]+)?)[23]?{_POWER}[\s.]*$")
# With the vowel signs of the scripts of India and South-East Asia.
_OTHER_SCRIPT = re.compile(
    r"\s*([^\W\d_a-zA-Z](?:[^\W\d_]|[\u0900-\u0eff])*(?:[\s/.]+[^\W\d_]+)*)[\s.]*$"
)
_CURRENCY = re.compile(
    r"\s*(\\?\$|US\s?\\?\$|HK\s?\\?\$|USD|EUR|GBP|CNY|RMB|INR|Rs\.?|[€£¥₹₽₩]|\\euro|\\pounds|\\yen)"
)
_PLAIN = re.compile(
    r"\s*-?\s*(?:[0-9.,]+|[0-9]*\s*\\[dt]?frac\s*(?:\{[0-9]+\}\{[0-9]+\}|[0-9]{2}))"
)
_CURRENCY_AFTER = re.compile(r"\s*(\\?\$|[€£¥₹₽₩¢])[\s.]*$")
_PERCENT_WORD = re.compile(r"\s*(?:per\s?cent(?:age)?|pct|процент\w*|por ciento|prozent)\b", re.I)
_ABOUT = re.compile(
    r"\s*(?:\\text[a-z]*\s*\{\s*(?:about|approximately|around|exactly)\s*\}"
    r"|\\(?:approx|sim|simeq)|about|approximately|approx\.?|around|exactly|约|大约)\s*"
)
# These words join or restrict; what they follow is no unit.
_MEANING = re.compile(
    r"\b(?:or|and|not|between|if|when|where|mod|modulo|base|except|unless|but|plus|minus|nor|half"
    r"|none|или|и|oder|und|ou)\b|[或和且半成多余]|(?<![A-Za-z^])[0-9]|[-=<>+*/]\s*$"
)
_FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|mod|gcd|lcm|min|max|det")
_NOT_UNITS = frozenset("一二三四五六七八九十")
_SINGLE_LETTER_UNITS = frozenset("mgshLlNJWVKCF")

_AT_LEAST = (
    "at least|no less than|not less than|no fewer than|not fewer than|a minimum of|至少|最少|不少于"
    "|不小于|не менее|не меньше|mindestens|au moins|al menos|por lo menos|almeno|pelo menos"
)
_AT_MOST = (
    "at most|no more than|not more than|no greater than|not greater than|a maximum of|up to|至多"
    "|最多|不超过|不多于|不大于|не более|не больше|höchstens|au plus"
    "|como máximo|al massimo|no máximo"
)
_MORE = "more than|greater than|larger than|over|above|exceeding|大于|多于|超过|более|больше"
_LESS = "less than|fewer than|smaller than|under|below|小于|少于|不到|менее|меньше"
_OR_MORE = (
    "(?:or|and) (?:more|greater|above|higher|larger|over|up)|以上|或更多|и более|или больше"
    "|oder mehr|ou plus|o más|ou mais"
)
_OR_LESS = (
    "(?:or|and) (?:less|fewer|below|lower|smaller|under)|以下|或更少|и менее|или меньше"
    "|oder weniger|ou moins|o menos|ou menos"
)
_BEFORE = [
    (relation, re.compile(rf"\s*(?:{words})(?!\w)\s*|\s*(?:{words})(?=[^a-zA-Z])", re.IGNORECASE))
    for relation, words in ((">=", _AT_LEAST), ("<=", _AT_MOST), (">", _MORE), ("<", _LESS))
]
_AFTER = [
    (relation, re.compile(rf"\s*(?:{words})(?!\w)|\+\s*$", re.IGNORECASE))
    for relation, words in ((">=", _OR_MORE), ("<=", _OR_LESS))
]


@dataclass(frozen=True)
class Quantity:
    """An answer without the words beside it: Quantity("7", "cm", 0). `magnitude` is a power of
    ten; `unit` is empty where there is none."""

    text: str
    unit: str = ""
    magnitude: int = 0

    @property
    def whole(self) -> str:
        """The text of the number, its magnitude included."""
        return f"({self.text})*10^{{{self.magnitude}}}" if self.magnitude else self.text


def split_unit(text: str, *, is_gold: bool = False) -> Quantity:
    """Takes the unit, the currency and words such as `about` off a number.

    is_gold: a single letter that touches the number is then a variable, as in 5t. In a completion
        it is taken for a unit.
    """
    text = unwrap_all(text)
    if split_bound(text) is not None:
        return Quantity(text.strip())
    about = _ABOUT.match(text)
    text = text[about.end() :] if about else text
    sign = re.match(r"\s*-\s*", text)
    currency = _CURRENCY.match(text, sign.end() if sign else 0)
    if currency is not None and is_arithmetic(rest := text[currency.end() :]):
        return Quantity(("-" if sign else "") + rest, currency[1].strip("\\ ."))
    after = _CURRENCY_AFTER.search(text)
    if after is not None and is_arithmetic(text[: after.start()]):
        return Quantity(text[: after.start()], after[1].strip("\\"))
    for find in (_text_unit, _degrees, _bare_unit):
        quantity = find(text, is_gold)
        if quantity is not None:
            return quantity
    return Quantity(text.strip())


def are_different_units(first: str, second: str) -> bool:
    """Whether both are known units, and not the same one. Powers do not count: cm^2 is cm."""
    units = [_UNITS.get(_plain(unit)) for unit in (first, second)]
    return None not in units and units[0] != units[1]


def split_bound(text: str) -> tuple[str, str] | None:
    """What `at least 5` and `5\\text{ or more}` say, (">=", "5"); None where nothing is said."""
    plain = unwrap_text(text)
    if plain.isascii() and not re.search(r"[a-z]{2}|\+\s*$", plain):
        return None
    for relation, pattern in _BEFORE:
        match = pattern.match(plain)
        if match and match.end() < len(plain):
            return relation, plain[match.end() :].strip()
    for relation, pattern in _AFTER:
        match = pattern.search(plain)
        if match and match.start() > 0 and is_arithmetic(plain[: match.start()].split(" ")[0]):
            return relation, plain[: match.start()].strip()
    return None


def unwrap_all(text: str) -> str:
    """`text` without a \\text{} around the whole of it, unless it holds but words."""
    match = _ALL_TEXT.fullmatch(text)
    return match[1] if match else text


def unwrap_text(text: str) -> str:
    """`text` with the words of \\text{} and its like as they are."""
    return re.sub(r"\s+", " ", _UNWRAP.sub(r"\1", text)).strip()


def _text_unit(text: str, is_gold: bool) -> Quantity | None:
    match = _TEXT_UNIT.search(text)
    if match is None or not text[: match.start()].strip():
        return None
    rest, words = text[: match.start()], unwrap_text(match.group())
    percent = _PERCENT_WORD.match(words)
    if percent is not None:
        return Quantity(f"{rest}\\%")
    is_symbol = len(words) == 1 and words.isascii() and words.isalpha()
    if is_symbol and (words not in _SINGLE_LETTER_UNITS or not is_arithmetic(rest)):
        return None
    if _MEANING.search(words) or re.search(r"[-+*/=<>^_({,]\s*$", rest):
        return None
    return _quantity(rest, words)


def _degrees(text: str, is_gold: bool) -> Quantity | None:
    match = _DEGREES.search(text)
    if match is None or not is_arithmetic(text[: match.start()]):
        return None
    return Quantity(text[: match.start()], match[1] or "degree")


def _bare_unit(text: str, is_gold: bool) -> Quantity | None:
    percent = re.search(_PERCENT_WORD.pattern + r"\s*$", text, re.IGNORECASE)
    if percent is not None and is_arithmetic(text[: percent.start()]):
        return Quantity(text[: percent.start()] + "\\%")
    for find in (_bare_words, _other_script, _bare_symbol):
        match = find(text, is_gold)
        if match is not None and is_arithmetic(match[0]):
            return _quantity(*match)
    return None


def _bare_words(text: str, is_gold: bool) -> tuple[str, str] | None:
    match = _BARE_WORDS.search(text)
    if match is None or _MEANING.search(match[1]) or _FUNCTIONS.match(match[1]):
        return None
    return text[: match.start()], match[1]


def _other_script(text: str, is_gold: bool) -> tuple[str, str] | None:
    if text.isascii():
        return None
    match = _OTHER_SCRIPT.search(text)
    if match is None or _MEANING.search(match[1]) or match[1][0] in _NOT_UNITS:
        return None
    script = name(match[1][0], "").split(" ")[0]
    is_letter = script in ("GREEK", "LATIN") or (script == "CYRILLIC" and len(match[1]) == 1)
    if is_letter and match[1] not in _UNITS:
        return None
    return text[: match.start()], match[1]


def _bare_symbol(text: str, is_gold: bool) -> tuple[str, str] | None:
    match = _BARE_SYMBOL.search(text)
    if match is None:
        return None
    symbol, touches = match[2], not match[1]
    is_letter = len(symbol) == 1
    if is_letter and symbol not in _SINGLE_LETTER_UNITS:
        return None
    is_known = symbol.lower() in _UNITS
    if not is_known and not all(part.lower() in _UNITS for part in re.split("[/*]", symbol)):
        return None
    rest = text[: match.start()]
    # 144-48s has a variable.
    is_variable = is_letter and ((touches and is_gold) or not _PLAIN.fullmatch(rest))
    return None if is_variable else (rest, symbol)


def _quantity(rest: str, words: str) -> Quantity:
    for magnitude, power in _MAGNITUDES.items():
        if words.lower().startswith(magnitude):
            after = words[len(magnitude) :]
            if not magnitude.isascii() or not after[:1].isalpha():
                return Quantity(rest.strip(), after.strip(), power)
    return Quantity(rest.strip(), words)


def _plain(unit: str) -> str:
    unit = re.sub(r"\^?\{?-?[0-9]\}?|square|cubic|sq\.?\s", "", unit.lower())
    return re.sub(r"\s", "", unit).strip("\\.") or unit
