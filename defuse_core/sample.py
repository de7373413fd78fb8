"""Algorithm 2: draw images from the components, for reviewers to see and for the classifier to be corrected on."""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import F32, Corrections, Gallery, Models, Scenarios, Verdicts
from defuse_core.config import RunFile
from defuse_core.device import cpu_threads
from defuse_core.models import decode_codes, load_classifier, load_vae, predict
from defuse_core.progress import Progress
from defuse_core.seeds import generator


def sample_codes_from(
    scenarios: Scenarios, component: int, count: int, tau: float, rng: np.random.Generator
) -> F32:
    """Return `count` codes from N(mu_j, τ·Σ_j) of one component, (count, Z). τ multiplies the covariance."""
    root = np.linalg.cholesky(tau * scenarios.covariances[component])
    normal = rng.standard_normal((count, scenarios.means.shape[1]))
    codes: F32 = (scenarios.means[component] + normal @ root.T).astype(np.float32)
    return codes


def sample_gallery(spec: RunFile, models: Models, scenarios: Scenarios, *, progress: Progress) -> Gallery:
    """Return R images of every component, decoded, with the classifier's answers."""
    review = spec.review
    progress("drawing images to review", 0, 1, "galleries")
    codes = np.zeros((len(scenarios), review.images, spec.vae.latent_dim), np.float32)
    for component in range(len(scenarios)):
        rng = generator(spec.seed, "gallery", component)
        codes[component] = sample_codes_from(scenarios, component, review.images, review.tau, rng)
    with cpu_threads(1):
        flat = decode_codes(load_vae(spec, models.vae), codes.reshape(-1, spec.vae.latent_dim))
        predicted = predict(load_classifier(spec, models.classifier, len(models.classes)), flat)
    shape = codes.shape[:2]
    return Gallery(flat.reshape(*shape, *flat.shape[1:]), codes, predicted.reshape(shape), models.classes)


def sample_corrections(spec: RunFile, scenarios: Scenarios, verdicts: Verdicts) -> Corrections:
    """Return D_f: per failure scenario, codes to tune on and others to test on, under the scenario's one label."""
    section, accepted = spec.correct, verdicts.accepted
    count = section.tune_images + section.test_images
    codes = np.zeros((len(accepted), count, spec.vae.latent_dim), np.float32)
    for row, component in enumerate(accepted):
        rng = generator(spec.seed, "corrections", int(component))
        codes[row] = sample_codes_from(scenarios, int(component), count, spec.review.tau, rng)
    tune, test = codes[:, : section.tune_images], codes[:, section.tune_images :]
    return Corrections(accepted, verdicts.labels[accepted], tune, test)
