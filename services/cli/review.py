"""`defuse review ...` and `defuse label-studio ...`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from services.cli.options import checked_name, store_option
from services.settings import read_settings

if TYPE_CHECKING:
    from defuse_core.artifacts import Gallery
    from defuse_core.runs import Run


@click.group()
def review() -> None:
    """See and steer the review of a run's scenarios by people.

    \b
    Begin with:  defuse run deploy/runs/digits.yaml --set review.annotators=label-studio
    """


@review.command()
@click.argument("name", metavar="RUN")
@store_option
@click.option("--repair", is_flag=True, help="Put back what someone deleted or edited in Label Studio.")
@click.option(
    "--from-traffic", is_flag=True, help="Send inputs that `defuse serve` kept, in place of drawn images."
)
def push(name: str, store: str, repair: bool, from_traffic: bool) -> None:
    """Send the images of RUN to Label Studio; those that are there already stay as they are.

    Inputs from traffic get a review of their own, called RUN/traffic-1, that every command here takes as RUN.
    """
    from defuse_core.errors import InputError
    from services.labeling import LabelStudioAnnotators

    if from_traffic:
        name = _begin_traffic_review(name, store)
    opened, gallery = _open(name, store)
    if opened.spec.review.annotators != "label-studio":
        raise InputError(
            f"run {name} asks reference models, so nobody would read people's answers; start another one with "
            "`--set review.annotators=label-studio`"
        )
    with opened.store.lock():
        annotators = LabelStudioAnnotators(opened, read_settings())
        record = annotators.push(gallery, repair)
    click.echo(f"label at {annotators.server.page_of(record.number)}")
    if from_traffic:
        click.echo(f"`defuse review status {name}` shows the answers")


@review.command()
@click.argument("name", metavar="RUN")
@store_option
def status(name: str, store: str) -> None:
    """Show the answers so far of RUN, what is missing, and where to label."""
    from services.labeling import LabelStudioAnnotators
    from services.labeling.show import print_standing
    from services.labeling.traffic import conclude

    opened, gallery = _open(name, store)
    annotators = LabelStudioAnnotators(opened, read_settings())
    standing, record = annotators.standing(gallery)
    print_standing(standing, annotators.server.page_of(record.number))
    if "/" in name and not standing.open:  # a run's own review is concluded by `defuse run`
        with opened.store.lock():
            if not opened.store.exists("votes.safetensors"):
                annotators.push(gallery)  # the answers must still be about what was pushed
            conclude(opened, standing, record)
        click.echo(f"all answers are in, and stored in {opened.store.address}")


@review.command(name="set")
@click.argument("name", metavar="RUN")
@click.argument("scenario", type=int)
@store_option
@click.option(
    "--label", metavar="NAME_OR_INDEX", help="Accept the scenario as a failure, with this class as label."
)
@click.option("--reject", is_flag=True, help="Reject the scenario.")
@click.option("--reason", required=True, help="Why; the report shows it.")
@click.option("--author", help="Who decides. [default: the user of this machine]")
@click.option("--redo", is_flag=True, help="Forget verdicts and corrections that are made already.")
def set_(
    name: str,
    scenario: int,
    store: str,
    label: str | None,
    reject: bool,
    reason: str,
    author: str | None,
    redo: bool,
) -> None:
    """Decide SCENARIO of RUN above the vote.

    \b
    defuse review set digits 3 --label 8 --reason "thick eights, checked on paper"
    defuse review set digits 5 --reject --reason "not digits at all"
    """
    from services.labeling.decide import decide

    if reject == (label is not None):
        raise click.UsageError("give either --label NAME_OR_INDEX or --reject")
    if "/" in name:
        raise click.UsageError("a review of traffic corrects nothing, so there is no vote to decide above")
    opened, _ = _open(name, store)
    done = decide(opened, scenario, label, author or _user(), reason, redo)
    click.echo(f"{done}; `defuse run` goes on with it")


def _user() -> str:
    """Return who is at this machine. Raises InputError where it does not know, as in some containers."""
    import getpass

    from defuse_core.errors import InputError

    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise InputError("--author: this machine does not know your name; give it") from error


@click.group(name="label-studio")
def label_studio() -> None:
    """A Label Studio server on this machine, for trying it out.

    Commands that need a server find this one by themselves where LABEL_STUDIO_URL is not set.
    """


@label_studio.command()
def install() -> None:
    """Install the server in an environment of its own below the user's cache (about 1 GB, a minute)."""
    from services.labeling.server import install as install_server

    home = install_server(read_settings().cache)
    click.echo(f"Label Studio is installed in {home.env}")


