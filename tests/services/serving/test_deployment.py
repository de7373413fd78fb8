"""One replica, without Ray: what it answers beside a damaged version, and how long it follows the registry."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from defuse_core.artifacts import NO_SCENARIO, Gallery
from defuse_core.config import ServeSection
from defuse_core.errors import ModelError, StoreError
from defuse_core.export.finished import components_digest
from defuse_core.runs import Run
from services.serving.active_versions import MIN_SECONDS, CanaryStatistics, InitialModel
from services.serving.candidate import prepare_candidate
from services.serving.deployment import FAILURES_BEFORE_CHECK, ClassifierDeployment, canary_for
from services.serving.inputs import decode_body
from services.serving.limits import Unavailable
from services.serving.model import (
    LoadedModel,
    ModelOutput,
    PredictionRequest,
)
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest, RegistryState
from services.serving.traffic import SampledInput, read_traffic
from tests.services.serving.replicas import new_replica, post, put
from tests.waiting import WAIT_S


def test_a_replica_beside_a_damaged_version_starts_answers_503_with_the_reason_and_recovers(own_store):
    put(own_store, "first")
    key = "registry/versions/000001.safetensors"
    whole = own_store.read(key)
    own_store.write(key, whole[:-1])
    replica = new_replica(own_store)
    with pytest.raises(Unavailable, match="in production is damaged or missing: promote its run") as rejected:
        replica.current()
    assert rejected.value.status_code == 503 and own_store.address not in rejected.value.detail
    own_store.write(key, whole)
    versions = replica.watcher.load_changes(replica.active)
    assert versions is not None and versions.names() == {"production": "1"}


def test_sampled_inputs_are_stored_with_the_components_of_their_run(own_store, pictures):
    put(own_store, "first")
    settings = ServeSection(reservoir=3)
    replica = ClassifierDeployment(
        own_store.address, InitialModel(), settings, {"watch_share": 0.5}, require_token=False
    )

    async def send() -> list[int]:
        return [(await post(replica, picture)).status_code for picture in pictures[:20]]

    assert set(asyncio.run(send())) == {200}
    assert replica.reservoir is not None
    replica.reservoir._thread.shutdown()
    drawn = Run.open(own_store, "first").require(Gallery)
    digest = components_digest(drawn)
    stored = own_store.list("traffic/")
    assert stored and all(key.startswith(f"traffic/first/{digest[:16]}/") for key in stored)
    assert len(read_traffic(own_store, "first", drawn)) == len(stored)


def test_each_input_that_is_flagged_or_inside_a_scenario_is_sampled_with_its_own_image_and_answer(
    own_store, pictures, monkeypatch
):
    put(own_store, "first")
    replica, offered = new_replica(own_store, reservoir=3), list[SampledInput]()
    monkeypatch.setattr(replica.reservoir, "offer", lambda run, sampled: offered.append(sampled))
    output = ModelOutput(
        probabilities=np.eye(10, dtype=np.float32)[4:8],
        distances=np.zeros((4, 2), np.float32),
        inside=np.array([[False, False], [False, False], [False, True], [True, True]]),
        failure=np.array([0.1, 0.9, 0.2, 0.8]),
        flagged=np.array([False, True, False, True]),
    )
    monkeypatch.setattr(LoadedModel, "predict", lambda *_: output)
    active = replica.current()
    pixels = decode_body("image/png", pictures[:4], active.in_production.input_spec)
    asyncio.run(replica.predict(active, pixels, b""))
    found = [(one.scenario, one.predicted, one.failure) for one in offered]
    assert found == [(NO_SCENARIO, 5, 0.9), (1, 6, 0.2), (0, 7, 0.8), (1, 7, 0.8)]
    assert np.array_equal([one.image for one in offered], pixels[[1, 2, 3, 3]])
    # a view would keep all images of the request
    assert not any(np.shares_memory(one.image, pixels) for one in offered)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError("Unable to allocate 22 TiB"), 503, "out of memory"),
        (KeyError("x"), 500, "KeyError"),
    ],
)
def test_errors_that_nobody_expected_are_answered_in_json_and_counted(
    own_store, pictures, monkeypatch, error, status, words
):
    monkeypatch.setattr("services.serving.deployment.decode_body", failing_with(error))
    put(own_store, "first")
    replica, counted = new_replica(own_store), []
    monkeypatch.setattr(replica.metrics.rejected, "inc", lambda *count: counted.append(count))
    reply = asyncio.run(post(replica, pictures[0]))
    assert reply.status_code == status and words in reply.json()["error"]
    assert counted == [(1, {"status": str(status)})]


def failing_with(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_network_without_memory_is_answered_503_with_retry_after(own_store, pictures, monkeypatch, error):
    put(own_store, "first")
    monkeypatch.setattr(LoadedModel, "predict", failing_with(error))
    monkeypatch.setattr(LoadedModel, "warm_up", lambda *_: None)
    reply = asyncio.run(post(new_replica(own_store), pictures[0]))
    assert reply.status_code == 503 and "out of memory" in reply.json()["error"]
    assert reply.headers["Retry-After"]


CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access")


@pytest.mark.parametrize(
    ("error", "on_zeros", "healthy"),
    [
        (CUDA_ERROR, CUDA_ERROR, False),
        (RuntimeError("an input of ones"), 1.0, True),
        (RuntimeError("an input of ones"), np.nan, True),
        (ModelError("not finite"), CUDA_ERROR, True),
    ],
)
def test_a_replica_whose_network_fails_on_everything_is_replaced(
    own_store, pictures, monkeypatch, error, on_zeros, healthy
):
    put(own_store, "first")
    replica, forward = new_replica(own_store), LoadedModel._forward

    def fail(model: LoadedModel, pixels: Any) -> Any:
        if pixels.any() or isinstance(on_zeros, Exception):
            raise error
        return [part * on_zeros for part in forward(model, pixels)]

    async def send(count: int) -> None:
        for _ in range(count):
            assert (await post(replica, pictures[0])).status_code == 500
        await replica.check_health()

    monkeypatch.setattr(LoadedModel, "_forward", fail)
    asyncio.run(send(FAILURES_BEFORE_CHECK - 1))
    with contextlib.nullcontext() if healthy else pytest.raises(RuntimeError, match="CUDA error"):
        asyncio.run(send(1))


def test_a_request_that_waits_for_the_decoding_thread_keeps_its_slot_after_its_timeout(
    own_store, pictures, caplog
):
    put(own_store, "first")
    replica = new_replica(own_store, timeout_s=2.0, max_ongoing=1, max_queued=0)
    large = pictures[0] + b"\0" * 40_000  # decoded in the thread, not in the event loop

    async def replies() -> list[httpx.Response]:
        blocked = threading.Event()
        replica._decode_thread.submit(blocked.wait)
        late, rejected = await post(replica, large), await post(replica, large)
        blocked.set()
        await asyncio.wrap_future(replica._decode_thread.submit(int))
        await asyncio.sleep(0)
        return [late, rejected, await post(replica, large)]

    late, rejected, answered = asyncio.run(replies())
    gc.collect()
    assert "never retrieved" not in caplog.text
    assert late.status_code == 503 and "no answer within 2 s" in late.text
    assert rejected.status_code == 503 and "overloaded: 1 requests in progress" in rejected.text
    assert answered.status_code == 200


def test_a_request_that_production_does_not_answer_leaves_nothing_to_the_canary(
    own_store, pictures, monkeypatch
):
    put(own_store, "first")
    second = prepare_candidate(Run.open(own_store, "second"))[1]
    promote(Registry(own_store), second, PromotionRequest("ana", "", canary=0.5))
    replica, cancelled = new_replica(own_store, timeout_s=0.2), []

    async def never(request: PredictionRequest) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise

    monkeypatch.setattr(replica._batcher, "predict", never)
    monkeypatch.setattr(replica._canary_batcher, "predict", never)
    pixels = decode_body("image/png", [pictures[0]], replica.current().in_production.input_spec)
    key = next(key for key in (bytes([n]) for n in range(99)) if canary_for(replica.active, key))

    async def ask() -> None:
        with pytest.raises(Unavailable):
            await replica.predict(replica.active, pixels, key)
        await asyncio.sleep(0)

    asyncio.run(ask())
    assert len(cancelled) == 2  # that of production and that of the canary


def test_a_canary_whose_end_cannot_be_stored_is_remembered_until_it_is(own_store, pictures, monkeypatch):
    put(own_store, "first")
    second = prepare_candidate(Run.open(own_store, "second"))[1]
    promote(Registry(own_store), second, PromotionRequest("ana", "", canary=0.999))
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.1)
    replica = new_replica(own_store)
    assert replica.active.names() == {"production": "1", "canary": "2"}
    monkeypatch.setattr(CanaryStatistics, "reason_to_end", lambda *_: "too slow")
    end_canary, calls = replica.watcher.registry.end_canary, []

    def fail_once(*change):
        calls.append(replica.ended)
        if len(calls) == 1:
            raise StoreError("no access")
        return end_canary(*change)

    monkeypatch.setattr(replica.watcher.registry, "end_canary", fail_once)

    async def answer_and_end():
        assert (await post(replica, pictures[0])).status_code == 200
        await asyncio.gather(*replica._tasks)

    asyncio.run(answer_and_end())
    assert calls == [2, 2] and replica.ended is None
    assert Registry(own_store).state().canary is None


def test_a_late_comparison_of_a_promoted_shadow_ends_no_other_version(own_store, pictures, monkeypatch):
    put(own_store, "first")
    second, third = (prepare_candidate(Run.open(own_store, name))[1] for name in ("second", "swapped"))
    promote(Registry(own_store), second, PromotionRequest("ana", "", shadow=True))
    replica = new_replica(own_store, min_compared=1, min_agreement=1.0, max_errors=0.0)
    before = replica.active
    shadow = before.shadow
    assert before.names() == {"production": "1", "shadow": "2"} and shadow is not None
    promote(Registry(own_store), second, PromotionRequest("ana", ""))
    promote(Registry(own_store), third, PromotionRequest("ana", "", force="tested", canary=0.5))
    versions = replica.watcher.load_changes(replica.active)
    assert versions is not None and versions.names() == {"production": "2", "canary": "3"}
    replica._activate(versions)
    pixels = decode_body("image/png", [pictures[0]], before.in_production.input_spec)
    ours = before.in_production.predict(pixels)

    async def compare() -> None:
        replica._compare(before, shadow, ours, TimeoutError("too slow"))

    monkeypatch.setattr("services.serving.active_versions.ERROR_WINDOW_S", 0.0)
    for _ in range(MIN_SECONDS):
        before.statistics.add_error()
    asyncio.run(compare())
    assert before.statistics.reason_to_end(replica.section) is not None
    assert replica.active is versions and replica.ended is None


def test_a_request_is_answered_by_the_version_that_it_was_decoded_for(own_store, pictures, monkeypatch):
    put(own_store, "first")
    replica = new_replica(own_store)
    put(own_store, "second")

    def decode_and_switch(*args: Any) -> Any:
        pixels = decode_body(*args)
        versions = replica.watcher.load_changes(replica.active)
        if versions is not None:
            replica._activate(versions)
        return pixels

    monkeypatch.setattr("services.serving.deployment.decode_body", decode_and_switch)

    async def versions() -> list[str]:
        return [(await post(replica, pictures[0])).json()["version"] for _ in range(2)]

    assert asyncio.run(versions()) == ["1", "2"]


def test_the_registry_is_not_polled_after_the_block_ends_with_an_error(own_store):
    async def tasks_left() -> set[asyncio.Task[None]]:
        with pytest.raises(RuntimeError, match="shut down"):
            async with new_replica(own_store).following_registry():
                raise RuntimeError("shut down")
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert not asyncio.run(tasks_left())


def test_a_registry_that_stays_lost_is_logged_once_and_the_version_goes_on_answering(
    own_store, pictures, caplog, monkeypatch
):
    put(own_store, "first")
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.01)
    replica = new_replica(own_store)
    for key in own_store.list("registry/"):
        own_store.delete(key)
    asked: list[RegistryState] = []
    state_after = replica.watcher.registry.state_after
    replica.watcher.registry.state_after = lambda known: asked.append(known) or state_after(known)

    async def answer_after_polls() -> httpx.Response:
        async with replica.following_registry():
            while len(asked) < 4:
                await asyncio.sleep(0.01)
            return await post(replica, pictures[0])

    assert asyncio.run(answer_after_polls()).json()["version"] == "1"
    (line,) = [record.getMessage() for record in caplog.records if "registry" in record.getMessage()]
    assert "the current one stays active" in line and "the registry is gone; restore it" in line


def test_a_version_that_cannot_be_loaded_leaves_the_current_one_active_until_the_next_one(
    own_store, pictures, caplog, monkeypatch
):
    put(own_store, "first")
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.01)
    replica, registry = new_replica(own_store), Registry(own_store)
    registry.store.create("versions/000002.safetensors", b"cut")
    registry.change("version 2 to production", "ana", "", lambda _: {"production": 2})
    second = prepare_candidate(Run.open(own_store, "second"))[1]

    async def versions() -> list[str]:
        async with asyncio.timeout(WAIT_S), replica.following_registry():
            while "the current one stays active" not in caplog.text:
                await asyncio.sleep(0.01)
            before = await post(replica, pictures[0])
            promote(registry, second, PromotionRequest("ana", "", force="version 2 is broken"))
            while replica.active.names() == {"production": "1"}:
                await asyncio.sleep(0.01)
            return [reply.json()["version"] for reply in (before, await post(replica, pictures[0]))]

    assert asyncio.run(versions()) == ["1", "3"]
    assert "000002.safetensors" in caplog.text


def test_a_canary_gets_the_requests_of_a_key_and_without_one_those_of_a_body(own_store, pictures):
    put(own_store, "first")
    second = prepare_candidate(Run.open(own_store, "second"))[1]
    promote(Registry(own_store), second, PromotionRequest("ana", "", canary=0.5))
    replica, keys = new_replica(own_store), [f"user-{n}" for n in range(12)]

    def expected(key: bytes) -> str:
        return "1" if canary_for(replica.active, key) is None else "2"

    async def versions() -> tuple[list[str], list[str]]:
        by_key = [await post(replica, pictures[0], **{"X-Request-Key": key}) for key in keys]
        by_body = [await post(replica, picture) for picture in pictures[:12]]
        return [reply.json()["version"] for reply in by_key], [reply.json()["version"] for reply in by_body]

    by_key, by_body = asyncio.run(versions())
    assert by_key == [expected(key.encode()) for key in keys] and set(by_key) == {"1", "2"}
    assert by_body == [expected(hashlib.sha256(picture).digest()) for picture in pictures[:12]]
    assert set(by_body) == {"1", "2"}


def test_images_and_the_errors_that_are_expected_of_them_are_counted(own_store, pictures, monkeypatch):
    put(own_store, "first")
    replica, counted = new_replica(own_store), {}
    for name in ("images", "expected_errors"):
        monkeypatch.setattr(
            getattr(replica.metrics, name),
            "inc",
            lambda value, tags, name=name: counted.update({name: (value, tags)}),
        )
    pixels = decode_body("image/png", pictures[:7], replica.current().in_production.input_spec)
    answer = asyncio.run(replica.predict(replica.active, pixels, b""))
    expected = sum(one.failure_probability for one in answer.predictions)
    assert counted["images"] == (7, {"version": "1"})
    assert counted["expected_errors"] == (pytest.approx(expected, abs=1e-4), {"version": "1"})
