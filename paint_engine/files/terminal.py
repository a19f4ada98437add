"""What a command prints: a console of rich that shows what others wrote, and does not obey it."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from paint_engine.files.printable import printable


class Terminal(Console):
    """A console without markup, emoji codes or highlighting, whose text is printable.

    Terminal().say("first line", "second line")

    stderr: prints to standard error.
    settings: of rich's `Console`.

    The controls that rich writes itself, for colours and the live line, are left as they are.
    """

    def __init__(self, *, stderr: bool = False, **settings: Any) -> None:
        stream = settings.pop("file", None) or (sys.stderr if stderr else sys.stdout)
        super().__init__(
            file=getattr(stream, "unescaped", stream),
            stderr=stderr,
            highlight=False,
            markup=False,
            emoji=False,
            **settings,
        )

    def say(self, *lines: str, style: str | None = None) -> None:
        """Prints lines, which are not wrapped.

        A line break within one indents what follows it: a value of others that contains one
        cannot pass for a line of ours.
        """
        for line in lines:
            self.print(line.replace("\n", "\n    "), style=style, soft_wrap=True)

    # Of rich: what text becomes before it is laid out, in tables too.
    def render_str(self, text: str, **settings: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().render_str(printable(text), **settings)

    # Of rich: everything passes here, text that is laid out already too.
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), _without_link(segment.style))


def _without_link(style: Style | None) -> Style | None:
    """A link is a control with a text of others, where a library's output has one."""
    return style if style is None or style.link is None else style.update_link(None)
