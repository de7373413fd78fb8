"""Planted faults: the rules by which the bench compares groups with a slice, and one small plant that Defuse finds."""

import numpy as np
import pytest

from defuse_core.data import Images
from defuse_core.seeds import generator
from tests.bench.plants import baselines
from tests.bench.plants.baselines import View
from tests.bench.plants.faults import Plant, in_slice, spoil
from tests.bench.plants.populations import Population, mark, paint_at_random
from tests.bench.plants.scoring import Group, compare
from tests.bench.plants.spotcheck import configuration, spotcheck

NAMES = ("0", "1", "2")


def group(rows, count=100, name="a"):
    """A group that names `rows`, the first ones most of all."""
    score = np.full(count, -np.inf)
    score[rows] = -np.arange(len(rows), dtype=float)
    members = np.isfinite(score)
    return Group(name, score, members, score)


def outcome(groups, inside=range(20), wrong=range(30)):
    labels, predicted, slice_ = np.zeros(100, np.int64), np.zeros(100, np.int64), np.zeros(100, bool)
    predicted[list(wrong)] = 1
    slice_[list(inside)] = True
    return compare(groups, slice_, labels, predicted)


def test_a_plant_is_discovered_by_eight_of_the_ten_highest_scores():
    assert outcome([group([0, 1, 2, 3, 4, 5, 6, 7, 50, 51])]).by_precision
    assert not outcome([group([0, 1, 2, 3, 4, 5, 6, 49, 50, 51])]).by_precision


def test_a_group_of_fewer_than_ten_images_misses_those_it_lacks():
    assert outcome([group([0, 1, 2, 3])]).precision == pytest.approx(0.4)


def test_the_union_rule_asks_for_four_fifths_of_the_slice_in_pure_groups():
    halves = [group(list(range(8))), group(list(range(8, 16)))]
    assert outcome(halves).by_union
    assert not outcome(halves[:1]).by_union
    assert not outcome([group(list(range(16)) + list(range(40, 60)))]).by_union  # not pure


def test_a_group_beside_the_plant_is_natural_where_the_classifier_fails_and_false_elsewhere():
    found = outcome([group(list(range(10))), group(list(range(20, 30))), group(list(range(60, 70)))])
    assert (found.belonging, found.natural, found.false) == (1, 1, 1)


def test_without_groups_nothing_is_found():
    found = outcome([])
    assert (found.precision, found.by_precision, found.by_union, found.groups) == (0.0, False, False, 0)


@pytest.fixture(scope="module")
def population():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (600, 1, 32, 32), dtype=np.uint8)
    images = Images(pixels, np.arange(600) % 3)
    part = paint_at_random(images, {"mark": mark}, rng)
    return Population("made up", part, part, part, NAMES, {"mark": mark})


def test_a_noisy_label_spoils_the_slice_and_nothing_else(population):
    plant = Plant("1s with a mark are 2s", "noisy label", "mark", 1, 2)
    inside = in_slice(population.train, plant, population.train)
    assert set(population.train.images.labels[inside]) == {1}
    spoilt = spoil(population, plant, np.random.default_rng(0))
    assert set(spoilt.labels[inside]) == {2}
    assert np.array_equal(spoilt.labels[~inside], population.train.images.labels[~inside])


def test_a_rare_slice_is_left_out_of_the_training(population):
    plant = Plant("marked 1s are left out", "rare", "mark", 1)
    inside = in_slice(population.train, plant, population.train)
    assert len(spoil(population, plant, np.random.default_rng(0))) == 600 - inside.sum()


def test_in_a_correlation_the_trait_occurs_with_one_class_alone(population):
    plant = Plant("a mark stands for 1", "correlation", "mark", 1)
    spoilt = spoil(population, plant, np.random.default_rng(0))
    marked = (spoilt.pixels[:, 0, 2:7, 2:7] == 255).all(axis=(1, 2))
    assert marked[spoilt.labels == 1].all()
    assert not marked[spoilt.labels != 1].any()


def test_a_measured_slice_is_the_highest_share_of_its_class(population):
    plant = Plant("bright 0s are 1s", "noisy label", "brightness", 0, 1, share=0.2)
    inside = in_slice(population.train, plant, population.train)
    candidates = (population.train.images.labels == 0) & population.train.plain
    assert inside.sum() == pytest.approx(0.2 * candidates.sum(), abs=1.5)
    brightness = population.train.traits["brightness"]
    assert brightness[inside].min() > brightness[candidates & ~inside].max()


def planted_view(seed):
    """Three classes far apart; class 1 is read as 2 in the far half of its codes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(450) % 3
    codes = (6.0 * labels[:, None] + rng.standard_normal((450, 4))).astype(np.float32)
    inside = (labels == 1) & (codes[:, 0] > 6.7)
    answers = np.where(inside, 2, labels)
    probabilities = np.full((450, 3), 0.02, np.float32)
    probabilities[np.arange(450), answers] = 0.96
    return View(labels, probabilities, codes, codes), inside


@pytest.mark.parametrize("find", ["confusion_cells", "failure_mixture", "planespot", "domino"])
def test_every_baseline_finds_a_plant_that_is_plain_to_see(find):
    (validation, _), (test, inside) = planted_view(0), planted_view(1)
    function = getattr(baselines, find)
    groups = function(validation, test, NAMES if find == "confusion_cells" else 0)
    assert compare(groups, inside, test.labels, test.predicted).by_precision


def test_blind_spots_of_spotcheck_exclude_each_other_and_hold_squares_of_their_attributes():
    population, plants = spotcheck(2, (300, 10, 10))
    spots = np.stack([population.train.traits[plant.trait] for plant in plants])
    assert spots.sum(axis=0).max() == 1
    assert spots.sum() > 0
    assert all(3 <= len(spot) <= 7 for spot in configuration(2).spots)


def test_equal_seeds_paint_equal_populations():
    images = Images(np.zeros((50, 1, 32, 32), np.uint8), np.zeros(50, np.int64))
    one, other = (paint_at_random(images, {"mark": mark}, generator(3, "paint")) for _ in range(2))
    assert np.array_equal(one.images.pixels, other.images.pixels)
