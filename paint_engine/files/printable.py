"""Text of others made fit for a terminal and a log."""


def printable(text: str) -> str:
    """Returns the text with every character that is not printable as its escape: a line break as
    \\n, the start of a terminal's command as \\x1b."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
