"""What people and other systems touch: the command line, Label Studio, S3, serving."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

# not in the exception: Ray would replace one that names its signal by a plain KeyboardInterrupt
_received: list[signal.Signals] = []


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a command beside Ctrl-C; a hangup that is ignored, as under nohup, does not."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignores_hangup else (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let SIGTERM, as of a scheduler or Kubernetes, and the hangup of a terminal end the block as Ctrl-C does."""

    def stop(number: int, _: object) -> NoReturn:
        if number == signal.SIGHUP:  # a shell repeats it, and the second would cut off the end
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _received.append(signal.Signals(number))
        raise KeyboardInterrupt

    _received.clear()
    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> tuple[signal.Signals, ...]:
    """Let no further signal cut off the end of a command, and return those that would have."""
    numbers = (signal.SIGINT, *stop_signals())
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    return numbers


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    """Ignore signals in the block, at a command's end; after it they end the process at once, without a message."""
    numbers = ignore_signals()
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def was_stopped() -> bool:
    """Whether SIGTERM or a hangup has arrived."""
    return bool(_received)


def stopped_exit_code() -> int:
    """Return the exit code of a command that a signal ended: 143 for SIGTERM, 130 for Ctrl-C, 129 for a hangup."""
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
        with ignoring_signals():
            print(f"defuse: {stopped_line()}", file=sys.stderr)
        sys.exit(stopped_exit_code())
