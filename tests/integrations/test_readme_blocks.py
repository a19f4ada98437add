"""The README's trainer classes are those of docs/integrations.md, which the other tests run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_readme_shows_code_that_is_run() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = [
        block for block in python_blocks(readme) if re.search(r"^class \w+Trainer", block, re.M)
    ]
    assert len(shown) == 2
    assert set(shown) <= set(python_blocks((ROOT / "docs" / "integrations.md").read_text()))
