"""Options that several commands share, and the check of a run's name."""

from __future__ import annotations

import re
from pathlib import Path

import click

from defuse_core.config import STEPS
from defuse_core.errors import InputError

RESERVED = {"registry", "traffic"}  # folders that the store keeps for versions and kept inputs


def given(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Return the value of an option. Raises BadParameter for an empty one: of an unset variable, in scripts."""
    if value == "":
        raise click.BadParameter(
            "expected a value, found an empty one; is the variable set?", context, parameter
        )
    return value


store_option = click.option(
    "--store",
    default="runs",
    show_default=True,
    callback=given,
    help="Folder, or s3://bucket/prefix, where the runs are stored.",
)
name_option = click.option("--name", callback=given, help="Name of the run. [default: the run file's name]")
address_option = click.option(
    "--address",
    callback=given,
    help="Address of a running Ray cluster. [default: RAY_ADDRESS, else an embedded Ray]",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field: --set identify.draws=20"
)
until_option = click.option(
    "--until", type=click.Choice(STEPS), default=STEPS[-1], help="Stop after this step."
)


def checked_name(name: str) -> str:
    """Return `name` if it can name a folder everywhere. Raises InputError."""
    if name in RESERVED:
        raise InputError(
            f"run name {name}: expected another name, since the store keeps versions and traffic under it"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(
            f"run name {name!r}: expected letters, digits, dots, dashes and underscores, at most 100"
        )
    return name


def run_name(name: str | None, runfile: Path) -> str:
    """Return the name of a run: `name`, else the run file's. Raises InputError for one that cannot name a folder."""
    return checked_name(runfile.stem if name is None else name)
