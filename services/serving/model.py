"""One model version on one device: pixels -> probabilities and the failure scenarios that contain the inputs.

Requests that wait for the same version are predicted together; each fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from defuse_core.artifacts import F32, F64, Bool
from defuse_core.artifacts.scenarios import rows_of
from defuse_core.config import RunFile, ServeSection
from defuse_core.device import computing_on, device
from defuse_core.errors import ModelError
from defuse_core.models import Vae, load_classifier, load_vae
from defuse_core.report.evidence_schema import WatchFigures
from defuse_core.watch import FailureDetector
from services.serving.candidate import Candidate
from services.serving.inputs import InputSpec

MAX_FORWARD_IMAGES = 256  # images in one forward pass, for any batch size


class ScenarioMatch(BaseModel):
    """A failure scenario that contains an input."""

    scenario: int = Field(description="index among the components that the run found")
    name: str = Field(
        description="`2 read as 3 (scenario 4)` if `explains`, else `in the region of scenario 4`"
    )
    explains: bool = Field(
        description="whether the answer is the scenario's label, or what its failures were mistaken for"
    )
    fixed: bool = Field(description="whether this version is right in the scenario, as in /v1/model")
    distance: float = Field(description="Mahalanobis distance from the codes of the scenario's own images")
    nearer_share: float = Field(description="share of the training images at a smaller distance")


class Prediction(BaseModel):
    """The answer for one image."""

    label: int = Field(alias="class", description="index of the most probable class")
    name: str = Field(description="its name")
    probabilities: list[float] = Field(description="one per class")
    failure_probability: float | None = Field(
        description="calibrated probability that this answer is wrong; null if the version's detector cannot tell, "
        "see `failures` of /v1/model"
    )
    flagged: bool | None = Field(
        description="whether failure_probability reaches the version's threshold; null with it"
    )
    explanation: str | None = Field(
        description="if the image is flagged and inside a known failure scenario: the name of the nearest that "
        "explains the answer, else `in the region of scenario 4`, the nearest; otherwise null"
    )
    scenarios: list[ScenarioMatch] | None = Field(
        description="known failure scenarios that contain the image, nearest first; null without the watch"
    )


class PredictionResponse(BaseModel):
    """The answer to POST /v1/predict."""

    version: str = Field(description="the model version that answered")
    predictions: list[Prediction] = Field(description="one per image, in the order of the request")


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What a version computes for n images. Without serve.watch, distances are (n, 0)."""

    probabilities: F32  # (n, C)
    distances: F32  # (n, A)
    inside: Bool  # (n, A) inside the scenario
    failure: F64 | None  # (n,) probability that the answer is wrong; None where the version cannot tell
    flagged: Bool  # (n,) failure reaches the threshold

    def rows(self, rows: slice) -> ModelOutput:
        return replace(self, **rows_of(self, rows))


