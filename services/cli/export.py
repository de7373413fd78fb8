"""`defuse export`, `delete`, `suite save`, `check --suite` and `compare`: what is done with finished runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from defuse_core.errors import CheckFailed, InputError
from defuse_core.store import checked_name
from services.cli.options import CLASSIFIER_HELP, store_option

if TYPE_CHECKING:
    from torch import nn

    from defuse_core.export.compare import ComparedScenario
    from defuse_core.export.suite import Suite, SuiteResult
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
    _expect_unregistered(opened, run)
    with found.lock():
        keys = found.list()
        if not yes and not _confirmed(f"delete {len(keys)} files in {found.address}?"):
            click.echo("defuse: nothing was deleted", err=True)
            sys.exit(130)
        _expect_unregistered(opened, run)  # it may have been promoted since, while the question stood
        sampled = delete_traffic(opened, run)  # before the run: a repeated deletion needs its run.yaml
        found.delete_all()
    click.echo(f"deleted {run}: {len(keys) + sampled} files")


def _confirmed(question: str) -> bool:
    """Whether a person says yes; Ctrl-C and the end of the input are a no."""
    try:
        return click.confirm(question)
    except click.Abort:
        return False


def _expect_unregistered(store: Store, run: str) -> None:
    """Raise InputError where a version in the registry comes from this run."""
    from services.serving.registry import Registry

    versions = [number for number, version in Registry(store).state().versions.items() if version.run == run]
    if versions:
        raise InputError(
            f"run {run}: version {versions[-1]} in the registry was made from it, and it is that version's record; "
            "keep it"
        )


@dataclass(frozen=True)
class SuiteCheck:
    """The options of `defuse check --suite`."""

    suite: Path
    run: str | None
    store: str
    as_json: bool
    classifier: str | None
    weights: Path | None
    overrides: tuple[str, ...]
    junit: Path | None


def suite_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `defuse check --suite` to a command."""
    for option in reversed(
        [
            click.option(
                "--suite", type=click.Path(path_type=Path), help="Folder of a suite to check against."
            ),
            click.option("--classifier", help=f"With --suite: {CLASSIFIER_HELP}"),
            click.option(
                "--weights", type=click.Path(path_type=Path), help="With --classifier: its state dict."
            ),
            click.option(
                "--set",
                "overrides",
                multiple=True,
                metavar="KEY=VALUE",
                help="With --classifier: a field of it, such as classifier.input_range=imagenet.",
            ),
            click.option(
                "--junit", type=click.Path(path_type=Path), help="With --suite: JUnit XML file to write."
            ),
        ]
    ):
        command = option(command)
    return command


def expect_no_suite_options(
    classifier: str | None, weights: Path | None, overrides: tuple[str, ...], junit: Path | None
) -> None:
    """Raise UsageError for an option of `defuse check --suite` that is given without --suite."""
    given = {"--classifier": classifier, "--weights": weights, "--set": overrides, "--junit": junit}
    for option, value in given.items():
        if value:
            raise click.UsageError(f"{option} needs --suite FOLDER")


@click.group()
def suite() -> None:
    """Failure scenarios as a regression suite for any classifier.

    \b
    defuse suite save digits --out suite/
    defuse check --suite suite/ --classifier my_nets:build --weights new.safetensors
    """


@suite.command()
@click.argument("run")
@store_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder to write.")
def save(run: str, store: str, out: Path) -> None:
    """Freeze the accepted scenarios of RUN in one portable folder: pictures, codes, decoder, labels, thresholds.

    The least accuracy of each scenario is in OUT/suite.json, and may be edited there.
    """
    from defuse_core.export.suite import save_suite
    from defuse_core.runs import Run
    from services.storage import open_store

    saved = save_suite(Run.open(open_store(store), checked_name(run)), out)
    scenarios = saved.description.scenarios
    click.echo(f"{out}: {len(scenarios)} scenarios with {scenarios[0].pictures} pictures each; next: "
               f"defuse check --suite {out} --classifier ...")  # fmt: skip


def check_suite(options: SuiteCheck) -> None:
    """Run a classifier against a suite: print a table or JSON, write JUnit XML. Raises CheckFailed if it fails."""
    from defuse_core.export.suite import load_suite

    if (options.run is None) == (options.classifier is None):
        raise click.UsageError("with --suite, give either RUN or --classifier")
    if options.classifier is None and (options.weights or options.overrides):
        raise click.UsageError("--weights and --set need --classifier")
    loaded = load_suite(options.suite)
    results = loaded.check(_classifier(loaded, options))
    name = options.classifier or f"run {options.run}"
    if options.as_json:
        click.echo(json.dumps(_page(name, options, results)))
    else:
        for result in results:
            verdict, scenario = "ok    " if result.passed else "FAILED", result.scenario
            click.echo(
                f"{verdict} {scenario.name}: {result.accuracy:.1%}, at least {scenario.least:.1%} is asked "
                f"({loaded.description.run}: {scenario.before:.1%} before, {scenario.after:.1%} after)"
            )
    if options.junit is not None:  # after the results, which are shown also where it cannot be written
        _write_junit(options.junit, name, loaded, results)
    failed = sum(not result.passed for result in results)
    if failed:
        raise CheckFailed(f"suite {options.suite}: {name} fails {failed} of {len(results)} scenarios")


