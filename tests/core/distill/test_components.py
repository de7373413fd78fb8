"""Which components are kept, in which order, and what is told of them: on mixtures that are given, not fitted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Psi, Scenarios, Shard
from defuse_core.codec import decode, encode
from defuse_core.config import DistillSection
from defuse_core.data import Images
from defuse_core.distill import components
from defuse_core.distill.components import (
    WHOLE,
    Fits,
    FittedCell,
    Sources,
    _largest_change,
    components_of,
    fit_mixture,
    fit_mixtures,
    join_small_cells,
    log_scenarios,
    scenarios_of,
    small_cell,
)
from defuse_core.distill.mixture import FittedMixture, fit_dirichlet_process_mixture
from defuse_core.identify import save_shard
from defuse_core.protocols import silent
from defuse_core.store import FolderStore
from tests.conftest import recommended, tiny
from tests.sample_components import sample_failures

SECTION = DistillSection(min_weight=0.1, min_support=5)


def mixture(
    weights: list[float], first: int, iterations: int, bound: float, converged: bool, change: float
) -> FittedMixture:
    """A mixture whose components have their number, from `first` on, as mean and variance."""
    numbers = first + np.arange(len(weights), dtype=np.float64)
    return FittedMixture(
        weights=np.array(weights),
        means=np.stack([numbers, -numbers], axis=1),
        covariances=numbers[:, None, None] * np.eye(2),
        converged=converged,
        iterations=iterations,
        lower_bound=bound,
        last_change=change,
    )


@pytest.fixture
def cells() -> list[FittedCell]:
    """Components 1 to 3 of one cell and 4 to 6 of another, whose weights are 0.4, 0.1, 0.3; 0.05, 0.12, 0.03."""
    one = mixture([0.5, 0.125, 0.375], 1, 30, -5.0, False, -0.5)
    other = mixture([0.25, 0.6, 0.15], 4, 40, -7.0, True, 0.25)
    sources = [
        Sources(np.array([9, 9, 4]), np.array([1.0, 9.0, 4.0])),
        Sources(np.array([9, 5, 9]), np.array([9.0, 5.0, 9.0])),
    ]
    return [
        FittedCell(one, (4, 9), 800, 0.8, sources[0]),
        FittedCell(other, (7, 2), 200, 0.2, sources[1]),
    ]


def numbers_of(scenarios: Scenarios) -> list[int]:
    return scenarios.means[:, 0].astype(int).tolist()


def test_components_over_the_least_weight_with_enough_images_are_kept_with_all_that_is_theirs(cells):
    found = scenarios_of(cells, SECTION)
    assert numbers_of(found) == [1, 5]  # 2 has just the least weight, and 5 just the least support
    np.testing.assert_allclose(found.weights, [0.4, 0.12])
    np.testing.assert_array_equal(found.covariances[:, 0, 0], [1, 5])
    assert (found.cells.tolist(), found.support.tolist()) == ([[4, 9], [7, 2]], [9, 5])
    np.testing.assert_allclose(found.source_error, [1 / 9, 1])
    np.testing.assert_allclose(found.all_weights, [0.4, 0.1, 0.3, 0.05, 0.12, 0.03])
    assert found.all_means[:, 0].tolist() == found.all_covariances[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    (thin,) = found.dropped
    assert (thin.weight, thin.source, thin.answer, thin.support) == (pytest.approx(0.3), 4, 9, 4)
    assert thin.reason == "its codes come from 4 training images, fewer than 5"


def test_images_of_one_track_support_a_component_once(cells):
    wrong = np.zeros(3)
    tracks = [np.array([[track, 3, 0] for track in range(count)], float) for count in (5, 9, 4)]
    sources = Sources(np.array([15, 27, 12]), wrong, tuple(tracks))
    found = scenarios_of([replace(cells[0], sources=sources)], SECTION)
    assert (numbers_of(found), found.source_tracks.tolist()) == ([1], [5])
    assert [one.reason for one in found.dropped] == ["its codes come from 4 tracks, fewer than 5"]


def test_the_fit_of_all_cells_is_as_long_as_the_longest_and_converged_only_if_each_is(cells):
    found = scenarios_of(cells, SECTION)
    assert (found.codes_used, found.iterations, found.lower_bound) == (1000, 40, -12.0)
    assert (found.converged, found.last_change) == (False, 0.5)
    assert scenarios_of(cells[1:], SECTION).converged


def test_cells_without_a_mixture_are_listed_before_components_without_support(cells):
    small = small_cell((1, 3), 4, 0.004, 2, 2, SECTION)
    found = scenarios_of(cells, SECTION, (small,))
    assert [(dropped.source, dropped.support) for dropped in found.dropped] == [(1, 2), (4, 4)]


def test_the_small_cells_of_fewest_images_count_as_one_with_enough_and_one_with_few_images(monkeypatch):
    small = [
        small_cell((1, 3 + row), 9, 0.001, images, images, SECTION)
        for row, images in enumerate([7, 2, 9, 5, 8, 1])
    ]
    assert join_small_cells(small) == tuple(small)
    monkeypatch.setattr("defuse_core.distill.components.MOST_SMALL_CELLS", 2)
    *kept, enough, few = join_small_cells(small)
    assert kept == [small[2], small[4]]
    assert (enough.support, few.support, few.source) == (12, 3, NONE_OF_THE_ABOVE)
    assert (enough.cause, few.cause) == ("few codes", "few images")
    assert sum(one.weight for one in (*kept, enough, few)) == pytest.approx(0.006)


def test_small_cells_of_few_codes_are_listed_before_larger_ones_of_few_tracks(monkeypatch):
    # with tracks, a cell of many images can be one of few tracks: the caveats say how many cells have few codes
    tracks = [(60, 2), (6, 6), (50, 2), (5, 5), (7, 7)]
    section = SECTION.model_copy(update={"min_support": 5})
    small = [small_cell((1, 3 + row), 60, 0.001, *each, section) for row, each in enumerate(tracks)]
    monkeypatch.setattr("defuse_core.distill.components.MOST_SMALL_CELLS", 3)
    assert join_small_cells(small)[:3] == (small[1], small[3], small[4])
    assert [(one.cause, one.support) for one in join_small_cells(small)[3:]] == [("few images", 110)]


@pytest.mark.parametrize(
    ("images", "tracks", "least", "cause"),
    [
        (5, 5, 1, "few codes"),
        (4, 4, 1, "few images"),  # are no scenario, whatever the run file says
        (8, 8, 8, "few codes"),
        (8, 8, 9, "few images"),
        (60, 2, 3, "few images"),  # of two tracks
    ],
)
def test_a_small_cell_of_too_few_images_or_tracks_is_told_from_one_of_too_few_codes(
    images: int, tracks: int, least: int, cause: str
):
    section = SECTION.model_copy(update={"min_support": least})
    assert small_cell((1, 3), 9, 0.001, images, tracks, section).cause == cause


def test_components_of_any_number_of_cells_can_be_stored():
    fits = Fits(sample_failures(np.zeros((1, 2), np.float32), *np.zeros((3, 1), np.int64)), SECTION)
    fits.small = [small_cell((1, 3), 4, 0.001, 2, 2, SECTION)] * 600_000
    stored = decode(Scenarios, encode(fits.scenarios()), "scenarios")
    assert sum(one.support for one in stored.dropped) == 2 * 600_000


def test_components_that_are_wrong_on_their_images_come_first_where_asked_for_and_by_weight_if_equal(cells):
    assert numbers_of(scenarios_of(cells, replace_order(SECTION))) == [5, 1]
    equal = [replace(cell, sources=Sources(np.full(3, 9), np.full(3, 9.0))) for cell in cells]
    assert numbers_of(scenarios_of(equal, replace_order(SECTION))) == [1, 3, 5]


def replace_order(section: DistillSection) -> DistillSection:
    return section.model_copy(update={"order": "source-error"})


def test_the_largest_change_is_so_in_either_direction_and_unknown_after_single_iterations():
    fits = [mixture([1.0], 1, 1, 0.0, False, change) for change in (-3.0, 1.0, float("nan"))]
    assert _largest_change(fits) == 3
    assert _largest_change(fits[2:]) is None


@pytest.mark.parametrize(("weight", "count"), [(0.001, 1), (0.24, 1), (0.26, 2), (0.45, 3), (1.0, 6)])
def test_a_cell_gets_the_nearest_number_of_components_and_one_at_least(weight, count):
    assert components_of(weight, DistillSection(max_components=6)) == count


@pytest.mark.parametrize(("weight", "count"), [(0.016, 1), (0.028, 1), (0.04, 2), (0.5, 25)])
def test_a_cell_over_the_least_weight_is_not_cut_into_components_under_it(weight, count):
    assert components_of(weight, DistillSection()) == count  # K = 100, ε = 0.01: each would weigh ε
    assert components_of(weight, DistillSection(min_weight=0.0)) == round(100 * weight)
    assert components_of(1.0, DistillSection(by="all")) == 100
    many = DistillSection(max_components=1000)  # over 1 / 2 ε nothing changes
    assert components_of(weight, many) == components_of(weight, DistillSection(max_components=50))


def test_a_small_cell_has_the_support_of_its_images_and_each_cell_is_told_as_it_begins():
    rng = np.random.default_rng(0)
    codes, told = rng.standard_normal((404, 3)).astype(np.float32), []
    source = np.concatenate([np.arange(400), [500, 500, 501, 501]])
    truth = np.repeat([0, 3], [400, 4])
    section = DistillSection(by="cell", max_components=2, min_weight=0.05, min_support=1)
    failures = sample_failures(codes, source, truth, truth + 1)
    fits = fit_mixtures(failures, section, 0, lambda *args: told.append(args))
    assert [(dropped.source, dropped.support) for dropped in fits.small] == [(3, 2)]
    assert told == [("fitting the mixtures", 0, 2, "fits"), ("fitting the mixtures", 1, 2, "fits")]


def test_the_images_of_a_small_cell_count_once_for_each_track():
    codes, source = np.random.default_rng(0).standard_normal((408, 3)).astype(np.float32), np.arange(408)
    truth, causes = np.repeat([0, 3], [400, 8]), []
    section = DistillSection(by="cell", max_components=2, min_weight=0.05, min_support=3)
    for track in (None, source // 8):
        failures = sample_failures(codes, source, truth, truth + 1, source_track=track)
        (small,) = fit_mixtures(failures, section, 0, silent).small
        causes.append((small.support, small.cause))
    assert causes == [(8, "few codes"), (8, "few images")]


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_each_seed_and_each_cell_begins_its_fit_in_its_own_way(engine, monkeypatch):
    own = list[int]()

    def noting(codes, count, **options):
        own.append(count)
        return fit_dirichlet_process_mixture(codes, count, **options)

    monkeypatch.setattr(components, "fit_dirichlet_process_mixture", noting)
    codes = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
    section = DistillSection(engine=engine, max_iterations=1)
    begun = [
        fit_mixture(codes, 4, section, seed, cell).means.tobytes()
        for seed, cell in ((0, WHOLE), (0, WHOLE), (1, WHOLE), (0, (3, 4)), (0, (3, 5)))
    ]
    assert begun[0] == begun[1] and len(set(begun)) == 4
    assert own == (5 * [4] if engine == "torch" else [])


def test_what_was_kept_and_dropped_and_how_the_fit_ended_is_told(cells, caplog):
    spec = tiny(distill={"min_weight": 0.1, "tolerance": 1e-3})
    found = scenarios_of(cells, SECTION, (small_cell((1, 3), 4, 0.004, 2, 2, SECTION),))
    with caplog.at_level("INFO", "defuse"):
        log_scenarios(spec, found)
        log_scenarios(spec, replace(found, last_change=None, dropped=()))
        log_scenarios(spec, replace(found, converged=True, dropped=()))
        log_scenarios(spec, Scenarios.none(2, 0))
    kept = (
        "kept 2 of 6 components with weight over 0.1 (lighter ones hold 18 % of the codes), from 1,000 codes;"
    )
    with caplog.at_level("INFO", "defuse"):
        log_scenarios(spec, replace(found, dropped=found.dropped * 1200))
    assert caplog.records.pop().getMessage().startswith("dropped 2,400 components or cells")
    caplog.records.pop()
    assert [record.getMessage() for record in caplog.records] == [
        f"{kept} the fit had NOT converged (its bound changed by 0.5 nats, tolerance 0.001) after 40 iterations",
        "dropped 2 components or cells with too few codes or images, which hold 30 % of the codes",
        f"{kept} the fit had NOT converged after 40 iterations",
        f"{kept} the fit converged after 40 iterations",
    ]


def test_anchored_components_keep_their_own_failures_and_those_of_one_photograph_are_dropped(
    tmp_path, monkeypatch
):
    centres = np.array([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0]])
    sizes, rng = [60, 100, 140], np.random.default_rng(0)
    codes = np.repeat(centres, sizes, axis=0) + rng.standard_normal((300, 2))
    source = np.concatenate([np.arange(60), np.full(100, 60), 61 + np.arange(140)])
    truth = np.zeros(300, np.int64)
    known = sample_failures(codes.astype(np.float32), source, truth, truth + 1)
    shard = Shard(known, 300, 300, 0, 0, 0.0, index=0)
    store = FolderStore(tmp_path)
    save_shard(store, shard)
    train = Images(np.zeros((201, 1, 4, 4), np.uint8), np.zeros(201, np.int64))
    monkeypatch.setattr(components, "reopen_splits", lambda *_: SimpleNamespace(train=train))
    distilled = {"by": "all", "order": "weight", "min_support": 1, "min_weight": 0.1, "max_components": 3}
    spec = recommended(vae={"decode": "anchored", "latent_dim": 2}, distill=distilled)
    found = components.distill(spec, Psi(np.array([300]), 300, 300, 0, 0, 0.0), store, "", progress=silent)
    np.testing.assert_allclose(found.means, centres[[2, 0]], atol=1)
    assert [dropped.reason for dropped in found.dropped] == [
        "too few photographs to hold out: all are of one photograph"
    ]
    for mean, own in zip(found.means, found.failures.codes, strict=True):
        assert np.abs(own - mean).max() < 10
