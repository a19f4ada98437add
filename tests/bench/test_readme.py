"""The README's tables come from the committed results."""

from bench.readme import README, TABLES, fill


def test_readme_tables_are_those_of_the_committed_results() -> None:
    readme = README.read_text()
    assert fill(readme) == readme
    assert all(f"<!-- begin {name} -->" in readme for name in TABLES)
