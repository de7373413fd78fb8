"""`defuse`: the command line. One module per group of commands; heavy imports wait until a command needs them."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import PathFinder
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click
import rich

from defuse_core.errors import DefuseError, InputError
from defuse_core.files import WRONG_PLACE
from defuse_core.formatting import escape_control_characters
from services import ignoring_signals, stopped_exit_code, stopped_line, stopping_on_signals, was_stopped
from services.cli.jobs import PACKAGES, ROOT, jobs, submit
from services.cli.output import EscapingFormatter, echo_marked
from services.cli.results import compare, export, suite
from services.cli.review import label_studio, review
from services.cli.run import delete, fields, init, report, run, status
from services.cli.serve import check, promote, rollback, serve
from services.settings import is_on, set_missing_home, share_cores

CLOSED_PIPE = 141  # 128 + SIGPIPE: what a shell says of a program that wrote to a closed pipe
UNPRINTED = {errno.EIO: "the terminal is gone", errno.ENOSPC: "no space left there"}
WRONG_PATH = WRONG_PLACE | {errno.EACCES, errno.EROFS}
# as wide as the signs themselves, since these set the columns of tables; but for ≤ and ≥, which no table has
PLAIN_SIGNS = {
    "−": "-",
    "–": "-",
    "→": ">",
    "…": ".",
    "\N{LEFT-TO-RIGHT MARK}": "",
    "≤": "<=",
    "≥": ">=",
} | dict(zip("λβΨψτσμεα", "lbPptsmea", strict=True))


GROUPS: dict[str, tuple[click.Command, ...]] = {  # groups of commands in the help
    "A run": (init, fields, run, status, report, delete),
    "People": (review, label_studio),
    "What a run found": (check, export, suite, compare),
    "Serving": (promote, serve, rollback),
    "A cluster": (submit, jobs),
}


class CommandLine(click.Group):
    """All commands. Where nobody reads what one prints, it ends as SIGPIPE would end it.

    click exits with 1 then, which means that a check failed. Python ignores the signal itself, so that a run whose log
    nobody reads any more (`defuse run 2>&1 | head`) goes on; its result is stored before it is printed.
    """

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        with _ending_with_its_reader():  # --help and --version print here
            return super().make_context(*args, **settings)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                short = formatter.width - width - 6
                formatter.write_dl(
                    [(f"{command.name:<{width}}", command.get_short_help_str(short)) for command in commands]
                )

    def invoke(self, ctx: click.Context) -> Any:
        with _ending_with_its_reader():
            return super().invoke(ctx)


@contextlib.contextmanager
def _ending_with_its_reader() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise click.exceptions.Exit(CLOSED_PIPE) from None


@click.group(
    cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="defuse")
def defuse() -> None:
    """Find the regions where an image classifier is wrong, have people label them, and fix it there.

    \b
    Begin with:           defuse run deploy/runs/demo.yaml
    For images of yours:  defuse init --help
    """


for command in chain.from_iterable(GROUPS.values()):
    defuse.add_command(command)


def main() -> None:
    """Run one command. Every failure ends in one message on stderr and the exit code of its error."""
    share_cores()
    set_missing_home()
    sys.path.append("")  # the working directory, where the user's classifier is, as with python -m
    log_output = logging.StreamHandler()
    log_output.setFormatter(EscapingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[log_output])
    logging.getLogger("defuse").setLevel(logging.INFO)  # of other libraries warnings alone
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(plain_signs.__name__, plain_signs)
        sys.stdout.reconfigure(errors=plain_signs.__name__)  # stderr escapes by itself
    try:
        with stopping_on_signals():
            _expect_working_directory()
            _run_command()
    finally:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                _drop_unread(stream)


def plain_signs(error: UnicodeError) -> tuple[str, int]:
    """Return the plain form of signs that a terminal lacks, else `?`: an error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(PLAIN_SIGNS.get(sign, "?") for sign in signs), error.end


def _expect_working_directory() -> None:
    """End where the working directory is gone, or hides a package of Defuse.

    torch ends the process without a reason in the first case. Ray's workers look for modules there first of all.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:
        _fail("the working directory was deleted; change to another one", InputError.exit_code)
    specs = {name: PathFinder.find_spec(name, [str(here)]) for name in PACKAGES}
    # a folder without __init__.py has no origin, and hides nothing
    origins = {name: spec.origin for name, spec in specs.items() if spec and spec.origin}
    hiding = [
        file for name, file in origins.items() if Path(file).parent.resolve() != (ROOT / name).resolve()
    ]
    if len(hiding) == len(PACKAGES):
        _fail(
            f"{here} has another copy of Defuse, which hides that of this command ({ROOT}) from Ray's workers; run "
            "defuse in another folder, or use the environment of the copy here",
            InputError.exit_code,
        )
    if hiding:
        _fail(
            f"{hiding[0]} has the name of a package of Defuse and hides it from Ray's workers; rename it, or run "
            "defuse in another folder",
            InputError.exit_code,
        )


def _run_command() -> None:
    try:
        code = defuse.main(standalone_mode=False)
    except SystemExit as error:  # commands end with click's Exit
        place = traceback.extract_tb(error.__traceback__)[-1]
        if Path(place.filename).parent == Path(click.__file__).parent:  # a shell asked for completions
            raise
        _fail(_exit_of_other_code(error, place), InputError.exit_code)
    except DefuseError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        with contextlib.suppress(BrokenPipeError):
            error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        with ignoring_signals():
            _fail(stopped_line(), stopped_exit_code())
    except BaseException as error:  # of a library or a classifier, which may raise what is no Exception
        unprinted = _unprinted(error)
        if unprinted and was_stopped():  # by a hangup, whose terminal is gone
            _fail(stopped_line(), stopped_exit_code())
        debugging = _is_debugging()
        if debugging:
            with contextlib.suppress(OSError):  # the exit code says it, too
                traceback.print_exc()
        if unprinted:
            _fail(f"cannot print to the end: {unprinted}; what the command made is stored", 4)
        if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
            _fail(f"{error.filename}: {error.strerror}; check this path", InputError.exit_code)
        remedy = "" if debugging else " (DEFUSE_DEBUG=1 shows where)"
        _fail(f"unexpected {type(error).__name__}: {error}{remedy}", 4)
    else:
        sys.exit(code)


def _unprinted(error: BaseException) -> str | None:
    """Return why click or rich, which print, could not write; None for other errors, such as of other files."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    prints = any(place.is_relative_to(Path(str(library.__file__)).parent) for library in (click, rich))
    return UNPRINTED.get(error.errno or 0) if isinstance(error, OSError) and prints else None


def _is_debugging() -> bool:
    """Whether tracebacks are shown; also where DEFUSE_DEBUG has a wrong value, as the error is not about that."""
    try:
        return is_on("DEFUSE_DEBUG")
    except InputError:
        return True


def _exit_of_other_code(error: SystemExit, place: traceback.FrameSummary) -> str:
    """Return the line for code, such as the user's network, that ended the command by sys.exit."""
    return (
        f"{place.filename}, line {place.lineno}: exits the program (SystemExit: {error}); expected code that returns "
        "or raises an error, so remove that"
    )


def _fail(line: str, exit_code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the exit code says it, too
        echo_marked("defuse:", escape_control_characters(line), len("defuse: "), err=True)
    sys.exit(exit_code)


def _drop_unread(stream: TextIO) -> None:
    """Drop what is left for a pipe that nobody reads or a full disk, which would turn the exit code into 120."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
