"""Lines that commands print and log. (Tables and bars are in console.py, which imports rich.)"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import textwrap

import click

from defuse_core.formatting import escape_control_characters, unbroken

MARK_WIDTH = 7  # columns of ok, FAILED or note before the text of a check


class EscapingFormatter(logging.Formatter):
    """No text from a file changes the terminal; lines after the first are indented, so none looks like a record."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(escape_control_characters, super().format(record).split("\n")))


def echo_marked(mark: str, text: str, width: int = MARK_WIDTH, *, err: bool = False) -> None:
    """Print text behind its mark of `width` columns; a narrow terminal gets lines that break between words."""
    lines, stream = [text], sys.stderr if err else sys.stdout
    columns = shutil.get_terminal_size().columns - width
    if stream is not None and stream.isatty() and len(text) > columns:
        lines = broken_lines(text, max(24, columns))
    click.echo(f"{mark:<{width - 1}} " + f"\n{'':{width}}".join(lines), err=err)


def echo_note(text: str) -> None:
    echo_marked("note:", text, len("note: "), err=True)


def broken_lines(text: str, width: int) -> list[str]:
    """Return the text in lines of `width` columns, broken between words, but in no number with its percent sign.

    A command in backticks is not broken either, and may exceed the width: a shell would run its first line.
    """
    whole = re.sub("`[^`]+`", lambda command: command[0].replace(" ", "\u00a0"), unbroken(text))
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines]
