"""`defuse review ...` and `defuse label-studio ...`."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import click

from defuse_core.errors import DefuseError, InputError, ServiceError, StoreError
from defuse_core.formatting import count_of
from defuse_core.store import checked_name
from services.cli.options import (
    WholeNumber,
    json_option,
    local_user,
    print_json,
    set_option,
    store_option,
    text_option,
)
from services.cli.runs import COPY_IT, expect_not_promoted, expect_repeatable
from services.settings import read_environment

if TYPE_CHECKING:
    from defuse_core.artifacts import Gallery, Verdicts, Votes
    from defuse_core.runs import Run
    from services.cli.console import Terminal
    from services.labeling.annotations import AnswerChanges
    from services.labeling.local_server import LocalServer


@click.group()
def review() -> None:
    """Show and control the review of a run's scenarios.

    \b
    Ask people:  defuse run mine.yaml --set review.annotators=label-studio
    """


@review.command(short_help="Send the images to Label Studio.")
@click.argument("run")
@store_option
@click.option(
    "--repair",
    is_flag=True,
    help="Put back what someone deleted or edited in Label Studio; deletes the answers to edited tasks.",
)
@click.option(
    "--from-traffic", is_flag=True, help="Send inputs that `defuse serve` stored, instead of drawn images."
)
@set_option(help="Of a review of traffic, new or not finished: --set review.answers_per_task=3")
def push(run: str, store: str, repair: bool, from_traffic: bool, overrides: tuple[str, ...]) -> None:
    """Send the images of RUN to Label Studio; those that it has already stay as they are.

    Inputs from traffic get a review of their own, called RUN/traffic-1, which every command here accepts as RUN.
    """
    from services.labeling.annotators import LabelStudioAnnotators

    if overrides and not (from_traffic or _is_of_traffic(run)):
        raise click.UsageError(
            "--set goes with --from-traffic, or with RUN/traffic-1; for a run's own review give it to `defuse run`"
        )
    if from_traffic or overrides:
        run = _open_traffic_review(run, store, overrides)
    opened, gallery = _open_with_gallery(run, store)
    _expect_people(opened)
    with opened.store.lock():
        annotators = LabelStudioAnnotators(opened, read_environment())
        state = annotators.push(gallery, repair)
    click.echo(f"label at {annotators.client.labeling_url(state.number)}")
    click.echo(f"annotators get an account at {annotators.client.invitation()}")
    if opened.store.exists("votes.safetensors"):
        click.echo(f"voting is closed: answers count only after `{opened.command('review reopen')}`")
    if from_traffic:
        click.echo(f"`{opened.command('review status')}` shows the answers")


@review.command(short_help="Show answers, and where to label.")
@click.argument("run")
@store_option
@json_option
def status(run: str, store: str, as_json: bool) -> None:
    """Show the answers so far of RUN, the missing ones, and the address for labelling.

    Once the votes are stored, show them and the verdicts that `defuse run` makes of them; that also works without
    Label Studio.
    """
    from defuse_core.artifacts import Verdicts, Votes
    from services.cli import review_tables
    from services.cli.console import Terminal

    opened, gallery = _open_with_gallery(run, store)
    console = Terminal()
    console.quiet = as_json
    votes, verdicts = opened.load(Votes), opened.load(Verdicts)
    if votes is None or verdicts is None:
        _expect_people(opened)
    if votes is not None:
        if verdicts is None:
            verdicts = _verdicts_from(opened, gallery, votes, console)
        changes, failure = _later_answers(opened, gallery, votes)
        later = changes, None if failure is None else str(failure)
        review_tables.print_result(gallery, votes, verdicts, console)
        review_tables.print_closed(opened, *later, console)
        if as_json:
            print_json(asdict(review_tables.summarize_result(run, gallery, votes, verdicts, *later)))
        return
    from services.labeling.annotators import LabelStudioAnnotators
    from services.serving.traffic import store_traffic_verdicts

    annotators = LabelStudioAnnotators(opened, read_environment())
    found = annotators.status(gallery)
    project = found.state.number
    label_at, invitation = annotators.client.labeling_url(project), annotators.client.invitation()
    console.print(f"Label at {label_at}", soft_wrap=True)
    console.print(f"Annotators get an account at {invitation}", soft_wrap=True)
    task_url = partial(annotators.client.task_url, project)
    review_tables.print_status(opened, found, console)
    review_tables.print_skips(opened, found, task_url, console)
    summary = review_tables.summarize_status(run, found, task_url)
    summary = replace(summary, label_at=label_at, invitation=invitation)
    if _is_of_traffic(run) and not found.outstanding:  # `defuse run` finishes a run's own review
        votes = found.final_votes()
        verdicts = store_traffic_verdicts(opened, votes)
        summary = review_tables.summarize_result(run, gallery, votes, verdicts, None, None)
        click.echo(f"all answers are in, and stored in {opened.store.address}")
    if as_json:
        print_json(asdict(summary))


def _expect_people(run: Run) -> None:
    if run.spec.review.annotators != "label-studio":
        raise InputError(
            f"run {run.name} asks reference models, so nobody would read people's answers: the models answer within "
            "`defuse run`; to ask people, start another run with `--set review.annotators=label-studio`"
        )


def _verdicts_from(run: Run, gallery: Gallery, votes: Votes, console: Terminal) -> Verdicts:
    """Return the verdicts that `defuse run` will make from people's stored votes; of traffic, store them."""
    from defuse_core.review.overrides import read_overrides
    from defuse_core.review.verdicts import crowdlab_consensus, decide_verdicts
    from defuse_core.training.reference_models import Prelabels
    from services.cli.review_tables import print_by_majority
    from services.serving.traffic import store_traffic_verdicts

    if _is_of_traffic(run.name):
        return store_traffic_verdicts(run, votes)
    review, consensus = run.spec.review, None
    if review.consensus == "crowdlab":
        stored = run.load(Prelabels)
        if stored is None:
            print_by_majority(console)
        else:
            consensus = crowdlab_consensus(votes, stored.probabilities)
    return decide_verdicts(review, gallery, votes, read_overrides(run.store), consensus=consensus)


