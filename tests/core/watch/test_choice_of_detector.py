"""Which method is chosen, and when none finds failing inputs: on given probabilities, without any fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sample_findings import sample_watch
from scipy import special, stats

from defuse_core.artifacts import I64
from defuse_core.config import ServeSection
from defuse_core.report.build_evidence import watch_figures
from defuse_core.watch import METHODS, FailureWatch, _standard_error, answer_scores


def two_methods(gain: float, deviation: float, tracks: I64 | None = None) -> FailureWatch:
    """A watch of 100 wrong answers; the second method's loss is less by `gain` on the mean, with this deviation."""
    given = sample_watch(images=100)
    losses = 2 - gain - deviation * np.repeat([-1.0, 1.0], 50)
    methods = tuple(
        dataclasses.replace(
            given.methods[0],
            detector=dataclasses.replace(given.methods[0].detector, method=method),
            validation=np.exp(-loss),
        )
        for method, loss in zip((METHODS[0], METHODS[2]), (np.full(100, 2.0), losses), strict=True)
    )
    wrong = np.ones(100, np.bool_)
    return dataclasses.replace(given, methods=methods, validation_wrong=wrong, validation_tracks=tracks)


@pytest.mark.parametrize(("gain", "chosen"), [(0.04, METHODS[0]), (0.06, METHODS[2])])
def test_a_more_complex_method_has_to_be_better_by_a_standard_error(gain: float, chosen: str) -> None:
    watch = two_methods(gain, 0.5)  # a standard error of 0.05
    assert watch.best().detector.method == chosen
    assert watch.best(codes=False).detector.method == METHODS[0]


def test_a_method_has_to_be_better_than_the_best_of_the_simpler_ones() -> None:
    watch = two_methods(0.5, 0.0)
    first, last = watch.methods
    middle = dataclasses.replace(
        first,
        detector=dataclasses.replace(first.detector, method=METHODS[1]),
        validation=np.full(100, np.exp(-1.0)),
    )
    found = dataclasses.replace(watch, methods=(first, middle, last)).best()
    assert found is not None and found.detector.method == METHODS[1]


def test_images_of_one_track_are_one_piece_of_evidence_for_a_method() -> None:
    tracks = np.arange(100) // 10  # a standard error of 0.17
    assert two_methods(0.1, 0.5).best().detector.method == METHODS[2]
    assert two_methods(0.1, 0.5, tracks).best().detector.method == METHODS[0]
    assert two_methods(0.2, 0.5, tracks).best().detector.method == METHODS[2]


def test_the_standard_error_is_that_of_the_mean_over_tracks() -> None:
    rng = np.random.default_rng(0)
    values, order = rng.standard_normal(12), rng.permutation(12)
    assert _standard_error(values, None) == pytest.approx(stats.sem(values))
    assert _standard_error(values, order) == pytest.approx(stats.sem(values))
    assert _standard_error(np.repeat(values, 5), np.repeat(order, 5)) == pytest.approx(stats.sem(values))


def test_a_detector_counts_by_its_validation_tracks_alone() -> None:
    watch = sample_watch(separation=1.0)
    chosen = watch.best()
    assert watch.objection(chosen) == ""
    blind = dataclasses.replace(chosen, validation=np.random.default_rng(0).random(400))
    assert "is chance" in watch.objection(blind)
    assert watch.objection(dataclasses.replace(chosen, test=blind.validation)) == ""
    few = np.where(
        watch.validation_wrong, np.arange(400) % 3, 3 + np.arange(400)
    )  # all errors in three tracks
    assert "is chance" in dataclasses.replace(watch, validation_tracks=few).objection(chosen)
    assert dataclasses.replace(watch, test_tracks=few).objection(chosen) == ""


def test_images_at_the_threshold_are_flagged() -> None:
    watch = sample_watch()
    given = np.round(watch.methods[0].test, 2)
    watch = dataclasses.replace(
        watch, methods=(dataclasses.replace(watch.methods[0], validation=given, test=given),)
    )
    threshold = float(np.unique(given)[10])
    found = watch_figures(watch, ServeSection(failure_threshold=threshold)).test
    hits = (watch.test_wrong & (given >= threshold)).sum()
    assert found.flagged == (given >= threshold).sum() > (given > threshold).sum()
    assert found.precision.value == pytest.approx(hits / found.flagged)
    assert found.recall.value == pytest.approx(hits / watch.test_wrong.sum())


def test_scores_are_the_log_odds_of_the_other_classes_the_energy_and_the_log_distance() -> None:
    logits, distance = np.array([[2.0, 0.0, 1.0]]), np.array([3.0])
    doubt = np.log(np.exp(-2 / 4) + np.exp(-1 / 4))
    odds = 1 / special.softmax(logits[0] / 4)[0] - 1  # 1/p - 1 of the answer, at temperature 4
    assert answer_scores("max-softmax", 4.0, logits, distance)[0] == pytest.approx([doubt])
    assert doubt == pytest.approx(np.log(odds))
    assert answer_scores("energy", 1.0, logits)[0] == pytest.approx([-special.logsumexp(logits)])
    found = answer_scores("softmax-and-distance", 4.0, logits, distance)[0]
    assert found == pytest.approx([doubt, np.log(3)])


def test_the_wanted_number_of_errors_is_not_one_more_by_rounding() -> None:
    assert 0.55 * 100 > 55
    wrong = np.ones(100, np.bool_)
    watch = dataclasses.replace(sample_watch(images=100), validation_wrong=wrong)
    chosen = dataclasses.replace(watch.methods[0], validation=np.arange(100) / 100)
    assert watch.threshold(chosen, ServeSection(failure_recall=0.55)) == 0.45


@pytest.mark.parametrize(("recall", "threshold"), [(0.25, 0.9), (0.5, 0.7), (0.6, 0.4), (1.0, 0.1)])
def test_the_threshold_is_the_largest_that_flags_the_wanted_share_of_errors(
    recall: float, threshold: float
) -> None:
    watch = sample_watch(images=6)
    given = np.array([0.4, 0.95, 0.9, 0.1, 0.8, 0.7])
    watch = dataclasses.replace(watch, validation_wrong=np.array([True, False, True, True, False, True]))
    chosen = dataclasses.replace(watch.methods[0], validation=given)
    assert watch.threshold(chosen, ServeSection(failure_recall=recall)) == threshold
