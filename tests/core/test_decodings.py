"""Pictures of scenarios that do not fit in memory: decoded on demand, to the results of those that do."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defuse_core.artifacts import Anchors, Corrections, Models, ReferenceSet
from defuse_core.correct import FineTuning, fine_tune
from defuse_core.data import Images, open_splits
from defuse_core.device import autocast
from defuse_core.evaluation import evaluate
from defuse_core.evaluation.controls import Controls
from defuse_core.evaluation.evidence import gather_evidence
from defuse_core.export.suite import save_suite
from defuse_core.local import LocalCompute
from defuse_core.models import Decoder, Decodings, StoredVae
from defuse_core.models.inference import BATCH
from defuse_core.pipeline import load_finished, run_defuse
from defuse_core.protocols import silent
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from defuse_core.tuning_data import by_scenario, decode_scenario_images, held_out_images
from tests.conftest import fine_tuning_data, recommended, tiny, trained_run
from tests.sample_components import sample_failures

SPEC = tiny(vae={"decode": "anchored"}, correct={"lambdas": [1.0], "epochs": 2})
ROUNDING = 1e-5


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of decodings fits in memory."""
    monkeypatch.setattr("defuse_core.models.decoding.MAX_DECODED", 0)


def anchored_fixes(count: int = 24) -> Corrections:
    """Two scenarios with draws near 12 training images, and unreviewed failures near others."""
    rng = np.random.default_rng(0)
    source = np.arange(0, 36, 3)
    pixels = np.asarray(open_splits(SPEC.data, SPEC.seed).train.pixels)[source]
    codes = rng.normal(size=(3, 2, count, 4)).astype(np.float32)
    anchor = rng.integers(12, size=(2, 2, count))
    failures = sample_failures(
        codes[2].reshape(-1, 4), rng.integers(300, size=2 * count), *np.ones((2, 2 * count), np.int64)
    )
    return Corrections(
        np.array([0, 3]),
        np.array([8, 2]),
        codes[0],
        codes[1],
        anchors=Anchors(pixels, source, np.zeros(12, np.bool_)),
        tune_anchor=anchor[0],
        test_anchor=anchor[1],
        unreviewed=failures,
    )


@pytest.mark.parametrize("anchored", [False, True])
def test_any_rows_are_the_decodings_of_their_codes(tiny_models: Models, anchored: bool) -> None:
    vae, rng = StoredVae(SPEC, tiny_models.vae), np.random.default_rng(0)
    codes, rows = rng.normal(size=(2, 10, 4)).astype(np.float32), rng.integers(9, size=(2, 10))
    images = Images(rng.random((9, 1, 16, 16), np.float32), np.zeros(9, np.int64)) if anchored else None
    decodings = Decodings(vae, codes, images, rows if anchored else None)
    expected = Decoder(vae.loaded, images).decode(codes, rows)
    np.testing.assert_array_equal(decodings.loaded(), expected)
    assert decodings.shape == expected.shape and decodings.dtype == expected.dtype
    asked = np.array([7, 0, 19, 7])
    np.testing.assert_allclose(decodings[asked], expected[asked], atol=ROUNDING)
    np.testing.assert_allclose(decodings.at(slice(5, 20))[2:4], expected[7:9], atol=ROUNDING)
    np.testing.assert_allclose(decodings.at(asked)[1:], expected[asked[1:]], atol=ROUNDING)
    assert decodings[:0].shape == (0, 1, 16, 16)


def test_only_the_images_that_codes_are_anchored_at_are_encoded(tiny_models, monkeypatch):
    vae, fixes, encoded = StoredVae(SPEC, tiny_models.vae), anchored_fixes(count=4), []
    encode = vae.loaded.encode

    def noting(images):
        encoded.append(len(images))
        return encode(images)

    monkeypatch.setattr(vae.loaded, "encode", noting)
    held_out = held_out_images(vae, fixes)
    assert isinstance(held_out.pixels, np.ndarray)
    assert sum(encoded) == len(np.unique(fixes.test_anchor)) < len(fixes.anchors.source)


def test_what_does_not_fit_in_memory_together_with_failures_is_not_decoded_to_find_out(
    tiny_models, monkeypatch
):
    fixes, decoded, decode = anchored_fixes(), [], Decoder.decode

    def noting(decoder, codes, anchors=None):
        shown = decode(decoder, codes, anchors)
        decoded.append(len(shown))
        return shown

    monkeypatch.setattr(Decoder, "decode", noting)
    monkeypatch.setattr(
        "defuse_core.models.decoding.MAX_DECODED", 4 * 16 * 16 * 48
    )  # the scenarios' part alone
    made = decode_scenario_images(SPEC, tiny_models, fixes, None, progress=silent)
    assert isinstance(made.d_f.pixels, Decodings) and isinstance(made.held_out.pixels, np.ndarray)
    assert (made.of_scenarios, len(made.d_f)) == (48, 96)
    assert sum(decoded) == len(made.held_out)


