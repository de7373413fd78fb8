"""Failure scenarios as a regression suite: one portable folder, against which any classifier can be checked.

    suite/suite.json          classes, scenarios and the least accuracy on each, which may be edited
    suite/suite.safetensors   the pictures, their codes and labels, and the β-VAE that drew them
    suite/pictures/*.png      each scenario at a glance

Nothing in it is unpickled, and it needs no run, no store and no data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from defuse_core.artifacts import F32, I64, U8, Anchors, Models, Weights
from defuse_core.codec import decode, encode
from defuse_core.config import ClassifierSection, PrintableText, RunFile, parse_run_file
from defuse_core.data import Images
from defuse_core.data.images import to_levels, to_picture
from defuse_core.device import ieee_f32
from defuse_core.errors import InputError, StoreError
from defuse_core.evaluation import Findings
from defuse_core.export import expect_stated_classes, why_not_corrected
from defuse_core.export.finished import both_classifiers
from defuse_core.files import expect_new_folder, expect_no_special_file, filling
from defuse_core.formatting import percent
from defuse_core.intervals import SIGNIFICANT, certain_loss
from defuse_core.models import (
    EXTERNAL,
    StoredVae,
    accuracy,
    build_classifier,
    check_outputs,
    expect_own_weights,
    load_pretrained,
    predict,
    probe_classifier,
    to_device,
)
from defuse_core.models.adapters import plain_section
from defuse_core.models.probe import ON_AVERAGE, far_better_range
from defuse_core.review.verdicts import most_common_errors, scenario_name
from defuse_core.runs import Run, utc_now
from defuse_core.tuning_data import by_scenario, held_out_images

VERSION: Final = 3  # version of suite.json; grows with every change of the suite
DESCRIPTION, TENSORS, PICTURES = "suite.json", "suite.safetensors", "pictures"
SAVE_AGAIN = "save the suite again with `defuse suite save`"
OTHER_DEFUSE = "use the Defuse that saved it, or save the suite of a run of this one with `defuse suite save`"
SHEET = 8  # pictures per row and column of an overview


class SuiteScenario(BaseModel):
    """One failure scenario of a suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    """Index among the components of the run."""
    label: PrintableText
    """The class of all its pictures."""
    mistaken_for: PrintableText
    """What the classifier of the run answered most often in its place."""
    pictures: int
    before: float
    """Accuracy of the run's classifier before its correction."""
    after: float
    """And after it."""
    least: float = Field(ge=0, le=1)
    """Accuracy from which a checked classifier passes; 0 asks nothing. May be edited."""

    @property
    def name(self) -> str:
        """What a table calls it: `8 read as 3 (scenario 12)`; `8 misread` where the run's classifier was right."""
        return scenario_name(self.label, self.mistaken_for, self.number)


class SuiteClassifier(BaseModel):
    """What the classifier of the run gets and returns: fields of section `classifier`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_range: PrintableText
    outputs: PrintableText
    class_order: tuple[int, ...] | None

    def overrides(self) -> list[str]:
        """Return the fields that are not the defaults, as `defuse check --set` takes them."""
        defaults = {name: field.default for name, field in ClassifierSection.model_fields.items()}
        return [f"classifier.{name}={_text(value)}" for name, value in self if value != defaults[name]]


class SuiteDescription(BaseModel):
    """The content of suite.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[3]
    run: PrintableText
    """The run that it was saved from."""
    annotators: PrintableText
    """Who labelled its scenarios: people, or reference models."""
    saved: PrintableText
    """When, UTC."""
    classes: tuple[PrintableText, ...]
    image_size: int
    channels: int
    vae: dict[str, Any]
    """Section `vae` of the run file: the architecture of the decoder."""
    classifier: SuiteClassifier
    scenarios: tuple[SuiteScenario, ...]


@dataclass(frozen=True, eq=False)
class SuitePictures:
    """The content of suite.safetensors."""

    pixels: U8  # (A, n, channels, H, W) what classifiers are checked on
    labels: I64  # (A,)
    codes: F32  # (A, n, Z) that the pictures were decoded from
    vae: Weights
    numbers: I64  # (A,) SuiteScenario.number
    anchors: Anchors | None = None  # images that the codes are decoded at, with vae.decode: anchored
    anchor: I64 | None = None  # (A, n) index into anchors


