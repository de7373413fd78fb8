"""`defuse suite save` and `defuse check --suite`: failure scenarios as a regression suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from defuse_core.errors import CheckFailed, InputError, count_of
from services.cli.options import (
    CLASSIFIER_HELP,
    GivenPath,
    classifier_fields,
    given,
    open_run,
    print_json,
    section_overrides,
    store_option,
)

if TYPE_CHECKING:
    from torch import nn

    from defuse_core.export.suite import Suite, SuiteResult


def suite_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `defuse check --suite` to a command."""
    for option in reversed(
        [
            click.option("--suite", type=GivenPath(), help="Folder of a suite to check against."),
            click.option(
                "--classifier",
                callback=given,
                help=f"With --suite: {CLASSIFIER_HELP[0].lower()}{CLASSIFIER_HELP[1:]}",
            ),
            click.option("--weights", type=GivenPath(), help="With --classifier: its state dict."),
            click.option(
                "--set",
                "overrides",
                multiple=True,
                metavar="KEY=VALUE",
                help="With --classifier: a field of it, such as classifier.input_range=imagenet.",
            ),
            click.option("--junit", type=GivenPath(), help="With --suite: JUnit XML file to write."),
        ]
    ):
        command = option(command)
    return command


def expect_no_suite_options(
    classifier: str | None, weights: Path | None, overrides: tuple[str, ...], junit: Path | None
) -> None:
    """Raise UsageError for an option of `defuse check --suite` that is given without --suite."""
    options = {"--classifier": classifier, "--weights": weights, "--set": overrides, "--junit": junit}
    for option, value in options.items():
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
@click.option("--out", type=GivenPath(), required=True, help="New folder to write.")
def save(run: str, store: str, out: Path) -> None:
    """Freeze the accepted scenarios of RUN in one portable folder: pictures, codes, decoder, labels, thresholds.

    The least accuracy of each scenario is in OUT/suite.json, and may be edited there; with 0 nothing is asked.
    A suite in which nothing is asked of any scenario passes no check.
    """
    from defuse_core.export.suite import save_suite

    opened = open_run(run, store)
    scenarios = save_suite(opened, out).description.scenarios
    limit = opened.spec.check.min_each_scenario
    for scenario in scenarios:
        if limit <= scenario.before < scenario.least:
            click.echo(
                f"{scenario.name}: {scenario.least:.1%} is asked, since the classifier before has "
                f"{scenario.before:.1%}, not under {limit:.1%} (check.min_each_scenario)"
            )
        elif 0 < scenario.least < limit:
            click.echo(
                f"{scenario.name}: only {scenario.least:.1%} is asked, which the correction reaches, not {limit:.1%} "
                "(check.min_each_scenario)"
            )
        elif not scenario.least:
            click.echo(f"{scenario.name}: nothing is asked, since the correction did not improve it "
                       f"({scenario.before:.1%} before, {scenario.after:.1%} after)")  # fmt: skip
    pictures = count_of(scenarios[0].pictures, "picture")
    click.echo(f"{out}: {count_of(len(scenarios), 'scenario')} with {pictures} each; next: "
               f"defuse check --suite {out} --classifier ...")  # fmt: skip


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
    from defuse_core.export.suite import load_suite
    from defuse_core.files import expect_no_own_folder

    if (run is None) == (classifier is None):
        raise click.UsageError("with --suite, give either RUN or --classifier")
    if classifier is None and (weights or overrides):
        raise click.UsageError("--weights and --set need --classifier")
    if junit is not None:
        expect_no_own_folder("--junit", junit)
    loaded = load_suite(suite)
    section = _section(classifier, weights, overrides)
    net = loaded.classifier(section) if section else _corrected(loaded, run, store)
    results = loaded.check(net)
    name = classifier or f"run {run}"
    # the file first: whoever reads what is printed may close the pipe (`| head -1`), which ends the command
    unwritable = None if junit is None else _write_junit(junit, name, loaded, results)
    if as_json:
        print_json(_page(name, suite, results))
    else:
        _print_results(loaded, results)
    for line in loaded.other_inputs(section) if section else []:
        click.echo(f"note: {line}", err=True)
    if unwritable is not None:
        raise unwritable
    failed, asked = sum(not result.passed for result in results), _count_asked(results)
    if not asked:
        raise InputError(
            f"suite {suite}: nothing is asked of any scenario, so every classifier would pass; set `least` of "
            "some in suite.json, or save a suite of a run whose correction improved them"
        )
    if failed:
        hint = loaded.better_range(net, section) if section else ""
        raise CheckFailed(f"suite {suite}: {name} fails {failed} of {asked} scenarios{hint}")


def _count_asked(results: list[SuiteResult]) -> int:
    return sum(result.is_asked for result in results)


def _print_results(loaded: Suite, results: list[SuiteResult]) -> None:
    run = loaded.description.run
    for result in results:
        scenario = result.scenario
        verdict = ("ok" if result.passed else "FAILED") if result.is_asked else "–"
        click.echo(
            f"{verdict:<6} {scenario.name}: {_measured(result)} ({run}: {scenario.before:.1%} before, "
            f"{scenario.after:.1%} after)"
        )


def _measured(result: SuiteResult) -> str:
    asked = f"at least {result.scenario.least:.1%} is asked" if result.is_asked else "nothing is asked"
    return f"{result.accuracy:.1%}, {asked}"


def _section(
    classifier: str | None, weights: Path | None, overrides: tuple[str, ...]
) -> dict[str, Any] | None:
    """Return section `classifier` for --classifier, --weights and --set; None for the classifier of a run."""
    if classifier is None:
        return None
    tree: dict[str, Any] = {"classifier": classifier_fields(classifier, weights)}
    return section_overrides("classifier", overrides, tree)


def _corrected(loaded: Suite, name: str | None, store: str) -> nn.Module:
    from defuse_core.export.models import corrected_classifier
    from defuse_core.models import to_device

    run = open_run(name or "", store)
    models, classifier = corrected_classifier(run)
    data, asked = run.spec.data, loaded.description
    found = (models.classes, data.image_size, data.channels)
    if found != (asked.classes, asked.image_size, asked.channels):
        raise InputError(f"run {name}: its classes or images are not those of the suite (run {asked.run})")
    return to_device(classifier, data)


def _page(name: str, suite: Path, results: list[SuiteResult]) -> dict[str, Any]:
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
    return {"suite": str(suite), "classifier": name, "passed": passed, "scenarios": scenarios}


def _write_junit(path: Path, name: str, loaded: Suite, results: list[SuiteResult]) -> InputError | None:
    """Write JUnit XML; return the error of a file that cannot be written, so that the results are shown first."""
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    from defuse_core.files import writing

    tests = TestSuite(f"defuse {loaded.description.run}")
    for result in results:
        case = TestCase(result.scenario.name, classname=f"defuse.{loaded.description.run}")
        line = f"{name}: {_measured(result)}"
        if not result.passed:
            case.result = [Failure(line)]
        elif not result.is_asked:
            case.result = [Skipped(line)]
        case.system_out = line
        tests.add_testcase(case)
    xml = JUnitXml()
    xml.add_testsuite(tests)
    try:
        with writing("--junit", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            xml.write(str(path), pretty=True)
    except InputError as error:
        return error
    return None
