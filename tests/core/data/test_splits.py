"""Divisions of a data set."""

from __future__ import annotations

import numpy as np
from data_samples import ids, numbered
from hypothesis import given
from hypothesis import strategies as st

from defuse_core.data import Images
from defuse_core.data.splits import halves, mixed_order, sample_tracks, split_tracks
from defuse_core.seeds import generator


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 1000))
def test_every_beginning_of_a_mixed_order_has_each_class_in_proportion(labels: list[int], seed: int):
    truth = np.array(labels)
    order = mixed_order(truth, generator(seed, "test"))
    assert sorted(order.tolist()) == list(range(len(labels)))
    middle = len(labels) // 2
    for label in set(labels):
        expected = (truth == label).sum() * middle / len(labels)
        assert abs((truth[order[:middle]] == label).sum() - expected) <= 5  # one per class


def test_any_class_may_come_first_in_a_mixed_order():
    truth = np.arange(30) % 3
    first = {int(truth[mixed_order(truth, generator(seed, "test"))[0]]) for seed in range(50)}
    assert first == {0, 1, 2}


@given(st.integers(2, 300), st.integers(0, 1000))
def test_halves_are_disjoint_whole_and_in_order(count: int, seed: int):
    first, second = (ids(half) for half in halves(numbered(count), seed))
    assert sorted(first + second) == list(range(count))
    assert abs(len(first) - len(second)) <= 1
    assert first == sorted(first)
    assert second == sorted(second)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=40), st.integers(1, 100), st.integers(0, 1000))
def test_a_track_is_sampled_whole_or_not_at_all(lengths: list[int], limit: int, seed: int):
    tracks = np.repeat([f"{i % 3}/{i:05d}" for i in range(len(lengths))], lengths)
    count = len(tracks)
    labels = np.repeat(np.arange(len(lengths)) % 3, lengths)
    images = Images(numbered(count).pixels, labels, np.unique(tracks, return_inverse=True)[1])
    taken = np.array(ids(sample_tracks(images, limit, seed)))
    left = np.setdiff1d(np.arange(count), taken)
    assert not set(tracks[taken]) & set(tracks[left])
    assert len(taken) <= limit or len(set(tracks[taken])) == 1
    assert taken.tolist() == sorted(taken.tolist())


def test_two_parts_have_no_track_in_common_and_every_class_in_both():
    tracks = np.repeat(np.arange(40), 3)
    labels = tracks // 4  # four tracks a class
    images = Images(numbered(120).pixels, labels, tracks)
    first, second = split_tracks(images, 0.5, generator(0, "test"))
    assert sorted([*first, *second]) == list(range(120))
    assert not set(tracks[first]) & set(tracks[second])
    assert set(labels[first]) == set(labels[second]) == set(range(10))


@given(st.lists(st.integers(2, 5), min_size=1, max_size=30), st.integers(0, 1000))
def test_every_class_of_two_images_or_more_is_in_both_halves_and_in_a_small_sample(
    sizes: list[int], seed: int
):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = Images(numbered(len(labels)).pixels, labels)
    first, second = split_tracks(images, 0.5, generator(seed, "test"))
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert set(labels[first]) == set(labels[second]) == set(labels)


def test_images_without_tracks_are_divided_one_by_one():
    first, second = split_tracks(numbered(10), 0.3, generator(0, "test"))
    assert (len(first), sorted([*first, *second])) == (3, list(range(10)))
