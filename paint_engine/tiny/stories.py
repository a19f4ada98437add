"""The families of stories of the tiny domain. Each draws numbers and words, and returns the text
and the solving steps."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Lea", "Sam", "Ivy", "Leo", "Nora", "Omar")
_FRUIT = ("apples", "pears", "plums", "lemons", "figs", "melons")
_GOODS = ("lamps", "chairs", "mugs", "kites", "clocks", "toys")
_GIFTS = ("bike", "tent", "guitar", "camera", "desk", "drum")

Operator = Literal["+", "-", "*", "/", "%"]


@dataclass(frozen=True)
class Step:
    """`left op right`. A negative operand -k - 1 is the result of step k.

    Step("*", 4, 12, ("the number of apples in the baskets",)) is 48; a next Step("-", -1, 15, ...)
    is 33. "%" is right percent of left. `labels` are different names of the result.
    """

    op: Operator
    left: int
    right: int
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The sentences of the problem and the steps that solve it.

    `family` names the kind of story and its variant.
    """

    family: str
    story: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """The arithmetic of the problem without its words. No two splits share a key."""
        return (self.family, *((step.op, step.left, step.right) for step in self.steps))


def _harvest(rng: random.Random) -> Plan:
    first, second = rng.sample(_NAMES, 2)
    fruit = rng.choice(_FRUIT)
    baskets, each = rng.randint(2, 8), rng.randint(4, 15)
    story = [f"{first} picks {baskets} baskets with {each} {fruit} in each basket."]
    steps = [Step("*", baskets, each, (f"the number of {fruit} of {first}", f"what {first} picks"))]
    relation = rng.choice(("more", "fewer", "twice", "half"))
    second_labels = (f"the number of {fruit} of {second}", f"what {second} picks")
    if relation in ("more", "fewer"):
        gap = rng.randint(3, 25)
        story.append(f"{second} picks {gap} {relation} {fruit} than {first}.")
        steps.append(Step("+" if relation == "more" else "-", -1, gap, second_labels))
    elif relation == "twice":
        story.append(f"{second} picks twice as many {fruit} as {first}.")
        steps.append(Step("*", -1, 2, second_labels))
    else:
        story.append(f"{second} picks half as many {fruit} as {first}.")
        steps.append(Step("/", -1, 2, second_labels))
    total = (f"the number of {fruit} together", "what they have together")
    steps.append(Step("+", -1, -2, total))
    ending = rng.choice(("eat", "pack", "sell"))
    if ending == "eat":
        eaten = rng.randint(5, 40)
        story.append(f"They eat {eaten} of them. How many {fruit} are left?")
        steps.append(Step("-", -3, eaten, (f"the number of {fruit} left", "what is left")))
    elif ending == "pack":
        size = rng.randint(3, 9)
        story.append(f"They put all of them in boxes of {size}. How many boxes do they fill?")
        steps.append(Step("/", -3, size, ("the number of boxes", "the count of full boxes")))
    else:
        price = rng.randint(2, 4)
        story.append(
            f"They sell all of them for {price} dollars each. How many dollars do they get?"
        )
        steps.append(Step("*", -3, price, ("the money in dollars", "what they get")))
    return Plan(f"harvest-{relation}-{ending}", tuple(story), tuple(steps))


def _savings(rng: random.Random) -> Plan:
    name, gift = rng.choice(_NAMES), rng.choice(_GIFTS)
    start, weekly, weeks = rng.randint(10, 60), rng.randint(4, 15), rng.randint(3, 8)
    percent = rng.choice((10, 20, 25, 50))
    story = [
        f"{name} has {start} dollars and saves {weekly} dollars a week for {weeks} weeks.",
        f"Then {name} spends {percent} percent of all the money on a book.",
    ]
    steps = [
        Step("*", weekly, weeks, ("the money saved", f"what {name} saves")),
        Step("+", start, -1, ("all the money", f"what {name} has then")),
        Step("%", -2, percent, ("the price of the book", "the money for the book")),
        Step("-", -2, -3, ("the money left", f"what {name} has left")),
    ]
    ending = rng.choice(("need", "gift"))
    if ending == "need":
        cost = rng.randint(8, 20) * 10
        story.append(f"A {gift} costs {cost} dollars. How many more dollars does {name} need?")
        steps.append(Step("-", cost, -4, ("the money still needed", f"what {name} needs")))
    else:
        more = rng.randint(10, 50)
        story.append(
            f"For a birthday {name} gets {more} dollars more. How many dollars is that now?"
        )
        steps.append(Step("+", -4, more, ("the money now", f"what {name} has now")))
    return Plan(f"savings-{ending}", tuple(story), tuple(steps))


