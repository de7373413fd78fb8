"""Requests that are predicted together, on models that count."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from defuse_core.artifacts import F32
from defuse_core.config import ServeSection
from services.serving.model import (
    Batcher,
    LoadedModel,
    ModelOutput,
    PredictionRequest,
    PredictionResult,
    predict_batch,
)


class Doubling:
    """A model that answers twice its pixels, and fails on negative ones."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def predict(self, pixels: F32) -> ModelOutput:
        self.calls.append(pixels.ravel().tolist())
        if (pixels < 0).any():
            raise ValueError("negative")
        none = np.zeros((len(pixels), 0))
        return ModelOutput(
            2 * pixels.reshape(-1, 1), none, none.astype(bool), None, np.zeros(len(pixels), bool)
        )


def request(model: Doubling, *pixels: float) -> PredictionRequest:
    return PredictionRequest(np.array(pixels, np.float32).reshape(-1, 1, 1, 1), cast(LoadedModel, model))


def answers(results: list[PredictionResult]) -> list[Any]:
    return [
        result.probabilities.ravel().tolist() if isinstance(result, ModelOutput) else str(result)
        for result in results
    ]


def test_every_request_gets_its_own_rows_of_its_own_model_which_runs_once():
    one, two = Doubling(), Doubling()
    batch = [request(one, 1, 2), request(two, 3), request(one, 4), request(two, 5, 6, 7)]
    assert answers(predict_batch(batch)) == [[2, 4], [6], [8], [10, 12, 14]]
    assert (one.calls, two.calls) == ([[1, 2, 4]], [[3, 5, 6, 7]])


def test_a_request_that_fails_fails_alone():
    model, other = Doubling(), Doubling()
    batch = [request(model, 1), request(model, -1), request(other, 2), request(model, 3, 4)]
    assert answers(predict_batch(batch)) == [[2], "negative", [4], [6, 8]]
    assert answers(predict_batch([request(model, -1)])) == ["negative"]


def batched(requests: int, **settings: Any) -> list[list[list[float]]]:
    """The batches in which so many requests of one image, which arrive at once, are predicted."""
    batches: list[list[list[float]]] = []

    async def run(batch: list[PredictionRequest]) -> list[PredictionResult]:
        batches.append([one.pixels.ravel().tolist() for one in batch])
        return predict_batch(batch)

    async def ask() -> None:
        batcher, model = Batcher(run, ServeSection(**settings)), Doubling()
        asked = [batcher.predict(request(model, number)) for number in range(requests)]
        results = await asyncio.gather(*asked)
        assert answers(list(results)) == [[2 * number] for number in range(requests)]
        await asyncio.sleep(0)  # the task ends; the next request starts another one
        assert answers([await batcher.predict(request(model, 9))]) == [[18]]

    asyncio.run(asyncio.wait_for(ask(), 30))
    return batches[:-1]


def test_a_batch_takes_the_oldest_requests_up_to_its_size():
    assert batched(5, batch_size=2) == [[[0], [1]], [[2], [3]], [[4]]]
    assert batched(5, batch_size=64) == [[[0], [1], [2], [3], [4]]]


def test_an_error_of_a_whole_batch_is_the_result_of_each_of_its_requests():
    async def run(batch: list[PredictionRequest]) -> list[PredictionResult]:
        raise RuntimeError("no thread")

    async def ask() -> list[PredictionResult]:
        batcher = Batcher(run, ServeSection())
        return await asyncio.gather(*(batcher.predict(request(Doubling(), n)) for n in range(3)))

    assert answers(asyncio.run(asyncio.wait_for(ask(), 30))) == ["no thread"] * 3


def test_a_request_that_ends_while_its_batch_runs_leaves_the_others_their_answers():
    begun, end = asyncio.Event(), asyncio.Event()

    async def run(batch: list[PredictionRequest]) -> list[PredictionResult]:
        begun.set()
        await end.wait()
        return predict_batch(batch)

    async def ask() -> PredictionResult:
        batcher, model = Batcher(run, ServeSection()), Doubling()
        first, second = (asyncio.create_task(batcher.predict(request(model, n))) for n in (1, 2))
        await begun.wait()
        first.cancel()
        await asyncio.wait({first})
        end.set()
        return await second

    assert answers([asyncio.run(asyncio.wait_for(ask(), 30))]) == [[4]]


def test_a_request_that_is_too_late_for_its_batch_leaves_the_queue():
    async def queued() -> int:
        end = asyncio.Event()

        async def run(requests: list[PredictionRequest]) -> list[PredictionResult]:
            await end.wait()
            return predict_batch(requests)

        batcher = Batcher(run, ServeSection(batch_size=1))
        first = asyncio.create_task(batcher.predict(request(Doubling(), 1)))
        await asyncio.sleep(0.01)  # its batch has begun
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await batcher.predict(request(Doubling(), 2))
        waiting = len(batcher._queue)
        end.set()
        await first
        return waiting

    assert asyncio.run(queued()) == 0