@dataclass(frozen=True)
class SuiteResult:
    """One scenario of a suite and what a classifier reaches on it."""

    scenario: SuiteScenario
    accuracy: float

    @property
    def is_asked(self) -> bool:
        """Whether a classifier can fail here."""
        return self.scenario.least > 0

    @property
    def passed(self) -> bool:
        return self.accuracy >= self.scenario.least


@dataclass(frozen=True, eq=False)
class Suite:
    """A suite in memory."""

    description: SuiteDescription
    pictures: SuitePictures

    @ieee_f32()
    def check(self, classifier: nn.Module) -> list[SuiteResult]:
        """Return what a classifier, from images in [0, 1] to logits, reaches on each scenario."""
        accuracies = _accuracies(classifier, self.pictures)
        return [SuiteResult(*each) for each in zip(self.description.scenarios, accuracies, strict=True)]

    @ieee_f32()
    def classifier(self, section: dict[str, Any]) -> nn.Module:
        """Return the classifier that a section `classifier` describes, checked on the suite's pictures.

        Raises RunFileError for the section, ModelError for a classifier that does not fit or is untrained, InputError
        where its file names other classes.
        """
        spec = self._run_file(section)
        classes = len(self.description.classes)
        classifier = build_classifier(spec, classes)
        load_pretrained(classifier, spec.classifier.weights, trained_on=False)
        whose = f"the suite (run {self.description.run})"
        expect_stated_classes(spec.classifier, classifier, self.description.classes, whose)
        to_device(classifier).eval()
        side, colours = self.description.image_size, "grey" if self.description.channels == 1 else "colour"
        remedy = f"the suite's pictures are {side}x{side}, {colours}: give a classifier that takes these"
        check_outputs(classifier, spec.classifier, self._images(), classes, remedy)
        if spec.classifier.import_path is not None and spec.classifier.weights is None:
            expect_own_weights(spec.classifier.import_path)
        return classifier

    def other_inputs(self, section: dict[str, Any]) -> list[str]:
        """Return a line for each field in which a section `classifier` differs from that of the suite's run."""
        asked, given = self.description.classifier, self._run_file(section).classifier
        if given.architecture not in EXTERNAL:
            return []
        pairs = [(name, getattr(asked, name), getattr(given, name)) for name in SuiteClassifier.model_fields]
        hint = "; a file of `defuse export` needs no such field" if given.architecture == "program" else ""
        return [
            f"classifier.{name} is {_text(here)}; for the classifier of run {self.description.run} it was "
            f"{_text(there)}{hint}"
            for name, there, here in pairs
            if here != there
        ]

    def usage_hint(self, classifier: nn.Module, section: dict[str, Any]) -> str:
        """Return a clause: what to try where a classifier seems to expect other pixels or classes in another order."""
        spec, images, classes = self._run_file(section), self._images(), self.description.classes
        probe = probe_classifier(classifier, spec.classifier, images, classes)
        given = spec.classifier.input_range
        best = far_better_range(probe.by_range, given)
        if best is not None:
            return (
                f"; it is right on {percent(probe.by_range[best], 0)} of the pictures in the input range {best} and on "
                f"{percent(probe.by_range[given], 0)} in {given}, {ON_AVERAGE}: if it was trained on such inputs, add "
                f"--set classifier.input_range={best}"
            )
        answers = np.array(classes)[predict(classifier, images)].reshape(self.pictures.pixels.shape[:2])
        known = [(scenario.label, scenario.mistaken_for) for scenario in self.description.scenarios]
        others = float(np.mean([~np.isin(*each) for each in zip(answers, known, strict=True)]))
        if spec.classifier.class_order is not None or others <= 0.5:
            return ""
        return (
            f"; {percent(others, 0)} of its answers are neither the label nor the class that it was mistaken for: if "
            "it numbers the classes in another order, add --set classifier.class_order=[...]"
        )

    def _images(self) -> Images:
        """Return the pictures of all scenarios, one after the other."""
        pixels = self.pictures.pixels.reshape(-1, *self.pictures.pixels.shape[2:])
        return Images(pixels, np.repeat(self.pictures.labels, self.pictures.pixels.shape[1]))

    def _run_file(self, section: dict[str, Any]) -> RunFile:
        about = self.description
        data = {"name": "digits", "image_size": about.image_size, "channels": about.channels}
        tree = {"data": data, "vae": about.vae, "classifier": section}
        return parse_run_file(tree, "the classifier to check")


