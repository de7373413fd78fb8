"""Request bodies within limits of size, memory and time, and requests that wait for a slot, without a server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from defuse_core.config import ServeSection
from services.serving import limits
from services.serving.limits import RejectedInput, RequestSlots, Unavailable, UploadLimits

NEVER = None  # the rest of a body that does not arrive


def request(chunks: Sequence[bytes | None], pause_s: float = 0.0, **headers: str) -> Request:
    """A request of 192.0.2.1 whose body arrives in these chunks, with pauses between them."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60 if left[0] is NEVER else pause_s)  # what is cancelled meanwhile is asked again
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "client": ("192.0.2.1", 1234)}, receive)


def received(uploads: UploadLimits, sent: Request) -> bytes:
    async def receive() -> bytes:
        with contextlib.ExitStack() as held:
            return await uploads.receive(sent, held)

    return asyncio.run(receive())


MB = bytes(1_000_000)


@pytest.mark.parametrize("length", ["1000001", "9" * 30, "-1", "1e3", "many"])
def test_a_body_whose_length_is_too_large_or_no_number_is_rejected_unread(length):
    uploads = UploadLimits(ServeSection(max_body_mb=1))
    with pytest.raises(RejectedInput, match="exceeds the limit of 1 MB") as refused:
        received(uploads, request([], content_length=length))
    assert refused.value.status_code == 413


@pytest.mark.parametrize("connection", ["Upgrade, HTTP2-Settings", "keep-alive,upgrade"])
def test_a_request_that_offers_another_protocol_is_told_that_its_body_is_not_read(connection):
    uploads = UploadLimits(ServeSection())
    with pytest.raises(RejectedInput, match="Upgrade: h2c is not read; send it as plain HTTP/1.1") as refused:
        received(uploads, request([b""], connection=connection, upgrade="h2c", content_length="2"))
    assert (refused.value.status_code, refused.value.headers) == (400, {"Connection": "close"})
    assert received(uploads, request([b"ab"], upgrade="h2c")) == b"ab"  # which is no offer
    assert received(uploads, request([b"ab"], connection="keep-alive")) == b"ab"


def test_a_body_up_to_the_limit_is_received_and_one_above_it_is_not_whatever_its_header_says():
    uploads = UploadLimits(ServeSection(max_body_mb=1))
    assert received(uploads, request([MB], content_length="1000000")) == MB
    assert received(uploads, request([b"ab", b"", b"c"])) == b"abc"
    for chunks in ([MB, b"1"], [b"1", MB], [MB[:600_000], MB[:600_000], b""]):
        with pytest.raises(RejectedInput, match="exceeds the limit of 1 MB") as refused:
            received(uploads, request(chunks, content_length="3"))
        assert refused.value.status_code == 413


def test_bodies_that_do_not_fit_into_the_memory_are_tried_again_later():
    uploads = UploadLimits(ServeSection(max_body_mb=1, max_ongoing=2))

    async def receive() -> Unavailable:
        with (
            contextlib.ExitStack() as first,
            contextlib.ExitStack() as second,
            contextlib.ExitStack() as third,
        ):
            await uploads.receive(request([MB[:400_000], MB[:600_000]]), first)
            await uploads.receive(request([MB[:-1]]), second)
            await uploads.receive(request([b"1"]), third)  # all 2 MB
            with pytest.raises(Unavailable, match="too many large bodies at once") as refused:
                await uploads.receive(request([b"1"]), third)
            second.close()
            assert await uploads.receive(request([MB[:-1]]), third) == MB[:-1]
            return refused.value

    assert asyncio.run(receive()).headers == {"Retry-After": "1"}


