"""Where the images of a plant went: a count after every step of Defuse, to tell why a plant was missed."""

from __future__ import annotations

from typing import Any

import numpy as np

from defuse_core.artifacts import Bool, Failures, Models, ReferenceSet, Scenarios
from defuse_core.data import Images
from defuse_core.device import cpu_threads
from defuse_core.models import decode_codes, encode_images, load_classifier, load_vae, predict
from defuse_core.runs import Run
from defuse_core.training.reference_models import load_reference_models, mean_probabilities
from tests.bench.plants.runs import all_failures, candidates, load, owners


def funnel(run: Run, train: Images, inside: Bool, control: Run) -> dict[str, Any]:
    """Return shares of the plant's training images, then of Ψ, then the component that holds most of their codes."""
    models: Models = load(run, Models)
    rows = np.flatnonzero(inside)
    images = train.take(rows)
    classes = len(models.classes)
    with cpu_threads(1):
        classifier, vae = (
            load_classifier(run.spec, models.classifier, classes),
            load_vae(run.spec, models.vae),
        )
        decoded = decode_codes(vae, encode_images(vae, images))
        wrong, read = predict(classifier, images) != images.labels, predict(classifier, decoded)
    found = {
        "images": len(rows),
        "wrong": float(wrong.mean()),
        "decoding_wrong": float((read != images.labels).mean()),
        "decoding_recognised": _recognised(run, control, decoded, images.labels, classes),
    }
    psi = all_failures(run)
    of_plant = inside[psi.source]
    found |= {
        "codes": len(psi),
        "codes_of_plant": int(of_plant.sum()),
        "images_with_codes": len(np.unique(psi.source[of_plant])),
    }
    return found | _components(run, psi, of_plant)


def _recognised(run: Run, control: Run, decoded: Any, labels: Any, classes: int) -> float:
    """Return the share of the plant's decodings in which the reference models still see the right class."""
    references = load(control, ReferenceSet, "references")
    with cpu_threads(1):
        models = load_reference_models(run.spec, run.spec.review.reference, references, classes)
        seen = mean_probabilities(models, decoded)
    return float((seen[np.arange(len(labels)), labels] >= 0.5).mean())


def _components(run: Run, psi: Failures, of_plant: Bool) -> dict[str, Any]:
    """Return, per component that holds some of the plant's codes, how many, how purely, and what became of it."""
    scenarios: Scenarios = load(run, Scenarios)
    sources = np.unique(psi.truth[of_plant])
    dropped = [
        {"source": part.source, "answer": part.answer, "weight": part.weight, "reason": part.reason}
        for part in scenarios.dropped
        if part.source in sources or part.source < 0
    ]
    if not len(scenarios) or not of_plant.any():
        return {"components": [], "dropped": dropped}
    owner = owners(run, psi)
    rows = []
    for candidate in candidates(run):
        held = owner == candidate.component
        share = float(of_plant[held].mean()) if held.any() else 0.0
        if share >= 0.3:
            rows.append(
                {
                    "weight": float(scenarios.weights[candidate.component]),
                    "codes": int(held.sum()),
                    "share_of_plant": share,
                    "label": candidate.label,
                    "answer": candidate.answer,
                    "reason": candidate.reason,
                }
            )
    homeless = float((owner[of_plant] < 0).mean())
    return {
        "components": rows,
        "plant_codes_without_component": homeless,
        "kept_components": len(scenarios),
        "dropped": dropped,
    }
