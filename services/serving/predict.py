"""One version on one device: pixels -> probabilities and the scenarios that the inputs lie in; and batches of such."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defuse_core.artifacts import F32, F64, Bool
from defuse_core.config import ServeSection
from defuse_core.device import device
from defuse_core.errors import ModelError
from defuse_core.models import load_classifier, load_vae
from services.serving.candidate import Candidate
from services.serving.inputs import Expected
from services.serving.watch import Watch

PASS_IMAGES = 256  # images in one forward pass at most, whatever the batch


@dataclass(frozen=True, eq=False)
class Answers:
    """What a version says about n images. Without the watch, distances are (n, 0)."""

    probabilities: F32  # (n, C)
    distances: F32  # (n, A)
    inside: Bool  # (n, A) lies in the scenario

    def rows(self, rows: slice) -> Answers:
        return Answers(self.probabilities[rows], self.distances[rows], self.inside[rows])


class Served:
    """A version, loaded and ready to answer."""

    def __init__(self, candidate: Candidate, settings: ServeSection, number: int | None = None) -> None:
        """Load the networks; `number` is the version's, None for a run's own candidate.

        Raises ModelError for weights that do not fit, or a device that is not there.
        """
        self.number, self.name = number, candidate.run if number is None else str(number)
        self.candidate = candidate
        self.device = chosen_device(settings.device)
        self.settings = settings
        self.half = settings.precision == "bfloat16"
        spec = candidate.run_file()
        self.expected = Expected.of(spec, settings)
        where = f"version {self.name}"
        self.classifier = load_classifier(spec, candidate.classifier, len(candidate.classes), where).to(
            self.device
        )
        self.watch: Watch | None = None
        if settings.watch and len(candidate.scenario):
            vae = load_vae(spec, candidate.vae, where)
            self.watch = Watch(vae, candidate.means, candidate.covariances).to(self.device).eval()
        self.thresholds = thresholds(candidate, settings.watch_share)
        self.fixed = candidate.after >= spec.check.min_scenario_accuracy  # (A,)
        self.scenario_names = candidate.names()
        self.image_s = 0.0  # that an image takes in a full batch

    def warm_up(self, batch: int) -> None:
        """Answer nonsense in the smallest and the largest size, so that no request pays for it, and take the time."""
        sizes = (1, min(batch, PASS_IMAGES))
        for count in (*sizes, sizes[1]):
            started = time.perf_counter()
            self.answer(np.zeros((count, *self.expected.shape), np.float32))
            self.image_s = (time.perf_counter() - started) / count

    def answer(self, pixels: F32) -> Answers:
        """Return the answers for pixels (n, channels, H, W) in [0, 1]. Raises ModelError for one that is not finite."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            parts = [
                self._forward(pixels[at : at + PASS_IMAGES]) for at in range(0, len(pixels), PASS_IMAGES)
            ]
        probabilities, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not np.isfinite(probabilities).all():
            raise ModelError(f"version {self.name}: the classifier's answer is not finite")
        return Answers(probabilities, distances, distances <= self.thresholds[: distances.shape[1]])

    def _forward(self, pixels: F32) -> tuple[F32, F32]:
        images = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        probabilities: Tensor = self.classifier(images).float().softmax(1)
        if self.watch is None:
            return probabilities.cpu().numpy(), np.zeros((len(pixels), 0), np.float32)
        with torch.autocast(self.device.type, enabled=False):  # the distances were calibrated in float32
            distances: Tensor = self.watch(images)
        return probabilities.cpu().numpy(), distances.cpu().numpy()

    def described(self, answers: Answers) -> list[dict[str, Any]]:
        """Return the answers as they go to the client, one per image."""
        best = answers.probabilities.argmax(axis=1)
        shares = np.round(answers.probabilities.astype(np.float64), 7).tolist()
        return [
            {
                "class": int(top),
                "name": self.candidate.classes[top],
                "probabilities": shares[row],
                "scenarios": self._scenarios(answers, row),
            }
            for row, top in enumerate(best)
        ]

    def _scenarios(self, answers: Answers, row: int) -> list[dict[str, Any]] | None:
        """Return the failure scenarios that an image lies in, deepest first; None without the watch."""
        if self.watch is None:
            return None
        found = [
            self._scenario(j, float(answers.distances[row, j])) for j in np.flatnonzero(answers.inside[row])
        ]
        return sorted(found, key=lambda scenario: float(scenario["nearer_share"]))

    def _scenario(self, j: int, distance: float) -> dict[str, Any]:
        candidate = self.candidate
        return {
            "scenario": int(candidate.scenario[j]),
            "name": self.scenario_names[j],
            "fixed": bool(self.fixed[j]),
            "distance": round(distance, 4),
            "nearer_share": round(float(np.interp(distance, candidate.distances[j], candidate.levels)), 5),
        }


def thresholds(candidate: Candidate, share: float) -> F64:
    """Return per scenario the distance that `share` of the training images stay below, (A,)."""
    return np.array([np.interp(share, candidate.levels, distances) for distances in candidate.distances])


def chosen_device(name: str) -> torch.device:
    """Return the device of section `serve`. Raises ModelError where cuda is asked for and cannot be used."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("serve.device: cuda, but torch can use no GPU here; set it to auto or cpu")
    return device() if name == "auto" else torch.device(name)


@dataclass(frozen=True, eq=False)
class Job:
    """One request: its images, and the versions that are asked about them."""

    pixels: F32  # (n, channels, H, W)
    asked: tuple[Served, ...]


Outcome = dict[Served, Answers | Exception]


def run_jobs(jobs: Sequence[Job]) -> list[Outcome]:
    """Return for each job what each version that it asks says. Every version is run once, on all of its images.

    An image that makes a version fail fails alone: its batch-mates are answered without it.
    """
    outcomes: list[Outcome] = [{} for _ in jobs]
    for served in dict.fromkeys(served for job in jobs for served in job.asked):
        rows = [row for row, job in enumerate(jobs) if served in job.asked]
        for row, answers in zip(rows, _answer_all(served, [jobs[row].pixels for row in rows]), strict=True):
            outcomes[row][served] = answers
    return outcomes


def _answer_all(served: Served, requests: list[F32]) -> list[Answers | Exception]:
    try:
        together = served.answer(np.concatenate(requests) if len(requests) > 1 else requests[0])
    except Exception as error:
        return [error] if len(requests) == 1 else [_answer_all(served, [request])[0] for request in requests]
    ends = np.cumsum([len(request) for request in requests])
    return [
        together.rows(slice(end - len(request), end)) for request, end in zip(requests, ends, strict=True)
    ]
