"""The JUnit XML file of `defuse check --suite`, which never keeps the result of an earlier check."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from defuse_core.errors import InputError
from defuse_core.formatting import escape_control_characters
from services.cli.output import echo_note

OPTION = "--junit"


class JunitCommand(click.Command):
    """A command with --junit: an error in its options is written to that file, too."""

    def make_context(
        self, info_name: str | None, args: list[str], *parent: Any, **more: Any
    ) -> click.Context:
        # click empties the list; and a shell that completes a command line checks nothing
        path = None if more.get("resilient_parsing") else named_file(args)
        try:
            return super().make_context(info_name, args, *parent, **more)
        except click.UsageError as error:
            write_error(path, f"defuse {info_name}", error)
            raise


def named_file(words: list[str]) -> Path | None:
    """Return the file of --junit among the words of a command that cannot be parsed; None without one."""
    found = None
    for place, word in enumerate(words):
        option, has_value, value = word.partition("=")
        if word == "--":
            break
        if option == OPTION:
            found = value if has_value else "".join(words[place + 1 : place + 2])
    if not found or found.startswith("--"):  # another option, where a variable was empty
        return None
    with contextlib.suppress(RuntimeError):  # no home of such a user
        return Path(found).expanduser()
    return None


@contextlib.contextmanager
def failure_in_junit(path: Path | None, title: str) -> Iterator[None]:
    """Write to the file why a check could not be made; while the block runs, that the check has not ended.

    So a process that is killed, or that native code of a classifier ends, leaves no earlier result either.
    """
    if path is not None:
        write_junit(path, title, [not_checked("the check has not ended; was it killed?")])
    try:
        yield
    except BaseException as error:  # also sys.exit of a factory, and Ctrl-C
        write_error(path, title, error)
        raise


def write_error(path: Path | None, title: str, error: BaseException) -> None:
    """Write an error in place of results; say so where that is not possible."""
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    case = not_checked(text or type(error).__name__)
    if path is not None and (unwritable := write_junit(path, title, [case])):
        echo_note(str(unwritable))


def not_checked(why: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", name="the suite was checked", classname="defuse")
    ElementTree.SubElement(case, "error", message=escape_control_characters(why))
    return case


def write_junit(path: Path, title: str, cases: list[ElementTree.Element]) -> InputError | None:
    """Write JUnit XML; return the error of a file that cannot be written, so that the results are shown first.

    An earlier file is deleted then, if that is possible: it would be read as the result of this check.
    """
    from defuse_core.files import expect_writable, replace_file, writing

    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    counts = {name: str(sum(case.find(kind) is not None for case in cases)) for name, kind in kinds.items()}
    page = ElementTree.Element("testsuites")
    ElementTree.SubElement(page, "testsuite", counts, name=title, tests=str(len(cases))).extend(cases)
    ElementTree.indent(page)
    try:
        with writing(OPTION, path):
            path.parent.mkdir(parents=True, exist_ok=True)
        expect_writable(OPTION, path)
        replace_file(OPTION, path, ElementTree.tostring(page, encoding="utf-8", xml_declaration=True))
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # not in a folder of Defuse's, where nothing is touched
            target = Path(os.path.realpath(path))
            with contextlib.suppress(OSError):
                if target.is_file():  # neither a folder nor a pipe
                    target.unlink()
        return error
    return None
