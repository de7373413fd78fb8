"""Failures that nobody reviewed are tuned on beside the images of the scenarios."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import Corrections, Failures
from defuse_core.data import Images
from defuse_core.local import LocalCompute
from defuse_core.models import decode_codes, load_vae
from defuse_core.pipeline import load_findings, run_defuse
from defuse_core.progress import silent
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from defuse_core.tuning_data import decode_scenario_images
from tests.conftest import recommended, trained_run
from tests.sample_components import sample_failures


@pytest.fixture
def failures() -> Failures:
    """Codes of the training images 7, 3 and 7."""
    codes = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    return sample_failures(codes, np.array([7, 3, 7]), np.array([1, 2, 3]), np.array([4, 5, 6]))


def fixes_with(failures: Failures | None) -> Corrections:
    codes = np.zeros((2, 5, 4), np.float32)
    return Corrections(np.array([0, 1]), np.array([8, 9]), codes, codes, unreviewed=failures)


def test_unreviewed_failures_are_tuned_on_under_the_class_of_their_training_image(tiny_models, failures):
    spec = recommended()
    made = decode_scenario_images(spec, tiny_models, fixes_with(failures), None, progress=silent)
    assert made.d_f.labels.tolist() == [8] * 5 + [9] * 5 + [1, 2, 3] * 3 + [1]  # half of all
    shown = decode_codes(load_vae(spec, tiny_models.vae), failures.codes)
    np.testing.assert_allclose(made.d_f.batch()[10:13], shown, atol=1e-6)
    assert made.tune.labels.tolist() == made.held_out.labels.tolist() == [8] * 5 + [9] * 5
    without = decode_scenario_images(spec, tiny_models, fixes_with(None), None, progress=silent)
    assert without.d_f.labels.tolist() == without.tune.labels.tolist() == [8] * 5 + [9] * 5


def test_images_to_tune_on_and_held_out_images_are_decoded_from_codes_of_their_own(tiny_models):
    spec = recommended()
    tune, test = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    fixes = Corrections(np.array([0, 1]), np.array([8, 9]), tune, test[:, :2])
    vae = load_vae(spec, tiny_models.vae)
    made = decode_scenario_images(spec, tiny_models, fixes, None, progress=silent)
    for images, codes in ((made.tune, tune), (made.held_out, test[:, :2])):
        np.testing.assert_allclose(images.batch(), decode_codes(vae, codes.reshape(-1, 4)), atol=1e-6)
        assert images.labels.tolist() == [8] * codes.shape[1] + [9] * codes.shape[1]


def test_few_unreviewed_failures_are_not_repeated_without_end(tiny_models, failures):
    one = fixes_with(failures.take(np.array([1])))
    made = decode_scenario_images(recommended(), tiny_models, one, None, progress=silent)
    assert made.d_f.labels.tolist() == [8] * 5 + [9] * 5 + [2] * 4
    nobody = fixes_with(failures.take(np.zeros(0, np.int64)))
    made = decode_scenario_images(recommended(), tiny_models, nobody, None, progress=silent)
    assert made.d_f.labels.tolist() == [8] * 5 + [9] * 5


def test_fewer_scenarios_are_tuned_on_with_the_first_failures_alone(tiny_models, failures):
    fixes = fixes_with(failures)
    few = replace(fixes, tune=fixes.tune[:, :1])
    made = decode_scenario_images(recommended(), tiny_models, few, None, progress=silent)
    assert made.d_f.labels.tolist() == [8, 9, 1, 2]


def test_the_baseline_is_tuned_on_the_reviewed_images_alone(tiny_models, failures):
    reviewed = Images(np.zeros((2, 1, 16, 16), np.float32), np.array([5, 6]))
    made = decode_scenario_images(recommended(), tiny_models, fixes_with(failures), reviewed, progress=silent)
    assert made.d_f.labels.tolist() == [5, 6]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("sections", "tuned"),
    [({}, True), ({"correct": {"unreviewed": False}}, False), ({"correct": {"filter": "none"}}, False)],
)
def test_a_run_tunes_on_unreviewed_failures_only_where_they_are_screened_and_wanted(
    tmp_path, tiny_models, references, sections, tuned
):
    spec = recommended(judges={"count": 0}, **sections)
    run = trained_run(FolderStore(tmp_path), "a", spec, tiny_models, references)
    compute = LocalCompute()
    report = run_defuse(run, compute, ReferenceAnnotators(run, compute))
    codes = load_findings(run)[0].fixes.unreviewed
    assert (codes is not None) == tuned
    assert report.scenarios.unreviewed_images == (len(codes) if tuned else 0)
    if tuned:
        assert 0 < len(codes) <= report.scenarios.accepted * run.spec.correct.tune_images
        page = run.store.read("report.html").decode()
        assert f'<b class="unbroken">{len(codes):,}</b> failing draws that nobody' in page
