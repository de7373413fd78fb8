"""Divisions of a data set."""

from __future__ import annotations

import numpy as np
import pytest
from data_samples import ids, numbered
from hypothesis import given
from hypothesis import strategies as st

from defuse_core.data import Images
from defuse_core.data.splits import (
    halves,
    hold_out,
    random_rows,
    sample,
    split_tracks,
    stratified_order,
    track_mates,
)
from defuse_core.errors import DataError
from defuse_core.seeds import generator


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 1000))
def test_every_beginning_of_a_stratified_order_has_each_class_in_proportion(labels: list[int], seed: int):
    truth = np.array(labels)
    order = stratified_order(truth, generator(seed, "test"))
    assert sorted(order.tolist()) == list(range(len(labels)))
    middle = len(labels) // 2
    for label in set(labels):
        expected = (truth == label).sum() * middle / len(labels)
        assert abs((truth[order[:middle]] == label).sum() - expected) <= 5  # one per class


def test_any_class_may_come_first_in_a_stratified_order():
    truth = np.arange(30) % 3
    first = {int(truth[stratified_order(truth, generator(seed, "test"))[0]]) for seed in range(50)}
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
    taken = np.array(ids(sample(images, limit, seed)))
    left = np.setdiff1d(np.arange(count), taken)
    assert not set(tracks[taken]) & set(tracks[left])
    assert len(taken) <= limit or len(set(tracks[taken])) == 1
    assert taken.tolist() == sorted(taken.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_two_parts_have_no_track_in_common_and_every_class_in_both(seed: int):
    tracks = np.repeat(np.arange(40), 3)
    labels = tracks // 4  # four tracks a class
    images = Images(numbered(120).pixels, labels, tracks)
    first, second = split_tracks(images, 0.5, generator(seed, "test"))
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


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 1000))
def test_random_rows_are_different_ones_in_order_and_no_more_than_there_are(count: int, most: int, seed: int):
    rows = random_rows(count, most, generator(seed, "test")).tolist()
    assert rows == sorted(set(rows) & set(range(count)))
    assert len(rows) == min(count, most)


def test_random_rows_are_not_the_first_ones():
    assert {random_rows(5, 1, generator(seed, "test"))[0] for seed in range(50)} == set(range(5))


def test_what_is_held_out_and_what_is_kept_are_the_images_in_order_with_each_class_in_proportion():
    images = Images(numbered(20).pixels, np.repeat([0, 1], [15, 5]))
    kept, held = hold_out(images, 0.375, generator(0, "test"))  # 7.5 of 20 are 8
    assert (len(kept), len(held)) == (12, 8)
    assert sorted(ids(kept) + ids(held)) == list(range(20))
    assert (ids(kept), ids(held)) == (sorted(ids(kept)), sorted(ids(held)))
    assert 1 <= held.labels.sum() <= 3


@pytest.mark.parametrize("seed", range(20))
def test_the_only_image_of_a_class_is_kept(seed: int):
    images = Images(numbered(40).pixels, np.repeat([0, 1], [39, 1]))
    kept, held = hold_out(images, 0.15, generator(seed, "test"))
    assert len(held) == 6 and 39 in ids(kept)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7])
def test_every_class_is_kept_however_large_the_share_and_however_few_its_images(share: float):
    labels = np.repeat(np.arange(12), [2] * 6 + [3] * 3 + [7, 9, 11])
    for seed in range(20):
        kept, held = hold_out(Images(numbered(len(labels)).pixels, labels), share, generator(seed, "test"))
        assert set(kept.labels) == set(labels) and len(held) == round(share * len(labels))


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_part_without_an_image_is_refused(share: float):
    found = rf"{share} of 10 images is {round(10 * share)}, and each part needs at least one"
    with pytest.raises(DataError, match=f"^data.validation_share: {found}"):
        hold_out(numbered(10), share, generator(0, "test"))
    tracked = Images(numbered(10).pixels, numbered(10).labels, np.arange(10) // 2)
    with pytest.raises(DataError, match=f"^data.validation_share: {share} of 5 tracks leaves a part empty"):
        hold_out(tracked, share, generator(0, "test"))


def test_what_is_held_out_of_tracks_are_whole_tracks():
    tracked = Images(numbered(20).pixels, np.arange(20) // 10, np.arange(20) // 2)
    kept, held = hold_out(tracked, 0.375, generator(0, "test"))  # 3.75 of 10 tracks are 4
    assert (len(kept), len(held)) == (12, 8)
    assert not set(kept.tracks) & set(held.tracks)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_the_only_track_of_a_class_is_kept(seed: int):
    tracked = Images(numbered(50).pixels, np.repeat([0, 1], [45, 5]), np.arange(50) // 5)
    kept, held = hold_out(tracked, 0.4, generator(seed, "test"))
    assert 1 in kept.labels and len(held) >= 15


def test_the_seed_says_which_images_are_held_out_halved_and_sampled():
    images = numbered(40)
    for divided in (
        lambda seed: ids(hold_out(images, 0.5, generator(seed, "test"))[1]),
        lambda seed: ids(halves(images, seed)[0]),
        lambda seed: ids(sample(images, 20, seed)),
    ):
        assert divided(0) == divided(0) != divided(1)


def test_two_images_can_be_halved_and_one_cannot():
    assert [len(half) for half in halves(numbered(2), 0)] == [1, 1]
    with pytest.raises(DataError, match="the official test set has 1 image, and halving it needs two"):
        halves(numbered(1), 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_sample_is_in_order_and_has_each_class_in_proportion(seed: int):
    images = Images(numbered(120).pixels, np.repeat([0, 1, 2], [80, 20, 20]))
    taken = sample(images, 12, seed)
    assert ids(taken) == sorted(set(ids(taken))) and len(taken) == 12
    assert np.abs(np.bincount(taken.labels) - [8, 2, 2]).max() <= 2
    assert sample(images, None, seed) is sample(images, 120, seed) is images


def test_a_sample_of_tracks_is_as_large_as_whole_tracks_can_make_it():
    tracked = Images(numbered(20).pixels, np.zeros(20, np.int64), np.arange(20) // 4)
    assert [len(sample(tracked, limit, 0)) for limit in (1, 4, 7, 8, 19, 20)] == [4, 4, 4, 8, 16, 20]


def test_mates_are_all_images_of_a_track_but_for_tracks_of_others_and_for_the_last_images_of_a_class():
    tracks = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4, 4])
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1, 2, 2])
    images = Images(numbered(10).pixels, labels, tracks)
    rows, others = np.array([0, 3, 7, 8]), np.array([4])
    # track 1 is one of others; of classes 1 and 2 no image would be left
    assert track_mates(images, rows, others).tolist() == [0, 1, 2]
    # image 3 is left out itself, so that class 5 would have no other image than 0
    rare = Images(images.pixels, np.array([5, 0, 0, 5, 0, 0, 0, 0, 0, 0]), tracks)
    assert track_mates(rare, np.array([0, 3]), others).tolist() == [1, 2]
    assert track_mates(Images(images.pixels, labels), rows, others).tolist() == []