class ScenarioDistances(nn.Module):
    """What `encode_images` and `mahalanobis` of defuse_core compute, as one network."""

    roots: Tensor  # (G, Z, Z) inverse Cholesky factors
    offsets: Tensor  # (G, Z) the same applied to the means

    def __init__(self, vae: Vae, means: F64, covariances: F64) -> None:
        super().__init__()
        self.vae = vae
        roots = np.linalg.inv(np.linalg.cholesky(covariances)) if len(means) else covariances
        self.register_buffer("roots", torch.tensor(roots, dtype=torch.float32))
        self.register_buffer(
            "offsets", torch.tensor(np.einsum("aij,aj->ai", roots, means), dtype=torch.float32)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> Mahalanobis distances (n, G)."""
        mu = self.vae.encode(images)[0].float()  # (n, Z)
        whitened = torch.einsum("aij,nj->nai", self.roots, mu) - self.offsets
        distances: Tensor = whitened.norm(dim=2)
        return distances


class LoadedModel:
    """A version with its networks in memory."""

    def __init__(self, candidate: Candidate, section: ServeSection, number: int | None = None) -> None:
        """Load the networks; `number` is the version's, None for the candidate of a run.

        Raises ModelError for weights that do not fit, or an unavailable device.
        """
        self.number, self.name = number, candidate.run if number is None else str(number)
        self.candidate = candidate
        self.device = select_device(section.device)
        self.section = section
        spec = candidate.run_file()
        self.input_spec = InputSpec.of(spec, section)
        where = f"version {self.name}"
        self.watch_figures = candidate.watch_figures(section)
        self.detector = _detector(candidate, self.watch_figures)
        with computing_on(self.device):
            self.classifier = load_classifier(spec, candidate.classifier, len(candidate.classes), where)
            self.distances = self._load_distances(spec, where)
        self.candidate = replace(candidate, classifier={}, vae={})  # the networks have copies of the weights
        share, levels = section.watch_share, candidate.levels
        # (A,) distances below which this share of the training images are
        self.thresholds = np.array([np.interp(share, levels, each) for each in candidate.distances])
        self.fixed = candidate.after >= spec.check.min_scenario_accuracy  # (A,)
        self.scenario_names = candidate.scenario_names()
        self.seconds_per_image = 0.0  # in a full batch

    def _load_distances(self, spec: RunFile, where: str) -> ScenarioDistances | None:
        """Return the distances from the A scenarios, and from the C classes where the detector needs them."""
        candidate = self.candidate
        means, covariances = candidate.means, candidate.covariances
        if self.detector is not None and self.detector.uses_codes:
            means = np.concatenate([means, candidate.failures.means])
            covariances = np.concatenate([covariances, candidate.failures.covariances])
        if not self.section.watch or not len(means):
            return None
        vae = load_vae(spec, candidate.vae, where)
        return ScenarioDistances(vae, means, covariances).to(self.device).eval()

    def warm_up(self, batch: int) -> None:
        """Run the smallest and the largest batch, so that no request pays for the first pass; measure the time.

        Raises ModelError where the output is finite neither for zeros nor for noise.
        """
        sizes = (1, min(batch, MAX_FORWARD_IMAGES))
        for count in (*sizes, sizes[1]):
            started = time.perf_counter()
            probabilities = self.run_on_zeros(count)
            self.seconds_per_image = (time.perf_counter() - started) / count
        if not np.isfinite(probabilities).all():
            self.predict(np.random.default_rng(0).random((1, *self.input_spec.shape), np.float32))

    def run_on_zeros(self, count: int) -> F32:
        """Return the probabilities for `count` images of zeros. They may be NaN, as those for a constant image may."""
        return self._run_networks(np.zeros((count, *self.input_spec.shape), np.float32))[1]

    def predict(self, pixels: F32) -> ModelOutput:
        """Return the output for pixels (n, channels, H, W) in [0, 1]. Raises ModelError for one that is not finite."""
        logits, probabilities, distances = self._run_networks(pixels)
        if not np.isfinite(probabilities).all():
            raise ModelError(f"version {self.name}: the classifier's output is not finite")
        regions = distances[:, : len(self.candidate.scenario)]
        failure, threshold = self._failure_probability(logits, distances), self.watch_figures.threshold
        flagged: Bool = np.zeros(len(logits), np.bool_)
        if failure is not None and threshold is not None:  # a detector has a threshold
            flagged = failure >= threshold
        return ModelOutput(
            probabilities, regions, regions <= self.thresholds[: regions.shape[1]], failure, flagged
        )

    def _run_networks(self, pixels: F32) -> tuple[F32, F32, F32]:
        """Return what `_forward` does, for any number of images."""
        half = self.section.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            parts = [
                self._forward(pixels[start : start + MAX_FORWARD_IMAGES])
                for start in range(0, len(pixels), MAX_FORWARD_IMAGES)
            ]
        logits, probabilities, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
        return logits, probabilities, distances

    def _failure_probability(self, logits: F32, distances: F32) -> F64 | None:
        """Return the probability that each answer is wrong, (n,)."""
        if self.detector is None:
            return None
        if not self.detector.uses_codes:
            return self.detector.probability(logits)
        classes = distances[:, len(self.candidate.scenario) :]  # (n, C)
        return self.detector.probability(logits, classes[np.arange(len(logits)), logits.argmax(axis=1)])

    def _forward(self, pixels: F32) -> tuple[F32, F32, F32]:
        """Return logits (n, C), their softmax, and the distances (n, G), without serve.watch (n, 0)."""
        images = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        logits: Tensor = self.classifier(images).float()
        answers = logits.cpu().numpy(), logits.softmax(1).cpu().numpy()
        if self.distances is None:
            return *answers, np.zeros((len(pixels), 0), np.float32)
        with torch.autocast(self.device.type, enabled=False):  # the distances were calibrated in float32
            distances: Tensor = self.distances(images)
        return *answers, distances.cpu().numpy()

    def predictions(self, output: ModelOutput) -> list[Prediction]:
        """Return the answers for the client, one per image."""
        best = output.probabilities.argmax(axis=1)
        probabilities = np.round(output.probabilities.astype(np.float64), 7).tolist()
        failure = [None] * len(best) if output.failure is None else np.round(output.failure, 6).tolist()
        flagged = [None] * len(best) if output.failure is None else output.flagged.tolist()
        answers = []
        for row, label in enumerate(best):
            matches = self._matches(output, row, int(label))
            answers.append(
                Prediction.model_construct(
                    label=int(label),
                    name=self.candidate.classes[label],
                    probabilities=probabilities[row],
                    failure_probability=failure[row],
                    flagged=flagged[row],
                    explanation=_explanation(matches) if flagged[row] else None,
                    scenarios=matches,
                )
            )
        return answers

    def _matches(self, output: ModelOutput, row: int, answer: int) -> list[ScenarioMatch] | None:
        """Return the failure scenarios that contain an image, nearest first; None without serve.watch."""
        if not self.section.watch or not len(self.candidate.scenario):
            return None
        matches = [
            self._match(int(j), float(output.distances[row, j]), answer)
            for j in np.flatnonzero(output.inside[row])
        ]
        # shares are 0 for all that are nearer than every training image
        return sorted(matches, key=lambda match: (match.nearer_share, match.distance))

    def _match(self, j: int, distance: float, answer: int) -> ScenarioMatch:
        candidate = self.candidate
        explains = answer in (candidate.labels[j], candidate.most_common_error[j])
        number = int(candidate.scenario[j])
        return ScenarioMatch(
            scenario=number,
            name=self.scenario_names[j] if explains else f"in the region of scenario {number}",
            explains=explains,
            fixed=bool(self.fixed[j]),
            distance=round(distance, 4),
            nearer_share=round(float(np.interp(distance, candidate.distances[j], candidate.levels)), 5),
        )


def _detector(candidate: Candidate, figures: WatchFigures) -> FailureDetector | None:
    """Return the detector that the figures name; None where it cannot tell."""
    if figures.method is None:
        return None
    detectors = (one.detector for one in candidate.failures.methods)
    return next(detector for detector in detectors if detector.method == figures.method)


def _explanation(matches: list[ScenarioMatch] | None) -> str | None:
    """Return the name of the nearest scenario that explains the answer, or else of the nearest that contains it."""
    if not matches:
        return None
    return next((match for match in matches if match.explains), matches[0]).name


def verify_candidate(candidate: Candidate) -> None:
    """Load the candidate on this machine's processor and predict with it. Raises ModelError if that fails."""
    section = candidate.run_file().serve.model_copy(update={"device": "cpu"})
    LoadedModel(candidate, section).warm_up(1)


def select_device(name: str) -> torch.device:
    """Return the device of section `serve`. Raises ModelError where cuda is requested and unavailable."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "serve.device: cuda, but torch finds no GPU of this replica; set it to auto or cpu, or "
            "serve.gpus_per_replica to 1"
        )
    return device() if name == "auto" else torch.device(name)


@dataclass(frozen=True, eq=False)
class PredictionRequest:
    """The images of one HTTP request, and the version that predicts them."""

    pixels: F32  # (n, channels, H, W)
    model: LoadedModel


PredictionResult = ModelOutput | Exception


def predict_batch(requests: Sequence[PredictionRequest]) -> list[PredictionResult]:
    """Return the result of each request. Every model runs once, on all of its images.

    An image that makes a model fail fails alone: the other requests of the batch are answered without it.
    """
    results: dict[PredictionRequest, PredictionResult] = {}
    for model in dict.fromkeys(request.model for request in requests):
        own = [request for request in requests if request.model is model]
        outputs = _predict_together(model, [request.pixels for request in own])
        results.update(zip(own, outputs, strict=True))
    return [results[request] for request in requests]


class Batcher:
    """Collects requests that arrive while a batch runs into the next batch.

    serve.batch does the same; it spends 0.2 ms on the signature of each call, as much as all else outside the networks.
    """

    def __init__(
        self,
        run: Callable[[list[PredictionRequest]], Awaitable[list[PredictionResult]]],
        section: ServeSection,
    ) -> None:
        self._run, self._max_size = run, section.batch_size
        self._queue: deque[tuple[PredictionRequest, asyncio.Future[PredictionResult]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def predict(self, request: PredictionRequest) -> PredictionResult:
        """Return the result of the request, after the batch that it becomes part of."""
        future: asyncio.Future[PredictionResult] = asyncio.get_running_loop().create_future()
        self._queue.append((request, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_batches())
        try:
            return await future
        except asyncio.CancelledError:  # too late for its client: its pixels do not wait for the next batch
            with contextlib.suppress(ValueError):
                self._queue.remove((request, future))
            raise

    async def _run_batches(self) -> None:
        while self._queue:
            taken = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_size))]
            batch = [(request, future) for request, future in taken if not future.done()]
            results = await self._results([request for request, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _results(self, batch: list[PredictionRequest]) -> list[PredictionResult]:
        try:
            return await self._run(batch)
        except Exception as error:
            return [error] * len(batch)


def _predict_together(model: LoadedModel, parts: list[F32]) -> list[PredictionResult]:
    try:
        together = model.predict(np.concatenate(parts) if len(parts) > 1 else parts[0])
    except Exception as error:
        return [error] if len(parts) == 1 else [_predict_together(model, [part])[0] for part in parts]
    ends = np.cumsum([len(part) for part in parts])
    return [together.rows(slice(end - len(part), end)) for part, end in zip(parts, ends, strict=True)]
