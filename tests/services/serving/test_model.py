"""A loaded version: its answers, alone and in batches."""

from __future__ import annotations

import numpy as np

from defuse_core.config import ServeSection
from services.serving.batching import PredictionRequest, predict_batch
from services.serving.model import LoadedModel


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