def test_a_client_that_disconnects_is_no_end_of_its_body():
    async def disconnect() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent = Request({"type": "http", "headers": [], "client": ("192.0.2.1", 1)}, disconnect)
    with pytest.raises(RejectedInput, match="disconnected before the body was complete") as refused:
        received(UploadLimits(ServeSection()), sent)
    assert refused.value.status_code == 400


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that each receiving was given, from its start."""
    given, timeout_at = list[float](), asyncio.timeout_at

    def noted(deadline: float) -> asyncio.Timeout:
        given.append(deadline - asyncio.get_running_loop().time())
        return timeout_at(deadline)

    monkeypatch.setattr(asyncio, "timeout_at", noted)
    return given


def test_a_body_has_the_whole_time_from_its_beginning_on(deadlines, monkeypatch):
    monkeypatch.setattr(limits, "FAST_UPLOAD_S", 0.2)
    uploads = UploadLimits(ServeSection(timeout_s=0.5))
    with pytest.raises(RejectedInput, match=r"did not arrive within 0\.5 s") as refused:
        received(uploads, request([b"a", NEVER]))
    assert refused.value.status_code == 408 and len(deadlines) == 2
    assert 0 < deadlines[0] <= 0.2 and deadlines[1] <= 0.301  # of the clock's resolution
    deadlines.clear()
    with pytest.raises(RejectedInput, match=r"did not arrive within 0\.1 s"):
        received(UploadLimits(ServeSection(timeout_s=0.1)), request([b"a", NEVER]))
    assert len(deadlines) == 1 and deadlines[0] <= 0.1


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        ({}, "did not arrive within 0.2 s"),
        ({"192.0.2.1": 1, "192.0.2.2": 2}, "did not arrive within 0.2 s"),
        ({"192.0.2.1": 2}, "did not arrive within 0.2 s"),  # below MANY_SLOW_UPLOADS
        ({"192.0.2.1": 2, "192.0.2.2": 1}, "within 0.1 s, and 2 other slow bodies from this address"),
        ({"192.0.2.2": 3}, "did not arrive within 0.2 s"),
        ({"192.0.2.2": 4}, "too many slow bodies at once"),
    ],
)
def test_a_slow_body_is_refused_where_many_are_slow_and_some_of_its_address(slow, words, monkeypatch):
    for name, value in (
        ("FAST_UPLOAD_S", 0.1),
        ("MANY_SLOW_UPLOADS", 3),
        ("MAX_SLOW_UPLOADS", 2),
        ("MAX_UPLOADS", 8),
    ):
        monkeypatch.setattr(limits, name, value)
    uploads = UploadLimits(ServeSection(timeout_s=0.2))
    uploads.slow = Counter(slow)
    with pytest.raises(HTTPException, match=words) as refused:
        received(uploads, request([b"a", NEVER]))
    assert refused.value.status_code == (503 if "too many" in words else 408)
    assert dict(uploads.slow) == slow  # it gives its place back


@pytest.mark.parametrize("chunks", [[MB[:-1], NEVER], [b"a", MB[2:], NEVER]])  # the rest once they are slow
def test_slow_bodies_of_one_address_leave_half_of_the_memory_to_others(chunks, monkeypatch):
    monkeypatch.setattr(limits, "FAST_UPLOAD_S", 0.05)
    monkeypatch.setattr(limits, "MAX_SLOW_UPLOADS", 2)
    uploads = UploadLimits(ServeSection(max_body_mb=1, max_ongoing=8, timeout_s=60))

    async def receive(sent: Request) -> bytes:
        with contextlib.ExitStack() as held:
            return await uploads.receive(sent, held)

    async def receive_beside_stalled() -> tuple[bytes, list[str]]:
        stalled = [asyncio.create_task(receive(request(chunks, pause_s=0.04))) for _ in range(8)]
        async with asyncio.timeout(10):
            while sum(task.done() for task in stalled) < 4:
                await asyncio.sleep(0.01)
        body = await receive(request([MB]))
        refused = [str(task.exception()) for task in stalled if task.done()]
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)
        return body, refused

    body, refused = asyncio.run(receive_beside_stalled())
    assert body == MB and not uploads.slow
    assert len(refused) == 4 and all("other slow bodies from this address" in line for line in refused)


def test_a_slow_body_that_arrives_is_whole_and_counts_no_more(monkeypatch):
    monkeypatch.setattr(limits, "FAST_UPLOAD_S", 0.02)
    uploads = UploadLimits(ServeSection(timeout_s=60))
    assert received(uploads, request([b"a", b"b", b"c"], pause_s=0.02)) == b"abc"
    assert not uploads.slow


def test_requests_above_the_limit_wait_in_a_queue_that_is_limited_too():
    async def requests() -> None:
        slots = RequestSlots(ServeSection(max_ongoing=1, max_queued=1, timeout_s=60))
        for _ in range(2):  # the queue is free again after the first time
            with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
                await slots.acquire(first)
                waiting = asyncio.create_task(slots.acquire(second))
                await asyncio.sleep(0)
                with pytest.raises(Unavailable, match="overloaded: 1 requests in progress and 1 waiting"):
                    await slots.acquire(contextlib.ExitStack())
                assert not waiting.done()
                first.close()
                await waiting

    asyncio.run(requests())


def test_a_request_waits_for_its_slot_as_long_as_for_an_answer():
    async def requests() -> None:
        slots = RequestSlots(ServeSection(max_ongoing=1, max_queued=1, timeout_s=0.05))
        with contextlib.ExitStack() as held:
            await slots.acquire(held)
            for _ in range(2):  # a request that gave up does not wait any more
                with pytest.raises(Unavailable, match=r"no answer within 0\.05 s") as refused:
                    await slots.acquire(contextlib.ExitStack())
                assert refused.value.headers == {"Retry-After": "1"}

    asyncio.run(asyncio.wait_for(requests(), 30))
