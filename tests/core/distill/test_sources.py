"""The training images of components: counts of images and tracks by hand, and which photographs are held out."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Failures, Scenarios
from defuse_core.codec import decode, encode
from defuse_core.data import Images
from defuse_core.distill.components import Sources, certain_source_error, count_sources
from defuse_core.distill.draws import component_failures, drop_with_few_units, failure_rows, held_out_half
from defuse_core.intervals import exact_lower
from defuse_core.seeds import generator
from tests.sample_components import sample_failures, sample_scenarios


def failures(source: list[int], wrong: list[int] | None = None, track: list[int] | None = None) -> Failures:
    """Failures at these images, of which those of `wrong` are misclassified; image i is of track `track[i]`."""
    found = sample_failures(
        np.zeros((len(source), 2), np.float32), np.array(source), *np.zeros((2, len(source)), np.int64)
    )
    if wrong is not None:
        found = replace(found, source_wrong=np.isin(source, wrong))
    return found if track is None else replace(found, source_track=np.array(track)[source])


TRACK = [0, 0, 0, 1, 1, 2]


def test_an_image_with_many_codes_counts_once():
    counted = count_sources([failures([5, 3, 3, 0, 3], wrong=[3, 5]), failures([1], wrong=[])])
    assert (counted.support.tolist(), counted.wrong.tolist()) == ([3, 1], [2.0, 0.0])
    np.testing.assert_allclose(counted.error(), [2 / 3, 0])
    assert Sources(np.array([1]), np.ones(1)).error() == [1]


def test_a_track_of_which_just_half_of_the_images_are_wrong_is_not_wrong():
    counted = count_sources([failures([5, 4, 3, 2, 1, 0, 0, 0], wrong=[0, 1, 3], track=TRACK)])
    tracks, wrong = counted.wrong_tracks()  # 2 of 3, 1 of 2 and none of 1
    assert (tracks.tolist(), wrong.tolist()) == ([3], [1.0])


def test_a_component_without_images_has_no_certain_error():
    nothing = Sources(np.array([0]), np.array([0.0]))
    assert np.isnan(nothing.error()).all() and nothing.certain_error().tolist() == [0]


def test_mixtures_have_tracks_only_where_each_has_them():
    tracked = count_sources([failures([0, 1], wrong=[0], track=TRACK), failures([5], wrong=[], track=TRACK)])
    plain = count_sources([failures([2, 3, 4], wrong=[3])])
    together = Sources.concatenated([tracked, plain])
    assert (together.support.tolist(), together.wrong.tolist()) == ([2, 1, 3], [1.0, 0.0, 1.0])
    assert together.tracks is None and together.wrong_tracks() is None
    twice = Sources.concatenated([tracked, tracked]).wrong_tracks()
    assert twice is not None and twice[0].tolist() == [1, 1, 1, 1]
    mixed = count_sources([failures([0], wrong=[0], track=TRACK), failures([1], wrong=[1])])
    assert mixed.tracks is None


@pytest.mark.parametrize("wrong", range(8))
def test_the_share_of_wrong_images_gives_back_how_many_there_are(wrong):
    exact = Sources(np.array([49]), np.array([float(wrong)])).certain_error()
    for off in (-0.3, 0.0, 0.3):
        stored = replace(
            Scenarios.none(2, 1), support=np.array([49]), source_error=np.array([(wrong + off) / 49])
        )
        assert certain_source_error(stored).tolist() == exact.tolist()


FRAMES = 3  # frames per track
Hypergraph = list[list[int]]  # the units of each component


def halves_of(components: Hypergraph, units: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return which units are held out."""
    used = np.stack([np.resize(own, 64) for own in components])
    return held_out_half(used, units, generator(seed, "test"))


def undivided(components: Hypergraph, held: np.ndarray) -> int:  # type: ignore[type-arg]
    return sum(len(set(held[own])) == 1 for own in components)


def random_components(rng: np.random.Generator, count: int, units: int, most: int) -> Hypergraph:
    """Return components of two units or more."""
    return [
        rng.choice(units, rng.integers(2, most + 1), replace=False).astype(int).tolist() for _ in range(count)
    ]


def with_tracks(components: Hypergraph, tracks: int | None) -> Scenarios:
    """Components with failures at FRAMES frames of each of their tracks, or at an image of each unit."""
    frames = FRAMES if tracks else 1
    members = []
    for own in components:
        source = np.concatenate([frames * unit + np.arange(frames) for unit in own])
        members.append(
            sample_failures(np.zeros((len(source), 2), np.float32), source, *np.zeros((2, len(source)), int))
        )
    images = frames * (1 + max(map(max, components)))
    of_track = np.arange(images) // frames if tracks else None
    train = Images(np.zeros((images, 1, 4, 4), np.uint8), np.zeros(images, np.int64), of_track)
    count = len(components)
    weights = np.arange(count, 0, -1) / 100
    return sample_scenarios(
        weights,
        np.zeros((count, 2)),
        np.tile(np.eye(2), (count, 1, 1)),
        weights,
        100,
        True,
        1,
        0.0,
        support=np.array([frames * len(own) for own in components]),
        failures=component_failures(members, train, 0),
    )


def test_every_component_has_photographs_in_both_halves_where_many_share_few_tracks():
    left = [
        undivided(components, halves_of(components, 40, seed))
        for seed in range(40)
        for components in [random_components(np.random.default_rng(seed), 20, 40, 3)]
    ]
    # an odd circle of pairs cannot be divided, and is rare
    assert np.mean(left) < 0.1


