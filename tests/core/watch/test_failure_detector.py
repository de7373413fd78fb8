"""The detector of failing inputs: methods, calibration, choice, and when it says that it cannot tell."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from defuse_core.codec import decode, encode
from defuse_core.config import ServeSection
from defuse_core.intervals import auroc
from defuse_core.report.build_evidence import calibration_error, watch_figures
from defuse_core.watch import METHODS, Answers, FailureWatch, _measure, _problem, answer_scores
from defuse_core.watch.scenario_regions import class_gaussians, mahalanobis
from tests.conftest import tiny

CLASSES = 5
GAUSSIANS = (np.zeros((CLASSES, 3)), np.stack([np.eye(3)] * CLASSES))


def answers(images: int, seed: int, shown: bool = True, distance: float = 0.0) -> Answers:
    """Answers whose labels are drawn from the softmax of the logits, which are shown twice as certain as they are.

    Not `shown`, all logits are equally certain. `distance` is how much farther wrong answers are from their class.
    """
    rng = np.random.default_rng(seed)
    logits = 5 * rng.standard_normal((images, CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    wrong = logits.argmax(axis=1) != labels
    if not shown:
        logits = 8 * np.eye(CLASSES)[logits.argmax(axis=1)] + 0.1 * rng.standard_normal(logits.shape)
    far = np.exp(rng.standard_normal(images) + distance * wrong)
    return Answers(2 * logits, labels, far)


def watch(validation: Answers, test: Answers) -> FailureWatch:
    return _measure(tiny(), validation, test, GAUSSIANS, _problem(validation, test))


@pytest.fixture(scope="module")
def confused() -> FailureWatch:
    """A watch whose logits show where the classifier fails."""
    return watch(answers(3000, 0), answers(3000, 1))


def test_failing_answers_get_higher_probabilities_and_the_probabilities_are_calibrated(confused):
    figures = watch_figures(confused, ServeSection())
    assert figures.method in METHODS and figures.verdict.startswith("Finds failing inputs by")
    for part in (figures.validation, figures.test):
        assert part.auroc.low > 0.8
        assert part.calibration_error < 0.03
        assert part.auroc.low < part.auroc.value < part.auroc.high
    best = confused.best()
    assert best.detector.temperature == pytest.approx(2, rel=0.1)
    given = np.where(confused.validation_wrong, best.validation, 1 - best.validation)
    assert best.losses(confused.validation_wrong) == pytest.approx(-np.log(given))
    assert best.test.mean() == pytest.approx(confused.test_wrong.mean(), abs=0.02)


def test_the_area_is_that_of_scikit_learn(confused):
    best = confused.best()
    found = watch_figures(confused, ServeSection()).test.auroc.value
    assert found == pytest.approx(roc_auc_score(confused.test_wrong, best.test))


def test_the_threshold_flags_the_wanted_share_of_the_wrong_answers_on_validation_images(confused):
    for recall in (0.5, 0.8, 1.0):
        figures = watch_figures(confused, ServeSection(failure_recall=recall))
        flagged = confused.best().validation[confused.validation_wrong] >= figures.threshold
        assert flagged.mean() == pytest.approx(recall, abs=0.01)


@pytest.mark.parametrize(("shift", "found"), [(0.35, False), (0.7, True)])
def test_a_detector_is_none_whose_area_may_be_below_six_tenths(confused, shift, found):
    wrong = np.arange(1000) < 300
    scores = np.random.default_rng(0).normal(shift * wrong)
    some = dataclasses.replace(confused, validation_wrong=wrong, validation_tracks=None)
    low = auroc(scores, wrong)[1]
    assert low > 0.5 and bool(low >= 0.6) is found
    assert (some.objection(dataclasses.replace(confused.best(), validation=scores)) == "") is found


def test_what_the_threshold_was_chosen_to_reach_is_no_measurement_in_figures_and_sentence(confused):
    figures = watch_figures(confused, ServeSection())
    found = figures.validation
    assert (found.recall.value, found.precision.value) == (None, None)
    assert found.flagged > 0
    on_validation, on_test = figures.verdict.split("; on ")[1:]
    assert on_validation.endswith(f"{found.flagged:,} of {found.images:,} are flagged")
    right = round(figures.test.recall.value * figures.test.errors)
    assert f"are flagged, among them {right} of the {figures.test.errors} wrong ones" in on_test
    fixed = watch_figures(confused, ServeSection(failure_threshold=0.5))
    assert fixed.validation.recall.value > 0 and fixed.validation.precision.value > 0
    assert fixed.verdict.count("among them") == 2
    assert fixed.threshold == 0.5 and fixed.test.precision.value > 0.5


def test_the_distance_from_the_class_is_used_only_where_it_adds_something():
    assert watch(answers(3000, 0), answers(500, 1)).best().detector.method == "max-softmax"
    helped = watch(answers(3000, 0, distance=2.0), answers(500, 1))
    assert helped.best().detector.method == "softmax-and-distance"
    assert helped.best(codes=False).detector.method == "max-softmax"


def test_test_images_choose_and_calibrate_nothing():
    validation = answers(2000, 0)
    first, second = watch(validation, answers(500, 1)), watch(validation, answers(300, 2, shown=False))
    assert encode(first.methods[0].detector) == encode(second.methods[0].detector)
    assert first.best().detector.method == second.best().detector.method
    thresholds = [one.threshold(one.best(), ServeSection()) for one in (first, second)]
    assert thresholds[0] == thresholds[1]


def test_validation_images_are_measured_by_detectors_that_were_not_fitted_on_them(confused):
    validation = answers(3000, 0)
    best = confused.best()
    fitted = best.detector.probability(validation.logits, validation.distance)
    assert not np.allclose(best.validation, fitted, atol=1e-9)
    np.testing.assert_allclose(best.validation, fitted, atol=0.05)


def test_equal_answers_give_an_equal_watch_and_it_survives_storage(confused):
    again = watch(answers(3000, 0), answers(3000, 1))
    assert encode(again) == encode(confused)
    assert encode(decode(FailureWatch, encode(confused), "here")) == encode(confused)


def test_a_detector_at_chance_says_so_and_gives_no_threshold():
    blind = watch(answers(1000, 0, shown=False), answers(1000, 1, shown=False))
    figures = watch_figures(blind, ServeSection())
    assert (figures.method, figures.threshold, figures.test.flagged) == (None, None, None)
    assert figures.verdict.startswith("No method finds failing inputs: the AUROC of the best")
    assert figures.test.auroc.low < 0.6 and figures.test.precision.value is None


def of_tracks(wrong_tracks: int, seed: int) -> Answers:
    """Answers on 100 tracks of 20 frames; each track is as certain as it is, and wrong or right, by chance."""
    rng = np.random.default_rng(seed)
    tracks = np.repeat(np.arange(100), 20)
    logits = 0.2 * rng.standard_normal((2000, 3))
    logits[:, 0] = np.repeat(6 + rng.standard_normal(100), 20) + 0.3 * rng.standard_normal(2000)
    labels = np.where(np.repeat(rng.permutation(100) < wrong_tracks, 20), 2, 0)
    distance = np.exp(np.repeat(rng.standard_normal(100), 20))
    return Answers(logits, labels, distance, tracks)


def test_chance_among_the_frames_of_a_few_tracks_is_no_detector():
    few = watch_figures(watch(of_tracks(3, 0), of_tracks(3, 1)), ServeSection())
    assert (
        "60 of 2000 answers on validation images are wrong, in 3 tracks, and at least 10 wrong" in few.verdict
    )
    found = [watch(of_tracks(12, seed), of_tracks(12, seed + 1)) for seed in range(8)]
    assert not any(watch_figures(one, ServeSection()).method for one in found)


def test_intervals_of_what_is_flagged_count_tracks(confused):
    tracks = np.arange(3000) // 100
    grouped = dataclasses.replace(confused, validation_tracks=tracks, test_tracks=tracks)
    settings = ServeSection(failure_threshold=0.5)
    alone, together = watch_figures(confused, settings).test, watch_figures(grouped, settings).test
    for share, wider in ((alone.precision, together.precision), (alone.recall, together.recall)):
        assert share.value == wider.value
        assert wider.high - wider.low > 1.5 * (share.high - share.low)


@pytest.mark.parametrize("test", [answers(3, 1), answers(1, 1)])
def test_a_test_part_whose_answers_are_all_wrong_has_no_area(confused, test):
    wrong = dataclasses.replace(test, labels=(test.logits.argmax(axis=1) + 1) % CLASSES)
    figures = watch_figures(watch(answers(3000, 0), wrong), ServeSection())
    assert figures.test.auroc.value is None
    assert f"; on test images {figures.test.flagged} of {len(test.labels)} are flagged" in figures.verdict


def without(answers: Answers, wrong: int) -> Answers:
    """The answers with only so many wrong ones."""
    rows = np.flatnonzero(answers.wrong)
    return answers.take(np.setdiff1d(np.arange(len(answers.labels)), rows[wrong:]))


def nearly_all_wrong(images: int, right: int) -> Answers:
    """Answers of which so many are right."""
    given = answers(images, 0)
    best = given.logits.argmax(axis=1)
    return dataclasses.replace(given, labels=np.where(np.arange(images) < right, best, (best + 1) % CLASSES))


@pytest.mark.parametrize(
    ("validation", "reason"),
    [
        (answers(0, 0), "has no validation images to calibrate on"),
        (
            without(answers(1000, 0), 4),
            "4 of .* answers on validation images are wrong, and at least 10 wrong",
        ),
        (
            nearly_all_wrong(30, right=9),
            "21 of 30 answers on validation images are wrong, and .* 10 right ones",
        ),
        (
            dataclasses.replace(answers(1000, 0), logits=np.full((1000, CLASSES), np.inf)),
            "outputs are not finite",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_calibrated_gives_a_reason_and_no_number(validation, reason):
    found = watch(validation, answers(100, 1))
    figures = watch_figures(found, ServeSection())
    assert found.best() is None and figures.method is None and figures.threshold is None
    assert re.search(reason, figures.verdict)
    assert figures.methods == ()


def test_scores_stay_finite_for_answers_beyond_all_doubt():
    sure = np.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    for method in METHODS:
        scores = answer_scores(method, 1.0, sure, np.array([0.0, 5.0]))
        assert np.isfinite(scores).all() and (scores[0] < scores[1]).all()


def test_the_calibration_error_is_the_gap_between_probability_and_share():
    rng = np.random.default_rng(0)
    probability = rng.random(20_000)
    wrong = rng.random(20_000) < probability
    assert calibration_error(probability, wrong) < 0.02
    assert calibration_error(np.full(20_000, 0.9), wrong) == pytest.approx(0.4, abs=0.02)


def test_codes_of_a_class_are_nearest_to_it_and_a_class_without_images_has_a_region():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=600)
    codes = (4 * np.eye(3)[labels] + rng.standard_normal((600, 3))).astype(np.float32)
    means, covariances = class_gaussians(codes, labels, 4)
    distances = mahalanobis(codes, means, covariances)
    assert np.isfinite(distances).all() and distances.shape == (600, 4)
    assert (distances[:, :3].argmin(axis=1) == labels).mean() > 0.95
    np.testing.assert_allclose(covariances[0], np.eye(3), atol=0.25)
