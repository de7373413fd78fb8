"""`defuse check`, `promote`, `rollback` and `serve`."""

from __future__ import annotations

import contextlib
import getpass
import json
from typing import TYPE_CHECKING, Any

import click

from services.cli.options import checked_name, store_option
from services.settings import read_settings

if TYPE_CHECKING:
    from services.serving.candidate import Candidate
    from services.serving.registry import Registry

by_option = click.option("--by", help="Whose decision it is. [default: the user of this machine]")
why_option = click.option("--why", default="", help="What for, kept in the registry.")


@click.command()
@click.argument("run")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(run: str, store: str, as_json: bool) -> None:
    """Check the corrected classifier of RUN against section `check` of its run file. Exits 1 if a check fails."""
    from defuse_core.errors import CheckFailed
    from services.serving.candidate import NothingCorrected

    try:
        candidate = _candidate(store, run)
    except NothingCorrected as nothing:
        page = {"run": run, "passed": True, "annotators": None, "checks": []}
        click.echo(json.dumps(page) if as_json else f"ok     {nothing}")
        return
    annotators = candidate.facts["annotators"]
    if as_json:
        page = {"passed": not candidate.failed(), "annotators": annotators, "checks": list(candidate.checks)}
        click.echo(json.dumps({"run": run, **page}))
    else:
        for row in candidate.checks:
            click.echo(f"{'ok    ' if row['passed'] else 'FAILED'} {row['line']}")
        click.echo(f"       its failure scenarios were labelled by {annotators}")
    if failed := candidate.failed():
        raise CheckFailed(f"run {run}: {len(failed)} of {len(candidate.checks)} checks failed")


@click.command()
@click.argument("run", required=False)
@store_option
@click.option("--canary", metavar="SHARE", help="Answer only this share of the requests with it: 5%.")
@click.option("--shadow", is_flag=True, help="Answer with the present version, and compare with this one.")
@click.option("--force", metavar="REASON", help="Promote although checks fail, for this reason.")
@by_option
@why_option
def promote(
    run: str | None, store: str, canary: str | None, shadow: bool, force: str | None, by: str | None, why: str
) -> None:
    """Put the corrected classifier of RUN into production if `defuse check` passes. Without RUN, show who answers.

    Running servers follow within seconds; no request is lost.

    \b
    defuse promote mnist --canary 5%
    defuse promote mnist --why "canary went well"
    """
    from services.serving.promotion import How, share_of
    from services.serving.promotion import promote as promoted

    registry = _registry(store)
    if run is None:
        _show(registry)
        return
    if canary and shadow:
        raise click.UsageError("--canary and --shadow exclude each other")
    share = share_of(canary) if canary else None
    how = How(by or getpass.getuser(), why, force or None, share, shadow)
    click.echo(promoted(registry, _candidate(store, run), how).action)


@click.command()
@store_option
@by_option
@why_option
def rollback(store: str, by: str | None, why: str) -> None:
    """End a canary or shadow; without one, put the version before back into production."""
    from services.serving.rollout import roll_back

    standing = roll_back(_registry(store), by or getpass.getuser(), why)
    click.echo(f"{standing.action}; version {standing.production} is in production")


@click.command()
@click.argument("run", required=False)
@store_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on."
)
@click.option(
    "--address", help="Address of a running Ray cluster. [default: RAY_ADDRESS, else an embedded Ray]"
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field: --set serve.watch=false"
)
@click.option("--pin", is_flag=True, help="Stay with RUN, whatever is promoted.")
@click.option(
    "--haproxy", is_flag=True, help="Several times the throughput; replicas listen on every interface."
)
def serve(
    run: str | None,
    store: str,
    host: str,
    port: int,
    address: str | None,
    overrides: tuple[str, ...],
    pin: bool,
    haproxy: bool,
) -> None:
    """Serve the corrected classifier of RUN, and every version promoted later. Without RUN, what is in production.

    With DEFUSE_SERVE_TOKEN set, every route but /healthz and /readyz asks for it as a bearer token.

    \b
    defuse serve mnist
    curl --data-binary @seven.png -H "Content-Type: image/png" http://127.0.0.1:8000/v1/predict
    """
    from services.serving.start import Ending, application, mind_the_replicas, ray_for, use_fast_proxy

    settings = read_settings()
    if haproxy:
        if not settings.serve_token:
            mind_the_replicas(host)
        use_fast_proxy()
    from services.serving.app import cpus_needed, expect_gpus, plan

    args: dict[str, Any] = {
        "store": store,
        "run": checked_name(run) if run else None,
        "pin": pin,
        "require_token": bool(settings.serve_token),
        "settings": _serve_fields(overrides),
    }
    planned, address = plan(args), address or settings.ray_address
    with ray_for(address, cpus_needed(planned)):
        ending = Ending()
        if address is None:
            expect_gpus(planned)
        started = application(args, host, port, shared=address is not None)
        with contextlib.suppress(KeyboardInterrupt), started as served:  # asked to end while it starts
            click.echo(f"serving on {served} (API page: {served}/docs); Ctrl-C stops it")
            ending.wait()


def _candidate(store: str, run: str) -> Candidate:
    from defuse_core.runs import Run
    from services.console import ProgressDisplay
    from services.serving.candidate import prepare
    from services.storage import open_store

    with ProgressDisplay() as display:
        return prepare(Run.open(open_store(store), checked_name(run)), display)[1]


def _registry(store: str) -> Registry:
    from services.serving.registry import Registry
    from services.storage import open_store

    return Registry(open_store(store))


def _show(registry: Registry) -> None:
    standing = registry.standing()
    for number, note in standing.versions.items():
        roles = {standing.production: "production", standing.canary: f"canary {standing.share:.1%}"}
        role = {**roles, standing.shadow: "shadow"}.get(number, "")
        forced = " (forced)" if note.forced else ""
        made = f"run {note.run}{forced}, labelled by {note.annotators}"
        click.echo(f"{number:>4}  {role:<12} {made}; by {note.by} on {note.when} {note.why}".rstrip())
    last = f", by {standing.by} on {standing.when} {standing.why}".rstrip() if standing.sequence else ""
    click.echo(f"last change: {standing.action}{last}")


def _serve_fields(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return {"watch": False} for ("serve.watch=false",). Raises RunFileError for anything else."""
    from defuse_core.config import apply_override
    from defuse_core.errors import RunFileError

    tree: dict[str, Any] = {}
    for override in overrides:
        if not override.strip().startswith("serve."):
            raise RunFileError(f"--set {override}: expected serve.field=value")
        apply_override(tree, override)
    fields: dict[str, Any] = tree.get("serve", {})
    return fields