def _journey(rng: random.Random) -> Plan:
    name = rng.choice(_NAMES)
    vehicle = rng.choice(("bus", "train", "truck", "boat"))
    speed, hours = rng.randrange(10, 90, 10), rng.randint(2, 6)
    speed2, hours2 = rng.randrange(10, 90, 10), rng.randint(2, 5)
    story = [
        f"{name} drives a {vehicle} for {hours} hours at {speed} miles per hour.",
        f"After a stop {name} drives {hours2} hours at {speed2} miles per hour.",
    ]
    steps = [
        Step("*", speed, hours, ("the first part in miles", "the way before the stop")),
        Step("*", speed2, hours2, ("the second part in miles", "the way after the stop")),
        Step("+", -1, -2, ("the way so far", "the number of miles so far")),
    ]
    way = rng.randint(20, 60) * 10
    story.append(f"The whole way is {way} miles.")
    steps.append(Step("-", way, -3, ("the way left", "the number of miles left")))
    ending = rng.choice(("left", "hours"))
    if ending == "left":
        story.append("How many miles are left?")
    else:
        speed3 = rng.choice((10, 20, 30, 40))
        story.append(f"How many hours does the rest take at {speed3} miles per hour?")
        steps.append(Step("/", -4, speed3, ("the number of hours left", "the time for the rest")))
    return Plan(f"journey-{ending}", tuple(story), tuple(steps))


def _workshop(rng: random.Random) -> Plan:
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    rate, hours = rng.randint(4, 25), rng.randint(3, 9)
    percent = rng.choice((10, 20, 25, 50))
    story = [
        f"A machine makes {rate} {goods} an hour and runs for {hours} hours.",
        f"Of these, {percent} percent are broken and {name} throws them away.",
    ]
    steps = [
        Step("*", rate, hours, (f"the number of {goods} made", "what the machine makes")),
        Step("%", -1, percent, (f"the number of broken {goods}", "what is broken")),
        Step("-", -1, -2, (f"the number of good {goods}", "what is good")),
    ]
    ending = rng.choice(("boxes", "store", "sell"))
    if ending == "boxes":
        size = rng.randint(2, 9)
        story.append(f"The good ones go in boxes of {size}. How many boxes are there?")
        steps.append(Step("/", -3, size, ("the number of boxes", "the count of full boxes")))
    elif ending == "store":
        stored, sold = rng.randint(20, 100), rng.randint(10, 50)
        story.append(f"There were {stored} {goods} in the store, and {sold} are sold at once.")
        story.append(f"How many {goods} are in the store now?")
        steps.append(Step("+", stored, -3, ("what is in the store", f"all the {goods}")))
        steps.append(Step("-", -4, sold, (f"the number of {goods} now", "what is there now")))
    else:
        price = rng.randint(2, 6)
        story.append(f"The good ones are sold for {price} dollars each. How many dollars is that?")
        steps.append(Step("*", -3, price, ("the money in dollars", "what they bring")))
    return Plan(f"workshop-{ending}", tuple(story), tuple(steps))


def _garden(rng: random.Random) -> Plan:
    name = rng.choice(_NAMES)
    width, extra = rng.randint(5, 30), rng.randint(3, 20)
    story = [f"The garden of {name} is {width} feet wide and {extra} feet longer than it is wide."]
    steps = [
        Step("+", width, extra, ("the length", "the length in feet")),
        Step("+", width, -1, ("half the way around", "length and width together")),
        Step("*", -2, 2, ("the way around the garden", "the length of the fence")),
    ]
    ending = rng.choice(("gate", "cost", "posts"))
    gate = rng.randint(3, 15)
    story.append(f"A fence goes all around but leaves {gate} feet open for a gate.")
    steps.append(Step("-", -3, gate, ("the fence without the gate", "the fence to build")))
    if ending == "gate":
        story.append("How many feet of fence does it take?")
    elif ending == "cost":
        cost = rng.randint(2, 4)
        story.append(f"A foot of fence costs {cost} dollars. How many dollars is the fence?")
        steps.append(Step("*", -4, cost, ("the money in dollars", "the price of the fence")))
    else:
        gap = rng.randint(2, 6)
        story.append(f"There is a post every {gap} feet. How many posts does it take?")
        steps.append(Step("/", -4, gap, ("the number of posts", "the count of posts")))
    return Plan(f"garden-{ending}", tuple(story), tuple(steps))


def _library(rng: random.Random) -> Plan:
    name = rng.choice(_NAMES)
    shelves, each, bought = rng.randint(3, 9), rng.randint(6, 20), rng.randint(10, 40)
    story = [
        f"{name} runs a library with {shelves} shelves of {each} books.",
        f"{name} buys {bought} books more.",
    ]
    steps = [
        Step("*", shelves, each, ("the number of books at first", "what is on the shelves")),
        Step("+", -1, bought, ("the number of books then", "all the books")),
    ]
    part = rng.choice((2, 3, 4, 5))
    word = {2: "Half", 3: "A third", 4: "A quarter", 5: "A fifth"}[part]
    story.append(f"{word} of all the books are lent out.")
    steps.append(Step("/", -2, part, ("the number of books lent", "what is lent")))
    steps.append(Step("-", -2, -3, ("the number of books there", "what is still there")))
    ending = rng.choice(("there", "back"))
    if ending == "there":
        story.append("How many books are still there?")
    else:
        back = rng.randint(5, 30)
        story.append(f"After a week {back} books come back. How many books are there then?")
        steps.append(Step("+", -4, back, ("the number of books in the end", "what is there then")))
    return Plan(f"library-{part}-{ending}", tuple(story), tuple(steps))


FAMILIES: tuple[Callable[[random.Random], Plan], ...] = (
    _harvest,
    _savings,
    _journey,
    _workshop,
    _garden,
    _library,
)
