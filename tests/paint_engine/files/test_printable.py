"""What others wrote is shown, and not obeyed: as text, by a terminal's console, and by whatever
prints."""

import io
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paint_engine.files import is_hidden, one_line, printable, printable_output, shown
from paint_engine.files.terminal import Terminal

CLEAR, CLIPBOARD, LINK = (
    "\x1b[2J\x1b[H",
    "\x1b]52;c;aGk=\x07",
    "\x1b]8;;http://x\x1b\\y\x1b]8;;\x1b\\",
)
HOSTILE = f"{CLEAR}{CLIPBOARD}{LINK}\x9b31m\rover\b\u202edesrever\u2066\u200b\u2028\ufeff\x7f\ud800"


def hidden(text: str, kept: str = "\n") -> list[str]:
    return [character for character in text if character not in kept and is_hidden(character)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "plain π ≈ 3, 数 and \u00e9\u0301\ufe0f\t\n",
            "plain π ≈ 3, 数 and \u00e9\u0301\ufe0f\t\n",
        ),
        (CLEAR, r"\x1b[2J\x1b[H"),
        (CLIPBOARD, r"\x1b]52;c;aGk=\x07"),
        ("a\r\nb\x9b\x7f\x00", "a\\r\nb\\x9b\\x7f\\x00"),
        ("\u202e\u2066\u2028\u200d\ud800\U000e0041", r"\u202e\u2066\u2028\u200d\ud800\U000e0041"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_what_a_terminal_would_obey_is_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert one_line(text) == shown.replace("\n", "\\n").replace("\t", "\\t")


@given(st.text())
def test_no_text_has_hidden_characters_left(text: str) -> None:
    assert not hidden(printable(text), "\n\t")
    assert not hidden(one_line(text), "")
    assert printable(text).count("\n") == text.count("\n")


def test_a_terminal_prints_no_control_of_others() -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, width=60)
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style=f"link {CLIPBOARD}"))
    terminal.print(table)
    terminal.print(HOSTILE, Text(HOSTILE), {"key": HOSTILE})
    terminal.say(HOSTILE, f"path: {HOSTILE}", style="red")
    assert hidden(file.getvalue()) == []
    assert r"path: \x1b[2J\x1b[H\x1b]52;c;aGk=\x07" in file.getvalue()


def test_a_terminal_s_own_colours_and_controls_stay() -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, color_system="standard", _environ={})
    terminal.say("error: \x1b[32m", style="red")
    terminal.show_cursor(False)
    assert file.getvalue() == "\x1b[31merror: \\x1b[32m\x1b[0m\n\x1b[?25l"


def test_emoji_codes_and_markup_are_text() -> None:
    file = io.StringIO()
    Terminal(file=file).say("runs/:fire:/[red]x[/red]")
    assert file.getvalue() == "runs/:fire:/[red]x[/red]\n"


def test_a_line_break_in_a_value_forges_no_line() -> None:
    file = io.StringIO()
    Terminal(file=file).say("error: a\nerror: b", "safe: all")
    assert file.getvalue() == "error: a\n    error: b\nsafe: all\n"


def test_whatever_prints_prints_printable_text(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_output():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": HOSTILE}))
        sys.stderr.write("\x1b[33mcoloured\x1b[0m\n")
        Console(stderr=True, force_terminal=True).print(Text(HOSTILE))
        Terminal().say("ours")
    out, err = capsys.readouterr()
    assert hidden(out) == hidden(err) == []
    assert err.count(r"\x1b]52;c;aGk=\x07") == 2 and "\ncoloured\n" in err and "ours\n" in out


def test_a_progress_bar_of_a_library_still_writes_over_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with printable_output():
        for text in ("\r 10%", "\n\x1b[A", "\r\x1b[2K 20%\r"):
            sys.stderr.write(text)
    assert capsys.readouterr().err == "\r 10%\n\x1b[A\r 20%\\r"


PROGRAM = """
import os
from paint_engine.files import command_output
with command_output():
    raise KeyError("\\x1b[2J")
"""


def test_the_last_words_of_a_command_are_printable() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 1 and "\nKeyError: " in done.stderr
    assert hidden(done.stderr) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n", "'a\\n'"),
        (10**40, str(10**40)),
        ([-(16**6000)], "[an integer of about 7,225 digits]"),
        ("a" * 10**6, "'" + 59 * "a" + "..."),
        ({"a": 1.5, "b": [True, None]}, "{'a': 1.5, 'b': [True, None]}"),
    ],
)
def test_a_value_is_shown_by_its_start(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_value_that_is_nested_deeply_is_shown() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "[[[[[[[...]]]]]]]"