def worse_than_corrected(results: list[SuiteResult]) -> list[str]:
    """Return the scenarios that pass where the run's corrected classifier is better by more than chance (95 %)."""
    passed = [result for result in results if result.is_asked and result.passed]
    figures = [(result.scenario.after, result.accuracy, result.scenario.pictures) for result in passed]
    after, now, pictures = np.array(figures).reshape(-1, 3).T
    lost = certain_loss(after, now, pictures, level=SIGNIFICANT / max(1, len(results)))
    return [result.scenario.name for result, loss in zip(passed, lost, strict=True) if loss]


@ieee_f32()
def save_suite(run: Run, folder: Path) -> Suite:
    """Write the accepted scenarios of a finished run as a suite into a new or empty folder, and return it.

    The pictures are the held-out ones. The least accuracy of each scenario is check.min_each_scenario of the run file,
    or what the corrected classifier reaches where that is less; where the classifier before reaches that, too, one
    picture more than it does. Where the correction is not better than the classifier before, the least is 0: nothing
    is asked. So the classifier before fails every scenario of which something is asked. Raises InputError where the run
    has no scenario or corrected nothing, or the folder is not empty or cannot be written.
    """
    expect_new_folder("--out", folder)
    suite = _suite_of(run)
    with filling("--out", folder) as unfinished:
        (unfinished / PICTURES).mkdir()
        for scenario, pixels in zip(suite.description.scenarios, suite.pictures.pixels, strict=True):
            _sheet(pixels).save(unfinished / PICTURES / f"scenario-{scenario.number:03d}.png")
        (unfinished / TENSORS).write_bytes(encode(suite.pictures))
        text = suite.description.model_dump_json(indent=1) + "\n"
        (unfinished / DESCRIPTION).write_text(text, encoding="utf-8")
    return suite


