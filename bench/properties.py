"""The table of the bundled base's properties, from `python -m paint_engine.tiny.properties`."""

from typing import NamedTuple

from bench.tables import Result, markdown


class Property(NamedTuple):
    """A measured value and the bounds that it must be within, as shares.

    is_difference: shown in points, not in percent.
    """

    text: str
    name: str
    lowest: float | None = None
    highest: float | None = None
    is_difference: bool = False

    @property
    def needed(self) -> str:
        unit = " points" if self.is_difference else "%"
        bounds = [
            f"{100 * bound:.3g}" for bound in (self.lowest, self.highest) if bound is not None
        ]
        if len(bounds) == 2:
            return f"{' to '.join(bounds)}{unit}"
        return f"{bounds[0]}{unit} or {'more' if self.highest is None else 'less'}"

    def holds(self, value: float) -> bool:
        above = self.lowest is None or value >= self.lowest
        return above and (self.highest is None or value <= self.highest)


PROPERTIES = (
    Property("1. Fallible: right alone", "alone", 0.45, 0.70),
    Property("2. Contents: the whole solution adds", "whole_minus_alone", 0.25, is_difference=True),
    Property("with 35% of it hidden", "hidden_35_minus_alone", 0.15, is_difference=True),
    Property("another problem's adds", "other_minus_alone", highest=0.03, is_difference=True),
    Property(
        "3. Dose: lost from 0 to 25% hidden", "whole_minus_hidden_25", 0.03, is_difference=True
    ),
    Property("from 25 to 50%", "hidden_25_minus_hidden_50", 0.03, is_difference=True),
    Property("from 50 to 75%", "hidden_50_minus_hidden_75", 0.03, is_difference=True),
    Property("4. The reference's way, with the whole", "whole_together", 0.9),
    Property(
        "fewer with half of it, by", "whole_minus_hidden_50_together", 0.05, is_difference=True
    ),
    Property("that way, alone", "alone_together", 0.2),
    Property("the other way, alone", "alone_apart", 0.2),
    Property(
        "5. Imitation costs: lost without its checks",
        "alone_minus_without_checks",
        0.05,
        is_difference=True,
    ),
    Property(
        "a reference's length, of its own solutions'", "reference_length_share", highest=2 / 3
    ),
)


def properties_table(result: Result) -> str:
    """Returns a line per bound: what is needed, and what was measured with its interval."""
    rows = []
    for one in PROPERTIES:
        value, (low, high) = result[one.name], result[f"{one.name}_ci95"]
        shown = (
            f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            if one.is_difference
            else f"{100 * value:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
        )
        rows.append([one.text, one.needed, shown, "yes" if one.holds(value) else "**no**"])
    caption = (
        f"{result['num_problems']} held-out problems, {result['num_samples']} samples each, "
        "temperature 1.0, top-p 0.95; 95% intervals over problems. A property holds if the "
        f"measured value is within its bounds. torch {result['torch']}; by `{result['command']}`."
    )
    header = ["property", "needed", "measured", "holds"]
    return f"{markdown(header, rows)}\n\n{caption}"
