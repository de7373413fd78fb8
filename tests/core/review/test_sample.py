"""Further draws of components in doubt, and failures that nobody reviews."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import (
    NONE_OF_THE_ABOVE,
    Anchors,
    ComponentFailures,
    Corrections,
    Failures,
    Scenarios,
)
from defuse_core.progress import silent
from defuse_core.review.sample import sample_more_images, unreviewed_failures
from defuse_core.store import FolderStore
from tests.conftest import TINY, recommended
from tests.sample_findings import sample_findings


def test_further_images_have_the_majoritys_label_as_those_of_the_gallery(tiny_models, references):
    two = np.full(2, 0.5)
    scenarios = Scenarios(two, np.zeros((2, 4)), np.stack([np.eye(4)] * 2), two, 100, True, 5, -1.0)
    first = references.models[0]
    contrary = {  # the same model, which answers the next class: never of one mind with the other two
        name: np.roll(array, 1, axis=0) if name.startswith("net.27") else array
        for name, array in first.items()
    }
    models = replace(references, models=(first, first, contrary))
    reference = TINY["review"]["reference"] | {"min_confidence": 0.0}
    spec = recommended(review={"tau": 0.1, "reference": reference})
    doubtful = np.array([True, False])
    more = sample_more_images(spec, tiny_models, models, scenarios, doubtful, progress=silent)
    assert more.drawn.tolist() == more.labelled.tolist() == [spec.review.more_images, 0]


def test_further_images_know_the_training_images_or_tracks_that_they_show(tiny_models, references):
    one, rng = np.ones(1), np.random.default_rng(0)
    pixels = rng.integers(256, size=(6, 1, 16, 16)).astype(np.uint8)
    anchors = Anchors(pixels, 100 + np.arange(6), np.arange(6) % 2 == 1)  # 100, 102 and 104 are reviewed
    failures = ComponentFailures(rng.normal(size=(1, 6, 4)).astype(np.float32), np.arange(6)[None], anchors)
    scenarios = Scenarios(one, np.zeros((1, 4)), np.eye(4)[None], one, 6, True, 5, -1.0, failures=failures)
    spec = recommended(review={"tau": 0.1, "more_images": 20})
    more = sample_more_images(spec, tiny_models, references, scenarios, np.array([True]), progress=silent)
    assert set(more.unit[0].tolist()) == {100, 102, 104}
    assert (more.outcome[0] >= 0).sum() == more.labelled[0]
    assert (more.outcome[0] == 1).sum() == more.misclassified[0]
    tracks = replace(failures, anchors=replace(anchors, track=np.repeat([7, 8], 3)))
    of_tracks = replace(scenarios, failures=tracks)
    more = sample_more_images(spec, tiny_models, references, of_tracks, np.array([True]), progress=silent)
    assert set(more.unit[0].tolist()) == {7, 8}


def psi_of(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ψ hold these failures."""
    monkeypatch.setattr("defuse_core.review.sample.subsample_psi", lambda *_: failures)


def failures_at(
    centers: list[float], truth: int, sources: list[int], tracks: list[int] | None = None
) -> Failures:
    codes = np.array(centers, np.float32)[:, None] * np.ones((1, 3), np.float32)
    labels = np.full(len(centers), truth)
    track = None if tracks is None else np.array(tracks)
    return Failures(codes, np.array(sources), labels, labels + 1, source_track=track)


def test_no_failure_is_tuned_on_that_reviewers_rejected_or_labelled_otherwise(tmp_path, monkeypatch):
    found, _ = sample_findings(scenarios=3, accepted=2)
    scenarios = replace(
        found.scenarios,
        means=np.array([[0.0] * 3, [100.0] * 3, [200.0] * 3]),
        covariances=np.stack([np.eye(3)] * 3),
    )
    verdicts = replace(found.verdicts, labels=np.array([4, 5, NONE_OF_THE_ABOVE]))
    fixes = Corrections(np.array([0, 1]), np.array([4, 5]), *np.zeros((2, 2, 24, 3), np.float32))
    psi_of(failures_at([0.0, 0.5, 50.0, 100.0, 150.0, 200.0], 4, [*range(6)]), monkeypatch)
    arguments = recommended(), found.psi, FolderStore(tmp_path), scenarios, verdicts, fixes
    chosen = unreviewed_failures(*arguments, progress=silent)
    assert chosen.source.tolist() == [0, 1, 2, 4]  # 3 is a 5 to the reviewers, 5 is nothing to them


def test_at_most_as_many_unreviewed_failures_as_scenario_images_are_drawn_by_seed(tmp_path, monkeypatch):
    found, _ = sample_findings(scenarios=2, accepted=1)
    fixes = Corrections(np.array([0]), found.verdicts.labels[:1], *np.zeros((2, 1, 24, 3), np.float32))
    psi_of(failures_at([1000.0] * 100, 4, [*range(100)]), monkeypatch)
    arguments = recommended(), found.psi, FolderStore(tmp_path), found.scenarios, found.verdicts, fixes
    first, again = (unreviewed_failures(*arguments, progress=silent).source.tolist() for _ in range(2))
    assert first == again == sorted(set(first)) and len(first) == 24 and first != [*range(24)]


def test_no_unreviewed_failure_is_of_an_image_or_track_that_held_out_images_are_anchored_at(
    tmp_path, monkeypatch
):
    found, _ = sample_findings(scenarios=1, accepted=1)
    anchors = Anchors(np.zeros((2, 1, 4, 4), np.uint8), np.array([10, 20]), track=np.array([7, 8]))
    fixes = Corrections(
        np.array([0]),
        found.verdicts.labels[:1],
        *np.zeros((2, 1, 24, 3), np.float32),
        anchors=anchors,
        tune_anchor=np.zeros((1, 24), np.int64),
        test_anchor=np.ones((1, 24), np.int64),
    )
    psi_of(failures_at([1000.0] * 4, 4, [10, 20, 21, 30], [7, 8, 8, 9]), monkeypatch)
    arguments = recommended(), found.psi, FolderStore(tmp_path), found.scenarios, found.verdicts, fixes
    assert unreviewed_failures(*arguments, progress=silent).source.tolist() == [10, 30]
