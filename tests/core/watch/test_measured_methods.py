"""Which images each figure of the watch is of, and by how many: on given probabilities, and on a small classifier."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from sample_findings import sample_watch
from sklearn.metrics import average_precision_score, roc_auc_score
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import Corrections
from defuse_core.codec import encode
from defuse_core.config import ServeSection
from defuse_core.data import Images, open_splits
from defuse_core.models import load_classifier, load_vae, predict, weights_of
from defuse_core.protocols import silent
from defuse_core.report.build_evidence import calibration_error, watch_figures
from defuse_core.training.train_vae import initial_vae
from defuse_core.watch import (
    METHODS,
    Answers,
    FailureWatch,
    _answers,
    _drawn,
    _measure,
    _missing_classes,
    _problem,
    answer_scores,
    fit_temperature,
    measure_detector,
    scenario_regions,
    watch_classifier,
    watch_run,
)
from defuse_core.watch.scenario_regions import class_gaussians, fit_regions, training_codes
from tests.conftest import tiny


@pytest.fixture
def unlike() -> FailureWatch:
    """A watch with other probabilities and answers on test images than on validation images; the methods are a simple
    one and a better one that uses codes."""
    validation = sample_watch(separation=1.0)
    rng = np.random.default_rng(1)
    wrong = rng.random(300) < 0.2
    given = 1 / (1 + np.exp(1 - 2.0 * wrong - rng.standard_normal(300)))
    simple = dataclasses.replace(validation.methods[0], test=given)
    better = dataclasses.replace(
        simple,
        detector=dataclasses.replace(simple.detector, method=METHODS[2]),
        validation=np.where(validation.validation_wrong, 0.9, simple.validation / 2),
    )
    return dataclasses.replace(validation, methods=(simple, better), test_wrong=wrong)


def test_figures_of_all_methods_are_those_of_their_own_images(unlike):
    figures = watch_figures(unlike, ServeSection())
    for row, one in zip(figures.methods, unlike.methods, strict=True):
        assert row.method == one.detector.method
        right = np.where(unlike.validation_wrong, one.validation, 1 - one.validation)
        assert row.log_loss == pytest.approx(-np.log(right).mean())
        assert row.validation.value == pytest.approx(roc_auc_score(unlike.validation_wrong, one.validation))
        assert row.test.value == pytest.approx(roc_auc_score(unlike.test_wrong, one.test))


def test_without_codes_the_figures_are_those_of_a_method_that_needs_none(unlike):
    on, off = (watch_figures(unlike, ServeSection(watch=codes)) for codes in (True, False))
    assert (on.method, off.method) == (METHODS[2], METHODS[0])
    for part, wrong, probability in (
        (off.validation, unlike.validation_wrong, unlike.methods[0].validation),
        (off.test, unlike.test_wrong, unlike.methods[0].test),
    ):
        assert (part.images, part.errors) == (len(wrong), wrong.sum())
        assert part.average_precision == pytest.approx(average_precision_score(wrong, probability))
        assert part.auroc.value == pytest.approx(roc_auc_score(wrong, probability))
        assert part.flagged == (probability >= off.threshold).sum()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_intervals_of_a_part_are_wider_where_its_images_are_of_few_tracks(unlike, part):
    tracks = np.arange(len(getattr(unlike, f"{part}_wrong"))) // 5
    grouped = dataclasses.replace(unlike, **{f"{part}_tracks": tracks})
    alone, together = (watch_figures(one, ServeSection(failure_threshold=0.5)) for one in (unlike, grouped))
    for other in ("validation", "test"):
        shares = [
            [
                *(getattr(row, other) for row in found.methods),
                getattr(found, other).precision,
                getattr(found, other).auroc,
            ]
            for found in (alone, together)
        ]
        for before, after in zip(*shares, strict=True):
            assert before.value == after.value
            if other == part:
                assert after.high - after.low > before.high - before.low
            else:
                assert before == after


def test_a_part_without_a_wrong_answer_has_no_average_precision(unlike):
    right = dataclasses.replace(unlike, test_wrong=np.zeros(300, np.bool_))
    found = watch_figures(right, ServeSection()).test
    assert (found.errors, found.average_precision, found.recall.value) == (0, None, None)


@pytest.mark.parametrize(
    ("images", "errors", "bins"),
    [(100, 20, 2), (100, 80, 2), (1000, 149, 14), (1300, 5, 2), (10_000, 92, 15)],
)
def test_the_calibration_error_is_the_mean_gap_of_as_many_bins_as_answers_fill(images, errors, bins):
    probability = np.minimum(np.linspace(0, 2, images) * errors / images, 1)
    wrong = np.random.default_rng(0).permutation(images) < errors
    parts = zip(np.array_split(probability, bins), np.array_split(wrong, bins), strict=True)
    gaps = [len(given) * abs(given.mean() - answers.mean()) for given, answers in parts]
    assert calibration_error(probability, wrong) == pytest.approx(sum(gaps) / images)


@pytest.mark.parametrize(("images", "errors"), [(3, 0), (100, 19), (100, 81), (1199, 9)])
def test_answers_that_fill_no_two_bins_have_no_calibration_error(images, errors):
    reversed_one = (np.arange(images) >= images - errors).astype(
        np.float64
    )  # sure, and wrong, of as many answers
    assert calibration_error(reversed_one, np.arange(images) < errors) is None


def test_the_calibration_error_of_few_images_is_not_their_chance():
    rng = np.random.default_rng(0)
    given = rng.beta(1, 4, (100, 150))
    found = [calibration_error(row, rng.random(150) < row) for row in given]
    known = [error for error in found if error is not None]
    assert len(known) > 90 and np.mean(known) < 0.06
    # probabilities that say the same of each image are as right on average, and seen to be worse than these
    flat = [calibration_error(row, rng.random(150) < row.mean()) for row in given]
    assert np.mean([error for error in flat if error is not None]) > np.mean(known) + 0.05


def test_the_temperature_is_that_of_the_logits_however_far_from_one():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4000, 4))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    for temperature in (0.003, 0.1, 12.0, 300.0):
        assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.1)


def made_answers(images: int, seed: int, tracks: bool = False, classes: int = 3) -> Answers:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((images, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    of_track = np.arange(images) // 4 if tracks else None
    return Answers(logits, labels, np.exp(rng.standard_normal(images)), of_track)


def test_answers_of_equal_doubt_get_the_share_of_wrong_ones():
    given = dataclasses.replace(
        made_answers(200, 0), logits=np.tile([2.0, 0.0, 0.0], (200, 1)), distance=np.ones(200)
    )
    for method in METHODS:
        found = measure_detector(method, given, given, 0)
        np.testing.assert_allclose(found.test, given.wrong.mean(), atol=0.01)


def test_folds_follow_from_the_seed_alone():
    validation, test = made_answers(200, 0), made_answers(20, 1)
    first, again, other = (measure_detector(METHODS[0], validation, test, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.validation, again.validation)
    assert not np.array_equal(first.validation, other.validation)
    np.testing.assert_array_equal(first.test, other.test)


@pytest.mark.parametrize("method", METHODS)
def test_of_many_answers_few_are_in_memory_at_once_and_scores_are_the_same(method, monkeypatch):
    given = made_answers(8000, 0, classes=50)
    whole = answer_scores(method, 1.5, given.logits, given.distance)
    at_once = measure_detector(method, given, given, 0)
    monkeypatch.setattr("defuse_core.watch.MOST_AT_ONCE", 400)
    np.testing.assert_array_equal(answer_scores(method, 1.5, given.logits, given.distance), whole)
    tracemalloc.start()
    try:
        in_parts = measure_detector(method, given, given, 0)
        assert tracemalloc.get_traced_memory()[1] < 0.8 * given.logits.nbytes
    finally:
        tracemalloc.stop()
    assert in_parts.detector.temperature == pytest.approx(at_once.detector.temperature, rel=0.1)


def test_test_outputs_that_are_not_finite_and_right_answers_of_few_tracks_are_a_problem():
    validation, test = made_answers(200, 0, tracks=True), made_answers(20, 1)
    assert _problem(validation, test) == ""
    broken = dataclasses.replace(test, logits=np.where(np.arange(20)[:, None] == 7, np.nan, test.logits))
    assert "not finite" in _problem(validation, broken)
    few = np.where(validation.wrong, 100 + np.arange(200), np.arange(200) % 9)
    assert f"in {validation.wrong.sum()} tracks, and at least 10 wrong and 10 right ones of" in _problem(
        dataclasses.replace(validation, tracks=few), test
    )
    enough = np.where(validation.wrong, 100 + np.arange(200), np.arange(200) % 10)
    assert _problem(dataclasses.replace(validation, tracks=enough), test) == ""


def test_ten_wrong_answers_are_enough():
    given = made_answers(200, 0)
    wrong, right = np.flatnonzero(given.wrong), np.flatnonzero(~given.wrong)
    nine, ten = (_problem(given.take(np.concatenate([wrong[:count], right])), given) for count in (9, 10))
    assert "9 of" in nine and ten == ""


def test_answers_that_are_taken_keep_all_that_is_theirs():
    given, rows = made_answers(12, 0, tracks=True), np.array([7, 0, 3])
    taken = given.take(rows)
    for name, array in vars(given).items():
        np.testing.assert_array_equal(getattr(taken, name), array[rows])
    assert dataclasses.replace(given, tracks=None).take(rows).tracks is None


def test_each_part_of_a_watch_is_of_its_own_images():
    validation, test = made_answers(200, 0, tracks=True), made_answers(120, 1, tracks=True)
    gaussians = np.zeros((3, 2)), np.stack([np.eye(2)] * 3)
    found = _measure(tiny(), validation, test, gaussians, "")
    for part, given in (("validation", validation), ("test", test)):
        for name in ("wrong", "tracks"):
            np.testing.assert_array_equal(getattr(found, f"{part}_{name}"), getattr(given, name))
    assert found.means is gaussians[0] and found.covariances is gaussians[1]


def test_a_watch_measures_the_given_weights_on_validation_and_on_test_images(tiny_spec, tiny_models):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    other = {name: -array for name, array in tiny_models.classifier.items()}
    for corrected, weights in ((other, other), ({}, tiny_models.classifier)):
        found = watch_classifier(tiny_spec, tiny_models, corrected, splits)
        same = watch_run(tiny_spec, tiny_models, corrected, progress=silent)
        assert encode(same) == encode(found)
        classifier = load_classifier(tiny_spec, weights, 10)
        for wrong, images in (
            (found.validation_wrong, splits.validation),
            (found.test_wrong, splits.test),
        ):
            np.testing.assert_array_equal(wrong, predict(classifier, images) != images.labels)


def test_a_watch_needs_validation_images_and_no_test_images(tiny_spec, tiny_models):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    whole, untested, unknown = (
        watch_classifier(tiny_spec, tiny_models, {}, dataclasses.replace(splits, **parts))
        for parts in ({}, {"test": None}, {"validation": None})
    )
    assert [len(one.test) for one in untested.methods] == [0, 0, 0] and not len(untested.test_wrong)
    for one, same in zip(whole.methods, untested.methods, strict=True):
        np.testing.assert_array_equal(one.validation, same.validation)
    assert not unknown.methods and "no validation images to calibrate on" in unknown.problem
    np.testing.assert_array_equal(unknown.test_wrong, whole.test_wrong)


def test_the_number_of_cores_changes_no_watch(tiny_models):
    spec = tiny(vae={"latent_dim": 160})
    splits = open_splits(spec.data, spec.seed)
    models = dataclasses.replace(tiny_models, vae=weights_of(initial_vae(spec, splits.train)))
    found = []
    for cores in (1, 2):
        with threadpool_limits(cores):
            found.append(encode(watch_classifier(spec, models, {}, splits)))
    assert found[0] == found[1]


def test_nothing_is_calibrated_on_validation_images_that_the_classifier_has_probably_seen(
    tiny_spec, tiny_models
):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    assert watch_classifier(tiny_spec, tiny_models, {}, splits).methods
    seen = dataclasses.replace(tiny_models, validation_from_training=True)
    figures = watch_figures(watch_classifier(tiny_spec, seen, {}, splits), ServeSection())
    assert (figures.method, figures.threshold) == (None, None)
    assert "a share of the training images, which the classifier has probably seen" in figures.verdict


def test_nothing_is_calibrated_where_no_validation_image_is_of_a_class(tiny_spec, tiny_models):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    others = splits.validation.take(np.flatnonzero(splits.validation.labels != 3))
    splits = dataclasses.replace(splits, validation=others)
    figures = watch_figures(watch_classifier(tiny_spec, tiny_models, {}, splits), ServeSection())
    assert (figures.method, figures.threshold) == (None, None)
    assert figures.verdict.endswith(
        "there is no validation image of 3, so nothing can be calibrated for it; add some."
    )


def test_a_class_whose_validation_images_are_not_drawn_does_not_lack_them(
    tiny_spec, tiny_models, monkeypatch
):
    monkeypatch.setattr("defuse_core.watch.MOST_IMAGES", 150)
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    labels = np.where(splits.validation.labels == 3, 4, splits.validation.labels)
    rows = np.arange(len(labels))
    drawn = _drawn(dataclasses.replace(splits.validation, labels=rows), tiny_spec.seed).labels
    labels[np.setdiff1d(rows, drawn)[0]] = 3
    splits = dataclasses.replace(splits, validation=dataclasses.replace(splits.validation, labels=labels))
    assert watch_classifier(tiny_spec, tiny_models, {}, splits).methods


@pytest.mark.parametrize(
    ("classes", "missing", "told"),
    [
        (2, [1], "class 1, so nothing can be calibrated for it"),
        (20, [0, 7], "class 0, class 7, so nothing can be calibrated for them"),
        (21, [7], None),
        (40, [0, 7], "class 0, class 7, "),
        (5, range(5), None),
    ],
)
def test_few_of_many_classes_may_lack_validation_images(classes, missing, told):
    train, names = np.arange(2 * classes) % classes, [f"class {number}" for number in range(classes + 3)]
    found = _missing_classes(np.setdiff1d(train, list(missing)), train, names)
    assert (told in found) if told else found == ""


def test_images_are_answered_batch_by_batch_and_keep_their_tracks(tiny_spec, tiny_models, monkeypatch):
    train = open_splits(tiny_spec.data, tiny_spec.seed).train.take(slice(0, 23))
    tracked = Images(train.pixels, train.labels, np.arange(23) // 2)
    vae, classifier = (
        load_vae(tiny_spec, tiny_models.vae),
        load_classifier(tiny_spec, tiny_models.classifier, 10),
    )
    codes, labels = training_codes(tiny_spec, vae, train)
    given = (classifier, vae, tracked, class_gaussians(codes, labels, 10))
    whole = _answers(*given)
    monkeypatch.setattr("defuse_core.watch.BATCH", 7)
    batched = _answers(*given)
    assert len(whole.logits) == 23
    for name, array in vars(whole).items():
        np.testing.assert_allclose(getattr(batched, name), array, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(batched.tracks, tracked.tracks)
    mislabelled = dataclasses.replace(tracked, labels=(tracked.labels + 1) % 10)  # which no score may know
    np.testing.assert_array_equal(_answers(classifier, vae, mislabelled, given[3]).distance, batched.distance)


def test_the_watch_reads_as_many_training_images_as_it_may(tiny_spec, tiny_models, monkeypatch):
    monkeypatch.setattr("defuse_core.watch.scenario_regions.WATCH_IMAGES", 100)
    train = open_splits(tiny_spec.data, tiny_spec.seed).train
    codes, labels = training_codes(tiny_spec, load_vae(tiny_spec, tiny_models.vae), train)
    assert len(codes) == len(labels) == 100 < len(train)
    assert not np.array_equal(labels, train.labels[:100])
    again, _ = training_codes(tiny_spec, load_vae(tiny_spec, tiny_models.vae), train)
    seed = tiny_spec.model_copy(update={"seed": 1})
    other, _ = training_codes(seed, load_vae(tiny_spec, tiny_models.vae), train)
    assert np.array_equal(again, codes) and not np.array_equal(other, codes)


def test_the_watch_is_measured_on_as_many_validation_and_test_images_as_it_may(
    tiny_spec, tiny_models, monkeypatch
):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    whole = watch_classifier(tiny_spec, tiny_models, {}, splits)
    monkeypatch.setattr("defuse_core.watch.MOST_IMAGES", 150)
    found, again = (watch_classifier(tiny_spec, tiny_models, {}, splits) for _ in range(2))
    assert len(found.validation_wrong) == len(found.test_wrong) == 150
    assert min(len(whole.validation_wrong), len(whole.test_wrong)) > 150
    assert encode(found) == encode(again)


class DecodesNothing:
    """A decoder whose images are the codes, and which keeps what it was asked for."""

    vae = None

    def __init__(self) -> None:
        self.asked = list[tuple[float, list[int]]]()

    def decode(self, codes, anchors):
        self.asked.append((float(codes[0, 0]), anchors.tolist()))
        return codes


def test_a_region_is_fitted_on_tuning_images_and_measured_on_held_out_ones_each_at_its_own_anchors(
    monkeypatch,
):
    decoder, rng = DecodesNothing(), np.random.default_rng(0)
    monkeypatch.setattr(scenario_regions, "Decoder", lambda *args: decoder)
    monkeypatch.setattr(scenario_regions, "encode_images", lambda vae, images: images)
    tune = (rng.standard_normal((2, 40, 2)) + np.array([[[20, 0]], [[0, 30]]])).astype(np.float32)
    test = tune.copy()
    test[0, :30] += 1000  # three quarters of the first scenario's held-out images are elsewhere
    anchors = rng.integers(9, size=(2, 2, 40))
    fixes = dataclasses.replace(
        Corrections(np.arange(2), np.arange(2), tune, test),
        tune_anchor=anchors[0],
        test_anchor=anchors[1],
    )
    found = fit_regions(None, fixes, rng.standard_normal((500, 2)).astype(np.float32))
    np.testing.assert_allclose(found.means, tune.mean(axis=1), rtol=1e-5)
    assert found.recall[0, -1] == 0.25 and found.recall[1, -1] == 1
    assert decoder.asked == [
        (float(codes[row, 0, 0]), anchors[part, row].tolist())
        for part, codes in enumerate((tune, test))
        for row in range(2)
    ]
