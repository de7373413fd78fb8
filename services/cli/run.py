"""`defuse run`, `status` and `report`."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from defuse_core.config import STEPS
from services.cli.options import (
    GivenPath,
    address_option,
    name_option,
    open_run,
    run_name,
    set_option,
    store_option,
    track_option,
    until_option,
)
from services.settings import read_settings

if TYPE_CHECKING:
    from defuse_core.protocols import Annotators, Compute
    from defuse_core.runs import Run
    from services.console import ProgressDisplay


@click.command(short_help="Debug the classifier that a run file describes.")
@click.argument("runfile", type=GivenPath())
@name_option
@store_option
@click.option(
    "--on",
    "where",
    type=click.Choice(["ray", "local"]),
    default="ray",
    show_default=True,
    help="Where to compute: on a Ray cluster, or in this process.",
)
@address_option
@set_option
@until_option
@track_option
@click.option(
    "--wait",
    is_flag=True,
    help="Wait for people's answers and check for them every so often, in place of exit code 3.",
)
@click.option(
    "--profile",
    type=click.Choice(STEPS),
    help="Store traces of torch's operations in this step under profile/ in the run, for Perfetto.",
)
def run(
    runfile: Path,
    name: str | None,
    store: str,
    where: str,
    address: str | None,
    overrides: tuple[str, ...],
    until: str,
    track: str | None,
    wait: bool,
    profile: str | None,
) -> None:
    """Debug the classifier that RUNFILE describes. The same command again continues where the last one stopped.

    \b
    Exit codes: 0 finished, whatever was found (`defuse check` says whether it is good), 2 bad input,
    3 waiting for people, 4 the machinery failed, 130 Ctrl-C, 143 SIGTERM.
    \b
    defuse run deploy/runs/digits.yaml
    defuse run deploy/runs/mnist-laptop.yaml --set data.root=/data --until review
    """
    from defuse_core.config import load_run_file
    from defuse_core.data import check_class_names, expect_root
    from defuse_core.pipeline import run_defuse
    from defuse_core.runs import ReachedStep, Run
    from services.console import ProgressDisplay
    from services.storage import open_store
    from services.tables import print_report
    from services.tracking import MlflowTracking, expect_mlflow

    if profile is not None and STEPS.index(profile) > STEPS.index(until):
        raise click.UsageError(f"--profile {profile} comes after --until {until}, so nothing would be traced")
    if where == "local" and address is not None:
        raise click.UsageError("--address goes with --on ray; --on local computes in this process")
    spec = load_run_file(runfile, overrides)
    check_class_names(spec.data)
    opened, name = open_store(store), run_name(name, runfile)
    if _computes_here(where, address) and not opened.within(name).exists("run.yaml"):
        expect_root(spec.data)  # before a run is recorded, and before anything is measured
    if track is not None:
        expect_mlflow(read_settings())
    with opened.within(name).lock(), ProgressDisplay() as display:
        started = Run.start(opened, name, spec, until)
        traces = started.store.list("profile/") if profile is not None else []
        try:
            tracking = MlflowTracking(started, read_settings()) if track else contextlib.nullcontext()
            with tracking, _compute(where, address, started, display, profile) as compute:
                found = run_defuse(started, compute, _annotators(started, compute, wait))
        except ReachedStep:
            _note_untraced(started, profile, traces)
            click.echo(f"{name}: done until {until}; run again without --until to continue")
            return
    _note_untraced(started, profile, traces)
    print_report(found, started.spec.correct)
    click.echo(f"\nreport: {started.store.address}/report.html")


@click.command(short_help="Show how far a run is, or list the runs.")
@click.argument("name", required=False)
@store_option
def status(name: str | None, store: str) -> None:
    """Show how far the run called NAME is, or list the runs.

    A step that has begun is under way while a `defuse run` process works on the run, else stopped: the same command
    continues it.
    """
    from services.status_tables import print_runs, print_status
    from services.storage import open_store

    if name is None:
        print_runs(open_store(store))
    else:
        print_status(open_run(name, store))


@click.command(short_help="Show the report of a run, and write its page again.")
@click.argument("name")
@store_option
def report(name: str, store: str) -> None:
    """Show the report of the run called NAME, and write its page again."""
    from defuse_core.pipeline import rewrite_report
    from services.tables import print_report

    opened = open_run(name, store)
    print_report(rewrite_report(opened), opened.spec.correct)
    if opened.store.exists("report.html"):
        click.echo(f"\nreport: {opened.store.address}/report.html")


def _computes_here(where: str, address: str | None) -> bool:
    """Whether this machine reads the images; on a cluster they may be where its nodes alone see them."""
    return where == "local" or (address or read_settings().ray_address) is None


def _compute(
    where: str, address: str | None, run: Run, display: ProgressDisplay, profile: str | None
) -> AbstractContextManager[Compute]:
    from defuse_core.profiling import Profile

    traced = Profile(profile, run.store)
    if where == "local":
        from defuse_core.local import LocalCompute

        return contextlib.nullcontext(LocalCompute(display, traced))
    from cluster.compute import RayCompute

    found = address or read_settings().ray_address
    return RayCompute(found, run.spec, display, require_lock=run.store.require_lock, profile=traced)


def _note_untraced(run: Run, profile: str | None, traces: list[str]) -> None:
    """Say that --profile had no effect, where the run has no more traces than before."""
    if profile is not None and run.store.list("profile/") == traces:
        click.echo(
            f"note: --profile {profile}: nothing was traced, since nothing was left to compute in this step; to trace "
            "it, run it under another --name",
            err=True,
        )


def _annotators(run: Run, compute: Compute, wait: bool) -> Annotators:
    if run.spec.review.annotators == "label-studio":
        from services.labeling import LabelStudioAnnotators

        return LabelStudioAnnotators(run, read_settings(), compute, wait=wait)
    from defuse_core.training.reference_models import ReferenceAnnotators

    return ReferenceAnnotators(run, compute)
