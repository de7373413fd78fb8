"""`defuse init` and `defuse fields`: from a folder of images to a run file."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from defuse_core.errors import InputError, count_of
from services.cli.options import CLASSIFIER_HELP, GivenPath, classifier_choice, given, usable_name

if TYPE_CHECKING:
    from defuse_core.suggest import Plan


def _number(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Return the value of an option. Raises BadParameter for nan, which click takes for a number within any range."""
    if math.isnan(value):
        raise click.BadParameter("expected a number, found nan", context, parameter)
    return value


@click.command(short_help="Look at images and a classifier, and write a run file.")
@click.argument("images", type=GivenPath())
@click.option("--classifier", callback=given, help=f"{CLASSIFIER_HELP} [default: train one]")
@click.option("--weights", type=GivenPath(), help="State dict of the classifier.")
@click.option(
    "--minutes",
    type=click.FloatRange(1, 10_000),
    default=30.0,
    show_default=True,
    callback=_number,
    help="Time for the run on this machine.",
)
@click.option(
    "--image-size",
    type=click.IntRange(8, 512),
    help="Height and width that pictures are resized to; what your classifier was trained on. [default: from both]",
)
@click.option(
    "--out",
    type=GivenPath(),
    help="Run file to write. [default: the name of IMAGES, with .yaml]",
)
@click.option("--force", is_flag=True, help="Replace the run file if it exists.")
def init(
    images: Path,
    classifier: str | None,
    weights: Path | None,
    minutes: float,
    image_size: int | None,
    out: Path | None,
    force: bool,
) -> None:
    """Look at IMAGES and a classifier, measure for some seconds, and write a commented run file.

    IMAGES is a folder with train/CLASS/*.png (and validation/ and test/ likewise), or an .npz file.

    \b
    defuse init parts/ --classifier my_nets:build --weights parts.safetensors
    defuse init parts/ --classifier parts.pt2 --minutes 60
    """
    from defuse_core.config import load_run_file
    from defuse_core.export.writing import expect_writable, writing
    from defuse_core.suggest import inspect_data, plan_run, write_run_file
    from services.console import ProgressDisplay

    path = out or Path(f"{usable_name(images.absolute().stem)}.yaml")
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another file with --out, or replace it with --force")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it, or choose another file with --out")
    expect_writable("--out", path)
    choice = classifier_choice(classifier, weights)
    with ProgressDisplay() as display:
        plan = plan_run(inspect_data(images.absolute()), choice, minutes, display, image_size)
    with writing("--out", path):
        path.write_text(write_run_file(plan), encoding="utf-8")
    load_run_file(path)
    _print_plan(plan, path)


def _print_plan(plan: Plan, path: Path) -> None:
    from defuse_core.suggest.write import describe_accuracy

    facts, vae = plan.facts, plan.tree["vae"]
    counts = ", ".join(f"{count:,} {part}" for part, count in facts.counts.items())
    data = plan.tree["data"]
    click.echo(f"images      {counts}; {len(facts.classes)} classes; {facts.width}x{facts.height} pixels")
    click.echo(
        f"used as     {data['image_size']}x{data['image_size']}, {'grey' if data['channels'] == 1 else 'colour'}"
    )
    if plan.probe is not None:
        click.echo(f"classifier  right on {describe_accuracy(plan)}")
    epochs = count_of(vae["epochs"], "epoch")
    click.echo(f"β-VAE       {vae['latent_dim']} dimensions, {epochs} at {plan.speeds.vae:,.0f} images/s")
    if vae.get("decode") == "anchored":
        click.echo("decode      anchored: photographs are moved, not redrawn")
    for warning in plan.warnings:
        click.echo(f"note        {warning}")
    named = "" if usable_name(path.stem) == path.stem else f" --name {usable_name(path.stem)}"
    following = f"defuse run {shlex.quote(str(path))}{named}"
    click.echo(f"wrote {path}, for about {count_of(plan.minutes, 'minute')}; next: {following}")


@click.command(short_help="List the fields of the run file with their meaning.")
@click.argument("section", required=False)
def fields(section: str | None) -> None:
    """List every field of the run file, or of SECTION, with its values, its default and its meaning.

    \b
    defuse fields vae
    defuse fields review.reference
    """
    import shutil
    import textwrap

    from defuse_core.config.loading import describe_fields

    columns = min(104, max(24, shutil.get_terminal_size((104, 24)).columns))  # 104 where it is no terminal
    for field in describe_fields(section):
        click.echo(f"{field.name}: {field.values} [{field.default}]")
        click.echo(textwrap.indent("\n".join(textwrap.wrap(field.meaning, columns - 4)), "    "))
