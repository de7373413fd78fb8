"""`defuse check`, `promote`, `rollback` and `serve`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from defuse_core.errors import CheckFailed, InputError
from defuse_core.formatting import NONE, decimal, escape_control_characters, percent
from defuse_core.store import checked_name
from services.cli.junit import JunitCommand, failure_in_junit
from services.cli.options import (
    CLASSIFIER_HELP,
    GivenPath,
    WholeNumber,
    address_option,
    json_option,
    local_user,
    print_json,
    section_overrides,
    set_option,
    store_option,
    text_option,
)
from services.cli.output import echo_marked
from services.cli.results import check_suite, expect_no_suite_options
from services.cli.runs import open_run
from services.settings import read_environment, serve_token

if TYPE_CHECKING:
    from defuse_core.report.evidence_schema import WatchFigures
    from defuse_core.runs import Run
    from services.serving.candidate import Candidate
    from services.serving.registry import Registry
    from services.serving.registry_state import RegistryState, VersionInfo

by_option = text_option("--by", help="Author of the change. [default: the user of this machine]")
why_option = text_option("--why", help="Reason for the change, stored in the registry.")


@click.command(cls=JunitCommand, short_help="Check the corrected classifier of a run, or any on a suite.")
@click.argument("run", required=False)
@store_option
@json_option
@click.option("--suite", type=GivenPath(), help="Folder of a suite to check against.")
@text_option("--classifier", help=f"With --suite: {CLASSIFIER_HELP[0].lower()}{CLASSIFIER_HELP[1:]}")
@click.option("--weights", type=GivenPath(), help="With --classifier: its state dict.")
@set_option(help="With --classifier: a field of it, such as classifier.input_range=imagenet.")
@click.option("--junit", type=GivenPath(), help="With --suite: JUnit XML file to write.")
def check(
    run: str | None,
    store: str,
    as_json: bool,
    suite: Path | None,
    classifier: str | None,
    weights: Path | None,
    overrides: tuple[str, ...],
    junit: Path | None,
) -> None:
    """Check the corrected classifier of RUN against section `check` of its run file.

    Exits 1 if a check fails, if no λ was chosen, or if the run could not tell; 0 if there was nothing to correct.

    The limits are those in STORE/RUN/run.yaml. After a change of check.* in your own file give `defuse run` again.
    A repeated check with the same limits prints what the first one measured, and reads no images.

    With --suite, check RUN, or any other classifier, against a suite that `defuse suite save` wrote.

    \b
    defuse check digits
    defuse check --suite suite/ --classifier my_nets:build \\
      --weights new.safetensors --junit report.xml
    """
    if suite is not None:
        check_suite(suite, run, store, as_json=as_json, classifier=classifier, weights=weights,
                    overrides=overrides, junit=junit)  # fmt: skip
        return
    with failure_in_junit(junit, "defuse check"):
        expect_no_suite_options(classifier, weights, overrides, junit)
    if run is None:
        raise click.UsageError("give RUN, or --suite FOLDER with --classifier")
    _check_run(run, store, as_json)


def _check_run(run: str, store: str, as_json: bool) -> None:
    from services.serving.candidate import NothingCorrected

    try:
        _, candidate = _candidate(open_run(run, store))
    except NothingCorrected as nothing:
        if as_json:
            print_json(_unchecked(run, True, nothing))
        else:
            click.echo(f"ok     {nothing}")
        return
    except CheckFailed as failure:
        if as_json:
            print_json(_unchecked(run, False, failure))
        raise
    failed, annotators = candidate.failed_checks(), candidate.summary.annotators
    if as_json:
        checks = [{**asdict(result), "at": result.at} for result in candidate.checks]
        page = {"run": run, "passed": not failed, "annotators": annotators, "checks": checks, "reason": None}
        print_json(page)
    else:
        for result in candidate.checks:
            echo_marked("ok" if result.passed else "FAILED", result.line)
        if annotators != "people":
            echo_marked("note", f"{annotators}, not people, labelled the failure scenarios")
        if not failed:
            click.echo(f"{len(candidate.checks)} of {len(candidate.checks)} checks passed")
    if failed:
        raise CheckFailed(f"run {run}: {len(failed)} of {len(candidate.checks)} checks failed")


def _unchecked(run: str, passed: bool, reason: InputError | CheckFailed) -> dict[str, Any]:
    """Return the JSON object of `defuse check --json` for a run without a corrected classifier."""
    return {"run": run, "passed": passed, "annotators": None, "checks": [], "reason": str(reason)}


@click.command(short_help="Put the corrected classifier of a run into production.")
@click.argument("run", required=False)
@store_option
@text_option("--canary", metavar="SHARE", help="Let it answer only this share of the requests: 5%.")
@click.option(
    "--shadow", is_flag=True, help="Compare it with the version in production, which goes on answering."
)
@text_option(
    "--force",
    metavar="REASON",
    help="Promote although checks fail, inputs or classes differ, or accuracy is lower, for this reason.",
)
@by_option
@why_option
def promote(
    run: str | None,
    store: str,
    canary: str | None,
    shadow: bool,
    force: str | None,
    by: str | None,
    why: str | None,
) -> None:
    """Put the corrected classifier of RUN into production. Without RUN, show all versions.

    Exits 1 if `defuse check` does not pass, or if, compared with the version in production, inputs or classes differ or
    clean accuracy is lower by more than check.max_loss. Running servers follow within seconds; no request is lost.

    \b
    defuse promote mnist --canary 5%
    defuse promote mnist --why "canary within limits"
    """
    from services.serving.candidate import locked_for_promotion
    from services.serving.registry import promote as promote_candidate
    from services.serving.registry_state import PromotionRequest

    registry = _registry(store)
    if run is None:
        if any((canary, shadow, force, by, why)):
            raise click.UsageError("--canary, --shadow, --force, --by and --why need RUN")
        _print_versions(registry)
        return
    if canary and shadow:
        raise click.UsageError("--canary and --shadow exclude each other")
    share = parse_share(canary) if canary else None
    request = PromotionRequest(by or local_user("--by"), why or "", force, share, shadow)
    opened, before = open_run(run, store), registry.state()
    # takes minutes, in which another version may go into production, and the run may be deleted or changed
    key, candidate = _candidate(opened)
    with locked_for_promotion(opened, key):
        state = promote_candidate(registry, candidate, request, before)
    click.echo(state.action)
    promoted = state.shadow or state.canary or state.production
    assert promoted is not None  # it has one of the roles
    version = state.versions[promoted]
    _print_forced(state)
    if version.run != run:
        click.echo(f"the model of run {run} equals version {promoted}, which is of run {version.run}")
    _print_watch(version.watch)


@click.command(short_help="End a canary or shadow, or return to the version before.")
@store_option
@by_option
@why_option
@click.option(
    "--production", is_flag=True, help="Put the previous version back, also beside or after a canary."
)
@click.option(
    "--from", "expected", type=WholeNumber(min=1), metavar="VERSION",
    help="Only if this version is in production, so that a repeated command goes back no further.")  # fmt: skip
def rollback(store: str, by: str | None, why: str | None, production: bool, expected: int | None) -> None:
    """End a canary or shadow; without one, put the previous version back into production.

    Where the last change ended one, --production is required. Given again, the command goes one version further back:
    scripts that may repeat it give --from.

    \b
    defuse rollback --from 3 --why "too slow"
    """
    from services.serving.model import verify_candidate

    author, registry = by or local_user("--by"), _registry(store)
    if not registry.state().sequence:
        raise InputError(_no_registry(registry))
    state = registry.roll_back(author, why or "", verify_candidate, production=production, expected=expected)
    click.echo(f"{state.action}; {state.production_text}")


@click.command(short_help="Serve the corrected classifier of a run, and later ones.")
@click.argument("run", required=False)
@store_option
@text_option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=WholeNumber(1, 65535), help="Port to listen on."
)
@address_option
@set_option(help="Change a field: --set serve.watch=false")
@click.option("--pin", is_flag=True, help="Keep RUN, whatever is promoted.")
@click.option(
    "--replace",
    is_flag=True,
    help="On a cluster, take the place of what another `defuse serve` has started there.",
)
@click.option(
    "--proxy",
    type=click.Choice(["auto", "direct", "haproxy", "ray"]),
    default="auto",
    show_default=True,
    help="Between clients and replicas of the embedded Ray: nothing (direct), HAProxy, or Ray's own proxy. auto is "
    "direct for one replica on loopback, and HAProxy otherwise.",
)
def serve(
    run: str | None,
    store: str,
    host: str,
    port: int,
    address: str | None,
    overrides: tuple[str, ...],
    pin: bool,
    replace: bool,
    proxy: str,
) -> None:
    """Serve the corrected classifier of RUN, and every later promoted version. Without RUN, the one in production.

    With DEFUSE_SERVE_TOKEN set, every route but /healthz and /readyz requires it as a bearer token.

    \b
    defuse serve mnist
    curl --data-binary @seven.png -H "Content-Type: image/png" \\
      http://127.0.0.1:8000/v1/predict
    """
    from services.serving.candidate import require_corrected
    from services.serving.launch import (
        Proxy,
        ServeArgs,
        choose_proxy,
        proxy_environment,
        require_free_port,
        serve_section,
    )

    address = address or read_environment().ray_address
    if address is not None and proxy != "auto":
        raise click.UsageError(
            "--proxy applies to the Ray that this command starts; the cluster of --address or RAY_ADDRESS has its own"
        )
    args = ServeArgs(
        store=store,
        run=None if run is None else checked_name(run),
        pin=pin,
        require_token=bool(serve_token()),
        settings=section_overrides("serve", overrides, {}),
        replace=replace,
    )
    section = serve_section(args)
    chosen = choose_proxy(proxy, section, host) if address is None else Proxy.CLUSTER
    if replace and address is None:
        raise InputError("--replace needs a cluster: --address or RAY_ADDRESS")
    if run is not None:  # both before Ray starts, which takes seconds
        require_corrected(open_run(run, store))
    if address is None:
        require_free_port(host, port)
    with proxy_environment(chosen, host, port):
        from services.serving.app import serve_until_stopped

        serve_until_stopped(args, section, address, host, port, chosen, click.echo)


def _candidate(run: Run) -> tuple[str, Candidate]:
    from services.cli.console import ProgressDisplay
    from services.serving.candidate import prepare_candidate

    with ProgressDisplay() as display:  # a promotion copies the candidate to the registry
        return prepare_candidate(run, display, must_store=False)


def parse_share(text: str) -> float:
    """Return 0.05 for `5%` or `0.05`. Raises InputError for anything but a share above 0 and below 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InputError(f"--canary {text}: expected a share such as 5%")
    return share


