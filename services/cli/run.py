"""The life of a run: `defuse init`, `fields`, `run`, `status`, `report` and `delete`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sys
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from defuse_core.errors import InputError
from defuse_core.formatting import count_of
from defuse_core.steps import MOST_MINUTES, STEPS
from defuse_core.store import checked_name
from services.cli.options import (
    CLASSIFIER_HELP,
    GivenPath,
    Number,
    WholeNumber,
    address_option,
    classifier_fields,
    json_option,
    name_option,
    print_json,
    set_option,
    store_option,
    text_option,
    track_option,
    until_option,
)
from services.cli.output import echo_marked, echo_note
from services.cli.runs import expect_not_promoted, is_left_behind, open_run, run_name, usable_name
from services.settings import read_environment

if TYPE_CHECKING:
    from defuse_core.protocols import Annotators, Compute
    from defuse_core.runs import Run
    from defuse_core.suggest import Plan

log = logging.getLogger("defuse")


@click.command(short_help="Look at images and a classifier, and write a run file.")
@click.argument("images", type=GivenPath())
@text_option("--classifier", help=f"{CLASSIFIER_HELP} [default: train one]")
@click.option("--weights", type=GivenPath(), help="State dict of the classifier.")
@click.option(
    "--minutes",
    type=Number(1, MOST_MINUTES),
    default=30.0,
    show_default=True,
    help="Time for the run on this machine.",
)
@click.option(
    "--image-size",
    type=WholeNumber(8, 512),
    help="Height and width that pictures are resized to, an even number, best as your classifier was trained on; an "
    ".npz keeps its own. "
    "[default: the pictures' own if they are square and it suits your classifier, else one that does; without "
    "--classifier 16, 32 or 64]",
)
@click.option(
    "--train-images", type=WholeNumber(min=4), help="Training images that the run uses. [default: all]"
)
@click.option("--out", type=GivenPath(), help="Run file to write. [default: the name of IMAGES, with .yaml]")
@click.option("--force", is_flag=True, help="Replace the run file if it exists.")
def init(
    images: Path,
    classifier: str | None,
    weights: Path | None,
    minutes: float,
    image_size: int | None,
    train_images: int | None,
    out: Path | None,
    force: bool,
) -> None:
    """Look at IMAGES and a classifier, measure for some seconds, and write a commented run file.

    IMAGES is a folder with train/CLASS/*.png (or .jpg, .tif, .webp, .bmp, .ppm; validation/ and test/ likewise), or an
    .npz file.

    \b
    defuse init parts/ --classifier my_nets:build --weights parts.safetensors
    defuse init parts/ --classifier parts.pt2 --minutes 60
    """
    from defuse_core.config import load_run_file
    from defuse_core.files import expect_new_file, expect_writable, replace_file
    from defuse_core.suggest import inspect_data, plan_run, write_run_file
    from services.cli.console import ProgressDisplay

    if images.suffix in {".yaml", ".yml"}:
        raise InputError(
            f"{images} is no folder of images and no .npz file; did you mean `defuse run {images}`?"
        )
    path = out or Path(f"{usable_name(images.absolute().name.removesuffix('.npz'))}.yaml")
    if not force:
        expect_new_file("--out", path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it, or choose another file with --out")
    expect_writable("--out", path)
    choice = classifier_fields(classifier, weights)
    with ProgressDisplay() as display:
        facts = inspect_data(images.absolute())
        plan = plan_run(facts, choice, minutes, display, image_size, train_images)
    replace_file("--out", path, write_run_file(plan).encode())
    load_run_file(path)
    _print_plan(plan, path, minutes)


def _print_plan(plan: Plan, path: Path, asked: float) -> None:
    """Print what was found and written; `asked` are the minutes asked for."""
    from defuse_core.suggest import describe_accuracy

    facts, vae, data = plan.facts, plan.tree["vae"], plan.tree["data"]
    counts = ", ".join(f"{count:,} {part}" for part, count in facts.counts.items())
    show = partial(echo_marked, width=len("classifier  "))
    show("images", f"{counts}; {len(facts.classes):,} classes; {facts.width}x{facts.height} pixels")
    some = data.get("train_images", facts.counts["train"])
    fewer = f"; {some:,} of the training images" if some < facts.counts["train"] else ""
    show(
        "used as",
        f"{data['image_size']}x{data['image_size']}, {'grey' if data['channels'] == 1 else 'colour'}{fewer}",
    )
    if plan.probe is not None:
        show("classifier", f"right on {describe_accuracy(plan)}")
    epochs = count_of(vae["epochs"], "epoch")
    show("β-VAE", f"{vae['latent_dim']} dimensions, {epochs} at {plan.speeds.vae:,.0f} images/s")
    if vae.get("decode") == "anchored":
        show("decode", "anchored: photographs are moved, not redrawn")
    for note in plan.notes:
        show("note", note)
    named = "" if usable_name(path.stem) == path.stem else f" --name {usable_name(path.stem)}"
    following = f"defuse run {shlex.quote(str(path))}{named}"
    enough = "; more time would bring nothing for so few images" if plan.minutes < asked else ""
    click.echo(f"wrote {path}, for about {count_of(plan.minutes, 'minute')}{enough}; next: {following}")


@click.command(short_help="List the fields of the run file with their meaning.")
@click.argument("section", required=False)
def fields(section: str | None) -> None:
    """List every field of the run file, or of SECTION, with its values, its default and its meaning.

    Sections: data, classifier, vae, identify, distill, review, judges, correct, report, resources, check, serve.

    \b
    defuse fields vae
    defuse fields review.reference
    """
    from defuse_core.config.loading import describe_fields
    from services.cli.console import Terminal

    columns = min(104, max(24, shutil.get_terminal_size((104, 24)).columns))  # 104 where it is no terminal
    shown = ""
    for field in describe_fields(section):
        at, dot, _ = field.name.partition(".")
        if section is None and dot and at != shown:
            shown = at
            click.echo()
            Terminal().print(at, style="bold")
        click.echo(f"{field.name}: {field.values} [{field.default}]")
        click.echo(textwrap.indent("\n".join(textwrap.wrap(field.meaning, columns - 4)), "    "))


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
@set_option(help="Change a field: --set identify.draws=20")
@until_option
@track_option
@click.option(
    "--wait",
    is_flag=True,
    help="Wait for people's answers instead of ending with exit code 3. Without people (review.annotators: "
    "reference-models) one line says that nobody is waited for.",
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

    A run keeps its settings: others need another --name. services/README.md lists the exceptions, such as data.root,
    check.*, serve.*, and values added to correct.lambdas, after which the report step is made again.

    \b
    Exit codes:
      0              finished, whatever was found (see `defuse check`)
      2              bad input, or a person must look
      3              waiting for people: run it again later
      4              a machine, a server or the store failed: run it again
      129, 130, 143  hangup, Ctrl-C, SIGTERM: run it again
    \b
    defuse run deploy/runs/digits.yaml
    defuse run deploy/runs/mnist-laptop.yaml --set data.root=/data --until review
    """
    from defuse_core.config import load_run_file, with_absolute_root
    from defuse_core.data import check_class_names, expect_root
    from defuse_core.local import Profile, local_compute
    from defuse_core.pipeline import expect_may_go_on, run_defuse
    from defuse_core.runs import ReachedStep, Run
    from services.cli.console import ProgressDisplay
    from services.cli.tables import print_report
    from services.storage import open_store
    from services.tracking import expect_mlflow, tracking

    if profile is not None and STEPS.index(profile) > STEPS.index(until):
        raise click.UsageError(f"--profile {profile} comes after --until {until}, so nothing would be traced")
    if where == "local" and address is not None:
        raise click.UsageError("--address goes with --on ray; --on local computes in this process")
    spec = load_run_file(runfile, overrides)
    check_class_names(spec.data)
    opened, name = open_store(store), run_name(name, runfile)
    if where == "ray":
        address = address or read_environment().ray_address
    if address is None:  # on a cluster the nodes alone may see the images
        spec = with_absolute_root(spec)
        recorded = Run.recorded(opened, name) if opened.within(name).exists("run.yaml") else None
        if recorded is None or recorded.data.root != spec.data.root:
            expect_root(spec.data)  # before it is recorded, and before anything is measured
    if track is not None:
        expect_mlflow(read_environment())
    found = None
    with opened.within(name).lock(), ProgressDisplay() as display:
        started = Run.start(opened, name, spec, until, check=expect_may_go_on)
        traces = started.store.list("profile/") if profile is not None else []
        traced = Profile(profile, started.store)
        computing: contextlib.AbstractContextManager[Compute]
        if where == "ray":
            from cluster.compute import on_ray

            computing = on_ray(address, display, traced)(started)
        else:
            computing = local_compute(started.spec, display, traced)
        with contextlib.suppress(ReachedStep):
            sending = tracking(started, read_environment()) if track else contextlib.nullcontext()
            with sending, computing as compute:
                found = run_defuse(started, compute, _annotators(started, compute, wait))
    _note_untraced(started, profile, traces)
    if found is None:  # printed only now: a terminal would show it in the middle of a bar
        following = "run again without --until to continue"
        if started.store.exists("report.json") and started.with_added is None:
            following = f"the run is finished, see `{started.command('report')}`"
        click.echo(f"{name}: done until {until}; {following}")
        return
    print_report(found)
    click.echo(f"\nreport: {started.store.address}/report.html")


@click.command(short_help="Show how far a run is, or list the runs.")
@click.argument("run", required=False)
@store_option
@json_option
def status(run: str | None, store: str, as_json: bool) -> None:
    """Show how far RUN is, or list the runs.

    A step that has begun is under way while a `defuse run` process works on the run, else stopped: the same command
    continues it. Sizes are of a step's artefacts, without its shards, trials and checkpoints.

    \b
    defuse status
    defuse status digits
    """
    from services.cli import status_tables
    from services.storage import open_store, store_folder

    if run is None:
        every = open_store(store)  # says, too, what keeps a folder from being read
        if not store.startswith("s3://") and not store_folder(store).exists():
            raise InputError(f"no folder {store_folder(store)}; give --store, or start a run")
        if as_json:
            print_json({"runs": [asdict(summary) for summary in status_tables.summarize_runs(every)]})
        else:
            status_tables.print_runs(every)
    elif as_json:
        opened = open_run(run, store)
        states = status_tables.step_states(opened)
        summary = asdict(status_tables.summarize_run(opened, states))
        print_json({**summary, "steps": [asdict(state) for state in states]})
    else:
        status_tables.print_status(open_run(run, store))


@click.command(short_help="Show the report of a run, and write its page again.")
@click.argument("run")
@store_option
@json_option
def report(run: str, store: str, as_json: bool) -> None:
    """Show the report of RUN, and write its page again. With --json: what report.json holds.

    \b
    defuse report digits
    """
    from defuse_core.pipeline import rewrite_report
    from services.cli.tables import print_report

    opened = open_run(run, store)
    found = rewrite_report(opened)
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    print_report(found)
    if opened.store.exists("report.html"):
        click.echo(f"\nreport: {opened.store.address}/report.html")


@click.command(short_help="Delete a run with everything that it stored.")
@click.argument("run")
@store_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(run: str, store: str, yes: bool) -> None:
    """Delete RUN with everything that it stored, and the inputs that were sampled while it was served.

    Its project in Label Studio stays. In a bucket with versioning, older versions of its files stay, too, until a
    lifecycle rule of the bucket (NoncurrentVersionExpiration) removes them.

    Refused while a driver writes the run, and for a run whose classifier is a version in the registry.
    """
    from defuse_core.runs import no_such_run
    from services.serving.traffic import delete_traffic
    from services.storage import open_store

    opened = open_store(store)
    found = opened.within(checked_name(run))
    if not found.exists("run.yaml") and not is_left_behind(found):  # one that cannot be read is deleted, too
        raise no_such_run(opened, run)
    folder = Path(found.address)  # of a bucket: nothing that exists here
    if folder.is_symlink():  # the registry and the traffic of its own store are not seen from here
        raise InputError(f"{folder} is a link to {folder.resolve()}; delete that run in its own store")
    expect_not_promoted(opened, run, "keep it")
    with found.lock():
        keys = found.list()
        if not yes and not _confirmed(f"delete {count_of(len(keys), 'file')} in {found.address}?"):
            raise InputError("nothing was deleted; to delete without being asked, give --yes")
        expect_not_promoted(opened, run, "keep it")  # it may have been promoted while the prompt waited
        # before the run: a deletion that is cut off here can be repeated
        sampled = delete_traffic(opened, run)
        found.delete_all()
    click.echo(f"deleted {run}: {count_of(len(keys) + sampled, 'file')}")


def _note_untraced(run: Run, profile: str | None, traces: list[str]) -> None:
    """Say that --profile had no effect, where the run has no more traces than before."""
    if profile is not None and run.store.list("profile/") == traces:
        nothing = "nothing was traced, since nothing was left to compute in this step"
        echo_note(f"--profile {profile}: {nothing}; to trace it, run it under another --name")


def _annotators(run: Run, compute: Compute, wait: bool) -> Annotators:
    if run.spec.review.annotators == "label-studio":
        from services.labeling.annotators import LabelStudioAnnotators

        return LabelStudioAnnotators(run, read_environment(), compute, wait=wait)
    from defuse_core.training.reference_models import ReferenceAnnotators

    if wait:
        log.warning("--wait: nobody is waited for, since models answer (review.annotators: reference-models)")
    return ReferenceAnnotators(run, compute)


def _confirmed(question: str) -> bool:
    """Whether a person says yes; the end of the input and a closed input (`<&-`) are a no, Ctrl-C ends the command."""
    try:
        return sys.stdin is not None and click.confirm(question)
    except click.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise
        return False
