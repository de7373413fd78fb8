"""`defuse`: the command line. One module per group of commands; heavy imports wait until a command needs them."""

from __future__ import annotations

import logging
import sys

import click

from defuse_core.errors import DefuseError, escape_control_characters
from services.cli.export import compare, delete, export, suite
from services.cli.init import fields, init
from services.cli.jobs import jobs, submit
from services.cli.review import label_studio, review
from services.cli.run import report, run, status
from services.cli.serve import check, promote, rollback, serve
from services.settings import read_settings, share_cores


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="defuse")
def defuse() -> None:
    """Find the regions where an image classifier is wrong, have people label them, and fix it there.

    \b
    Begin with:  defuse run deploy/runs/digits.yaml
    """


for command in (
    init,
    fields,
    run,
    status,
    report,
    export,
    delete,
    review,
    label_studio,
    submit,
    jobs,
    check,
    suite,
    compare,
    promote,
    rollback,
    serve,
):
    defuse.add_command(command)


def main() -> None:
    """Run one command. Every failure ends in one line on stderr and the exit code of its error."""
    share_cores()
    sys.path.append(
        ""
    )  # the working directory, from which the user's classifier is imported, as with python -m
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        sys.exit(defuse.main(standalone_mode=False))
    except DefuseError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped; the same command continues from here", 130)
    except Exception as error:
        if read_settings().debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (DEFUSE_DEBUG=1 shows where)", 4)


def _fail(line: str, exit_code: int) -> None:
    click.echo(f"defuse: {escape_control_characters(line)}", err=True)
    sys.exit(exit_code)
