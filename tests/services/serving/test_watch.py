"""The scenario watch and the reservoir."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as reference

from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from defuse_core.models import load_vae
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.candidate import prepare
from services.serving.metrics import merged
from services.serving.predict import Job, Served, run_jobs
from services.serving.reservoir import Reservoir, read_traffic, seen_now
from services.serving.watch import Watch, mahalanobis


@pytest.fixture(scope="module")
def candidate(planted):
    return prepare(Run.open(planted, "first"))[1]


def test_distances_are_mahalanobis_distances_from_each_component(candidate, good_spec, pixels):
    vae = load_vae(good_spec, candidate.vae)
    images = torch.from_numpy(pixels[:7])
    with torch.inference_mode():
        codes = vae.encode(images)[0].numpy()
        found = Watch(vae, candidate.means, candidate.covariances)(images).numpy()
    inverses = [np.linalg.inv(c) for c in candidate.covariances]
    expected = [[reference(c, m, i) for m, i in zip(candidate.means, inverses, strict=True)] for c in codes]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    np.testing.assert_allclose(
        mahalanobis(codes, candidate.means, candidate.covariances), expected, rtol=1e-6
    )


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_of_the_training_images_just_the_share_asked_for_lies_in_a_scenario(candidate, splits, share):
    served = Served(candidate, ServeSection(watch_share=share))
    inside = served.answer(splits.train.batch(slice(0, len(splits.train)))).inside
    np.testing.assert_allclose(inside.mean(axis=0), share, atol=0.003)


def test_nearly_all_held_out_images_of_a_scenario_lie_in_it(candidate):
    recall = [np.interp(0.02, candidate.levels, recall) for recall in candidate.recall]
    assert min(recall) > 0.9


def test_a_request_that_fails_does_not_harm_its_batch_mates(candidate, pixels):
    served = Served(candidate, ServeSection())
    alone = served.answer(pixels[:2]).probabilities
    poison = np.full((1, 1, 16, 16), 1e38, np.float32)
    jobs = [Job(pixels[:1], (served,)), Job(poison, (served,)), Job(pixels[1:2], (served,))]
    first, bad, last = (outcome[served] for outcome in run_jobs(jobs))
    assert isinstance(bad, Exception)
    np.testing.assert_allclose(np.concatenate([first.probabilities, last.probabilities]), alone, atol=1e-5)


def test_the_reservoir_stays_bounded_and_samples_evenly(tmp_path):
    store = FolderStore(tmp_path)
    reservoir = Reservoir(store, 5)
    for number in range(200):
        image = np.full((1, 2, 2), number / 200, np.float32)
        reservoir.offer("mnist", seen_now(image, 3, number % 10, "1", ("a", "b")))
        while reservoir._waiting:
            time.sleep(0.001)
    traffic = read_traffic(store, "mnist")
    assert len(traffic) == 5 and set(traffic.scenario) == {3} and traffic.classes == ("a", "b")
    assert traffic.images.mean(axis=(1, 2, 3)).max() > 0.1  # not just the first five
    assert (np.diff(traffic.when) >= 0).all()


class Notes:
    """An executor that only notes what would be written where."""

    def __init__(self, slots):
        self.slots = slots

    def submit(self, _, key, seen):
        self.slots[key] = seen.predicted


def test_every_input_is_as_likely_to_be_kept(tmp_path):
    reservoir = Reservoir(FolderStore(tmp_path), 4)
    kept = np.zeros(40)
    for _ in range(400):
        slots: dict[str, int] = {}
        reservoir._met.clear()
        reservoir._thread = Notes(slots)
        for number in range(40):
            reservoir._waiting = 0
            reservoir.offer("r", seen_now(np.zeros((1, 1, 1), np.float32), 0, number, "1", ()))
        kept[list(slots.values())] += 1
    assert kept.sum() == 1600 and kept.min() > 15 and kept.max() < 75


def test_traffic_gives_a_gallery_of_the_newest_inputs_of_full_scenarios(tmp_path):
    reservoir = Reservoir(FolderStore(tmp_path), 10)
    for scenario, count in ((2, 4), (5, 1)):
        for number in range(count):
            image = np.full((1, 2, 2), number / 10, np.float32)
            reservoir.offer("mnist", seen_now(image, scenario, number, "1", ("a",)))
    reservoir._thread.shutdown()
    gallery = read_traffic(FolderStore(tmp_path), "mnist").gallery(3)
    assert gallery.numbers == (2,)
    assert gallery.predicted.tolist() == [[1, 2, 3]]
    assert gallery.images.shape == (1, 3, 1, 2, 2)


def test_without_traffic_the_error_says_how_to_get_some(tmp_path):
    with pytest.raises(InputError, match=r"serve\.reservoir"):
        read_traffic(FolderStore(tmp_path), "mnist")


def test_pages_of_several_nodes_become_one_page_with_each_head_once():
    head = "# HELP ray_defuse_images x\n# TYPE ray_defuse_images counter\n"
    page = head + 'ray_defuse_images{n="%d"} 1.0\n# HELP other y\nother 2\n'
    assert merged([page % 1, page % 2, ""]) == (
        "# HELP ray_defuse_images x\n# TYPE ray_defuse_images counter\n"
        'ray_defuse_images{n="1"} 1.0\nray_defuse_images{n="2"} 1.0\n'
    )
