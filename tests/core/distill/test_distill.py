from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Failures, Scenarios
from defuse_core.config import DistillSection
from defuse_core.distill.components import Sources, certain_source_error, count_sources, fit_mixtures
from defuse_core.distill.draws import gaussian_codes
from defuse_core.intervals import exact_lower
from defuse_core.protocols import silent
from tests.sample_components import sample_failures


def planted(rng: np.random.Generator, sizes=(600, 300, 100), width=3) -> tuple[np.ndarray, np.ndarray]:
    """Codes around far-apart centres, and the centres."""
    centres = 12.0 * np.eye(width)[: len(sizes)]
    codes = np.concatenate([c + rng.standard_normal((n, width)) for c, n in zip(centres, sizes, strict=True)])
    return codes.astype(np.float32), centres


def section(**fields) -> DistillSection:
    return DistillSection(**{"by": "all", "min_support": 1, **fields})


def failures(codes: np.ndarray, truth=0, predicted=1, source=None) -> Failures:
    """Failures with these codes, each of a training image of its own unless `source` names others."""
    rows = np.arange(len(codes))
    labels = np.zeros(len(codes), np.int64)
    return sample_failures(codes, rows if source is None else source, labels + truth, labels + predicted)


def fit(found: Failures, distill: DistillSection, seed: int = 0) -> Scenarios:
    return fit_mixtures(found, distill, seed, silent).scenarios()


def fit_codes(codes: np.ndarray, distill: DistillSection, seed: int) -> Scenarios:
    return fit(failures(codes), distill, seed)


def test_planted_clusters_are_recovered_heaviest_first():
    codes, centres = planted(np.random.default_rng(0))
    found = fit_codes(codes, section(max_components=10, min_weight=0.02), seed=0)
    assert len(found) == 3
    np.testing.assert_allclose(found.means, centres, atol=0.5)
    np.testing.assert_allclose(found.weights, [0.6, 0.3, 0.1], atol=0.03)


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_pictures_that_are_stored_twice_leave_a_mixture(engine: str):
    rng = np.random.default_rng(0)
    different = rng.standard_normal((7, 10)).astype(np.float32)
    codes = np.concatenate(
        [different, different[[0] * 33]]
    )  # more codes than dimensions, and fewer different ones
    found = fit_codes(codes, section(max_components=20, min_weight=0.02, engine=engine), seed=0)
    assert np.isfinite(found.covariances).all()
    assert len(found.all_weights) == 7


def test_components_of_low_weight_are_dropped():
    codes, _ = planted(np.random.default_rng(0))
    found = fit_codes(codes, section(max_components=10, min_weight=0.2), seed=0)
    assert len(found) == 2
    assert len(found.all_weights) == 10


