"""A loaded version: its answers, alone and in batches."""

from __future__ import annotations

import numpy as np
import torch

from defuse_core.config import ServeSection
from services.serving.model import LoadedModel, PredictionRequest, predict_batch, verify_candidate


def test_a_request_that_fails_does_not_affect_the_rest_of_its_batch(candidate, pixels):
    served = LoadedModel(candidate, ServeSection())
    alone = served.predict(pixels[:2]).probabilities
    poison = np.full((1, 1, 16, 16), 1e38, np.float32)
    jobs = [
        PredictionRequest(pixels[:1], served),
        PredictionRequest(poison, served),
        PredictionRequest(pixels[1:2], served),
    ]
    first, bad, last = (result for result in predict_batch(jobs))
    assert isinstance(bad, Exception)
    np.testing.assert_allclose(np.concatenate([first.probabilities, last.probabilities]), alone, atol=1e-5)


def test_a_version_that_is_to_compute_on_the_cpu_is_loaded_there_beside_a_gpu(candidate, pixels, monkeypatch):
    """An exported program that was loaded for a GPU would keep tensors there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LoadedModel(candidate, ServeSection(device="cpu")).predict(pixels[:1]).probabilities.shape == (
        1,
        10,
    )
    verify_candidate(candidate)


def test_a_loaded_version_keeps_its_weights_in_its_networks_alone(candidate):
    kept = LoadedModel(candidate, ServeSection()).candidate
    assert not kept.classifier and not kept.vae and kept.digest == candidate.digest
    assert candidate.classifier and candidate.vae
