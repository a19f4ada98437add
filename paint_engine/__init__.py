"""PAINT: on-policy self-distillation with partially revealed solutions."""

import importlib.util
import sys

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

    A command calls it before it imports anything else; nothing is imported here.
    """
    missing = [name for name in ENGINE_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the engine needs {', '.join(missing)}, not installed here: run "
            "pip install '.[engine]' in the clone",
            file=sys.stderr,
        )
        sys.exit(2)