def _classifier(loaded: Suite, options: SuiteCheck) -> nn.Module:
    from defuse_core.config import apply_override
    from services.cli.options import classifier_fields

    if options.run is not None:
        return _corrected(loaded, options.run, options.store)
    tree: dict[str, Any] = {"classifier": classifier_fields(options.classifier or "", options.weights)}
    for override in options.overrides:
        if not override.strip().startswith("classifier."):
            raise InputError(f"--set {override}: expected classifier.field=value")
        apply_override(tree, override)
    return loaded.classifier(tree["classifier"])


def _corrected(loaded: Suite, name: str, store: str) -> nn.Module:
    from defuse_core.export.models import corrected_classifier
    from defuse_core.models import to_device
    from defuse_core.runs import Run
    from services.storage import open_store

    run = Run.open(open_store(store), checked_name(name))
    models, classifier = corrected_classifier(run)
    data, asked = run.spec.data, loaded.description
    found = (models.classes, data.image_size, data.channels)
    if found != (asked.classes, asked.image_size, asked.channels):
        raise InputError(f"run {name}: its classes or images are not those of the suite (run {asked.run})")
    return to_device(classifier)


def _page(name: str, options: SuiteCheck, results: list[SuiteResult]) -> dict[str, Any]:
    scenarios = [
        {**result.scenario.model_dump(), "accuracy": result.accuracy, "passed": result.passed}
        for result in results
    ]
    passed = all(result.passed for result in results)
    return {"suite": str(options.suite), "classifier": name, "passed": passed, "scenarios": scenarios}


def _write_junit(path: Path, name: str, loaded: Suite, results: list[SuiteResult]) -> None:
    from junitparser import Failure, JUnitXml, TestCase, TestSuite

    from defuse_core.export.writing import writing

    tests = TestSuite(f"defuse {loaded.description.run}")
    for result in results:
        case = TestCase(result.scenario.name, classname=f"defuse.{loaded.description.run}")
        line = f"{name}: {result.accuracy:.1%}, at least {result.scenario.least:.1%} is asked"
        if not result.passed:
            case.result = [Failure(line)]
        case.system_out = line
        tests.add_testcase(case)
    xml = JUnitXml()
    xml.add_testsuite(tests)
    with writing("--junit", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        xml.write(str(path), pretty=True)


@click.command()
@click.argument("run_a", metavar="A")
@click.argument("run_b", metavar="B")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(run_a: str, run_b: str, store: str, as_json: bool) -> None:
    """Show what became of the failure scenarios of run A in the later run B: persisting, fixed, back again, new.

    Accuracies are those of each run's classifier before and after its correction, on the scenario's held-out pictures.

    \b
    defuse compare parts-v1 parts-v2
    """
    from defuse_core.export.compare import compare_runs
    from defuse_core.runs import Run
    from services.storage import open_store

    opened = open_store(store)
    rows = compare_runs(Run.open(opened, checked_name(run_a)), Run.open(opened, checked_name(run_b)))
    if as_json:
        click.echo(
            json.dumps({"a": run_a, "b": run_b, "scenarios": [dataclasses.asdict(row) for row in rows]})
        )
    elif not rows:
        click.echo(f"neither {run_a} nor {run_b} accepted a failure scenario")
    else:
        _print_comparison(run_a, run_b, rows)


def _print_comparison(run_a: str, run_b: str, rows: list[ComparedScenario]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from services.console import Terminal

    table = Table(box=box.SIMPLE_HEAD)
    for column in (
        "State",
        "Label",
        "Mistaken for",
        "In A",
        "In B",
        "A before",
        "A after",
        "B before",
        "B after",
    ):
        table.add_column(column)
    for row in rows:
        numbers = ("–" if number is None else str(number) for number in (row.number_a, row.number_b))
        shares = (f"{share:.0%}" for share in (row.before_a, row.after_a, row.before_b, row.after_b))
        table.add_row(*map(Text, (row.state, row.label, row.mistaken_for, *numbers, *shares)))
    console = Terminal()
    console.print(f"A: {run_a}, B: {run_b}", markup=False)
    console.print(table)
    states = ("persisting", "fixed", "back again", "new")
    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in states)
    console.print(counts, markup=False)
