"""What people and other systems touch: the command line, Label Studio, S3, serving."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

# Ray would turn an exception that names its signal into a KeyboardInterrupt
_received: list[signal.Signals] = []


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, as of a scheduler or Kubernetes, end the block as Ctrl-C does."""

    def stop(*_: object) -> NoReturn:
        _received.append(signal.SIGTERM)
        raise KeyboardInterrupt

    _received.clear()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Ignore further signals in the block, which says that one came; after it they end the process without a word."""
    _react(signal.SIG_IGN)
    try:
        yield
    finally:
        _react(signal.SIG_DFL)


def _react(how: signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, how)


def stopped_exit_code() -> int:
    """Return the exit code of a command that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + (_received or [signal.SIGINT])[0]


def stopped_line() -> str:
    """Return what is said of a command that a signal ended: only a run is continued by the same command."""
    return "stopped" + ("; the same command continues from here" if sys.argv[1:2] == ["run"] else "")


def main() -> None:
    """Run the program `defuse`: Ctrl-C ends it in one line also while it imports what it needs."""
    try:
        from services.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        with last_words():
            print(f"defuse: {stopped_line()}", file=sys.stderr)
        sys.exit(stopped_exit_code())
