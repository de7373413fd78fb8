"""`defuse export`, `delete` and `compare`: what is done with finished runs."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from defuse_core.errors import DamagedError, InputError, count_of
from defuse_core.store import checked_name
from services.cli.options import GivenPath, json_option, open_run, print_json, store_option

if TYPE_CHECKING:
    from defuse_core.store import Store


@click.command(short_help="Write the corrected classifier, or the scenarios' pictures.")
@click.argument("run")
@store_option
@click.option(
    "--to",
    "model",
    type=GivenPath(),
    help="File for the corrected classifier: .safetensors (weights), .pt2 (torch.export) or .onnx.",
)
@click.option(
    "--scenarios",
    "folder",
    type=GivenPath(),
    help="New folder for the pictures of the failure scenarios: train/CLASS/*.png (reviewed, and drawn to tune on), "
    "test/CLASS/*.png (held out; a suite checks the same ones) and labels.csv, whose column class_index has the "
    "classifier's class numbers. torchvision's ImageFolder numbers the folders. Failures that are tuned on though "
    "nobody reviewed them (correct.unreviewed) are not among the pictures.",
)
@click.option("--force", is_flag=True, help="Replace the file of --to if it exists.")
def export(run: str, store: str, model: Path | None, folder: Path | None, force: bool) -> None:
    """Write the corrected classifier of RUN, or the pictures of its failure scenarios, for other tools.

    The written classifier is compared with the run's own on 1,000 images. A .safetensors file has the names of the
    network itself, and input_range, outputs, classes and class_order in its metadata; .pt2 and .onnx map images in
    [0, 1] to logits.

    \b
    defuse export digits --to model.safetensors
    defuse export digits --to model.onnx --scenarios pictures/
    """
    from defuse_core.export import export_model, export_scenarios
    from defuse_core.files import expect_new_file

    if model is None and folder is None:
        raise click.UsageError("give --to FILE, --scenarios FOLDER, or both")
    opened = open_run(run, store)
    if model is not None:
        if not force:
            expect_new_file("--to", model)
        done = export_model(opened, model)
        click.echo(
            f"{done.path}: the same answer as the run's classifier on {done.same_answers:,} of "
            f"{count_of(done.images, f'{done.source} image')}; logits differ by at most {done.difference:.2g}"
        )
    if folder is not None:
        count = export_scenarios(opened, folder)
        click.echo(
            f"{folder}: {count_of(count, 'picture')}, with labels.csv; its column class_index has the classifier's "
            "class numbers (ImageFolder numbers the folders)"
        )


@click.command(short_help="Delete a run with everything that it stored.")
@click.argument("run")
@store_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(run: str, store: str, yes: bool) -> None:
    """Delete RUN with everything that it stored, and the inputs that were sampled while it was served.

    Its project in Label Studio stays.

    Refused while a driver writes the run, and for a run whose classifier is a version in the registry.
    """
    from services.serving.traffic import delete_traffic
    from services.storage import open_store

    opened = open_store(store)
    found = opened.within(checked_name(run))
    if not found.exists("run.yaml"):  # one that cannot be read is deleted, too
        raise InputError(f"no run called {run} in {opened.address}; `defuse status` lists the runs")
    folder = Path(found.address)  # of a bucket: nothing that exists here
    if folder.is_symlink():  # the registry and the traffic of its own store are not seen from here
        raise InputError(f"{folder} is a link to {folder.resolve()}; delete that run in its own store")
    _expect_unregistered(opened, run)
    with found.lock():
        keys = found.list()
        if not yes and not _confirmed(f"delete {count_of(len(keys), 'file')} in {found.address}?"):
            click.echo("defuse: nothing was deleted", err=True)
            raise click.exceptions.Exit(130)
        _expect_unregistered(opened, run)  # it may have been promoted since, while the prompt waited
        sampled = delete_traffic(opened, run)  # before the run: a repeated deletion needs its run.yaml
        found.delete_all()
    click.echo(f"deleted {run}: {count_of(len(keys) + sampled, 'file')}")


def _confirmed(question: str) -> bool:
    """Whether a person says yes; Ctrl-C, the end of the input and a closed input are a no."""
    if sys.stdin is None:  # closed by `<&-`
        return False
    try:
        return click.confirm(question)
    except click.Abort:
        return False


def _expect_unregistered(store: Store, run: str) -> None:
    """Raise InputError where a version in the registry comes from this run, or may: not from another of its name."""
    from services.serving.registry import Registry

    named = {number: info for number, info in Registry(store).state().versions.items() if info.run == run}
    components = _components_of(store, run) if named else None
    if versions := [n for n, info in named.items() if components in (None, info.components_digest)]:
        raise InputError(
            f"run {run}: version {versions[-1]} in the registry was made from it, and it is that version's record; "
            "keep it"
        )


def _components_of(store: Store, run: str) -> str | None:
    """Return the digest of the run's components; None where it has none, or they cannot be read."""
    from defuse_core.artifacts import Gallery
    from defuse_core.runs import Run
    from services.serving.traffic import components_digest

    with contextlib.suppress(InputError, DamagedError):
        gallery = Run.open(store, run).load(Gallery)
        return None if gallery is None else components_digest(gallery)
    return None


@click.command(short_help="Show what became of a run's scenarios in a later run.")
@click.argument("run_a", metavar="A")
@click.argument("run_b", metavar="B")
@store_option
@json_option
def compare(run_a: str, run_b: str, store: str, as_json: bool) -> None:
    """Show what became of the failure scenarios of run A in the later run B, and which ones B found.

    Those of A are persisting, fixed or back again ("was right" where A's own classifier passes, too), by the classifier
    that B debugged. Those that only B found are new where the classifier that A debugged passes, and otherwise found
    now. Broken by B: the classifier that B debugged passes, but B's correction fails there. Broken by A: the same of A,
    for a scenario that only B found. Accuracies are those of each run's classifier before and after its correction, on
    the scenario's held-out pictures.

    \b
    defuse compare parts-v1 parts-v2
    """
    from defuse_core.export.compare import compare_runs
    from services.tables import print_comparison

    rows = compare_runs(open_run(run_a, store), open_run(run_b, store))
    if as_json:
        print_json({"a": run_a, "b": run_b, "scenarios": [dataclasses.asdict(row) for row in rows]})
    elif not rows:
        click.echo(f"neither {run_a} nor {run_b} accepted a failure scenario")
    else:
        print_comparison(run_a, run_b, rows)