def test_as_many_components_as_possible_are_divided():
    for seed in range(8):
        components = random_components(np.random.default_rng(seed), 12, 7, 4)
        fewest = min(
            undivided(components, np.array(held)) for held in itertools.product((False, True), repeat=7)
        )
        assert undivided(components, halves_of(components, 7, seed)) == fewest


def test_few_repairs_are_enough_where_many_components_share_few_units(monkeypatch):
    monkeypatch.setattr("defuse_core.distill.draws.REPAIRS", 100)
    halves = np.array(list(itertools.product((False, True), repeat=14)))
    for seed in range(8):
        components = random_components(np.random.default_rng(seed), 50, 14, 4)
        sizes = [(len(own), halves[:, own].sum(axis=1)) for own in components]
        fewest = sum((count == 0) | (count == size) for size, count in sizes).min()
        assert undivided(components, halves_of(components, 14, seed)) == fewest


def test_a_long_chain_of_pairs_is_divided_link_by_link():
    components = [[unit, unit + 1] for unit in range(30)]
    assert undivided(components, halves_of(components, 31, 0)) == 0


def test_components_that_need_no_repair_hold_out_half_of_their_units_and_review_an_odd_one():
    held = halves_of([list(range(8)), list(range(8, 15))], 15, 0)
    assert (held[:8].sum(), held[8:].sum()) == (4, 3)


def test_half_of_each_component_is_held_out_where_a_large_one_has_the_units_of_a_small_one():
    held = np.array([halves_of([list(range(8)), [0, 1, 2, 3]], 8, seed) for seed in range(100)])
    assert (held[:, :4].sum(axis=1) == 2).all() and (held[:, 4:].sum(axis=1) == 2).all()
    # which ones is chance
    np.testing.assert_allclose(held.mean(axis=0), 0.5, atol=0.2)


def test_a_component_of_one_photograph_does_not_keep_others_from_holding_it_out():
    alone, pairs = [[1]], [[0, 1], [1, 2], [0, 3]]
    for seed in range(10):
        np.testing.assert_array_equal(halves_of(alone + pairs, 4, seed), halves_of(pairs, 4, seed))


@pytest.mark.parametrize("tracks", [None, 4])
def test_components_that_cannot_be_divided_are_dropped_and_none_is_tuned_on_what_others_are_measured_on(
    tracks,
):
    # three pairs of three units are an odd circle
    scenarios = with_tracks([[0, 1], [1, 2], [0, 2], [3], [0, 1, 2, 3]], tracks)
    kept = drop_with_few_units(scenarios)
    assert len(kept) == 3
    reasons = [dropped.reason for dropped in kept.dropped]
    what = "track" if tracks else "photograph"
    assert f"too few photographs to hold out: other components share its 2 {what}s" in reasons
    assert f"too few photographs to hold out: all are of one {what}" in reasons
    alone = kept.dropped[1]
    assert (alone.weight, alone.support) == (0.02, FRAMES if tracks else 1)
    assert (alone.source, alone.answer) == (NONE_OF_THE_ABOVE, NONE_OF_THE_ABOVE)
    units = {held_out: set[int]() for held_out in (False, True)}
    for held_out, component in itertools.product((False, True), range(3)):
        rows = failure_rows(kept.failures, component, 200, generator(0, "a"), held_out=held_out)
        units[held_out] |= set(kept.failures.anchors.unit[kept.failures.anchor[component, rows]].tolist())
    assert units[False] and units[True] and not units[False] & units[True]


@pytest.mark.parametrize("tracks", [None, 12])
def test_a_component_with_fewer_photographs_to_review_than_significance_takes_is_dropped(tracks):
    scenarios = with_tracks([list(range(8)), list(range(2, 12))], tracks)
    kept = drop_with_few_units(scenarios, least=5)
    assert (len(kept), len(drop_with_few_units(scenarios, least=4))) == (1, 2)
    what = "track" if tracks else "photograph"
    assert [dropped.reason for dropped in kept.dropped] == [
        f"too few photographs or tracks for certainty: 4 {what}s to review, and significance takes 5"
    ]


def test_no_scenario_is_left_where_none_can_be_divided():
    kept = drop_with_few_units(with_tracks([[0], [1]], 2))
    assert (len(kept), len(kept.dropped)) == (0, 2)
    assert len(decode(Scenarios, encode(kept), "scenarios").dropped) == 2
    again = drop_with_few_units(dataclasses.replace(with_tracks([[3]], 4), dropped=kept.dropped[:1]))
    assert again.dropped[0] == kept.dropped[0] and len(again.dropped) == 2


def test_scenarios_without_photographs_are_kept_as_they_are():
    plain = dataclasses.replace(with_tracks([[0]], 1), failures=None)
    assert drop_with_few_units(plain) is plain


def test_wrong_frames_of_one_track_are_one_piece_of_evidence_for_the_error_of_a_component():
    table = np.array([[0, 30, 30], *([track, 1, 0] for track in range(1, 11))], np.float64)
    found = Sources(np.array([40]), np.array([30.0]), (table,))
    assert found.error().tolist() == [0.75]
    np.testing.assert_allclose(found.certain_error(), exact_lower(np.array([1]), np.array([11])))