def _later_answers(
    run: Run, gallery: Gallery, votes: Votes
) -> tuple[AnswerChanges | None, DefuseError | None]:
    """Return how people's answers changed after the votes, and why that is not known, where it is not."""
    if run.spec.review.annotators != "label-studio" or not len(gallery):
        return None, None
    try:
        from services.labeling.annotations import answer_changes
        from services.labeling.annotators import LabelStudioAnnotators

        status = LabelStudioAnnotators(run, read_environment()).status(gallery)
        return answer_changes(status.tasks, votes, status.final_votes()), None
    except (InputError, ServiceError, StoreError) as error:  # a pull writes, which the store may not allow
        return None, error


@review.command(name="set")
@click.argument("run")
@click.argument("scenario", type=WholeNumber(min=0))
@store_option
@text_option(
    "--label", metavar="NAME_OR_INDEX", help="Accept the scenario as a failure, with this class as label."
)
@click.option("--reject", is_flag=True, help="Reject the scenario.")
@text_option("--reason", required=True, help="The reason, which the report shows.")
@text_option("--author", help="The person who decides. [default: the user of this machine]")
@click.option(
    "--redo",
    is_flag=True,
    help="Necessary once the run has its verdicts: delete them and the correction, which the same `defuse run` makes "
    "again.",
)
def set_(
    run: str,
    scenario: int,
    store: str,
    label: str | None,
    reject: bool,
    reason: str,
    author: str | None,
    redo: bool,
) -> None:
    """Override the vote on SCENARIO of RUN, of people or of models. Of several decisions the newest counts.

    \b
    defuse review set digits 3 --label 8 --reason "thick eights" --redo
    defuse review set digits 5 --reject --reason "not digits at all" --redo
    """
    from defuse_core.review.overrides import override_verdict

    if reject == (label is not None):
        raise click.UsageError("give either --label NAME_OR_INDEX or --reject")
    if _is_of_traffic(run):
        raise click.UsageError("a review of traffic corrects nothing, so there is no vote to override")
    opened, _ = _open_with_gallery(run, store)
    check = partial(expect_repeatable, opened)
    author = author or local_user("--author")
    decision = override_verdict(opened, scenario, label, author=author, reason=reason, redo=redo, check=check)
    click.echo(f"{decision}; `defuse run` continues with it")


@review.command(short_help="Use late answers in a run.")
@click.argument("run")
@store_option
@click.option(
    "--discard", is_flag=True, help="Delete the votes even if Label Studio has lost answers or is away."
)
def reopen(run: str, store: str, discard: bool) -> None:
    """Use answers that people gave after the votes of RUN were stored.

    Deletes the votes, the verdicts and the corrected model; `defuse run` makes them again from all answers that Label
    Studio has then.
    """
    from defuse_core.artifacts import Votes
    from defuse_core.review.overrides import reopen_vote

    opened, gallery = _open_with_gallery(run, store)
    expect_not_promoted(opened.runs, run, COPY_IT)
    if not discard and (votes := opened.load(Votes)) is not None:
        _expect_no_answer_lost(opened, gallery, votes)
    reopen_vote(opened, partial(expect_repeatable, opened))
    click.echo(f"the vote of {run} is open again; `{_following(opened)}` takes in all answers")


