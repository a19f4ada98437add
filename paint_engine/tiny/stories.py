"""The families of stories of the tiny domain. Each draws numbers and words, and returns the text
and two ways of solving it."""

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

_NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Lea", "Sam", "Ivy", "Leo", "Nora", "Omar")

Operator = Literal["+", "-", "*", "/"]
Way = Literal["together", "apart"]
WAYS: tuple[Way, ...] = ("together", "apart")


class Step(NamedTuple):
    """`left op right`. An operand that is a string is the result of the step with that role.

    role: names the result; the steps of both ways to one result share its role.
    label: the words for the result.
    """

    role: str
    op: Operator
    left: int | str
    right: int | str
    label: str


@dataclass(frozen=True)
class Plan:
    """The sentences of a problem, and the steps of each way to its answer.

    "together" adds up what comes at a time and multiplies once; "apart" multiplies each part and
    adds up the products. From the total on, the ways share their steps.

    lines: by way, the roles that a terse solution computes in each of its formulas.
    """

    family: str
    story: tuple[str, ...]
    ways: dict[Way, tuple[Step, ...]]
    lines: dict[Way, tuple[tuple[str, ...], ...]]

    @property
    def key(self) -> tuple[object, ...]:
        """The arithmetic of the problem and its family, without the other words. No two splits
        share a key."""
        return (self.family, *((s.op, s.left, s.right) for s in self.ways["together"]))


class Words(NamedTuple):
    """What a family calls its results, from the sum at a time to the last result but one."""

    at_a_time: str
    first: str
    second: str
    total: str
    after: str
    then: str


class Ending(NamedTuple):
    """The last sentences and step of a story; `{k}` is the step's number."""

    text: str
    op: Operator
    label: str


class Family(NamedTuple):
    """A kind of story. `{n}` is a name, `{a}` how often `{b}` and `{c}` come, `{d}` and `{e}` what
    is taken away and added.

    joining: "+" if the second part adds to the first, "-" if it is lost.
    losing: the sentence where `{d}` is taken away before `{e}` is added; `gaining`: the reverse.
    """

    name: str
    opening: str
    joining: Operator
    losing: str
    gaining: str
    endings: tuple[Ending, ...]
    words: Words


class Draft(NamedTuple):
    """What a story is drawn with. `{k}` and the numbers are those of `Ending` and `Family`."""

    family: Family
    a: int
    b: int
    c: int
    d: int
    e: int
    name: str
    is_losing: bool
    ending: Ending
    k: int

    @property
    def chain(self) -> tuple[tuple[Operator, int], ...]:
        """The operators and numbers that take `b` to the answer, by the way "together"."""
        changes: tuple[tuple[Operator, int], ...] = (("-", self.d), ("+", self.e))
        return (
            (self.family.joining, self.c),
            ("*", self.a),
            *(changes if self.is_losing else changes[::-1]),
            (self.ending.op, self.k),
        )


def draw_draft(rng: random.Random, family: Family) -> Draft:
    """Draws the numbers, the name and the variant of a story. Results can be out of reach."""
    a, b, c = rng.randint(3, 9), 10 * rng.randint(1, 4), rng.randint(2, 9)
    d = 10 * rng.randint(1, 8) + rng.randint(1, 9)
    e = 10 * rng.randint(1, 8) + rng.randint(1, 9)
    name, is_losing, ending = rng.choice(_NAMES), rng.random() < 0.5, rng.choice(family.endings)
    k = rng.randint(2, 4) if ending.op == "*" else rng.randint(2, 5)
    return Draft(family, a, b, c, d, e, name, is_losing, ending, k)