def _registry(store: str) -> Registry:
    from services.serving.registry import Registry
    from services.storage import open_store

    return Registry(open_store(store))


def _no_registry(registry: Registry) -> str:
    return (
        f"no registry in {registry.store.address}: nothing was promoted yet, or --store names another store"
    )


def _print_versions(registry: Registry) -> None:
    state = registry.state()
    if not state.sequence:
        click.echo(_no_registry(registry))
        return
    forced_now = state.since is not None and bool(state.since.failed_checks)
    canary = f"canary {percent(state.share, None)}"
    roles = {state.production: "production", state.canary: canary, state.shadow: "shadow"}
    for number, info in state.versions.items():
        forced = " (forced)" if info.forced or (number == state.production and forced_now) else ""
        origin = f"run {info.run}{forced}, labelled by {info.annotators}{_watch_in_short(info)}"
        line = f"{number:>4}  {roles.get(number, ''):<12} {origin}; {_by(info)}"
        click.echo(escape_control_characters(line))
    click.echo(escape_control_characters(f"last change: {state.action}, {_by(state)}"))
    _print_forced(state)


def _by(change: VersionInfo | RegistryState) -> str:
    at = change.when.replace("T", " ")[:16]  # of such as 2026-11-28T19:20:26Z
    return f"by {change.by} on {at} UTC" + (f": {change.why}" if change.why else "")


