"""Whether the classifier fails on the real images nearest to a scenario more often than on its class."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from defuse_core.data import Images, open_splits
from defuse_core.data.images import PictureFiles, to_picture
from defuse_core.evaluation.describe import _error_nearby, _outcomes, _seen, find_nearest_real
from defuse_core.intervals import SIGNIFICANT
from defuse_core.models import encode_images, load_classifier, load_vae, predict
from tests.sample_findings import sample_findings


def judged(wrong: np.ndarray) -> tuple[float, bool, bool]:  # type: ignore[type-arg]
    """Return the error on the nearest, whether it is significant for one scenario alone, and whether any could be."""
    error, p_value, testable = _error_nearby(wrong)
    return error, p_value < SIGNIFICANT, testable


def in_order(near: int, far: int, images: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return which images are wrong, in order of distance: the `near` nearest and the `far` farthest."""
    wrong = np.zeros(images, np.bool_)
    wrong[:near] = wrong[images - far :] = True
    return wrong


@pytest.mark.parametrize(
    ("near", "far", "images", "seen"),
    [
        (12, 0, 30, True),  # the errors are around the scenario, of a class with few images
        (12, 8, 50, True),
        (0, 12, 50, False),
        (6, 0, 80, True),
        (30, 0, 1000, True),
    ],
)
def test_errors_around_a_scenario_are_seen_in_real_data_in_small_classes_too(near, far, images, seen):
    assert judged(in_order(near, far, images))[1:] == (seen, True)


def test_errors_that_are_spread_over_the_class_are_not_around_the_scenario():
    wrong = np.arange(400) % 10 == 0
    assert judged(wrong) == (0.1, False, True)


def test_errors_of_a_class_that_fails_as_a_whole_are_seen_around_each_of_its_scenarios():
    assert judged(np.arange(200) % 5 != 0) == (
        0.8,
        True,
        True,
    )  # 80 % of the class, 80 % of the nearest
    assert judged(np.ones(200, np.bool_))[1:] == (True, True)
    assert judged(np.arange(200) % 4 == 0)[1] is False  # 26 % of 50 may be 20 %
    assert judged(np.ones(4, np.bool_))[1:] == (False, False)  # one image tells nothing


def test_a_chance_of_five_percent_is_kept_where_the_scenario_has_nothing_to_do_with_the_errors():
    rng = np.random.default_rng(0)
    seen = [judged(rng.permutation(in_order(9, 0, 60)))[1] for _ in range(1000)]
    assert np.mean(seen) <= 0.05


@pytest.mark.parametrize(("near", "far", "images"), [(6, 6, 50), (8, 32, 50)])
def test_the_p_value_is_twice_the_smaller_of_two_tests(near, far, images):
    tested = images // 4
    over_all = stats.fisher_exact(
        [[near, tested - near], [far, images - tested - far]], alternative="greater"
    ).pvalue
    over_least = stats.binomtest(near, tested, 0.2, alternative="greater").pvalue
    error, p_value, _ = _error_nearby(in_order(near, far, images))
    assert error == near / tested
    assert p_value == pytest.approx(2 * min(over_all, over_least))


@pytest.mark.parametrize(
    ("near", "images", "testable"),
    [(1, 30, False), (1, 3, False), (0, 5, False), (0, 100, False), (0, 0, False)],
)
def test_no_error_of_the_nearest_can_be_significant_with_few_errors_or_images(near, images, testable):
    assert judged(in_order(near, 0, images))[1:] == (False, testable)


