"""What the console and the report show of a recipe's runs, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ConsoleField:
    """One number on the console: ConsoleField("loss", "loss", "{:.4f}")

    key: a key of the metrics; a step that lacks it shows nothing.
    form: a format string for the value.
    """

    key: str
    label: str
    form: str


@dataclass(frozen=True)
class Quantity:
    """One drawing of the report: series ("key of metrics.jsonl", "label") that share a unit.

    Quantity("Entropy", "nats per token", (("student_entropy", "student"),))

    optional: settings decide whether a run has it. Otherwise the report lists a missing one.
    percent: the values are fractions, shown as percentages.
    smooth: a running mean is drawn over the values.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    optional: bool = False
    percent: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class TokenColor:
    """The quantity that colours tokens: the magnitude of a sample's list `key`, in nats.

    `title` is its name in the legend, `label` its name beside a mean.
    """

    key: str
    title: str
    label: str


def never(metrics: Mapping[str, float]) -> bool:
    """Returns false: the loss of every step is meaningful."""
    return False


@dataclass(frozen=True)
class Display:
    """How the console and the report show a recipe's runs.

    curves: the drawings, in the order of the page.
    columns: describes the left and the right column of a sample.
    absent: names what the report lacks compared with a PAINT report.
    thing, things: what a step trains on, singular and plural.
    clips, interpolates: whether the report shows clipped masses and selected tokens.
    kinds_note: says how to read the loss by kind of token.
    loss_is_flat: whether a step's loss stays near zero regardless of learning. The console then
        omits it, and `flat_loss_note` explains the curve.
    """

    console: tuple[ConsoleField, ...]
    curves: tuple[Quantity, ...]
    token_color: TokenColor
    columns: str
    absent: str = ""
    thing: str = "rollout"
    things: str = "rollouts"
    clips: bool = False
    interpolates: bool = False
    kinds_note: str = ""
    loss_is_flat: Callable[[Mapping[str, float]], bool] = never
    flat_loss_note: str = ""


LOSS = ConsoleField("loss", "loss", "{:.4f}")
OVERLAP = ConsoleField("overlap", "overlap", "{:.0%}")
CONTEXT_SHARE = ConsoleField("context_share", "with context", "{:.0%}")
ACCURACY = ConsoleField("accuracy", "accuracy", "{:.0%}")
TOKENS_PER_S = ConsoleField("tokens_per_s", "", "{:,.0f} tokens/s")

LOSS_IN_NATS = Quantity("Loss", "nats per token", (("loss", "loss"),))
CONTEXT_EXPOSURE = Quantity(
    "Context exposure",
    "share",
    (("overlap", "anchors found (overlap)"), ("mask_ratio", "solution hidden (mask ratio)")),
    # Of contexts with a mask.
    optional=True,
    percent=True,
)
# Of contexts that may have nothing to show.
CONTEXT_SHARE_CURVE = Quantity(
    "Rollouts with a context",
    "share",
    (("context_share", "had something to show the teacher"),),
    optional=True,
    percent=True,
    smooth=True,
)
TAUGHT = Quantity(
    "Rollouts that the teacher trains",
    "share",
    (("taught_share", "judged as objective.on asks"),),
    optional=True,
    percent=True,
    smooth=True,
)
TOKEN_WEIGHTS = Quantity(
    "Token weights",
    "mean",
    (
        ("ratio", "student to old student"),
        ("importance_weight", "trainer to sampler (1: no cap)"),
    ),
)
ENTROPY = Quantity(
    "Entropy",
    "nats per token",
    (("student_entropy", "student"), ("teacher_entropy", "teacher")),
)
ROLLOUTS = Quantity(
    "Rollouts",
    "share",
    (("accuracy", "correct"), ("truncation_rate", "truncated")),
    percent=True,
    smooth=True,
)
GRADIENT_NORM = Quantity("Gradient norm", "before clipping", (("grad_norm", "L2 norm"),))
COMPLETION_LENGTH = Quantity("Completion length", "tokens", (("completion_length", "mean"),))
STEP_TIME = Quantity(
    "Step time",
    "seconds",
    (("seconds_rollout", "rollout"), ("seconds_update", "update")),
)
SERVED_MASS = Quantity(
    "Served mass",
    "share",
    (("served_mass", "teacher's probability of the listed tokens"),),
    percent=True,
)
# The last curves on the page of every recipe with rollouts.
SAMPLING_CURVES = (ENTROPY, ROLLOUTS, GRADIENT_NORM, COMPLETION_LENGTH, STEP_TIME)

TEACHER_COLUMNS = (
    "The left column shows what the teacher saw; the right column shows the student's completion"
)