def _print_forced(state: RegistryState) -> None:
    """Print the checks that failed where the last change is a promotion that was forced over them."""
    for line in state.failed_checks or ():
        click.echo(escape_control_characters(f"  forced over: {line}"))


def _watch_in_short(info: VersionInfo) -> str:
    if info.watch.method is None:
        return ", does not find failing inputs"
    for part, where in ((info.watch.test, ""), (info.watch.validation, " on validation images")):
        if part is not None and part.auroc.value is not None:  # None without a wrong answer
            return f", finds failing inputs (AUROC {decimal(part.auroc.value, 2)}{where})"
    return ", finds failing inputs"


def _print_watch(figures: WatchFigures) -> None:
    click.echo(figures.verdict)
    for name, found in (("validation", figures.validation), ("test", figures.test)):
        if found is not None:
            precision = NONE if found.average_precision is None else decimal(found.average_precision, 2)
            line = f"  {name}: {found.errors} of {found.images:,} answers are wrong; AUROC {found.auroc.as_decimal()}, "
            line += f"average precision {precision}"
            if figures.threshold is not None:
                line += f"; at failure probability {figures.threshold:.3f} "
                if found.errors and found.recall.value is None:
                    line += "no precision and recall, since that threshold was chosen on these images"
                else:
                    line += f"precision {found.precision.text()}, recall {found.recall.text()}"
                if found.calibration_error is not None:
                    line += f"; calibration error {found.calibration_error:.4f}"
            click.echo(line)