def test_a_class_with_more_errors_can_tell_more() -> None:
    assert [judged(in_order(0, errors, 80))[2] for errors in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize(("images", "tested"), [(1, 1), (3, 1), (8, 2), (199, 49), (200, 50), (1000, 50)])
def test_a_quarter_of_the_images_is_tested_but_one_at_least_and_fifty_at_most(images, tested):
    assert judged(in_order(tested, 0, images))[0] == 1
    assert judged(~in_order(tested, 0, images))[0] == 0
    assert images == 1 or judged(in_order(tested - 1, images - tested, images))[0] == (tested - 1) / tested


def test_frames_of_one_sign_count_once_where_the_nearest_of_them_is():
    # track 7 is the nearest, with three of four frames wrong; 5 has one of two wrong, which is not most of them
    tracks = np.array([7, 5, 7, 2, 7, 7, 5])
    wrong = np.array([True, True, False, False, True, True, False])
    assert _outcomes(wrong, tracks).tolist() == [True, False, False]
    assert _outcomes(wrong, None) is wrong


def test_thirty_wrong_frames_of_one_sign_do_not_show_the_failures_of_a_scenario():
    tracks = np.repeat(np.arange(20), 30)
    wrong = tracks == 0
    assert judged(wrong)[1:] == (True, True)
    assert judged(_outcomes(wrong, tracks))[1:] == (False, False)


def test_of_many_scenarios_that_chance_favours_a_little_none_is_seen_in_real_data():
    p_values, all_testable = np.linspace(0.03, 0.99, 20), np.ones(20, np.bool_)
    assert not _seen(p_values, all_testable).any()
    assert _seen(p_values, p_values < 0.05).tolist() == [True] + 19 * [False]  # the others could not be
    assert _seen(np.full(20, 0.03), all_testable).all()
    assert _seen(p_values, ~all_testable).tolist() == 20 * [False]


def test_the_tracks_of_real_images_are_what_is_compared(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    before = load_classifier(tiny_spec, tiny_models.classifier, len(tiny_models.classes))
    images = open_splits(tiny_spec.data, tiny_spec.seed).train.take(np.arange(200))
    answers = predict(before, images)
    # most images of the first ten tracks carry another class's label
    labels = np.where(np.arange(200) < 100, 3, answers)
    tracks = np.where(np.arange(200) < 100, np.arange(200) // 10, 100 + np.arange(200))
    real = Images(images.pixels, labels, tracks)
    found, _ = sample_findings(1, 1)
    width = len(tiny_models.kl_per_dimension)
    scenarios = dataclasses.replace(
        found.scenarios, means=np.zeros((1, width)), covariances=np.eye(width)[None]
    )
    fixes = dataclasses.replace(found.fixes, labels=np.array([3]), scenario=np.array([0]))
    nearest = find_nearest_real(vae, before, scenarios, fixes, real)
    of_label = [(answers[(tracks == track) & (labels == 3)] != 3) for track in np.unique(tracks[labels == 3])]
    expected = np.mean([wrong.mean() > 0.5 for wrong in of_label])
    assert nearest.error_of_label[0] == pytest.approx(expected)
    without = find_nearest_real(vae, before, scenarios, fixes, Images(images.pixels, labels))
    assert without.error_of_label[0] == pytest.approx((answers[labels == 3] != 3).mean())
    assert expected != without.error_of_label[0]


def test_the_nearest_images_of_the_label_are_shown_in_order_with_the_answers_on_them(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    before = load_classifier(tiny_spec, tiny_models.classifier, len(tiny_models.classes))
    real = open_splits(tiny_spec.data, tiny_spec.seed).train.take(np.arange(200))
    real = Images(
        real.pixels, np.where(real.labels == 9, 8, real.labels)
    )  # there is no 9, and many are wrong
    answers, codes = predict(before, real), encode_images(vae, real)
    found, _ = sample_findings(3, 3)
    rng, width = np.random.default_rng(0), codes.shape[1]
    roots = rng.normal(size=(3, width, width))
    scenarios = dataclasses.replace(
        found.scenarios,
        means=rng.normal(size=(3, width)),
        covariances=roots @ roots.transpose(0, 2, 1),
    )
    fixes = dataclasses.replace(found.fixes, labels=np.array([8, 3, 9]), scenario=np.array([2, 0, 1]))
    nearest = find_nearest_real(vae, before, scenarios, fixes, real)
    pictures = np.round(real.batch() * 255)
    for place, (number, label) in enumerate(((2, 8), (0, 3))):
        away = np.linalg.solve(roots[number], (codes - scenarios.means[number]).T.astype(np.float64))
        order = np.argsort((away**2).sum(axis=0))
        near = order[real.labels[order] == label]
        wrong = answers[near] != label
        np.testing.assert_array_equal(nearest.images[place], pictures[near[:12]])
        np.testing.assert_array_equal(nearest.predicted[place], answers[near[:12]])
        assert nearest.labels[place].tolist() == [label] * 12
        assert nearest.error[place] == wrong[: len(near) // 4].mean()
        assert nearest.error_of_label[place] == pytest.approx(wrong.mean())
    assert nearest.error_of_all == pytest.approx((answers != real.labels).mean())
    assert np.isnan([nearest.error[2], nearest.error_of_label[2]]).all()
    assert not nearest.seen[2] and not nearest.testable[2]


def test_a_scenario_is_seen_in_real_data_as_one_of_all_that_are_tested(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    before = load_classifier(tiny_spec, tiny_models.classifier, len(tiny_models.classes))
    images = open_splits(tiny_spec.data, tiny_spec.seed).train
    answers = predict(before, images)
    rows = np.concatenate([np.flatnonzero(answers == 3)[:24], np.flatnonzero(answers != 3)[:24]])
    real = Images(images.take(rows).pixels, np.full(48, 3))  # half of them are wrong
    codes = encode_images(vae, real)
    # how many of the twelve nearest to each of them are wrong: six are significant (0.04) for one scenario alone
    hits = np.array([(np.argsort(((codes - code) ** 2).sum(axis=1))[:12] >= 24).sum() for code in codes])
    two = [np.flatnonzero(hits == 6)[0], np.flatnonzero(hits < 6)[0]]
    found, _ = sample_findings(2, 2)
    width = codes.shape[1]
    scenarios = dataclasses.replace(
        found.scenarios,
        means=codes[two].astype(np.float64),
        covariances=np.stack([np.eye(width)] * 2),
    )
    seen = []
    for numbers in ([0], [0, 1]):
        fixes = found.fixes.take(np.array(numbers))
        fixes = dataclasses.replace(fixes, labels=np.full(len(fixes.labels), 3), scenario=np.array(numbers))
        seen.append(find_nearest_real(vae, before, scenarios, fixes, real).seen.tolist())
    assert seen == [[True], [False, False]]


def test_real_images_on_disk_are_read_by_the_processes_of_the_run(
    tiny_spec, tiny_models, tmp_path, monkeypatch
):
    asked = list[int]()

    def busy(readers: int) -> SimpleNamespace:
        asked.append(readers)
        return SimpleNamespace(in_use=SimpleNamespace(acquire=lambda blocking: False))

    monkeypatch.setattr("defuse_core.data.read_ahead.reader_pool", busy)
    vae = load_vae(tiny_spec, tiny_models.vae)
    before = load_classifier(tiny_spec, tiny_models.classifier, len(tiny_models.classes))
    some = open_splits(tiny_spec.data, tiny_spec.seed).train.take(np.arange(20))
    for number, pixels in enumerate(some.pixels):
        to_picture(pixels).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(20)]
    found, _ = sample_findings(2, 0)
    on_disk, in_memory = (
        find_nearest_real(vae, before, found.scenarios, found.fixes, Images(pixels, some.labels), 3)
        for pixels in (PictureFiles(files, 1, 16), some.pixels)
    )
    assert asked == [3, 3] and on_disk.error_of_all == in_memory.error_of_all


def test_without_scenarios_there_are_no_real_images(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    before = load_classifier(tiny_spec, tiny_models.classifier, len(tiny_models.classes))
    real = open_splits(tiny_spec.data, tiny_spec.seed).train.take(np.arange(20))
    found, _ = sample_findings(2, 0)
    nearest = find_nearest_real(vae, before, found.scenarios, found.fixes, real)
    assert nearest.images.shape == (0, 12, 1, 16, 16)
    assert nearest.labels.shape == nearest.predicted.shape == (0, 12)
    assert nearest.seen.shape == nearest.testable.shape == nearest.error.shape == (0,)
