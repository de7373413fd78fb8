"""What a correction without a fold of the scenarios is tuned on."""

from __future__ import annotations

import dataclasses

import numpy as np

from defuse_core.artifacts import Corrections, Failures
from defuse_core.evaluation.controls import fold_of, fold_spec, plain_spec, without_fold
from defuse_core.evaluation.evaluate import Findings
from defuse_core.review.verdicts import most_common_errors
from tests.conftest import tiny
from tests.sample_components import sample_failures
from tests.sample_findings import sample_findings


def found_with(count: int, unreviewed: Failures | None = None) -> Findings:
    """Findings with so many accepted scenarios; their components are far from each other, at 0, 100, 200, ..."""
    found, _ = sample_findings(scenarios=count, accepted=count)
    far = 100.0 * np.arange(count)[:, None] * np.ones((1, 3))
    scenarios = dataclasses.replace(found.scenarios, means=far, covariances=np.stack([np.eye(3)] * count))
    codes = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, 3, 3), np.float32)
    fixes = Corrections(np.arange(count), found.verdicts.labels, codes, codes, unreviewed=unreviewed)
    return dataclasses.replace(found, scenarios=scenarios, fixes=fixes)


def test_the_two_folds_hold_every_scenario_once() -> None:
    found = found_with(5)
    left = [without_fold(found, fold) for fold in (0, 1)]
    tuned = np.concatenate([part.scenario for part in left])
    assert sorted(tuned.tolist()) == found.fixes.scenario.tolist()
    assert [part.tune[:, 0, 0].tolist() for part in left] == [[1, 3], [0, 2, 4]]
    assert fold_of(found.fixes).tolist() == [0, 1, 0, 1, 0]
    assert [part.unreviewed for part in left] == [None, None]


def test_unreviewed_failures_near_a_left_out_scenario_are_left_out_with_all_of_their_images() -> None:
    found = found_with(2)
    labels = found.verdicts.labels.tolist()
    wrong = most_common_errors(found.gallery, found.verdicts, found.fixes.scenario).tolist()
    other = next(each for each in range(10) if each not in (*labels, *wrong))
    far = np.full(3, 50.0)
    rows = [  # code, source image, its class, the answer
        (np.zeros(3), 1, other, wrong[1]),  # in the region of scenario 0
        (far, 2, labels[0], wrong[0]),  # with its confusion
        (far, 2, labels[0], other),  # of the same image as that
        (far, 3, labels[0], other),
        (np.full(3, 100.0), 4, other, wrong[0]),  # in the region of scenario 1
        (far, 5, labels[1], wrong[1]),
    ]
    codes, source, truth, predicted = map(np.array, zip(*rows, strict=True))
    failures = sample_failures(codes.astype(np.float32), source, truth, predicted)
    kept = [without_fold(found_with(2, failures), fold).unreviewed.source.tolist() for fold in (0, 1)]
    assert kept == [[3, 4, 5], [1, 2, 2, 3]]
    of_tracks = dataclasses.replace(failures, source_track=np.array([9, 9, 9, 9, 8, 8]))
    kept = [without_fold(found_with(2, of_tracks), fold).unreviewed.source.tolist() for fold in (0, 1)]
    assert kept == [[4, 5], [1, 2, 2, 3]]


def test_scenarios_are_left_out_whose_numbers_are_not_their_places() -> None:
    found = found_with(3)
    wrong = most_common_errors(found.gallery, found.verdicts, found.fixes.scenario).tolist()
    labels = found.verdicts.labels.tolist()
    other = next(each for each in range(10) if each not in (*labels, *wrong))
    at = np.array([0.0, 100, 200])[:, None] * np.ones((1, 3))
    failures = sample_failures(at.astype(np.float32), np.arange(3), np.full(3, other), np.full(3, wrong[0]))
    fixes = dataclasses.replace(found.fixes.take(np.array([2, 1])), unreviewed=failures)
    changed = dataclasses.replace(found, fixes=fixes)
    kept = [without_fold(changed, fold) for fold in (0, 1)]
    assert [part.scenario.tolist() for part in kept] == [[1], [2]]
    assert [part.unreviewed.source.tolist() for part in kept] == [[0, 1], [0, 2]]


def test_controls_are_tuned_for_as_many_epochs_as_the_chosen_correction_whatever_their_loss() -> None:
    found, _ = sample_findings()
    row = dataclasses.replace(found.sweep.rows[0], lam=2.0, epoch=3)
    chosen = dataclasses.replace(found.sweep, chosen=row)
    spec = tiny(correct={"lambdas": (1.0, 5.0), "epochs": 7, "stop_at_loss": 0.3})
    plain, fold = plain_spec(spec, chosen).correct, fold_spec(spec, chosen).correct
    assert (plain.lambdas, fold.lambdas) == ((0.0,), (2.0,))
    for section in (plain, fold):
        assert (section.epochs, section.choose_by, section.stop_at_loss) == (3, "last", None)
    assert plain_spec(spec, dataclasses.replace(chosen, chosen=None)).correct.epochs == 7
