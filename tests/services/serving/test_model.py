"""A loaded version: its answers, alone and in batches."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defuse_core.config import ServeSection
from defuse_core.device import F32_FLAGS, ieee_f32
from defuse_core.errors import ModelError
from defuse_core.models import load_classifier
from defuse_core.runs import Run
from services.serving.active_versions import InitialModel
from services.serving.candidate import prepare_candidate
from services.serving.deployment import ClassifierDeployment
from services.serving.model import LoadedModel, PredictionRequest, predict_batch, verify_candidate
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest


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


class Standardized(nn.Module):
    """A classifier of images whose pixels have mean 0 and standard deviation 1: NaN for a black image."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        scaled = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        logits: Tensor = self.classifier(scaled.view_as(images))
        return logits


def standardized(*arguments: Any) -> nn.Module:
    return Standardized(load_classifier(*arguments)).eval()


def test_a_classifier_whose_output_is_not_finite_for_a_constant_image_is_served(
    candidate, pixels, monkeypatch
):
    monkeypatch.setattr("services.serving.model.load_classifier", standardized)
    verify_candidate(candidate)
    served = LoadedModel(candidate, ServeSection())
    served.warm_up(4)
    assert served.seconds_per_image > 0 and np.isfinite(served.predict(pixels[:2]).probabilities).all()
    with pytest.raises(ModelError, match="output is not finite"):
        served.predict(np.zeros_like(pixels[:1]))


def test_a_classifier_whose_output_is_finite_for_no_image_is_not_served(candidate):
    weights = {name: np.full_like(array, 3e38) for name, array in candidate.classifier.items()}
    with pytest.raises(ModelError, match="output is not finite"):
        verify_candidate(dataclasses.replace(candidate, classifier=weights))


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


class Noting(nn.Module):
    """A classifier that notes in which format it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.formats = set[str]()

    def forward(self, images: Tensor) -> Tensor:
        self.formats.update(flag.fp32_precision for flag in F32_FLAGS)
        return images.new_zeros(len(images), 10)


def test_a_replica_computes_in_f32_as_the_checks_of_its_version_did(own_store, pixels, monkeypatch):
    promote(
        Registry(own_store), prepare_candidate(Run.open(own_store, "first"))[1], PromotionRequest("ana", "")
    )
    noting = Noting()
    monkeypatch.setattr("services.serving.model.load_classifier", lambda *_: noting)
    with ieee_f32():  # for the flags of this process to be put back
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        replica = ClassifierDeployment(
            own_store.address, InitialModel(), ServeSection(), {}, require_token=False
        )
        asyncio.run(replica.predict(replica.current(), pixels[:1], b""))
    assert noting.formats == {"ieee"}
