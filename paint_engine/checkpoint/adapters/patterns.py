"""Tries the regular expressions of an adapter's configuration on a model's names, bounded in time.

peft matches each of them with every name. One may take longer than the age of the universe for a
name of thirty letters, and Python cannot stop it: so a child process tries them first.
"""

import re
import sys
from collections.abc import Callable, Mapping

from paint_engine.worker import StartFailed, Worker

# All of an adapter's take a hundredth of it on a model with thousands of layers.
_TIME_LIMIT_S = 10.0
_START_LIMIT_S = 120.0
# Names as they are. The dot also stands for any character, which takes no time.
_PLAIN = re.compile(r"[\w.-]*")


def bad_pattern(patterns: Mapping[str, str], names: list[str]) -> str | None:
    """The first of the regular expressions that Python does not take, or with which it does not
    finish in time, as "KEY: got ...; needs ...". None if there is none.

    patterns: by their keys, for the message.
    names: that peft matches with all of them.
    """
    tried = {key: text for key, text in patterns.items() if not _PLAIN.fullmatch(text)}
    if not tried:
        return None
    worker = Worker(
        "paint_engine.checkpoint.adapters.patterns:load_matcher",
        [names],
        call="matching it with the model's names",
        process="the process that tries regular expressions",
        timeout_s=_TIME_LIMIT_S,
        start_limit_s=_START_LIMIT_S,
        advice=f'see what this says: {sys.executable} -c "import paint_engine.worker"',
    )
    try:
        for key, text in tried.items():
            reply = worker.ask(text)
            if reply.error is not None:
                return (
                    f"{key}: got {text[:60]!r}; needs a regular expression that Python takes, "
                    f"matched within {_TIME_LIMIT_S:g} s ({reply.error})"
                )
    except StartFailed as failure:
        raise ValueError(str(failure)) from failure
    finally:
        worker.close()
    return None


def load_matcher(names: list[str]) -> Callable[[str], None]:
    """Returns, in the child, the function that matches one expression in peft's two ways."""

    def match(text: str) -> None:
        whole, end = re.compile(text), re.compile(rf"(.*\.)?({text})$")
        for name in names:
            whole.fullmatch(name)
            end.match(name)

    return match
