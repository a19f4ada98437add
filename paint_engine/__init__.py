"""PAINT: on-policy self-distillation with partially revealed solutions."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence

ENGINE_LIBRARIES = (
    "transformers",
    "peft",
    "datasets",
    "math_verify",
    "pyarrow",
    "pydantic",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "jaxtyping",
    "rich",
    "matplotlib",
    "jinja2",
)
"""modules of the extra `engine`, which the commands import in addition to PyTorch"""


def require_engine() -> None:
    """Ends the program with one line and exit code 2 if a library of the engine is missing.

    A command calls it before it imports any of them; nothing is imported here.
    """
    missing = [name for name in ENGINE_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the engine needs {', '.join(missing)}, not installed here: run "
            "pip install '.[engine]' in the clone",
            file=sys.stderr,
        )
        sys.exit(2)


def as_command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., None]:
    """Makes a command of a function that takes the arguments: it runs where the engine's libraries
    are installed, and what it prints obeys no control characters of others."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        require_engine()
        from paint_engine.files import command_output

        with command_output():
            main(argv)

    return run
