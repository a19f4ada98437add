"""The exit code of a command, for tests that run it in their own process."""

from collections.abc import Callable, Sequence


def exit_code(main: Callable[[Sequence[str]], object], *arguments: object) -> int:
    """The code with which the command ends; 0 if it returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0
