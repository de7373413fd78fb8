"""What finished runs found, used elsewhere: `defuse export`, `suite save`, `check --suite` and `compare`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import click

from defuse_core.errors import CheckFailed, InputError
from defuse_core.formatting import class_difference, count_of, first_few, percent
from services.cli.junit import failure_in_junit, not_checked, write_junit
from services.cli.options import (
    GivenPath,
    classifier_fields,
    json_option,
    print_json,
    section_overrides,
    store_option,
)
from services.cli.output import echo_marked, echo_note
from services.cli.runs import open_run

if TYPE_CHECKING:
    from torch import nn

    from defuse_core.export.suite import Suite, SuiteResult
    from defuse_core.runs import Run


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
    "test/CLASS/*.png (held out; a suite checks the same ones) and labels.csv. Its column class_index has the "
    "classifier's class numbers (torchvision's ImageFolder numbers the folders), and source the photograph that a "
    "picture was made from (vae.decode: anchored, with image files). Failures that are tuned on though "
    "nobody reviewed them (correct.unreviewed) are not among the pictures.",
)
@click.option("--force", is_flag=True, help="Replace the file of --to if it exists.")
def export(run: str, store: str, model: Path | None, folder: Path | None, force: bool) -> None:
    """Write the corrected classifier of RUN, or the pictures of its failure scenarios, for other tools.

    The written classifier is compared with the run's own on 1,000 images. A .safetensors file has the names of the
    network itself, and input_range, outputs, classes and class_order in its metadata; .pt2 and .onnx map images in
    [0, 1] to logits. Their metadata (.onnx: metadata_props; .pt2: extra file defuse.json) has the classes in the order
    of the logits, channels and image_size. Images of other sizes are resized bilinearly for it, without a crop; MNIST's
    are padded where image_size is 32.

    \b
    defuse export digits --to model.safetensors
    defuse export digits --to model.onnx --scenarios pictures/
    """
    from defuse_core.export import export_model
    from defuse_core.export.finished import export_scenarios
    from defuse_core.files import expect_new_file, expect_new_folder
    from defuse_core.local import local_device

    if model is None and folder is None:
        raise click.UsageError("give --to FILE, --scenarios FOLDER, or both")
    if force and model is None:
        raise click.UsageError("--force replaces the file of --to; choose a new folder for --scenarios")
    if model is not None and folder is not None:
        _expect_apart(model, folder)
    opened = open_run(run, store)
    if folder is not None:
        expect_new_folder("--scenarios", folder)  # before the model is written
    if model is not None:
        if not force:
            expect_new_file("--to", model)
        done = export_model(opened, model)
        click.echo(
            f"{done.path}: the same answer as the run's classifier on {done.same_answers:,} of "
            f"{count_of(done.images, f'{done.source} image')}; logits differ by at most {done.difference:.2g}"
        )
    if folder is not None:
        with local_device(opened.spec.resources.gpus_per_worker):
            count = export_scenarios(opened, folder)
        click.echo(
            f"{folder}: {count_of(count, 'picture')}, with labels.csv; its column class_index has the classifier's "
            "class numbers (ImageFolder numbers the folders)"
        )


def _expect_apart(model: Path, folder: Path) -> None:
    """Raise UsageError where the file would keep the folder from being new, or the folder the file."""
    file, pictures = (Path(os.path.realpath(path)) for path in (model, folder))
    if pictures in (file, *file.parents) or file in pictures.parents:
        raise click.UsageError(
            f"--to {model} and --scenarios {folder}: one is inside the other; choose another place for one of them"
        )


@click.group()
def suite() -> None:
    """Failure scenarios as a regression suite for any classifier.

    \b
    defuse suite save digits --out suite/
    defuse check --suite suite/ --classifier my_nets:build \\
      --weights new.safetensors
    """


@suite.command(short_help="Write the accepted scenarios as a suite.")
@click.argument("run")
@store_option
@click.option("--out", type=GivenPath(), required=True, help="New folder to write.")
def save(run: str, store: str, out: Path) -> None:
    """Freeze the accepted scenarios of RUN in one portable folder: pictures, codes, decoder, labels, thresholds.

    The required accuracy of each scenario is `least` in OUT/suite.json, and may be edited there; 0 requires nothing.
    A suite that requires nothing of any scenario passes no check.

    \b
    defuse suite save digits --out suite/
    """
    from defuse_core.export.suite import save_suite
    from defuse_core.local import local_device

    opened = open_run(run, store)
    with local_device(opened.spec.resources.gpus_per_worker):
        description = save_suite(opened, out).description
    scenarios, fields = description.scenarios, description.classifier.overrides()
    limit = opened.spec.check.min_each_scenario
    for scenario in scenarios:
        if limit <= scenario.before < scenario.least:
            click.echo(
                f"{scenario.name}: the suite requires {percent(scenario.least)}, since the classifier already reached "
                f"{percent(scenario.before)} before the correction (check.min_each_scenario: {percent(limit)})"
            )
        elif 0 < scenario.least < limit:
            click.echo(
                f"{scenario.name}: the suite requires only {percent(scenario.least)}, which the correction reaches, "
                f"not {percent(limit)} (check.min_each_scenario)"
            )
        elif not scenario.least:
            click.echo(f"{scenario.name}: nothing is required, since the correction did not improve it "
                       f"({percent(scenario.before)} before, {percent(scenario.after)} after)")  # fmt: skip
    pictures = count_of(scenarios[0].pictures, "picture")
    given = " ".join(["--classifier ...", *(f"--set {shlex.quote(field)}" for field in fields)])
    click.echo(f"{out}: {count_of(len(scenarios), 'scenario')} with {pictures} each; next: "
               f"defuse check --suite {shlex.quote(str(out))} {given}")  # fmt: skip
    if fields:
        click.echo("(a .pt2 file of `defuse export` needs no --set)")


def expect_no_suite_options(
    classifier: str | None, weights: Path | None, overrides: tuple[str, ...], junit: Path | None
) -> None:
    """Raise UsageError for an option of `defuse check --suite` that is given without --suite."""
    options = {"--classifier": classifier, "--weights": weights, "--set": overrides, "--junit": junit}
    for option, value in options.items():
        if value:
            raise click.UsageError(f"{option} needs --suite FOLDER")


def check_suite(
    suite: Path,
    run: str | None,
    store: str,
    *,
    as_json: bool,
    classifier: str | None,
    weights: Path | None,
    overrides: tuple[str, ...],
    junit: Path | None,
) -> None:
    """Run a classifier against a suite: print a table or JSON, write JUnit XML. Raises CheckFailed if it fails.

    Raises InputError where the suite asks nothing.
    """
    from defuse_core.files import expect_no_own_folder

    if junit is not None:
        expect_no_own_folder("--junit", junit)
    name = _classifier_name(classifier, weights, run)
    with failure_in_junit(junit, f"defuse: {name}"):
        from defuse_core.export.suite import load_suite, worse_than_corrected
        from defuse_core.local import local_device

        if (run is None) == (classifier is None):
            raise click.UsageError("with --suite, give either RUN or --classifier")
        if classifier is None and (weights or overrides):
            raise click.UsageError("--weights and --set need --classifier")
        loaded = load_suite(suite)
        section = classifier_fields(classifier, weights)
        if section is not None:
            section = section_overrides("classifier", overrides, {"classifier": section})
        opened = None if run is None else open_run(run, store)
        with local_device(opened and opened.spec.resources.gpus_per_worker):
            net = loaded.classifier(section or {}) if opened is None else _classifier_of(loaded, opened)
            results = loaded.check(net)
    failed, asked = sum(not result.passed for result in results), _count_asked(results)
    nothing_asked = InputError(
        f"suite {suite}: nothing is required of any scenario, so every classifier would pass; set `least` of "
        "some in suite.json, or save a suite of a run whose correction improved them"
    )
    cases = [_test_case(name, loaded.description.run, result) for result in results]
    cases += [] if asked else [not_checked(str(nothing_asked))]
    # the file first: whoever reads what is printed may close the pipe (`| head -1`), which ends the command
    title = f"defuse {loaded.description.run}: {name}"
    unwritable = None if junit is None else write_junit(junit, title, cases)
    if as_json:
        print_json(_suite_json(_classifier_name(classifier, None, run), section, suite, results))
    else:
        _print_results(loaded, results)
    for line in loaded.other_inputs(section) if section else []:
        echo_note(line)
    if worse := worse_than_corrected(results):
        echo_note(
            f"passed, but significantly worse than the corrected classifier of run {loaded.description.run} on "
            f"{first_few(worse)}; to let the check fail there, raise `least` in suite.json"
        )
    if unwritable is not None:
        raise unwritable
    if not asked:
        raise nothing_asked
    if failed:
        hint = loaded.usage_hint(net, section) if section else ""
        raise CheckFailed(f"suite {suite}: {name} fails {failed} of {asked} scenarios{hint}")


def _classifier_name(classifier: str | None, weights: Path | None, run: str | None) -> str:
    """Return the classifier that is checked, with the names of its files, wherever these are."""
    shown = f"run {run or 'not given'}" if classifier is None else Path(classifier).name or classifier
    return shown if weights is None else f"{shown} with {weights.name}"


def _count_asked(results: list[SuiteResult]) -> int:
    return sum(result.is_asked for result in results)


def _print_results(loaded: Suite, results: list[SuiteResult]) -> None:
    run = loaded.description.run
    for result in results:
        scenario = result.scenario
        verdict = ("ok" if result.passed else "FAILED") if result.is_asked else "–"
        before, after = percent(scenario.before), percent(scenario.after)
        echo_marked(verdict, f"{scenario.name}: {_measured(result)} ({run}: {before} before, {after} after)")


def _measured(result: SuiteResult) -> str:
    asked = (
        f"expected at least {percent(result.scenario.least)}" if result.is_asked else "nothing is required"
    )
    return f"{percent(result.accuracy)} by its label, {asked}"


def _classifier_of(loaded: Suite, run: Run) -> nn.Module:
    """Return the corrected classifier of a run, or the one that it debugged where it corrected nothing."""
    from defuse_core.evaluation import Findings
    from defuse_core.export.finished import both_classifiers
    from defuse_core.models import to_device

    found = Findings.load(run)
    data, asked = run.spec.data, loaded.description
    for what, got, expected in (
        ("data.image_size", data.image_size, asked.image_size),
        ("data.channels", data.channels, asked.channels),
    ):
        if got != expected:
            raise InputError(
                f"run {run.name}: expected the {what} of the suite (run {asked.run}), {expected}, found {got}"
            )
    if found.models.classes != asked.classes:
        differ = class_difference(found.models.classes, asked.classes, f"run {run.name}", "the suite")
        raise InputError(f"run {run.name}: expected the classes of the suite (run {asked.run}); {differ}")
    if not found.sweep.has_correction:
        echo_note(f"run {run.name} corrected nothing: the classifier that it debugged is checked")
    return to_device(both_classifiers(run.spec, found)[1], data)


def _suite_json(
    name: str, section: dict[str, Any] | None, suite: Path, results: list[SuiteResult]
) -> dict[str, Any]:
    from defuse_core.files import digest_of

    scenarios = [
        {
            **result.scenario.model_dump(),
            "accuracy": result.accuracy,
            "asked": result.is_asked,
            "passed": result.passed,
        }
        for result in results
    ]
    passed = _count_asked(results) > 0 and all(result.passed for result in results)
    file = (section or {}).get("weights")  # none of a run, and of a factory that loads its own
    return {
        "suite": str(suite),
        "classifier": name,
        "weights": file and Path(file).name,
        "sha256": file and digest_of(Path(file)),
        "passed": passed,
        "scenarios": scenarios,
    }


def _test_case(name: str, run: str, result: SuiteResult) -> ElementTree.Element:
    line = f"{name}: {_measured(result)}"
    case = ElementTree.Element("testcase", name=result.scenario.name, classname=f"defuse.{run}")
    if not result.passed:
        ElementTree.SubElement(case, "failure", message=line)
    elif not result.is_asked:
        ElementTree.SubElement(case, "skipped", message=line)
    ElementTree.SubElement(case, "system-out").text = line
    return case


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
    the scenario's held-out pictures, by its label.

    \b
    defuse compare parts-v1 parts-v2
    """
    from defuse_core.export.compare import compare_runs
    from defuse_core.local import local_device
    from services.cli.tables import print_comparison

    earlier, later = open_run(run_a, store), open_run(run_b, store)
    with local_device(later.spec.resources.gpus_per_worker):
        rows, undecided, guessing = compare_runs(earlier, later)
    right_from = later.spec.check.min_scenario_accuracy
    if as_json:
        page = {
            "a": run_a,
            "b": run_b,
            "undecided": {"a": undecided[0], "b": undecided[1]},
            "guessing": {"a": guessing[0], "b": guessing[1]},
            "right_from": right_from,
            "scenarios": [dataclasses.asdict(row) for row in rows],
        }
        print_json(page)
    elif not rows:
        click.echo(f"neither {run_a} nor {run_b} accepted a failure scenario")
    else:
        print_comparison(run_a, run_b, rows, right_from)
