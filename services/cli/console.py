"""The terminal, and the progress of a long command: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger("defuse")
LINE_EVERY_S = 15.0
WIDTH = 80  # columns where the terminal says that it has none


class Terminal(Console):
    """What a command prints its tables on."""

    def __init__(self, *, stderr: bool = False, markup: bool = True) -> None:
        super().__init__(stderr=stderr, markup=markup, emoji=False)  # `:cat:` in a class name is text
        if self.width < 1:  # COLUMNS=0, as in some editors and containers
            self.width = WIDTH

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, as click does: rich would exit with 1, which means that a check failed."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _rate(made: int, elapsed: float) -> str:
    """Return the rate, empty before it is meaningful."""
    if elapsed <= 1 or not made:
        return ""
    return f"{made / elapsed:,.0f}/s" if made / elapsed >= 10 else f"{60 * made / elapsed:,.3g}/min"


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
            disable=not self.is_live,
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
            self.handlers, root.handlers = (
                root.handlers,
                [
                    RichHandler(
                        console=self.console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
                    )
                ],
            )
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
        if self.handlers:
            logging.getLogger().handlers = self.handlers

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        """Show that `done` of `total` units of `what` are done."""
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
            from defuse_core.report.formatting import duration  # late: pydantic takes a while

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