@label_studio.command()
@click.option("--port", default=8080, show_default=True, help="Port on loopback.")
def up(port: int) -> None:
    """Start the server, installed first if need be; about half a minute the first time."""
    from services.labeling.server import up as start_server

    server = start_server(read_settings().cache, port)
    click.echo(f"Label Studio runs at {server.address}")
    click.echo(f"log in as {server.username} with password {server.password}")


@label_studio.command()
def down() -> None:
    """Stop the server; its projects and answers stay."""
    from services.labeling.server import down as stop_server

    stopped = stop_server(read_settings().cache)
    click.echo(
        "stopped; `defuse label-studio up` brings it back as it was" if stopped else "it was not running"
    )


@label_studio.command(name="status")
def server_status() -> None:
    """Show whether the server runs, and how to log in."""
    from services.labeling.server import running

    server = running(read_settings().cache)
    if server is None:
        click.echo("not running; `defuse label-studio up` starts it")
        return
    click.echo(f"Label Studio runs at {server.address}")
    click.echo(f"log in as {server.username} with password {server.password}")


@label_studio.command()
@click.argument("name", metavar="RUN")
@store_option
def simulate(name: str, store: str) -> None:
    """Have simulated people answer RUN in the local server: one per reference model, each with an account of its own.

    To try out the whole of a review without asking anyone; their votes are models' votes.
    """
    from defuse_core.errors import InputError
    from defuse_core.local import LocalCompute
    from services.console import ProgressDisplay
    from services.labeling import LabelStudioAnnotators
    from services.labeling.server import running
    from services.labeling.simulate import simulate as answer

    opened, gallery = _open(name, store)
    settings = replace(read_settings(), label_studio_url=None)  # never a server where people work
    server = running(settings.cache)
    if server is None:
        raise InputError("the local Label Studio is not running; `defuse label-studio up` starts it")
    annotators = LabelStudioAnnotators(opened, settings)
    with ProgressDisplay() as display:
        total = answer(annotators, gallery, server, LocalCompute(display), click.echo)
    click.echo(f"{total} answers; `defuse run` goes on with them")


def _begin_traffic_review(name: str, store: str) -> str:
    from defuse_core.runs import Run
    from services.labeling.traffic import open_traffic_review
    from services.storage import open_store

    opened = open_store(store)
    run = Run.open(opened, checked_name(name))
    with run.store.lock():
        return open_traffic_review(opened, run).name


def _checked(name: str) -> str:
    """Return the name of a run, or of a review of its traffic: mnist/traffic-1. Raises InputError."""

    run, slash, review = name.partition("/")
    return checked_name(run) + slash + (checked_name(review) if slash else "")


def _open(name: str, store: str) -> tuple[Run, Gallery]:
    """Return the run and the images that people review. Raises InputError where there are none yet."""
    from defuse_core.artifacts import Gallery
    from defuse_core.errors import InputError
    from defuse_core.runs import Run
    from services.storage import open_store

    opened = Run.open(open_store(store), _checked(name))
    gallery = opened.load(Gallery)
    if gallery is None:
        raise InputError(
            f"run {name} has no images to review yet; `defuse status {name}` shows how far it is"
        )
    return opened, gallery