def _expect_no_answer_lost(run: Run, gallery: Gallery, votes: Votes) -> None:
    """Raise InputError where Label Studio lacks answers that only the stored votes hold, or cannot be asked."""
    changes, failure = _later_answers(run, gallery, votes)
    reason = None if failure is None else str(failure)
    if changes is not None and changes.deleted:
        reason = f"{count_of(changes.deleted, 'answer')} of the votes were deleted in Label Studio"
    if reason is not None:
        outage = isinstance(failure, ServiceError)  # which a later start may find over
        raise (ServiceError if outage else InputError)(
            f"the votes of {run.name} may be the only copy of answers, which --discard gives up: {reason}"
        )


@click.group(name="label-studio")
def label_studio() -> None:
    """A Label Studio server on this machine, for trying it out.

    Commands that need a server use this one if LABEL_STUDIO_URL is not set.
    """


def _print_progress(line: str) -> None:
    click.echo(line, err=True)


@label_studio.command(short_help="Install the server (about 1 GB).")
def install() -> None:
    """Install the server in an environment of its own below the user's cache (about 1 GB, a minute)."""
    from services.labeling.local_server import install as install_server

    installation = install_server(read_environment().cache, _print_progress)
    click.echo(f"Label Studio is installed in {installation.env}")


@label_studio.command(short_help="Start the server.")
@click.option("--port", default=8080, show_default=True, type=WholeNumber(1, 65535), help="Port on loopback.")
def up(port: int) -> None:
    """Start the server; the first time it is installed (about 1 GB), which takes a minute and a half."""
    from services.labeling.local_server import up as start_server

    _print_server(start_server(read_environment().cache, port, _print_progress))


def _print_server(server: LocalServer) -> None:
    click.echo(f"Label Studio runs at {server.address}")
    click.echo(f"log in as {server.username} with password {server.password}")


@label_studio.command()
def down() -> None:
    """Stop the server; its projects and answers stay."""
    from services.labeling.local_server import down as stop_server

    stopped = stop_server(read_environment().cache)
    click.echo(
        "stopped; `defuse label-studio up` starts it again with its data" if stopped else "it was not running"
    )


@label_studio.command(name="status")
def server_status() -> None:
    """Show whether the server runs, and how to log in."""
    from services.labeling.local_server import running_server

    server = running_server(read_environment().cache)
    if server is None:
        click.echo("not running; `defuse label-studio up` starts it")
        return
    _print_server(server)


@label_studio.command(short_help="Let models answer instead of people.")
@click.argument("run")
@store_option
def simulate(run: str, store: str) -> None:
    """Let simulated annotators answer RUN in the local server: one per reference model, each with its own account.

    Use it to try out a whole review without people; the votes are those of models.
    """
    from defuse_core.local import local_compute
    from services.cli.console import ProgressDisplay
    from services.labeling.annotators import LabelStudioAnnotators
    from services.labeling.local_server import running_server
    from services.labeling.simulate import simulate as simulate_annotators

    opened, gallery = _open_with_gallery(run, store)
    _expect_people(opened)
    environment = replace(read_environment(), label_studio_url=None)  # never a server where people work
    if (server := running_server(environment.cache)) is None:
        raise InputError("the local Label Studio is not running; `defuse label-studio up` starts it")
    annotators = LabelStudioAnnotators(opened, environment)
    with ProgressDisplay() as display, local_compute(opened.spec, display) as compute:
        total = simulate_annotators(annotators, gallery, server, compute, display)
    click.echo(f"answered {count_of(total, 'task')}; `{_following(opened)}` continues with the answers")


def _is_of_traffic(name: str) -> bool:
    """Whether a review is one of traffic, such as mnist/traffic-1, and not the run's own."""
    return "/" in name


def _following(run: Run) -> str:
    """Return the command that takes in the answers of a review: of a run, or of the traffic of a version."""
    return run.command("review status") if _is_of_traffic(run.name) else "defuse run"


def _open_traffic_review(name: str, store: str, overrides: tuple[str, ...]) -> str:
    from services.serving.traffic import open_traffic_review, set_in_traffic_review

    run = _open_run_or_review(name, store)
    if _is_of_traffic(name):
        return set_in_traffic_review(run, overrides).name
    with run.store.lock():
        return open_traffic_review(run, overrides).name


def _open_with_gallery(name: str, store: str) -> tuple[Run, Gallery]:
    """Return the run, and the images that people review. Raises InputError if there are none yet."""
    from defuse_core.artifacts import Gallery
    from defuse_core.runs import CONTINUES

    opened = _open_run_or_review(name, store)
    gallery = opened.load(Gallery)
    if gallery is None:
        raise opened.incomplete_error(f"has no images to review yet; {CONTINUES}")
    return opened, gallery


def _open_run_or_review(name: str, store: str) -> Run:
    """Return a run, or a review of its traffic, such as mnist/traffic-1. Raises InputError where there is none."""
    from defuse_core.runs import Run
    from services.storage import open_store

    return Run.open(open_store(store), "/".join(map(checked_name, name.split("/", 1))))
