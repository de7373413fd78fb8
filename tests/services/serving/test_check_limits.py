"""Each check compares its own figure with its own limit; the candidate keeps what was measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sample_evidence import sample_evidence

from defuse_core.artifacts import Corrections, Models, Sweep
from defuse_core.codec import encode
from defuse_core.config import CheckSection
from defuse_core.evaluation.evidence import DEFUSE
from defuse_core.models import load_classifier, predict
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.candidate import Candidate, prepare_candidate
from services.serving.checks import CandidateReport, Check, evaluate_candidate

ALL_ALLOWED = CheckSection(
    min_scenario_accuracy=0.0, min_each_scenario=0.0, max_loss=1.0, max_class_loss=1.0, max_regressions=1.0
)


def report(
    before: str = "1111", after: str = "1111", labels: str = "", scenarios: tuple[float, ...] = (0.9,)
) -> CandidateReport:
    """A report on clean images of classes a and b, of which 1 is right and 0 is wrong."""
    right = [np.array(list(answers)) == "1" for answers in (before, after)]
    truth = np.array([int(label) for label in labels or "0" * len(before)])
    numbers, after = np.arange(len(scenarios)), np.array(scenarios)
    return CandidateReport("test", ("a", "b"), truth, *right, numbers, np.zeros(1), after, ())


def failed(found: CandidateReport, **limits: float) -> set[str]:
    checks = found.checks(ALL_ALLOWED.model_copy(update=limits))
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize(
    ("found", "limit", "value", "name"),
    [
        (report(scenarios=(0.5, 0.9, 1.0)), "min_scenario_accuracy", 0.8, "scenario accuracy"),
        (report(scenarios=(0.5, 0.9, 1.0)), "min_each_scenario", 0.5, "worst scenario"),
        (report("1" * 100, "1" * 99 + "0"), "max_loss", 0.01, "clean accuracy"),
        (report("111100", "001011"), "max_loss", 1 / 6, "clean accuracy"),
        (report("11110011", "00101101", "00000011"), "max_class_loss", 0.5, "every class"),  # of two of b
        (report("1111000", "1001100"), "max_regressions", 2 / 7, "regressions"),
    ],
)
def test_a_check_passes_at_its_limit_and_fails_beyond_it(found, limit, value, name):
    beyond = value + 0.001 if limit.startswith("min") else value - 0.001
    assert failed(found, **{limit: value}) == set()
    assert failed(found, **{limit: beyond}) == {name}


def test_images_that_are_right_now_make_up_for_lost_ones_but_not_for_regressions():
    better = report("1100", "0111")
    assert failed(better, max_loss=0.0, max_class_loss=0.0, max_regressions=0.25) == set()
    assert failed(better, max_regressions=0.0) == {"regressions"}


def test_a_check_has_the_figure_that_it_compares():
    checks = report("1111011110", "1110011111").checks(ALL_ALLOWED)  # 8 of 10, and 8: one lost, one gained
    worse = report("1" * 10, "1" * 9 + "0", "0" * 8 + "11").checks(ALL_ALLOWED)
    found, lost = ({check.name: check for check in each} for each in (checks, worse))
    assert (found["clean accuracy"].found, found["regressions"].found) == (0.0, 0.1)
    assert lost["clean accuracy"].found == pytest.approx(0.1) and lost["every class"].found == 0.5
    assert "class b lost 50.00 points, expected at most" in lost["every class"].line


def test_scenarios_that_are_no_better_than_before_fail():
    same = dataclasses.replace(report(), scenario_before=np.array([0.9]))
    assert failed(same) == {"improvement"}
    better = dataclasses.replace(same, scenario_before=np.array([0.6]))
    assert failed(better) == set()
    (gain,) = [check.found for check in better.checks(ALL_ALLOWED) if check.name == "improvement"]
    assert gain == pytest.approx(0.3)


def evaluated(stored: Run, splits, corrected) -> CandidateReport:
    sweep = dataclasses.replace(stored.require(Sweep), weights=corrected)
    models, corrections = stored.require(Models), stored.require(Corrections)
    return evaluate_candidate(stored.spec, models, corrections, sweep, splits, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_fail_and_are_named(planted, splits, value):
    stored = Run.open(planted, "first")
    weights = {name: array.copy() for name, array in stored.require(Sweep).weights.items()}
    name = sorted(weights)[-1]
    weights[name].flat[0] = value
    found = evaluated(stored, splits, weights)
    assert found.checks(ALL_ALLOWED) == [Check("finite", False, f"weights: {name} has NaN or infinity")]


def test_images_whose_answer_is_not_finite_are_wrong(planted, splits):
    stored = Run.open(planted, "broken")
    found = evaluated(stored, splits, stored.require(Sweep).weights)
    assert not found.right_after.any() and found.right_before.any()
    assert "clean accuracy" in {check.name for check in found.checks(CheckSection()) if not check.passed}


def test_a_candidate_keeps_its_correction_its_accuracies_and_the_names_of_its_scenarios(
    planted, splits, candidate: Candidate
):
    stored = Run.open(planted, "first")
    models, sweep, corrections = stored.require(Models), stored.require(Sweep), stored.require(Corrections)
    right = [
        float((predict(load_classifier(stored.spec, weights, 10), splits.test) == splits.test.labels).mean())
        for weights in (models.classifier, sweep.weights)
    ]
    summary = candidate.summary
    assert (summary.lam, summary.epoch, summary.clean_split) == (1.0, 2, "test")
    assert [summary.clean_before, summary.clean_after] == right and right[0] < right[1]
    assert (summary.scenario_before, summary.scenario_after) == (
        candidate.before.mean(),
        candidate.after.mean(),
    )
    assert candidate.before.max() < 0.5 < candidate.after.min()  # the original confuses both classes
    assert summary.annotators == "reference models" and summary.made.endswith("Z")
    assert candidate.scenario.tolist() == corrections.scenario.tolist() == [0, 1]
    assert candidate.labels.tolist() == [3, 8]
    names = candidate.classes
    assert candidate.scenario_names() == [
        f"{names[3]} read as {names[8]} (scenario 0)",
        f"{names[8]} read as {names[3]} (scenario 1)",
    ]
    unknown = dataclasses.replace(candidate, most_common_error=candidate.labels)
    assert unknown.scenario_names()[0] == f"{names[3]} misread (scenario 0)"


def test_the_watch_figures_of_a_candidate_are_those_of_the_settings(candidate: Candidate):
    settings = candidate.run_file().serve
    on, off = (
        candidate.watch_figures(settings.model_copy(update={"watch": watch})) for watch in (True, False)
    )
    assert on != off


def test_the_watch_of_a_candidate_measures_the_corrected_classifier(planted, splits, candidate: Candidate):
    stored = Run.open(planted, "first")
    for weights, same in ((stored.require(Sweep).weights, True), (stored.require(Models).classifier, False)):
        wrong = predict(load_classifier(stored.spec, weights, 10), splits.test) != splits.test.labels
        assert np.array_equal(candidate.failures.test_wrong, wrong) is same


def test_a_candidate_is_checked_by_the_labels_of_judges_where_they_are_known_and_stored(
    own_store: FolderStore,
):
    run, told = Run.open(own_store, "first"), []
    first = prepare_candidate(run)[1]
    right = np.full((2, 4), 0.5)
    right[:, DEFUSE] = 0.9
    run.store.write("evidence.safetensors", encode(sample_evidence(right)))
    key, judged = prepare_candidate(run, lambda *progress: told.append(progress))
    names = [[check.name for check in found.checks] for found in (first, judged)]
    assert "own label" not in names[0] and set(names[1]) == {*names[0], "own label"}
    assert told == [("checking the corrected classifier", step, 2, "steps") for step in range(3)]
    assert judged.digest != first.digest  # by the judges' labels, other scenarios may be fixed
    again_key, again = prepare_candidate(run, lambda *progress: told.append(progress))
    assert (again_key, encode(again), len(told)) == (key, encode(judged), 3)