def load_suite(folder: Path) -> Suite:
    """Return the suite in a folder. Raises InputError for anything else."""
    try:
        for name in (DESCRIPTION, TENSORS):
            expect_no_special_file(folder / name)
        description = SuiteDescription.model_validate_json((folder / DESCRIPTION).read_bytes())
        data, where = (folder / TENSORS).read_bytes(), str(folder / TENSORS)
        pictures = decode(SuitePictures, data, where, SAVE_AGAIN, OTHER_DEFUSE)
    except OSError as error:
        found = f"; cannot read {error.filename} ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            found = f", found no {Path(error.filename).name}"
        wanted = "expected a folder written by `defuse suite save`"
        raise InputError(f"--suite {folder}: {wanted}{found}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        told = f"{first['msg']}; undo the edit"
        if place == "version" and first["type"] == "literal_error":
            told = f"expected {VERSION}, found {first['input']}; {OTHER_DEFUSE}"
        raise InputError(f"{folder / DESCRIPTION}: {place}: {told}") from error
    except StoreError as error:
        raise InputError(str(error)) from error
    scenarios = _in_order_of(pictures, description, folder)
    return Suite(description.model_copy(update={"scenarios": tuple(scenarios)}), pictures)


def _in_order_of(pictures: SuitePictures, description: SuiteDescription, folder: Path) -> list[SuiteScenario]:
    """Return the scenarios of suite.json in the order of the pictures, whatever theirs is.

    Raises InputError where they are not those of the pictures.
    """
    by_number = {scenario.number: scenario for scenario in description.scenarios}
    if len(description.scenarios) != len(pictures.labels):
        counts = f"{len(description.scenarios)} scenarios, {TENSORS} has {len(pictures.labels)}"
        raise InputError(f"{folder}: {DESCRIPTION} has {counts}; save the suite again")
    numbers = pictures.numbers.tolist()
    if sorted(by_number) != sorted(numbers):
        raise InputError(
            f"{folder / DESCRIPTION}: scenarios: expected the numbers {_text(tuple(numbers))}, found "
            f"{_text(tuple(sorted(scenario.number for scenario in description.scenarios)))}; undo the edit"
        )
    found = [by_number[number] for number in numbers]
    _, count, channels, size, _ = pictures.pixels.shape
    if (description.image_size, description.channels) != (size, channels):
        raise InputError(
            f"{folder / DESCRIPTION}: expected image_size {size} and channels {channels}, as in {TENSORS}, found "
            f"{description.image_size} and {description.channels}; undo the edit"
        )
    classes = dict(enumerate(description.classes))
    for scenario, label in zip(found, pictures.labels.tolist(), strict=True):
        if (scenario.label, scenario.pictures) != (classes.get(label), count):
            raise InputError(
                f"{folder / DESCRIPTION}: scenario {scenario.number}: expected label {classes.get(label)} and {count} "
                f"pictures, as in {TENSORS}, found {scenario.label} and {scenario.pictures}; undo the edit"
            )
    return found


def least_accuracy(limit: float, before: float, after: float, pictures: int) -> float:
    """Return the accuracy to ask for: over that before, not over that of the correction; 0 where it is not better.

    before and after are shares of the pictures that are right; limit is check.min_each_scenario.
    """
    if after <= before:
        return 0.0
    one_more = (round(before * pictures) + 1) / pictures
    return min(max(limit, one_more), after)


def _text(value: object) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _suite_of(run: Run) -> Suite:
    found = Findings.load(run)
    models, fixes = found.models, found.fixes
    if not len(fixes.labels):
        raise InputError(f"run {run.name} accepted no failure scenario, so a suite of it would check nothing")
    if not found.sweep.has_correction:
        raise InputError(
            f"run {run.name} corrected nothing, so a suite of it would require nothing; {why_not_corrected(run)}"
        )
    spec, classes = run.spec, models.classes
    images = held_out_images(StoredVae(spec, models.vae), fixes)
    pixels = np.stack([to_levels(each.batch()) for each in by_scenario(images, len(fixes.labels))])
    pictures = SuitePictures(
        pixels, fixes.labels, fixes.test, models.vae, fixes.scenario, fixes.anchors, fixes.test_anchor
    )
    before, after = (_accuracies(classifier, pictures) for classifier in both_classifiers(spec, found))
    errors = most_common_errors(found.gallery, found.verdicts, fixes.scenario)
    scenarios = tuple(
        SuiteScenario(
            number=int(component),
            label=classes[label],
            mistaken_for=classes[errors[row]],
            pictures=pixels.shape[1],
            before=before[row],
            after=after[row],
            least=least_accuracy(spec.check.min_each_scenario, before[row], after[row], pixels.shape[1]),
        )
        for row, (component, label) in enumerate(zip(fixes.scenario, fixes.labels, strict=True))
    )
    return Suite(_described(run, models, scenarios), pictures)


def _described(run: Run, models: Models, scenarios: tuple[SuiteScenario, ...]) -> SuiteDescription:
    vae = run.spec.vae.model_dump(mode="json")
    return SuiteDescription(
        version=VERSION,
        run=run.name,
        annotators=str(run.manifest().get("annotators", "unknown")),
        saved=utc_now(),
        classes=models.classes,
        image_size=run.spec.data.image_size,
        channels=run.spec.data.channels,
        vae=vae | {"weights": None, "epochs": max(1, vae["epochs"])},
        classifier=SuiteClassifier.model_validate(plain_section(run.spec.classifier), from_attributes=True),
        scenarios=scenarios,
    )


def _accuracies(classifier: nn.Module, pictures: SuitePictures) -> list[float]:
    """Return the classifier's accuracy on the pictures of each scenario."""
    return [
        accuracy(classifier, Images(pixels, np.full(len(pixels), label, np.int64)))
        for pixels, label in zip(pictures.pixels, pictures.labels, strict=True)
    ]


def _sheet(pixels: U8) -> Image.Image:
    """Return the first pictures (n, channels, H, W) of a scenario as one picture."""
    shown = pixels[: SHEET * SHEET]
    rows = [shown[start : start + SHEET] for start in range(0, len(shown), SHEET)]
    blank = np.full_like(shown[0], 255)
    lines = [np.concatenate([*row, *[blank] * (SHEET - len(row))], axis=2) for row in rows]
    return to_picture(np.concatenate(lines, axis=1))
