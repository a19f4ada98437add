"""The table of the base's properties: bounds, and which of them hold."""

import pytest

from bench.properties import PROPERTIES, Property, properties_table


def test_bounds_are_told_in_their_unit_and_kept() -> None:
    share = Property("a", "a", 0.45, 0.7)
    assert share.needed == "45 to 70%"
    assert [share.holds(value) for value in (0.44, 0.45, 0.7, 0.71)] == [False, True, True, False]
    least = Property("b", "b", 0.25, is_difference=True)
    assert least.needed == "25 points or more"
    assert least.holds(0.25) and not least.holds(0.24)
    most = Property("c", "c", highest=0.03, is_difference=True)
    assert most.needed == "3 points or less"
    assert most.holds(-0.1) and not most.holds(0.04)


def test_every_property_has_a_line_with_its_interval() -> None:
    result = {one.name: 0.5 for one in PROPERTIES}
    result |= {f"{one.name}_ci95": [0.4, 0.6] for one in PROPERTIES}
    result |= {"num_problems": 512, "num_samples": 4, "torch": "2", "command": "c"}
    header, _, *lines = properties_table(result).split("\n\n")[0].splitlines()
    assert header == "| property | needed | measured | holds |"
    assert len(lines) == len(PROPERTIES)
    assert lines[0].endswith("| 45 to 70% | 50.0% (40.0 to 60.0) | yes |")
    (other,) = (line for line in lines if line.startswith("| another problem's"))
    assert other.endswith("| 3 points or less | +50.0 (+40.0 to +60.0) | **no** |")


@pytest.mark.parametrize("one", PROPERTIES, ids=lambda one: one.name)
def test_every_property_has_a_bound(one: Property) -> None:
    assert one.lowest is not None or one.highest is not None
