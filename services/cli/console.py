"""The terminal: its tables, and the progress of a long command, as bars or as plain lines in a log."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Sequence
from typing import Self, cast

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from defuse_core.formatting import duration
from services.cli.output import EscapingFormatter

log = logging.getLogger("defuse")
LINE_EVERY_S = 15.0
WIDTH = 80  # columns where the terminal says that it has none
UNBOUNDED = 1000  # columns, in which every table fits
CLASS_COLUMNS = ("Label", "Mistaken for")
FOLDED = 10  # columns that a text needs which is broken anywhere


class Terminal(Console):
    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)  # `[b]` and `:cat:` in a name are text
        if self.is_dumb_terminal:  # rich takes 80 columns for it, whatever COLUMNS says
            self.size = shutil.get_terminal_size()
        if self.width < 1:  # COLUMNS=0, as in some editors and containers
            self.width = WIDTH

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, as click does: rich would exit with 1, which means that a check failed."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def new_table(title: str | None, columns: Sequence[str], texts: int = 1) -> Table:
    """Return an empty table whose first `texts` columns hold text, and the others numbers.

    Names of classes go on in the next line where they are too long.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        if column in CLASS_COLUMNS:
            table.add_column(column, overflow="fold")
        elif place < texts:
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _keep_names_readable(table: Table) -> None:
    """Give long names of classes as many columns as their headings have, at least."""
    for column in table.columns:
        if column.header in CLASS_COLUMNS:
            longest = max((len(str(cell)) for cell in column.cells), default=0)
            column.min_width = min(longest, len(max(CLASS_COLUMNS, key=len)))


def print_table(console: Console, table: Table) -> None:
    """Print a table; where rich would cut its cells, those of each row below each other, with their headings."""
    if needed_width(console, table) <= console.width:
        console.print(table)
        if table.caption:
            console.print()  # a table without one ends with a blank line
        return
    if table.title:
        console.print(Text(str(table.title), style="bold"))
    for number, cells in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        if number:
            console.print()
        for place, (column, cell) in enumerate(zip(table.columns, cells, strict=True)):
            heading = f"{column.header}: " if column.header else ""
            console.print(Text.assemble("  " if place else "", heading, cast(str | Text, cell)))
    if table.caption:
        console.print(Text(str(table.caption), style="dim"))
    console.print()


def needed_width(console: Console, table: Table) -> int:
    """Return the width from which on rich cuts no cell: a column that may wrap needs its longest word."""
    unbounded = console.options.update_width(UNBOUNDED)
    width = Measurement.get(console, unbounded, table).maximum
    for column in table.columns:
        if not column.no_wrap:
            cells = [Measurement.get(console, unbounded, cell) for cell in (column.header, *column.cells)]
            word = (
                max(FOLDED, column.min_width or 0)
                if column.overflow == "fold"
                else max(cell.minimum for cell in cells)
            )
            width -= max(0, max(cell.maximum for cell in cells) - word)
    return width


def print_fitting(console: Console, table: Table, dropped: Sequence[str]) -> None:
    drop_columns(console, table, dropped)
    print_table(console, table)


def drop_columns(console: Console, table: Table, dropped: Sequence[str]) -> None:
    """Leave out columns of the table, in the order of `dropped`, until it fits: fewer, rather than parts of each.

    None where the fewest do not fit: print_table prints all of them then, below each other.
    """
    _keep_names_readable(table)
    every = table.columns
    for count in range(len(dropped) + 1):
        table.columns = [column for column in every if column.header not in dropped[:count]]
        if needed_width(console, table) <= console.width:
            return
    table.columns = every


def _rate(made: int, elapsed: float) -> str:
    """Return the rate, empty before it is meaningful."""
    if elapsed <= 1 or not made:
        return ""
    return f"{made / elapsed:,.0f}/s" if made / elapsed >= 10 else f"{60 * made / elapsed:,.3g}/min"


class _AboveBars(logging.Handler):
    """Prints each record above the bars; the terminal itself breaks long lines, so that these can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(EscapingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:
            self.handleError(record)


class ProgressDisplay:
    """The protocol `Progress` for people: one bar for the current activity, with its rate and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Terminal(stderr=True)
        # is_terminal alone is true for a file, too, where FORCE_COLOR is set, and for one that draws no bars
        self.is_live = self.console.is_interactive and self.console.file.isatty()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.shown: dict[str, TaskID] = {}
        # activity -> when it was first reported, and how far it was
        self.begun: dict[str, tuple[float, int]] = {}
        self.last: dict[str, int] = {}  # activity -> how far it is
        self.last_line = 0.0
        self.handlers: list[logging.Handler] = []

    def __enter__(self) -> Self:
        if self.is_live:
            root = logging.getLogger()
            self.handlers, root.handlers = root.handlers, [_AboveBars(self.console)]
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self.bars.stop()
            logging.getLogger().handlers = self.handlers

    def __call__(self, what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
        now = time.monotonic()
        if done < self.last.get(what, done + 1):  # new, or the same activity again
            self.begun[what] = (now, done)
            if not self.is_live and total > done == 0:
                log.info("%s", what)
        self.last[what] = done
        elapsed, made = now - self.begun[what][0], done - self.begun[what][1]
        rate = _rate(made, elapsed)
        if self.is_live:
            self._bar(what, done, total, unit, rate)
        elif now - self.last_line >= LINE_EVERY_S and done:
            self.last_line = now
            is_known = elapsed > 1 and made and done < total
            left = f"{duration(elapsed / made * (total - done))} left" if is_known else ""
            log.info("%s: %s", what, ", ".join(filter(None, [f"{done:,} of {total:,} {unit}", rate, left])))

    def _bar(self, what: str, done: int, total: int, unit: str, rate: str) -> None:
        if what not in self.shown:
            for finished in self.shown.values():
                self.bars.remove_task(finished)
            self.shown = {what: self.bars.add_task(what, total=total, unit=unit, rate=rate)}
        self.bars.update(self.shown[what], completed=done, total=total, unit=unit, rate=rate)
