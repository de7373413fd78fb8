"""`defuse run`, `status` and `report`."""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from defuse_core.config import STEPS
from defuse_core.errors import InputError
from services.settings import read_settings

if TYPE_CHECKING:
    from defuse_core.pipeline import Annotators, Compute
    from defuse_core.runs import Run
    from services.console import ProgressDisplay

store_option = click.option(
    "--store", default="runs", show_default=True, help="Folder, or s3://bucket/prefix, that the runs lie in."
)


@click.command()
@click.argument("runfile", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the run. [default: the run file's name]")
@store_option
@click.option(
    "--on",
    "where",
    type=click.Choice(["ray", "local"]),
    default="ray",
    show_default=True,
    help="Where to compute: on a Ray cluster, or in this process.",
)
@click.option(
    "--address", help="Address of a running Ray cluster. [default: RAY_ADDRESS, else an embedded Ray]"
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field: --set identify.draws=20"
)
@click.option("--until", type=click.Choice(STEPS), default=STEPS[-1], help="Stop after this step.")
@click.option(
    "--wait", is_flag=True, help="Wait for people's answers, asking now and then, in place of exit code 3."
)
def run(
    runfile: Path,
    name: str | None,
    store: str,
    where: str,
    address: str | None,
    overrides: tuple[str, ...],
    until: str,
    wait: bool,
) -> None:
    """Debug the classifier that RUNFILE describes. The same command again goes on where the last one stopped.

    \b
    Exit codes: 0 done, 1 a check failed, 2 bad input, 3 waiting for people, 4 the machinery failed.
    \b
    defuse run deploy/runs/digits.yaml
    defuse run deploy/runs/mnist-laptop.yaml --set data.root=/data --until review
    """
    from defuse_core.config import load_run_file
    from defuse_core.pipeline import run_defuse
    from defuse_core.runs import ReachedStep, Run
    from services.console import ProgressDisplay
    from services.storage import open_store
    from services.tables import print_report

    spec = load_run_file(runfile, overrides)
    opened, name = open_store(store), checked_name(name or runfile.stem)
    with opened.within(name).lock(), ProgressDisplay() as display:
        started = Run.start(opened, name, spec, until)
        try:
            with _compute(where, address, started, display) as compute:
                found = run_defuse(started, compute, _annotators(started, compute, wait))
        except ReachedStep:
            click.echo(f"{name}: done until {until}; run again without --until to go on")
            return
    print_report(found)
    click.echo(f"\nreport: {started.store.address}/report.html")


@click.command()
@click.argument("name", required=False)
@store_option
def status(name: str | None, store: str) -> None:
    """Show how far the run called NAME is, or list the runs."""
    from defuse_core.runs import Run
    from services.storage import open_store
    from services.tables import print_runs, print_status

    opened = open_store(store)
    if name is None:
        print_runs(opened)
    else:
        print_status(Run.open(opened, checked_name(name)))


@click.command()
@click.argument("name")
@store_option
def report(name: str, store: str) -> None:
    """Show the report of the run called NAME, and write its page again."""
    from defuse_core.pipeline import rewrite_report
    from defuse_core.runs import Run
    from services.storage import open_store
    from services.tables import print_report

    opened = Run.open(open_store(store), checked_name(name))
    print_report(rewrite_report(opened))
    click.echo(f"\nreport: {opened.store.address}/report.html")


def checked_name(name: str) -> str:
    """Return `name` if it can name a folder everywhere. Raises InputError."""
    if name in {"registry", "traffic"}:
        raise InputError(
            f"run name {name}: the store keeps its versions and traffic under that name; take another"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(
            f"run name {name!r}: expected letters, digits, dots, dashes and underscores, at most 100"
        )
    return name


def _compute(
    where: str, address: str | None, run: Run, display: ProgressDisplay
) -> AbstractContextManager[Compute]:
    if where == "local":
        from defuse_core.local import LocalCompute

        return contextlib.nullcontext(LocalCompute(display))
    from cluster.compute import RayCompute

    return RayCompute(address or read_settings().ray_address, run.spec, display)


def _annotators(run: Run, compute: Compute, wait: bool) -> Annotators:
    if run.spec.review.annotators == "label-studio":
        from services.labeling import LabelStudioAnnotators

        return LabelStudioAnnotators(run, read_settings(), compute, wait=wait)
    from defuse_core.reference_models import ReferenceAnnotators

    return ReferenceAnnotators(run, compute)