@pytest.mark.usefixtures("no_memory")
def test_they_change_neither_random_numbers_nor_rounding_of_what_is_computed_around_them(tiny_models):
    codes = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = Decoder(StoredVae(SPEC, tiny_models.vae).loaded).decode(codes)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with autocast("bf16"):
        shown = Decodings(StoredVae(SPEC, tiny_models.vae), codes)[:]
    np.testing.assert_array_equal(shown, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("no_memory")
def test_images_that_do_not_fit_in_memory_travel_as_codes(tiny_models: Models) -> None:
    fixes = anchored_fixes(count=2000)
    made = decode_scenario_images(SPEC, tiny_models, fixes, None, progress=silent)
    stored = pickle.dumps(made)
    codes = [fixes.tune, fixes.test, fixes.unreviewed.codes]
    labels_and_rows = 2 * 8 * (len(made.d_f) + len(made.held_out))
    weights = sum(array.nbytes for array in tiny_models.vae.values())
    pictures = fixes.anchors.pixels.nbytes + open_splits(SPEC.data, SPEC.seed).train.pixels.nbytes
    parts = sum(each.nbytes for each in codes) + labels_and_rows + weights + pictures
    assert len(stored) < parts + 50_000 < 4 * 16 * 16 * len(made.d_f) / 4
    there = pickle.loads(stored)
    rows = np.array([0, 2500, 7999])
    np.testing.assert_array_equal(there.d_f.batch(rows), made.d_f.batch(rows))
    np.testing.assert_array_equal(there.held_out.batch(rows // 2), made.held_out.batch(rows // 2))


@pytest.mark.parametrize("spec", [SPEC, tiny(correct={"lambdas": [1.0], "epochs": 2})])
def test_a_correction_on_images_that_do_not_fit_in_memory_equals_one_on_those_that_do(
    tiny_models, spec, request
):
    fixes = anchored_fixes()
    if spec.vae.decode == "plain":
        fixes = replace(fixes, anchors=None, tune_anchor=None, test_anchor=None)
    data = fine_tuning_data(spec, tiny_models, fixes)
    request.getfixturevalue("no_memory")
    lazy = fine_tuning_data(spec, tiny_models, fixes)
    for one, other in (
        (data.scenario.d_f, lazy.scenario.d_f),
        (data.scenario.tune, lazy.scenario.tune),
        (data.scenario.held_out, lazy.scenario.held_out),
    ):
        assert isinstance(one.pixels, np.ndarray) and isinstance(other.pixels, Decodings)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.batch(), other.batch(), atol=ROUNDING)
    (*_, expected), (*_, found) = (
        fine_tune(FineTuning(spec, tiny_models, each), 1.0, None) for each in (data, lazy)
    )
    for row, other in zip(expected.rows, found.rows, strict=True):
        assert other.loss == pytest.approx(row.loss, rel=1e-3)
        assert other.tune == pytest.approx(row.tune, abs=0.03)
        assert other.scenario == pytest.approx(row.scenario, abs=0.03)
    for name, array in expected.best.items():
        np.testing.assert_allclose(found.best[name], array, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("no_figures")
def test_evaluation_evidence_and_suite_of_images_that_do_not_fit_in_memory_are_those_of_images_that_do(
    tmp_path: Path, tiny_models: Models, references: ReferenceSet, request: pytest.FixtureRequest
) -> None:
    spec = recommended(
        vae={"decode": "anchored"},
        identify={"scale": 3.0},
        judges={"count": 1, "epochs": 3},
        correct={"test_images": 120},
    )
    run = trained_run(FolderStore(tmp_path), "run", spec, tiny_models, references)
    compute = LocalCompute()
    run_defuse(run, compute, ReferenceAnnotators(run, compute))
    found = load_finished(run).found
    controls = Controls((found.sweep,), (found.sweep, found.baseline))
    vae = StoredVae(spec, tiny_models.vae)

    def results():
        return (
            evaluate(spec, found, run.store, progress=silent),
            gather_evidence(spec, found, controls, progress=silent),
            save_suite(run, tmp_path / str(len(list(tmp_path.iterdir())))).pictures.pixels.astype(float),
        )

    in_memory = results()
    request.getfixturevalue("no_memory")
    at_once, decode = [], Decodings.__getitem__

    def noting(decodings, rows):
        shown = decode(decodings, rows)
        at_once.append(len(shown))
        return shown

    request.getfixturevalue("monkeypatch").setattr(Decodings, "__getitem__", noting)
    assert all(
        isinstance(each.pixels, Decodings) for each in by_scenario(held_out_images(vae, found.fixes), 2)
    )
    on_demand = results()
    assert max(at_once) <= BATCH < len(found.fixes.labels) * spec.correct.test_images
    for one, other in zip(in_memory[:2], on_demand[:2], strict=True):
        for field in fields(one):
            _expect_alike(getattr(one, field.name), getattr(other, field.name))
    np.testing.assert_allclose(on_demand[2], in_memory[2], atol=1)


def _expect_alike(one: object, other: object) -> None:
    if isinstance(one, np.ndarray) and one.dtype.kind == "f":
        np.testing.assert_allclose(other, one, atol=0.03)
    elif isinstance(one, np.ndarray | str | int | tuple):
        np.testing.assert_array_equal(other, one)
