"""The checks of a corrected classifier, on answers that are given."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from sample_evidence import sample_evidence
from sample_findings import sample_findings
from torch import nn

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Corrections, Models, Scenarios, Sweep, Verdicts
from defuse_core.codec import encode
from defuse_core.config import CheckSection
from defuse_core.data import Splits
from defuse_core.errors import CheckFailed, RunMismatchError
from defuse_core.evaluation import Findings
from defuse_core.export.finished import both_classifiers
from defuse_core.review.sample import sample_corrections
from defuse_core.runs import Run
from services.serving.api import ModelInfo
from services.serving.candidate import prepare_candidate
from services.serving.checks import CandidateReport, Check, evaluate_candidate, own_label_check
from services.serving.model import LoadedModel
from services.serving.registry_state import EMPTY
from tests.services.serving.test_serve_commands import check, promote, run


def own_labels(before: list[float], after: list[float]) -> np.ndarray:
    """Accuracies (A, B) by own label, alike for baseline and plain further training."""
    return np.stack([before, [0.7] * len(before), [0.7] * len(before), after], axis=1)


@pytest.mark.parametrize(
    ("before", "after", "pairs", "passed", "worst"),
    [
        ([0.10, 0.5547], [0.99, 0.4531], [256, 0, 26], False, "scenario 1, 55.47 % to 45.31 %"),
        # each image was right before or after: may be chance
        ([0.10, 0.5547], [0.99, 0.4531], [256, 116, 142], True, "scenario 1, 55.47 % to 45.31 %"),
        ([0.55, 0.30], [0.55, 1.00], [256, 179, 0], True, ""),
        ([0.60, 1.00], [0.30, 0.50], [256, 0, 128], False, "scenario 1, 100.00 % to 50.00 %"),
        # four photographs tell nothing, however many pictures show them
        ([0.60, 1.00], [0.99, 0.00], [4, 0, 4], True, "scenario 1, 100.00 % to 0.00 %"),
        # p = 0.013, which one of thirty has by chance
        ([0.10] * 29 + [0.6], [0.99] * 29 + [0.5], [256, 23, 42], True, "scenario 29, 60.00 % to 50.00 %"),
    ],
)
def test_a_scenario_that_is_worse_by_its_own_label_fails_a_check(before, after, pairs, passed, worst):
    run_found = sample_findings(32, len(before))[0]
    evidence = sample_evidence(own_labels(before, after))
    evidence.pairs_with_before[-1] = pairs
    found = own_label_check(run_found.fixes, evidence, run_found.models)
    assert (found.name, found.passed) == ("own label", passed)
    assert found.limit is None and (found.found > 0) == bool(worst)
    told = f"largest loss by the judges' labels: {worst}, {'not significant' if passed else 'significant'}"
    assert found.line.startswith(told if worst else "judges' labels: no scenario is less often right")


def test_scenarios_without_an_accuracy_by_own_label_are_left_out():
    run_found = sample_findings(32, 4)[0]
    corrections, models = replace(run_found.fixes, scenario=np.array([2, 3, 5, 7])), run_found.models
    measured = own_labels([np.nan, 0.9, 0.8, 0.6], [0.5, 0.9, np.nan, 0.3])
    evidence = replace(sample_evidence(np.full((4, 4), 0.5)), scenario_own_label=measured)
    evidence.pairs_with_before[:] = [256, 0, 0]
    evidence.pairs_with_before[[0, 3]] = [256, 0, 77]
    found = own_label_check(corrections, evidence, models)
    assert "scenario 7, 60.00 % to 30.00 %, significant" in found.line and not found.passed
    evidence.pairs_with_before[3] = [256, 0, 0]
    found = own_label_check(corrections, evidence, models)  # only one that is left out is significantly worse
    assert "scenario 7, 60.00 % to 30.00 %, not significant" in found.line and found.passed
    measured[3] = measured[1]
    assert "no scenario is less often right" in own_label_check(corrections, evidence, models).line


def test_judges_that_are_worse_than_the_classifier_decide_no_check():
    found, lost = sample_findings(4, 2)[0], own_labels([0.9, 0.9], [0.1, 0.1])

    def checked(judges: float, before: float, images: int = 500) -> Check | None:
        models = replace(found.models, images={"test": images})
        return own_label_check(found.fixes, sample_evidence(lost, judges=judges, before=before), models)

    assert checked(0.6, 0.95) is None
    assert not checked(0.94, 0.95).passed
    assert checked(0.94, 0.98, images=1000) is None and not checked(0.94, 0.98, images=50).passed  # by chance


def test_judges_that_do_not_recognise_a_class_decide_no_check():
    found, lost = sample_findings(4, 2)[0], own_labels([0.9, 0.9], [0.1, 0.1])
    models = replace(found.models, class_images={"test": np.full(10, 50)})
    for of_the_last, decided in ((0.0, False), (0.95, True)):
        by_class = np.array([[0.99] * 9 + [of_the_last]])
        evidence = replace(sample_evidence(lost), judges_by_class=by_class)
        assert (own_label_check(found.fixes, evidence, models) is not None) is decided


def test_check_says_that_judges_who_do_not_recognise_a_class_decide_nothing(own_store, caplog):
    stored = Run.open(own_store, "first")
    models = stored.require(Models)
    known = replace(models, class_accuracy={"test": np.full(10, 0.9)}, class_images={"test": np.full(10, 50)})
    by_class = np.array([[0.9] * 9 + [0.0]])
    evidence = replace(sample_evidence(own_labels([0.1, 0.6], [1.0, 0.3])), judges_by_class=by_class)
    for name, artefact in (("models", known), ("evidence", evidence)):
        stored.store.write(f"{name}.safetensors", encode(artefact))
    checks = prepare_candidate(stored)[1].checks
    assert (
        "own label is not checked, since the best judge is right on 81.0 % of the test images" in caplog.text
    )
    assert not any(each.name == "own label" for each in checks)


def test_without_judged_units_there_is_no_check_by_own_label():
    found = sample_findings(4, 2)[0]
    evidence = sample_evidence(own_labels([0.9, 0.9], [0.1, 0.1]))
    assert own_label_check(found.fixes, None, found.models) is None
    nobody = replace(evidence, scenario_own_label=own_labels([np.nan, np.nan], [np.nan, np.nan]))
    assert own_label_check(found.fixes, nobody, found.models) is None


def test_a_server_shows_the_accuracies_that_judges_measured_and_else_those_by_one_label(own_store):
    run_dir = Run.open(own_store, "first")
    plain = prepare_candidate(run_dir)[1]
    assert plain.judged.tolist() == [False, False]
    measured = own_labels([0.58, np.nan], [0.6, 0.9])
    evidence = replace(sample_evidence(np.full((2, 4), 0.5)), scenario_own_label=measured)
    run_dir.store.write("evidence.safetensors", encode(evidence))
    candidate = prepare_candidate(run_dir)[1]
    assert candidate.judged.tolist() == [True, False] and candidate.digest != plain.digest
    assert (candidate.before[0], candidate.after[0]) == (0.58, 0.6)
    assert (candidate.before[1], candidate.after[1]) == (plain.before[1], plain.after[1])
    model = LoadedModel(candidate, candidate.run_file().serve)
    page = ModelInfo.of(model, EMPTY, None, None).scenarios
    assert [(each.judged, each.fixed, each.accuracy_after) for each in page] == [
        (True, False, 0.6),
        (False, True, plain.after[1]),
    ]


def test_check_fails_a_run_whose_judges_find_a_scenario_worse_also_after_a_check_without_them(own_store):
    before = prepare_candidate(Run.open(own_store, "first"))[0]
    evidence = sample_evidence(own_labels([0.1, 0.6], [1.0, 0.3]))
    Run.open(own_store, "first").store.write("evidence.safetensors", encode(evidence))
    with pytest.raises(CheckFailed, match="1 of 9 checks failed"):
        run(check, "first", "--store", own_store.address)
    key, candidate = prepare_candidate(Run.open(own_store, "first"))
    assert key != before
    assert candidate.failed_checks()[0].startswith(
        "largest loss by the judges' labels: scenario 1, 60.00 % to 30.00 %"
    )


def test_check_fails_a_run_whose_classifier_guesses_and_a_promotion_can_be_forced(own_store):
    stored = Run.open(own_store, "first")
    models = stored.require(Models)
    one_answer = {part: np.eye(10)[0] for part in models.class_accuracy}
    stored.store.write("models.safetensors", encode(replace(models, class_accuracy=one_answer)))
    shutil.rmtree(stored.store.folder / "candidates")  # made before with the same key
    with pytest.raises(CheckFailed, match="1 of 8 checks failed"):
        run(check, "first", "--store", own_store.address)
    (line,) = prepare_candidate(Run.open(own_store, "first"))[1].failed_checks()
    assert line.startswith("the classifier is hardly better than guessing (right on ")
    with pytest.raises(CheckFailed, match="hardly better than guessing"):
        run(promote, "first", "--store", own_store.address)
    assert "version 1" in run(promote, "first", "--store", own_store.address, "--force", "a trial")


def test_a_candidate_is_made_again_after_a_changed_verdict_or_evidence_with_equal_weights(own_store):
    """As where λ = 0 was chosen, whose weights do not depend on what was accepted."""
    run_dir = Run.open(own_store, "first")
    key, before = prepare_candidate(run_dir)
    verdicts = run_dir.require(Verdicts)
    first, *others = verdicts.accepted
    labels = np.where(np.arange(len(verdicts.labels)) == first, NONE_OF_THE_ABOVE, verdicts.labels)
    verdicts = replace(verdicts, labels=labels)
    corrections = sample_corrections(run_dir.spec, run_dir.require(Scenarios), verdicts)
    for artefact in (verdicts, corrections):
        run_dir.store.write(f"{type(artefact).__name__.lower()}.safetensors", encode(artefact))
    after_review = prepare_candidate(run_dir)
    assert before.scenario.tolist() == [first, *others] and after_review[1].scenario.tolist() == others
    keys = {key, after_review[0]}
    for own_label in (1.0, 0.3):
        evidence = sample_evidence(own_labels([0.6], [own_label]))
        run_dir.store.write("evidence.safetensors", encode(evidence))
        key, judged = prepare_candidate(run_dir)
        assert [c.passed for c in judged.checks if c.name == "own label"] == [own_label == 1.0]
        keys.add(key)
    assert len(keys) == 4 and prepare_candidate(run_dir)[0] == key


def test_a_classifier_whose_code_has_changed_is_neither_checked_nor_compared(own_store, monkeypatch):
    for key in own_store.list("first/candidates/"):
        own_store.delete(key)
    monkeypatch.setattr("torch.nn.ReLU", nn.Sigmoid)  # the weights fit as before
    with pytest.raises(
        RunMismatchError,
        match="of the test images right, and got .* its code, or that of a package, has changed",
    ):
        run(check, "first", "--store", own_store.address)
    with pytest.raises(RunMismatchError, match="stored images otherwise than when the run began"):
        opened = Run.open(own_store, "first")
        both_classifiers(opened.spec, Findings.load(opened))


def test_a_classifier_whose_code_has_changed_since_a_check_is_neither_checked_again_nor_promoted(
    own_store, monkeypatch
):
    stored = Run.open(own_store, "first")
    architectures = (stored.spec.classifier.architecture,)  # as if its code were the user's
    monkeypatch.setattr("services.serving.candidate.CODE_ELSEWHERE", architectures)
    assert own_store.exists(f"first/{prepare_candidate(stored)[0]}")
    monkeypatch.setattr("torch.nn.ReLU", nn.Sigmoid)  # the weights fit as before
    for command in (check, promote):
        with pytest.raises(RunMismatchError, match="stored images otherwise than when the run began"):
            run(command, "first", "--store", own_store.address)
    assert not own_store.list("registry/")


def report_on(labels: list[int], right_after: list[bool]) -> CandidateReport:
    """A report on clean images that the classifier before gets right, and one corrected scenario."""
    right = np.ones(len(labels), np.bool_)
    after = np.array(right_after)
    names = ("cat", "dog", "eel", "fox")
    return CandidateReport(
        "test", names, np.array(labels), right, after, np.zeros(1, np.int64), np.zeros(1), np.ones(1), ()
    )


@pytest.mark.parametrize(
    ("parts", "choose_by", "end"),
    [
        ({}, "tune", "points"),
        ({"test": None}, "tune", "points (not independent: λ was chosen on these images)"),
        ({"test": None}, "validation", "points (not independent: λ was chosen on these images)"),
        ({"test": None}, "last", "points"),
        (
            {"test": None, "validation": None},
            "tune",
            "points (not independent: the classifier was trained on these images)",
        ),
    ],
)
def test_clean_accuracy_on_images_that_the_correction_has_seen_says_so(
    own_store, splits, parts, choose_by: str, end: str
):
    stored = Run.open(own_store, "first")
    correct = stored.spec.correct.model_copy(update={"choose_by": choose_by})
    spec = stored.spec.model_copy(update={"correct": correct})
    models, others = stored.require(Models), (stored.require(Corrections), stored.require(Sweep))
    ends = {False: end}
    if "test" in parts and "validation" not in parts:
        ends[True] = "points (not independent: the classifier has probably seen these images)"
    for seen, expected in ends.items():
        models = replace(models, validation_from_training=seen)
        report = evaluate_candidate(spec, models, *others, replace(splits, **parts), None)
        (line,) = (check.line for check in report.checks(spec.check) if check.name == "clean accuracy")
        assert line.endswith(expected)


def test_clean_images_are_identified_by_what_they_show_unless_the_classifier_may_know_them(own_store, splits):
    stored = Run.open(own_store, "first")
    models, others = stored.require(Models), (stored.require(Corrections), stored.require(Sweep))

    def identified(models: Models, splits: Splits) -> str:
        return evaluate_candidate(stored.spec, models, *others, splits, None).fingerprint

    known = identified(models, splits)
    assert known and known == prepare_candidate(stored)[1].summary.clean_images
    fewer = replace(splits, train=splits.train.take(slice(0, 100)))
    assert identified(models, fewer) == known != fewer.fingerprint()
    assert identified(models, replace(splits, test=splits.test.take(slice(0, 100)))) not in (known, "")
    untested = replace(models, accuracy={part: models.accuracy[part] for part in ("train", "validation")})
    without = replace(splits, test=None)
    assert identified(untested, without) == splits.fingerprint("validation")
    assert identified(replace(untested, validation_from_training=True), without) == ""


def test_scenario_accuracies_that_equal_the_limit_pass():
    report = replace(report_on([1], [True]), scenario_before=np.zeros(3), scenario_after=np.full(3, 0.7))
    limits = CheckSection(min_scenario_accuracy=0.7, min_each_scenario=0.7)
    found = {check.name: check for check in report.checks(limits)}
    assert report.scenario_after.mean() < 0.7  # by the rounding of floats alone
    assert found["scenario accuracy"].passed and found["worst scenario"].passed
    assert found["worst scenario"].found == found["worst scenario"].limit == 0.7
    assert found["improvement"].found == pytest.approx(0.7)
    below = {check.name: check for check in replace(report, scenario_after=np.full(3, 0.69)).checks(limits)}
    assert not below["scenario accuracy"].passed and not below["worst scenario"].passed


def test_the_check_of_the_worst_scenario_names_it():
    numbers, after = np.array([3, 7]), np.array([0.9, 0.6])
    found = replace(
        report_on([1], [True]), scenario=numbers, scenario_before=np.zeros(2), scenario_after=after
    )
    (line,) = (check.line for check in found.checks(CheckSection()) if check.name == "worst scenario")
    assert line.startswith("worst scenario by its label: 7, 60.00 %, expected at least ")


def test_the_checks_on_scenarios_say_by_whose_label_they_are():
    lines = {check.name: check.line for check in report_on([1], [True]).checks(CheckSection())}
    for name in ("scenario accuracy", "improvement"):
        assert lines[name].startswith(f"{name} by the scenarios' labels: ")


def test_every_class_means_those_with_images_and_the_others_are_named():
    def every_class(labels: list[int], right_after: list[bool]) -> Check:
        (found,) = (
            check
            for check in report_on(labels, right_after).checks(CheckSection())
            if check.name == "every class"
        )
        return found

    assert "not measured" not in every_class([0, 1, 2, 3], [True] * 4).line
    partly = every_class([1, 1, 2], [True, False, False])
    assert not partly.passed and "class eel lost 100.00 points" in partly.line
    assert (partly.found, partly.limit) == (1.0, CheckSection().max_class_loss)
    assert partly.line.endswith("; not measured, since no test image shows them: cat, fox")
    report = replace(report_on([1, 1, 2], [True, False, False]), classes=tuple(f"c{n}" for n in range(200)))
    many = next(check for check in report.checks(CheckSection()) if check.name == "every class")
    assert many.line.endswith("no test image shows them: c0, c3, c4, c5, c6 and 193 more")
    twenty = replace(report, classes=tuple(f"c{n}" for n in range(20)))
    told = {
        len(each.classes): [check.line for check in each.checks(CheckSection())] for each in (report, twenty)
    }
    assert {count: "lost accuracy for certain, " in " ".join(lines) for count, lines in told.items()} == {
        200: True,
        20: False,
    }
    # not that of a class without images
    kept = every_class([1, 2], [True, True])
    assert kept.passed and kept.line.startswith("every class: no class lost accuracy, expected at most ")
    unhurt = replace(report, right_after=np.ones(3, np.bool_))
    (line,) = (check.line for check in unhurt.checks(CheckSection()) if check.name == "every class")
    assert line.startswith("every class: no class lost accuracy for certain, expected at most ")


def test_with_many_classes_every_class_means_that_none_lost_more_for_certain():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(1000), 50)
    before, draw = rng.random((2, len(labels)))
    right = before < 0.5
    after = np.where(right, draw >= 0.04, draw < 0.04)
    found = replace(
        report_on(labels.tolist(), after.tolist()), right_before=right, classes=tuple(map(str, range(1000)))
    )

    def every_class(found: CandidateReport) -> Check:
        return next(check for check in found.checks(CheckSection()) if check.name == "every class")

    assert every_class(found).passed
    assert "no class lost accuracy for certain, expected at most 5.00 points" in every_class(found).line
    one_lost = replace(found, right_before=right | (labels == 7), right_after=after & (labels != 7))
    assert not every_class(one_lost).passed and "class 7 lost " in every_class(one_lost).line
    tracks = np.where(labels == 7, 0, np.arange(len(labels)))
    assert every_class(replace(one_lost, tracks=tracks)).passed
