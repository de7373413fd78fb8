"""Every figure of the judges against a count image by image, for classifiers whose answers are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Corrections, Sweep, SweepRow
from defuse_core.config import RunFile
from defuse_core.data import open_splits
from defuse_core.data.splits import random_rows
from defuse_core.distill.draws import draw_codes
from defuse_core.evaluation import Findings
from defuse_core.evaluation.controls import Controls
from defuse_core.evaluation.describe import find_nearest_real
from defuse_core.evaluation.evidence import FRESH_IMAGES, Evidence, _Judging, gather_evidence
from defuse_core.identify import draw_noise, encode_posterior
from defuse_core.models import Decoder, StoredVae, decode_codes, load_classifier, load_vae, predict
from defuse_core.protocols import silent
from defuse_core.seeds import generator
from defuse_core.training.reference_models import load_reference_models, model_probabilities
from defuse_core.tuning_data import held_out_images
from tests.conftest import recommended
from tests.own_classifiers import Standardising
from tests.sample_findings import sample_findings

NOTHING_CHOSEN = Sweep((), None, {}, ())

SCENARIOS, IMAGES = 3, 20


class Setting:
    """Findings with three scenarios, and classifiers that answer the class after that of the classifier before."""

    def __init__(self, models, references) -> None:
        self.spec: RunFile = recommended(
            judges={"architecture": "cnn", "count": 3}, review={"tau": 0.5}, identify={"min_probability": 0.3}
        )
        self.models, self.references = models, references
        sample, _ = sample_findings(SCENARIOS, SCENARIOS, images=5, side=16)
        codes = generator(0, "test").normal(scale=1.5, size=(SCENARIOS, IMAGES, 4)).astype(np.float32)
        numbers = np.arange(SCENARIOS)
        scenarios = dataclasses.replace(
            sample.scenarios,
            means=codes.mean(axis=1).astype(np.float64),
            covariances=np.stack([np.eye(4)] * SCENARIOS),
        )
        self.vae = load_vae(self.spec, models.vae)
        images = held_out_images(
            StoredVae(self.spec, models.vae), Corrections(numbers, numbers, codes, codes)
        )
        self.images = images.batch()
        self.own = self.majority(self.images)
        labels = [np.bincount(row[row >= 0]).argmax() for row in self.own.reshape(SCENARIOS, IMAGES)]
        self.labels = np.array(labels, np.int64)
        self.found: Findings = dataclasses.replace(
            sample,
            models=models,
            scenarios=scenarios,
            fixes=Corrections(numbers, self.labels, codes, codes),
            baseline=self.shifted(1),
            sweep=self.shifted(0),
            references=references,
            judges=references,
        )

    def shifted(self, by: int) -> Sweep:
        """Return a sweep whose classifier answers `by` classes on."""
        last = sorted(name for name in self.models.classifier if name.endswith(".bias"))[-1]
        names = (last, last.replace("bias", "weight"))
        weights = {
            name: np.roll(array, by, axis=0) if name in names else array
            for name, array in self.models.classifier.items()
        }
        return Sweep((), SweepRow(1.0, 1, 0.0), weights, ())

    def answers(self, sweep: Sweep, images) -> np.ndarray:
        return predict(load_classifier(self.spec, sweep.weights, 10), images)

    def majority(self, images) -> np.ndarray:
        judges = load_reference_models(self.spec, self.spec.judges, self.references, 10)
        votes = model_probabilities(judges, images).argmax(axis=2)
        labels = []
        for of_image in votes.T.tolist():
            most = max(of_image.count(answer) for answer in of_image)
            first = {answer for answer in of_image if of_image.count(answer) == most}
            labels.append(first.pop() if len(first) == 1 else NONE_OF_THE_ABOVE)
        return np.array(labels)

    def by_scenario(self, sweep: Sweep, labels: np.ndarray) -> np.ndarray:
        """Return the accuracy on the held-out images that have a label, scenario by scenario."""
        right, known = self.answers(sweep, self.images) == labels, labels >= 0
        rows = [slice(n * IMAGES, (n + 1) * IMAGES) for n in range(SCENARIOS)]
        return np.array([right[part][known[part]].mean() for part in rows])


@pytest.fixture(scope="module")
def setting(tiny_models, references) -> Setting:
    return Setting(tiny_models, references)


@pytest.fixture(scope="module")
def evidence(setting) -> Evidence:
    controls = Controls(
        (setting.shifted(2), setting.shifted(0), setting.shifted(1)), (setting.shifted(1), setting.shifted(0))
    )
    return gather_evidence(setting.spec, setting.found, controls, progress=silent)


def test_accuracies_are_means_over_scenarios_by_the_judges_labels_and_by_the_scenarios(setting, evidence):
    known = setting.own >= 0
    assert 0 < known.sum() < len(known) and evidence.labelled == pytest.approx(known.mean())
    shows = (setting.own == np.repeat(setting.labels, IMAGES)).reshape(SCENARIOS, IMAGES).mean(axis=1)
    np.testing.assert_allclose(evidence.scenario_purity, shows)
    assert evidence.purity[0] == pytest.approx(shows.mean())
    one_labels = np.repeat(setting.labels, IMAGES)
    for table, labels in ((evidence.own_label, setting.own), (evidence.one_label, one_labels)):
        by_shift = {by: setting.by_scenario(setting.shifted(by), labels) for by in (0, 1, 2)}
        plain = np.mean([by_shift[by] for by in (2, 0, 1)], axis=0)
        expected = np.stack([by_shift[0], by_shift[1], plain, by_shift[0]])  # before, baseline, plain, defuse
        np.testing.assert_allclose(table[:, 0], expected.mean(axis=1))
        if labels is setting.own:
            np.testing.assert_allclose(evidence.scenario_own_label, expected.T)
            np.testing.assert_allclose(evidence.scenario_plain, [by_shift[by] for by in (2, 0, 1)])
    assert evidence.own_label[0, 0] > evidence.own_label[2, 0] > evidence.own_label[1, 0]
    np.testing.assert_array_equal(evidence.judges, setting.references.test)


def test_left_out_scenarios_are_judged_after_the_correction_without_their_fold(setting, evidence):
    own = {by: setting.by_scenario(setting.shifted(by), setting.own) for by in (0, 1, 2)}
    left_out = np.array([own[1][0], own[0][1], own[1][2]])  # the scenarios 0 and 2 are the first fold
    np.testing.assert_allclose(evidence.scenario_left_out, left_out)
    plain = np.mean([own[by] for by in (2, 0, 1)])
    np.testing.assert_allclose(evidence.left_out[:, 0], [own[0].mean(), left_out.mean(), plain])
    np.testing.assert_allclose(evidence.plain_each[2], [own[by].mean() for by in (2, 0, 1)])
    alone = gather_evidence(setting.spec, setting.found, Controls((setting.shifted(2),), ()), progress=silent)
    assert np.isnan(alone.left_out).all() and np.isnan(alone.scenario_left_out).all()
    assert np.isnan(alone.plain_each[2]).all() and np.isfinite(alone.plain_each[0]).all()


def test_a_plain_training_that_failed_for_good_is_not_compared_with_if_there_are_others(setting, evidence):
    plain = (setting.shifted(2), NOTHING_CHOSEN, setting.shifted(1))
    made = gather_evidence(setting.spec, setting.found, Controls(plain, ()), progress=silent)
    np.testing.assert_array_equal(made.pairs, evidence.pairs[[0, 2]])
    np.testing.assert_array_equal(made.scenario_plain, evidence.scenario_plain[[0, 2]])
    assert made.plain_clean.shape == (2, 2)


def test_wider_draws_and_pairs_tell_the_correction_from_plain_training(setting, evidence):
    controls = Controls((setting.shifted(1), setting.shifted(1)), ())
    made = gather_evidence(setting.spec, setting.found, controls, progress=silent)
    before, defuse, plain = made.wider[:, :, 0].T
    np.testing.assert_array_equal(before, defuse)
    assert (before > plain).all() and before[0] != before[1]
    right = [setting.answers(setting.shifted(by), setting.images) == setting.own for by in (0, 1)]
    known = setting.own >= 0
    for row in range(SCENARIOS):
        part = np.arange(len(known)) // IMAGES == row
        better, worse = ((one & ~other & known & part).sum() for one, other in (right, right[::-1]))
        assert made.pairs[0, row].tolist() == [(known & part).sum(), better, worse]
        assert made.units[row] == (known & part).sum()
    assert made.confirmed.any() and not made.worse.any()


def test_real_failures_are_the_first_failing_draws_in_which_the_judges_see_the_class(setting, evidence):
    spec, rng = setting.spec, generator(setting.spec.seed, "evidence", "fresh")
    test = open_splits(spec.data, spec.seed).test
    test = test.take(random_rows(len(test), FRESH_IMAGES, rng))
    mu, sigma = encode_posterior(setting.vae, test, spec.identify.batch_size)
    codes = mu[:, None] + draw_noise(spec.identify, sigma, rng)  # (n, Q, Z)
    shape = codes.shape[:2]
    decoded = decode_codes(setting.vae, codes.reshape(-1, 4))
    failing = setting.answers(setting.shifted(0), decoded).reshape(shape) != test.labels[:, None]
    real = failing & (setting.majority(decoded).reshape(shape) == test.labels[:, None])
    images = np.flatnonzero(real.any(axis=1))
    assert evidence.real_failure_images == len(images) > 10
    assert real[images].sum() > len(images)  # of several draws of one image the first alone counts
    shown = decoded.reshape(*shape, *decoded.shape[1:])[images, real[images].argmax(axis=1)]
    truth = test.labels[images]
    right = {by: (setting.answers(setting.shifted(by), shown) == truth).mean() for by in (0, 1, 2)}
    plain = [right[by] for by in (2, 0, 1)]
    np.testing.assert_allclose(evidence.real_failures[:, 0], [0, right[1], np.mean(plain), 0])
    np.testing.assert_allclose(evidence.plain_each[3], plain)
    assert evidence.real_failure_pairs[2].tolist() == [len(images), 0, round(right[1] * len(images))]
    found = dataclasses.replace(
        setting.found, sweep=setting.shifted(1)
    )  # the classifier before is what fails
    other = gather_evidence(spec, found, Controls((setting.shifted(0),) * 2, ()), progress=silent)
    np.testing.assert_allclose(other.real_failures[:, 0], [0, right[1], 0, right[1]])
    assert other.worse.any() and not other.confirmed.any()
    assert other.worse_than_before.any() and not evidence.worse_than_before.any()
    references = load_reference_models(spec, spec.review.reference, setting.references, 10)
    seen = model_probabilities(references, shown).mean(axis=0)
    sure = seen[np.arange(len(truth)), truth] >= spec.identify.min_probability
    assert evidence.screen_recall[0] == pytest.approx((sure & (seen.argmax(axis=1) == truth)).mean())


def test_what_became_right_and_wrong_on_the_test_set_is_counted_for_the_first_plain_training(
    setting, evidence
):
    test = open_splits(setting.spec.data, setting.spec.seed).test
    before, after = (setting.answers(setting.shifted(by), test) == test.labels for by in (0, 2))
    changed = [(after & ~before).sum(), (before & ~after).sum()]
    assert evidence.test_pairs_with_before.tolist() == [[len(test), *changed], [len(test), 0, 0]]


def test_on_test_images_the_correction_is_compared_with_each_plain_training(setting, evidence):
    test = open_splits(setting.spec.data, setting.spec.seed).test
    right = {by: setting.answers(setting.shifted(by), test) == test.labels for by in (0, 1, 2)}
    pairs = [[len(test), (right[0] & ~right[by]).sum(), (right[by] & ~right[0]).sum()] for by in (2, 0, 1)]
    assert evidence.test_pairs.tolist() == pairs and pairs[1][1:] == [0, 0]
    draws, _, better_plain = evidence.real_failure_pairs[
        2
    ]  # of the plain training that answers as the baseline
    assert evidence.real_failure_pairs_with_baseline.tolist() == [draws, 0, better_plain]
    assert np.isnan(evidence.plain_clean).all()  # these have no row
    rows = [SweepRow(0.0, 1, 0.1, 0.9, share, share + 0.01, 0.9, 0.9) for share in (0.8, 0.9)]
    plain = tuple(dataclasses.replace(setting.shifted(1), chosen=row) for row in rows)
    made = gather_evidence(setting.spec, setting.found, Controls(plain, ()), progress=silent)
    np.testing.assert_allclose(made.plain_clean, [[0.8, 0.9], [0.81, 0.91]])


def test_validation_images_that_the_classifier_may_know_compare_nothing(setting, evidence):
    accuracy, splits = setting.models.accuracy, open_splits(setting.spec.data, setting.spec.seed)
    assert not setting.models.validation_from_training and evidence.before_test == accuracy["test"]
    untested = {part: share for part, share in accuracy.items() if part != "test"}
    models = dataclasses.replace(setting.models, accuracy=untested, validation_from_training=True)
    found = dataclasses.replace(setting.found, models=models)
    made = gather_evidence(setting.spec, found, Controls((setting.shifted(1),), ()), progress=silent)
    assert np.isnan(made.before_test)
    known = dataclasses.replace(found, models=dataclasses.replace(models, accuracy=accuracy))
    tested = gather_evidence(setting.spec, known, Controls((setting.shifted(1),), ()), progress=silent).real
    assert (tested.testable & ~tested.seen).any()
    np.testing.assert_array_equal(made.real.testable, tested.testable & tested.seen)  # few errors say nothing
    for each, images in ((evidence, splits.validation), (made, splits.test)):  # what it has not seen
        wrong = (setting.answers(setting.shifted(0), images) != images.labels).mean()
        assert each.real.error_of_all == pytest.approx(wrong)


def test_without_test_images_judges_are_measured_on_validation_images_and_no_failing_draw_is_made(setting):
    splits = dataclasses.replace(open_splits(setting.spec.data, setting.spec.seed), test=None)
    controls = Controls((setting.shifted(2),), ())
    made = _Judging(setting.spec, setting.found, controls, splits, silent).gather()
    measured = setting.references
    np.testing.assert_array_equal(made.judges, measured.validation)
    np.testing.assert_array_equal(made.judges_by_class, measured.class_accuracy["validation"])
    assert not np.array_equal(measured.validation, measured.test)
    assert made.real_failure_images == 0 and np.isnan(made.real_failures).all()
    assert not made.real_failure_pairs.any() and not made.test_pairs.any()
    assert np.isnan(made.screen_recall).all()


def test_real_images_are_those_that_the_classifier_has_not_seen_where_there_are_any(setting):
    splits = open_splits(setting.spec.data, setting.spec.seed)
    untested = dataclasses.replace(splits, test=None)
    unseen = ((splits, splits.validation), (dataclasses.replace(splits, validation=None), splits.test))
    seen = (dataclasses.replace(untested, validation=None), splits.train)
    for parts, expected in (*unseen, (untested, splits.validation), seen):
        judging = _Judging(setting.spec, setting.found, Controls((), ()), parts, silent)
        assert judging._real_images() is expected
    judging.found = dataclasses.replace(
        setting.found, models=dataclasses.replace(setting.models, validation_from_training=True)
    )
    for parts, expected in ((splits, splits.test), (untested, splits.validation)):
        judging.splits = parts
        assert judging._real_images() is expected


def test_test_images_and_failing_draws_of_one_track_are_one_unit(setting, evidence):
    splits = open_splits(setting.spec.data, setting.spec.seed)
    in_tracks = dataclasses.replace(splits.test, tracks=np.arange(len(splits.test)) % 10)
    controls = Controls((setting.shifted(2),), ())
    given = setting.spec, setting.found, controls, dataclasses.replace(splits, test=in_tracks), silent
    made = _Judging(*given).gather()
    assert made.test_pairs[0, 0] == 10 and made.real_failure_pairs[0, 0] <= 10
    assert made.real_failure_images == evidence.real_failure_images > 10
    assert made.real_failures[1, 0] == pytest.approx(evidence.real_failures[1, 0])
    assert np.ptp(made.real_failures[1, 1:]) > np.ptp(evidence.real_failures[1, 1:])


def test_a_judge_that_returns_nan_gives_no_vote(setting):
    splits = open_splits(setting.spec.data, setting.spec.seed)
    judging = _Judging(setting.spec, setting.found, Controls((setting.shifted(2),), ()), splits, silent)
    judging.judges = [Standardising()] * 3
    images = np.stack([np.zeros((1, 16, 16)), np.linspace(0, 1, 256).reshape(1, 16, 16)]).astype(np.float32)
    assert judging.labels(images).tolist() == [NONE_OF_THE_ABOVE, 2]


def test_draws_are_of_the_seed_and_wider_ones_of_each_scenario_its_own(setting, monkeypatch):
    drawn, failing = [], []

    def noting(spec, scenarios, number, count, rng, *, factor, **options):
        found = draw_codes(spec, scenarios, number, count, rng, factor=factor, **options)
        moved = (found.codes - scenarios.means[number]) / np.sqrt(factor)
        drawn.append(tuple(moved[0].round(2).tolist()))
        return found

    monkeypatch.setattr("defuse_core.evaluation.evidence.draw_codes", noting)
    splits, controls = open_splits(setting.spec.data, setting.spec.seed), Controls((setting.shifted(2),), ())
    for seed in (0, 1):
        spec = setting.spec.model_copy(update={"seed": seed})
        judging = _Judging(spec, setting.found, controls, splits, silent)
        judging._wider()
        failing.append(judging._failing_draws()[0])
    assert len(set(drawn)) == 2 * SCENARIOS  # the same at both factors
    assert not np.array_equal(*failing)


def test_with_anchored_decoding_each_failing_draw_is_decoded_at_its_own_image(setting):
    spec = setting.spec.with_fields("vae", decode="anchored").with_fields("identify", scale=3.0)
    splits, rng = open_splits(spec.data, spec.seed), generator(spec.seed, "evidence", "fresh")
    judging = _Judging(spec, setting.found, Controls((setting.shifted(2),), ()), splits, silent)
    test = splits.test.take(random_rows(len(splits.test), FRESH_IMAGES, rng))
    mu, sigma = encode_posterior(setting.vae, test, spec.identify.batch_size)
    codes = mu[:, None] + draw_noise(spec.identify, sigma, rng)  # (n, Q, Z)
    shape = codes.shape[:2]
    shown = Decoder(setting.vae, test).decode(codes.reshape(-1, 4), np.repeat(np.arange(shape[0]), shape[1]))
    answers, seen = setting.answers(setting.shifted(0), shown), setting.majority(shown)
    truth = np.repeat(test.labels, shape[1])
    real = ((answers != truth) & (seen == truth)).reshape(shape)
    rows = np.flatnonzero(real.any(axis=1))
    draw = real[rows].argmax(axis=1)
    expected = shown.reshape(*shape, -1)[rows, draw]
    found, _, units = judging._failing_draws()
    assert len(found) == len(rows) and draw.max() > 0
    order = np.argsort(units)
    np.testing.assert_array_equal(units[order], test.unit[rows])
    np.testing.assert_allclose(found[order].reshape(len(rows), -1), expected, atol=1e-4)


def test_the_real_images_nearest_to_scenarios_are_read_by_as_many_processes_as_the_run_has(
    setting, monkeypatch
):
    asked = list[int]()

    def find(*arguments):
        asked.append(arguments[-1])
        return find_nearest_real(*arguments)

    monkeypatch.setattr("defuse_core.evaluation.evidence.find_nearest_real", find)
    spec = setting.spec.with_fields("resources", readers=2)
    gather_evidence(spec, setting.found, Controls((setting.shifted(0),), ()), progress=silent)
    assert asked == [2]
