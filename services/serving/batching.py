"""How requests reach the models: those that wait for the same one together, those for a shadow with pauses.

Each fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32
from defuse_core.config import ServeSection
from services.serving.model import LoadedModel, ModelOutput

# Requests for the shadow above this are dropped: answers have priority over comparisons.
MAX_PENDING_SHADOWS = 4
SHADOW_TIME_SHARE = 0.2  # of the time, at most, in which a shadow computes


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
        settings: ServeSection,
    ) -> None:
        self._run, self._max_size, self._wait_s = run, settings.batch_size, settings.batch_wait_s
        self._queue: deque[tuple[PredictionRequest, asyncio.Future[PredictionResult]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def predict(self, request: PredictionRequest) -> PredictionResult:
        """Return the result of the request, after the batch that it becomes part of."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[PredictionResult] = loop.create_future()
        self._queue.append((request, future))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run_batches())
        try:
            return await future
        except asyncio.CancelledError:  # too late for its client: its pixels do not wait for the next batch
            with contextlib.suppress(ValueError):
                self._queue.remove((request, future))
            raise

    async def _run_batches(self) -> None:
        while self._queue:
            if self._wait_s and len(self._queue) < self._max_size:
                await asyncio.sleep(self._wait_s)
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


@dataclass(frozen=True, eq=False)
class ShadowRequest:
    """One request that production has answered, for a shadow to answer too."""

    shadow: LoadedModel
    pixels: F32  # (n, channels, H, W)
    report: Callable[[PredictionResult], None]  # called with the shadow's


class ShadowRunner:
    """Runs a shadow in a thread of its own, with pauses, so that production keeps its speed.

    A low priority of the thread would not help: it could lose the processor while it holds Python's interpreter lock.
    """

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._pending: list[ShadowRequest] = []
        self._thread = ThreadPoolExecutor(1, "shadow")

    async def run(self, request: ShadowRequest) -> None:
        """Return after this request and those that arrive meanwhile are reported; drop requests above the limit.

        Raises what `report` raises, and drops the requests that are left.
        """
        if len(self._pending) >= MAX_PENDING_SHADOWS:
            return
        self._pending.append(request)
        if len(self._pending) > 1:
            return  # another call runs it
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                started = loop.time()
                current = self._pending[0]
                current.report(await loop.run_in_executor(self._thread, self._predict, current))
                await asyncio.sleep((loop.time() - started) * (1 / SHADOW_TIME_SHARE - 1))
                self._pending.pop(0)
        finally:
            self._pending.clear()  # after an error too: what is left would keep later calls from running

    def _predict(self, request: ShadowRequest) -> PredictionResult:
        started = time.thread_time()  # of the processor: the time that other threads take is not the shadow's
        try:
            output = request.shadow.predict(request.pixels)
        except Exception as error:
            return error
        seconds = time.thread_time() - started
        return output if seconds <= self._max_seconds else TimeoutError(f"it took {seconds:.2f} s")
