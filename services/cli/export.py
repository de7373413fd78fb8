"""`defuse export` and `defuse delete`: what leaves the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from services.cli.options import checked_name, store_option

if TYPE_CHECKING:
    from defuse_core.store import Store


@click.command()
@click.argument("run")
@store_option
@click.option(
    "--to",
    "model",
    type=click.Path(path_type=Path),
    help="File for the corrected classifier: .safetensors (weights), .pt2 (torch.export) or .onnx.",
)
@click.option(
    "--scenarios",
    "folder",
    type=click.Path(path_type=Path),
    help="New folder for the pictures of the failure scenarios: CLASS/*.png and labels.csv.",
)
def export(run: str, store: str, model: Path | None, folder: Path | None) -> None:
    """Write the corrected classifier of RUN, or the pictures of its failure scenarios, for other tools.

    The written classifier is compared with the run's own on 1,000 images. A .safetensors file has the names of the
    network itself; .pt2 and .onnx map images in [0, 1] to logits.

    \b
    defuse export digits --to model.safetensors
    defuse export digits --to model.onnx --scenarios pictures/
    """
    from defuse_core.export import export_model, export_scenarios
    from defuse_core.runs import Run
    from services.storage import open_store

    if model is None and folder is None:
        raise click.UsageError("give --to FILE, --scenarios FOLDER, or both")
    opened = Run.open(open_store(store), checked_name(run))
    if model is not None:
        done = export_model(opened, model)
        click.echo(
            f"{done.path}: the same answer as the run's classifier on {done.same_answers:,} of {done.images:,} "
            f"{done.source} images; logits differ by at most {done.difference:.2g}"
        )
    if folder is not None:
        count = export_scenarios(opened, folder)
        click.echo(f"{folder}: {count:,} pictures, with labels.csv")


@click.command()
@click.argument("run")
@store_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(run: str, store: str, yes: bool) -> None:
    """Delete RUN with everything that it stored. Its project in Label Studio stays.

    Refused while a driver writes the run, and for a run whose classifier is a version in the registry.
    """
    from defuse_core.runs import Run
    from services.storage import open_store

    opened = open_store(store)
    found = Run.open(opened, checked_name(run))
    _expect_unregistered(opened, run)
    with found.store.lock():
        keys = found.store.list()
        if not yes:
            click.confirm(f"delete {len(keys)} files in {found.store.address}?", abort=True)
        found.store.delete_all()
    click.echo(f"deleted {run}: {len(keys)} files")


def _expect_unregistered(store: Store, run: str) -> None:
    """Raise InputError where a version in the registry comes from this run."""
    from defuse_core.errors import InputError
    from services.serving.registry import Registry

    versions = [number for number, version in Registry(store).state().versions.items() if version.run == run]
    if versions:
        raise InputError(
            f"run {run}: version {versions[-1]} in the registry was made from it, and it is that version's record; "
            "keep it"
        )