def test_the_same_codes_and_seed_give_the_same_mixture():
    codes, _ = planted(np.random.default_rng(1))
    first, second = (fit_codes(codes, section(max_components=8), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.means, second.means)


@pytest.mark.parametrize(("seed", "tolerance"), [(0, 1e-3), (1, 1e-3), (2, 1.0)])
def test_both_engines_give_the_same_components(seed, tolerance):
    codes, _ = planted(np.random.default_rng(seed))
    torch_, oracle = (
        fit_codes(
            codes, section(max_components=8, max_iterations=60, tolerance=tolerance, engine=engine), seed
        )
        for engine in ("torch", "scikit-learn")
    )
    assert (torch_.iterations, torch_.converged) == (oracle.iterations, oracle.converged)
    assert torch_.last_change == pytest.approx(oracle.last_change, abs=1e-6)
    np.testing.assert_allclose(torch_.means, oracle.means, atol=1e-8)
    np.testing.assert_allclose(torch_.covariances, oracle.covariances, atol=1e-8)
    np.testing.assert_array_equal(torch_.support, oracle.support)


def test_a_fit_that_did_not_converge_says_so():
    codes, _ = planted(np.random.default_rng(0))
    found = fit_codes(codes, section(max_components=10, max_iterations=1), seed=0)
    assert not found.converged
    assert found.iterations == 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_codes_give_no_scenario(count):
    found = fit_codes(np.zeros((count, 4), np.float32), section(), seed=0)
    assert len(found) == 0
    assert found.means.shape == (0, 4)


def test_a_component_says_how_many_training_images_its_codes_come_from():
    codes, _ = planted(np.random.default_rng(0), sizes=(300, 200))
    source = np.repeat(np.arange(100), 5)  # 60 images in the first cluster, 40 in the second
    found = fit(failures(codes, source=source), section(max_components=5, min_weight=0.05))
    assert found.support.tolist() == [60, 40]


def test_a_component_of_too_few_training_images_is_dropped_and_listed():
    codes, _ = planted(np.random.default_rng(0), sizes=(300, 200))
    source = np.concatenate([np.arange(300), np.repeat([300, 301], 100)])
    found = fit(failures(codes, source=source), section(max_components=5, min_weight=0.05, min_support=3))
    assert len(found) == 1
    (dropped,) = found.dropped
    assert (dropped.support, dropped.source) == (2, NONE_OF_THE_ABOVE)
    assert "2 training images, fewer than 3" in dropped.reason
    assert dropped.cause == "few images"


def with_wrong_sources(found: Failures, wrong: range) -> Failures:
    """The failures, with the source images of `wrong` misclassified."""
    return replace(found, source_wrong=np.isin(found.source, wrong))


def test_a_component_says_which_share_of_its_source_images_is_misclassified():
    codes, _ = planted(np.random.default_rng(0), sizes=(300, 200))
    source = np.repeat(np.arange(100), 5)  # 60 images in the first cluster, 40 in the second
    known = with_wrong_sources(failures(codes, source=source), range(50, 80))
    found = fit(known, section(max_components=5, min_weight=0.05))
    np.testing.assert_allclose(found.source_error, [10 / 60, 20 / 40])


@pytest.mark.parametrize(("order", "first"), [("weight", 0), ("source-error", 1)])
def test_components_whose_source_images_are_misclassified_come_first_where_asked_for(order, first):
    codes, centres = planted(np.random.default_rng(0), sizes=(300, 200))
    known = with_wrong_sources(failures(codes), range(400, 500))
    found = fit(known, section(max_components=5, min_weight=0.05, order=order))
    np.testing.assert_allclose(found.means[0], centres[first], atol=0.5)


def test_a_high_error_on_few_source_images_is_less_certain_than_a_lower_one_on_many():
    certain = Sources(np.array([2, 40, 0]), np.array([2.0, 32.0, 0.0])).certain_error()
    assert certain.argsort().tolist() == [2, 0, 1]
    # at least 3 of 5 are wrong with probability 0.058 where a fifth is
    assert Sources(np.array([5]), np.array([3.0])).certain_error()[0] < 0.2


def test_few_wrong_source_images_do_not_put_a_component_before_one_with_many():
    codes, centres = planted(np.random.default_rng(0), sizes=(300, 200))
    source = np.concatenate([np.arange(300), 300 + np.arange(200) % 2])  # two images in the second cluster
    known = with_wrong_sources(failures(codes, source=source), range(60, 302))
    found = fit(known, section(max_components=5, min_weight=0.05, order="source-error"))
    np.testing.assert_allclose(found.source_error, [0.8, 1.0])
    np.testing.assert_allclose(found.means, centres[:2], atol=0.5)


def test_frames_of_one_track_count_once_in_the_certainty_of_the_source_error():
    codes, _ = planted(np.random.default_rng(0), sizes=(300, 200))
    known = with_wrong_sources(failures(codes), range(300, 360))  # of the second cluster
    distill = section(max_components=5, min_weight=0.05, order="source-error", min_support=200)
    by_image = fit(known, distill)
    assert by_image.source_tracks is None and certain_source_error(by_image)[0] > 0.2
    # the wrong ones are of two tracks of 30, the others of ten of 14
    track = np.concatenate([np.arange(300), np.repeat([300, 301], 30), np.repeat(np.arange(302, 312), 14)])
    found = fit(replace(known, source_track=track), distill.model_copy(update={"min_support": 12}))
    assert (found.support.tolist(), found.source_tracks.tolist()) == ([200, 300], [12, 300])
    np.testing.assert_array_equal(found.source_error, by_image.source_error)
    np.testing.assert_array_equal(found.wrong_tracks, [2, 0])
    np.testing.assert_allclose(certain_source_error(found)[0], exact_lower(np.array([2]), np.array([12]))[0])
    assert certain_source_error(found.take(np.array([1]))).tolist() == [0.0]


def test_a_track_in_several_parts_of_psi_is_one_track():
    codes = np.zeros((6, 2), np.float32)
    known = replace(failures(codes), source_track=np.array([0, 0, 0, 0, 1, 1]))
    known = with_wrong_sources(known, range(1, 4))  # three images of four
    parts = [count_sources([known.take(rows)]) for rows in (np.arange(3), np.arange(3, 6))]
    summed, whole = Sources.summed(parts), count_sources([known])
    assert (summed.support.tolist(), summed.wrong.tolist()) == ([6], [3.0])
    for counted in (summed, whole):
        tracks, wrong = counted.wrong_tracks()
        assert (tracks.tolist(), wrong.tolist()) == ([2], [1.0])
    assert Sources.summed([*parts, count_sources([failures(codes)])]).tracks is None


def test_one_mixture_per_cell_keeps_overlapping_classes_apart():
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((900, 3)).astype(np.float32)  # all in one place
    two_cells = Failures.concatenate([failures(codes[:600], 4, 9), failures(codes[600:], 7, 2)])
    found = fit(two_cells, section(by="cell", max_components=3, min_weight=0.05))
    cells = {tuple(cell) for cell in found.cells.tolist()}
    assert cells == {(4, 9), (7, 2)}
    weights = [found.weights[(found.cells == cell).all(axis=1)].sum() for cell in ((4, 9), (7, 2))]
    np.testing.assert_allclose(weights, [2 / 3, 1 / 3], atol=0.05)


def test_a_cell_too_small_for_a_component_is_listed():
    codes, _ = planted(np.random.default_rng(0), sizes=(500,))
    rare = failures(codes[:4], truth=3, predicted=5)
    found = fit(Failures.concatenate([failures(codes), rare]), section(by="cell"))
    (dropped,) = found.dropped
    assert (dropped.source, dropped.answer, dropped.support) == (3, 5, 4)
    assert dropped.weight == pytest.approx(4 / 504)
    assert "4 codes are too few for a weight over 0.01" in dropped.reason


def test_a_cell_of_exactly_the_least_weight_is_listed():
    codes, _ = planted(np.random.default_rng(0), sizes=(40,))
    cells = Failures.concatenate([failures(codes[:20]), failures(codes[20:], truth=3, predicted=5)])
    found = fit(cells, section(by="cell", min_weight=0.5))
    assert [(dropped.weight, dropped.small) for dropped in found.dropped] == [(0.5, True)] * 2


def test_cells_share_the_components_by_their_weight_and_the_slowest_fit_is_that_of_all():
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((900, 3)).astype(np.float32)
    cells = Failures.concatenate([failures(codes[:750], 4, 9), failures(codes[750:], 7, 2)])
    fits = fit_mixtures(cells, section(by="cell", max_components=6, max_iterations=4), 0, silent)
    assert [len(part.fit.weights) for part in fits.cells] == [5, 1]
    found, changes = fits.scenarios(), [abs(part.fit.last_change) for part in fits.cells]
    assert [part.fit.converged for part in fits.cells] == [False, True]
    assert not found.converged and found.last_change == max(changes) > min(changes)


def test_a_single_code_is_dropped_and_told_in_both_ways():
    one = failures(np.zeros((1, 3), np.float32))
    for by in ("all", "cell"):
        found = fit(one, section(by=by))
        assert [dropped.reason for dropped in found.dropped] == ["a single code is no cluster"]
        assert len(fit(failures(np.eye(2, 3, dtype=np.float32)), section(by=by))) == 1  # but two are


def test_without_any_code_there_is_no_cell():
    found = fit(failures(np.zeros((0, 3), np.float32)), section(by="cell"))
    assert (len(found), found.means.shape, found.dropped) == (0, (0, 3), ())


def test_tau_multiplies_the_covariance():
    codes, _ = planted(np.random.default_rng(0), sizes=(1000,))
    found = fit_codes(codes, section(max_components=1), seed=0)
    drawn = gaussian_codes(found, 0, 20_000, 0.25, np.random.default_rng(0))
    np.testing.assert_allclose(np.cov(drawn.T), 0.25 * found.covariances[0], atol=0.02)
    np.testing.assert_allclose(drawn.mean(0), found.means[0], atol=0.02)