def write_plan(draft: Draft) -> Plan:
    """Writes the story, and the steps of both ways. "together" takes those of `Draft.chain`."""
    family, ending, words = draft.family, draft.ending, draft.family.words
    a, b, c, k = draft.a, draft.b, draft.c, draft.k
    texts = (family.opening, family.losing if draft.is_losing else family.gaining, ending.text)
    told = {"n": draft.name, "k": k, "a": a, "b": b, "c": c, "d": draft.d, "e": draft.e}
    _, _, (first_op, first), (second_op, second), _ = draft.chain
    tail = (
        Step("after", first_op, "total", first, words.after),
        Step("then", second_op, "after", second, words.then),
        Step("answer", ending.op, "then", k, ending.label),
    )
    together = (
        Step("at_a_time", family.joining, b, c, words.at_a_time),
        Step("total", "*", a, "at_a_time", words.total),
    )
    apart = (
        Step("first", "*", a, b, words.first),
        Step("second", "*", a, c, words.second),
        Step("total", family.joining, "first", "second", words.total),
    )
    ends = (("then",), ("answer",))
    return Plan(
        f"{family.name}-{'lose' if draft.is_losing else 'gain'}-{ending.label}",
        tuple(text.format(**told) for text in texts),
        {"together": (*together, *tail), "apart": (*apart, *tail)},
        {
            "together": (("at_a_time",), ("total", "after"), *ends),
            "apart": (("first", "second", "total"), ("after",), *ends),
        },
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "harvest",
        "{n} picks {b} apples and {c} pears a day for {a} days.",
        "+",
        "{n} gives away {d} of them and buys {e} more.",
        "{n} buys {e} more and gives away {d} of them.",
        (
            Ending("{n} sells all for {k} dollars each. How many dollars is that?", "*", "dollars"),
            Ending("{n} packs all in bags of {k}. How many bags are there?", "/", "bags"),
        ),
        Words("fruit a day", "apples", "pears", "all fruit", "fruit then", "fruit now"),
    ),
    Family(
        "workshop",
        "A machine makes {b} lamps an hour, but {c} of them are broken. It runs for {a} hours.",
        "-",
        "{n} sells {d} good lamps and then finds {e} more.",
        "{n} finds {e} more good lamps and then sells {d}.",
        (
            Ending("A lamp needs {k} screws. How many screws is that?", "*", "screws"),
            Ending("The lamps go in boxes of {k}. How many boxes are there?", "/", "boxes"),
        ),
        Words(
            "good an hour", "lamps made", "lamps broken", "good lamps", "lamps then", "lamps now"
        ),
    ),
    Family(
        "journey",
        "A bus drives {b} miles before noon and {c} miles after noon on each of {a} days.",
        "+",
        "The driver {n} takes off {d} miles of a detour and adds {e} miles of a trip.",
        "The driver {n} adds {e} miles of a trip and takes off {d} miles of a detour.",
        (
            Ending("A mile costs {k} dollars. How many dollars is that?", "*", "costs"),
            Ending("It needs a break every {k} miles. How many breaks is that?", "/", "breaks"),
        ),
        Words("miles a day", "before noon", "after noon", "all miles", "miles then", "miles now"),
    ),
    Family(
        "savings",
        "{n} earns {b} dollars a week and spends {c} dollars a week for {a} weeks.",
        "-",
        "Then {n} pays {d} dollars for a tent and gets {e} dollars as a gift.",
        "Then {n} gets {e} dollars as a gift and pays {d} dollars for a tent.",
        (
            Ending("The bank pays {k} times the money. How much is that?", "*", "payment"),
            Ending("{k} friends share the money. How much does one get?", "/", "share"),
        ),
        Words("saved a week", "earned", "spent", "savings", "money then", "money now"),
    ),
    Family(
        "garden",
        "In each of {a} rows {n} plants {b} tulips and {c} roses.",
        "+",
        "In May {d} flowers wither and {e} new ones grow.",
        "In May {e} new flowers grow and {d} wither.",
        (
            Ending("A flower has {k} leaves. How many leaves is that?", "*", "leaves"),
            Ending("{n} makes bunches of {k} flowers. How many bunches is that?", "/", "bunches"),
        ),
        Words("flowers a row", "tulips", "roses", "all flowers", "flowers then", "flowers now"),
    ),
    Family(
        "library",
        "A library has {a} shelves with {b} books each, but {c} on each shelf are lent.",
        "-",
        "{n} takes {d} books out and puts {e} others in.",
        "{n} puts {e} others in and takes {d} books out.",
        (
            Ending("A book weighs {k} pounds. How many pounds is that?", "*", "pounds"),
            Ending("They go on carts of {k} books. How many carts is that?", "/", "carts"),
        ),
        Words("books a shelf", "places", "books lent", "all books", "books then", "books now"),
    ),
)
