import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from defuse_core.config import changed_field
from defuse_core.data import open_splits
from defuse_core.errors import VaeHealthError
from defuse_core.evaluation.health import expect_healthy, measure_health, reconstruction_strip
from defuse_core.local import LocalCompute
from defuse_core.models import load_vae
from defuse_core.pipeline import run_defuse
from defuse_core.progress import silent
from defuse_core.runs import ReachedStep, Run
from defuse_core.store import FolderStore
from defuse_core.train import train
from defuse_core.training.reference_models import ReferenceAnnotators
from tests.conftest import tiny

ALIVE = np.ones(4)


def health(kept: int, kl=ALIVE):
    """Of 100 images that the classifier gets right, `kept` reconstructions are right too."""
    labels = np.zeros(100, np.int64)
    reconstructed = np.where(np.arange(100) < kept, 0, 1)
    return measure_health(labels, labels, reconstructed, np.asarray(kl))


@pytest.mark.parametrize(
    ("kept", "kl", "verdict"),
    [
        (100, ALIVE, "fit"),
        (90, ALIVE, "fit"),
        (89, ALIVE, "poor"),
        (50, ALIVE, "poor"),
        (49, ALIVE, "blind"),
        (100, [1, 1, 1, 0.09], "fit"),
        (100, [1, 1, 0.09, 0.09], "poor"),
        (100, [0, 0, 0, 0.09], "blind"),
    ],
)
def test_the_verdict_follows_the_documented_thresholds(kept, kl, verdict):
    assert health(kept, kl).verdict == verdict


def test_an_image_that_the_classifier_gets_wrong_says_nothing_of_the_vae():
    labels, answers = np.zeros(10, np.int64), np.array([0] * 4 + [1] * 6)
    found = measure_health(labels, answers, answers, ALIVE)
    assert (found.originals_right, found.reconstructions_right, found.kept_right) == (0.4, 0.4, 1.0)
    assert found.verdict == "fit"


def test_the_most_frequent_answer_on_reconstructions_is_measured():
    found = health(30)
    assert (found.most_common_answer, found.most_common_share) == (1, 0.7)


def test_training_measures_health_and_stores_originals_beside_reconstructions(tmp_path, tiny_spec, caplog):
    store = FolderStore(tmp_path)
    models = train(tiny(vae={"epochs": 1}, classifier={"epochs": 8}), store, progress=silent)
    assert models.health.images == 300
    assert models.health.reconstructions_right == pytest.approx(1 - models.reconstruction_flips)
    assert models.health.collapsed == int((models.kl_per_dimension < 0.1).sum())
    assert f"the β-VAE is {models.health.verdict}: the classifier gets" in caplog.text
    strip = Image.open(io.BytesIO(store.read("reconstructions.png")))
    assert strip.size == (16 * 64, 2 * 64)


def test_the_upper_row_of_the_strip_is_the_originals(tiny_spec, tiny_models):
    images = open_splits(tiny_spec.data, tiny_spec.seed).train.take(slice(0, 16))
    strip = reconstruction_strip(tiny_spec, load_vae(tiny_spec, tiny_models.vae), images)
    pixels = np.asarray(Image.open(io.BytesIO(strip)).convert("L"))[::4, ::4]
    expected = np.concatenate([image[0] for image in images.batch(slice(0, 16))], axis=1)
    np.testing.assert_allclose(pixels[:16] / 255, expected, atol=0.5 / 255 + 1e-6)
    assert not np.allclose(pixels[16:] / 255, expected, atol=0.1)


@pytest.mark.parametrize(
    ("verdict", "accept", "stops"),
    [
        ("blind", "poor", True),
        ("blind", "blind", False),
        ("poor", "fit", True),
        ("poor", "poor", False),
        ("fit", "fit", False),
    ],
)
def test_a_verdict_worse_than_accept_stops(verdict, accept, stops, tiny_models):
    models = dataclasses.replace(tiny_models, health=dataclasses.replace(tiny_models.health, verdict=verdict))
    spec = tiny(vae={"accept": accept})
    if stops:
        with pytest.raises(VaeHealthError, match=f"the β-VAE is {verdict}.* vae.accept: {verdict} goes on"):
            expect_healthy(spec, models)
    else:
        expect_healthy(spec, models)


@pytest.mark.parametrize(
    ("kl", "vae", "remedy"),
    [
        ([0, 0, 0, 0], {}, "lower vae.beta \\(now 0.3\\)"),
        (ALIVE, {}, "set vae.architecture: convolutional, and choose another"),
        (ALIVE, {"architecture": "convolutional"}, "raise vae.epochs or vae.latent_dim, and choose another"),
    ],
)
def test_the_error_says_what_to_change(kl, vae, remedy, tiny_models):
    models = dataclasses.replace(tiny_models, health=health(10, kl))
    with pytest.raises(VaeHealthError, match=remedy):
        expect_healthy(tiny(vae=vae), models)


def test_a_blind_vae_stops_the_run_before_identification_until_it_is_accepted(tmp_path):
    blind = {"vae": {"epochs": 1}, "classifier": {"epochs": 1}}

    def whole_run(spec):
        run = Run.start(FolderStore(tmp_path), "a", spec, until="identify")
        compute = LocalCompute()
        return run_defuse(run, compute, ReferenceAnnotators(run, compute))

    with pytest.raises(VaeHealthError, match="the β-VAE is blind"):
        whole_run(tiny(**blind))
    assert not FolderStore(tmp_path).list("a/psi")
    with pytest.raises(ReachedStep):
        whole_run(tiny(vae={**blind["vae"], "accept": "blind"}, classifier=blind["classifier"]))
    assert FolderStore(tmp_path).list("a/psi")


def test_accepting_another_verdict_changes_no_result():
    assert changed_field(tiny(), tiny(vae={"accept": "blind"})) is None
