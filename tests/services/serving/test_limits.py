"""Slow clients and overload: valid requests are answered all the same."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import threading
import time
from typing import Any

import httpx
import pytest
import uvicorn.config
from load_generator import limited, load, request_bytes
from ray.serve._private import http_util
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from defuse_core.config import ServeSection
from services.serving.limits import (
    BearerAuthMiddleware,
    LimitedHttpProtocol,
    RejectedInput,
    RequestSlots,
    Unavailable,
    UploadLimits,
    client_address,
    limit_headers,
)
from tests.waiting import wait_until

TIMEOUT_S = 40.0  # four times the application's default, for slow machines


class SlowClients(threading.Thread):
    """Connections that send `prefix` and then a byte each half second; a closed one is opened again."""

    def __init__(self, port: int, count: int, prefix: bytes) -> None:
        super().__init__(daemon=True)
        self.port, self.count, self.prefix = port, count, prefix
        self.ended = threading.Event()
        self.replies: list[bytes] = []

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        for _ in range(self.count):
            self._open(selector)
        sent = time.monotonic()
        while not self.ended.is_set():
            for key, _ in selector.select(0.05):
                with contextlib.suppress(OSError):
                    self.replies.append(key.fileobj.recv(300))
                selector.unregister(key.fileobj)
                key.fileobj.close()
                self._open(selector)
            if time.monotonic() < sent + 0.5:
                continue
            sent = time.monotonic()
            for key in list(selector.get_map().values()):
                with contextlib.suppress(OSError):
                    key.fileobj.send(b"x")
        for key in list(selector.get_map().values()):
            key.fileobj.close()

    def _open(self, selector: selectors.BaseSelector) -> None:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(self.prefix)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)

    def refused(self) -> bool:
        """Whether a connection was refused since too many of this address are slow."""
        return any(
            b" 408 " in reply and b"other slow bodies from this address" in reply
            for reply in self.replies.copy()
        )

    def stop(self) -> None:
        self.ended.set()
        self.join()


def test_an_overloaded_server_is_unavailable_and_rejects_no_input():
    async def second_request() -> None:
        slots = RequestSlots(ServeSection(max_ongoing=1, max_queued=0))
        with contextlib.ExitStack() as held:
            await slots.acquire(held)
            await slots.acquire(held)

    with pytest.raises(Unavailable, match="overloaded: 1 requests in progress") as raised:
        asyncio.run(second_request())
    assert not isinstance(raised.value, RejectedInput)
    assert (raised.value.status_code, raised.value.headers) == (503, {"Retry-After": "1"})


def test_below_a_route_prefix_too_only_health_routes_are_open_and_the_docs_ask_browsers_for_a_login():
    async def challenge(path: str) -> str | None:
        app = BearerAuthMiddleware(PlainTextResponse("answered"), "secret", lambda status: None)
        transport = httpx.ASGITransport(app, root_path="/digits")
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return (await client.get(f"/digits{path}")).headers.get("www-authenticate")

    found = [asyncio.run(challenge(path)) for path in ("/healthz", "/v1/model", "/docs")]
    assert found == [None, "Bearer", 'Basic realm="Defuse"']


def test_bodies_count_until_their_requests_end_also_while_these_wait_for_a_slot():
    settings = ServeSection(max_ongoing=2, max_queued=6, max_body_mb=1)
    uploads, slots = UploadLimits(settings), RequestSlots(settings)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(1_000_000), "more_body": False}

    async def request(end: asyncio.Event, received: list[bytes]) -> None:
        with contextlib.ExitStack() as held:
            received.append(await uploads.receive(Request({"type": "http", "headers": []}, receive), held))
            await slots.acquire(held)
            await end.wait()

    async def count_received() -> list[int]:
        counts = []
        for _ in range(2):  # the second time all memory is given back
            end, received = asyncio.Event(), []
            work = [asyncio.create_task(request(end, received)) for _ in range(8)]
            await asyncio.sleep(0.1)
            counts.append(len(received))
            end.set()
            errors = await asyncio.gather(*work, return_exceptions=True)
            assert sum(isinstance(error, Unavailable) for error in errors) == 6
        return counts

    assert asyncio.run(count_received()) == [2, 2]


@pytest.fixture(scope="module")
def app(serving, planted):
    return serving(planted, run="first", pin=True, timeout_s=TIMEOUT_S)


def slow_body(path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n"
    return head.encode()


def test_200_bodies_that_arrive_slowly_do_not_block_valid_requests(app, pictures):
    attack = SlowClients(app.port, 200, slow_body(app.predict))
    attack.start()
    wait_until(attack.refused)
    other = {"X-Forwarded-For": "192.0.2.1"}  # valid requests come from another address
    requests = [request_bytes(picture, app.predict, "image/png", **other) for picture in pictures[:50]]
    replies = load(app.port, 4, limited(requests, 100))
    attack.stop()
    assert [reply.status for reply in replies] == [200] * 100
    assert max(reply.seconds for reply in replies) < 0.8 * TIMEOUT_S


def test_a_few_slow_bodies_of_an_address_are_read_to_their_end(app, pictures):
    whole = request_bytes(pictures[0], app.predict, "image/png")
    with socket.create_connection(("127.0.0.1", app.port), timeout=60) as connection:
        connection.sendall(whole[:-20])
        time.sleep(2)
        connection.sendall(whole[-20:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_connection_whose_headers_do_not_arrive_in_time_is_closed(sent, monkeypatch):
    monkeypatch.setattr("services.serving.limits.HEADER_TIMEOUT_S", 0.3)
    with http_server() as port, contextlib.ExitStack() as stack:
        started = time.monotonic()
        connection = stack.enter_context(connected(port))
        connection.sendall(sent)
        assert connection.recv(100) == b""
        assert 0.2 < time.monotonic() - started < 9  # less than by default


def test_headers_that_stop_after_a_first_request_close_the_connection(monkeypatch):
    with http_server() as port, connected(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in connection.recv(1000).split(b"\r\n")[0]
        monkeypatch.setattr("services.serving.limits.HEADER_TIMEOUT_S", 0.3)
        connection.sendall(b"GET / HTTP/1.1\r\nHost")
        assert connection.recv(100) == b""


def test_an_address_with_too_many_connections_without_headers_gets_no_more_until_it_closes_some(monkeypatch):
    monkeypatch.setattr("services.serving.limits.MAX_HEADERS_PER_ADDRESS", 3)
    monkeypatch.setattr("services.serving.limits.HEADER_TIMEOUT_S", 1000.0)  # which would close it too
    with http_server() as port:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connected(port))
            wait_until(lambda: LimitedHttpProtocol._incomplete["127.0.0.1"] == 3)
            fourth = stack.enter_context(connected(port))
            assert fourth.recv(100) == b""
        wait_until(lambda: not LimitedHttpProtocol._incomplete)  # those that were closed count no more


def test_connections_that_change_the_protocol_are_not_counted_for_ever(monkeypatch):
    monkeypatch.setattr("services.serving.limits.HEADER_TIMEOUT_S", 2.0)
    upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with http_server() as port:
        for _ in range(3):
            with connected(port) as connection:
                connection.sendall(upgrade)
                connection.recv(1000)
        wait_until(lambda: not LimitedHttpProtocol._incomplete)


def test_a_body_may_arrive_after_the_time_that_headers_have(monkeypatch):
    monkeypatch.setattr("services.serving.limits.HEADER_TIMEOUT_S", 1.0)
    with http_server(answer_to_body) as port, connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        time.sleep(1.5)
        connection.sendall(b"b")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_an_ordinary_body_in_tcp_segments_is_read_as_it_arrives(monkeypatch):
    monkeypatch.setattr("services.serving.limits.PIECE_INTERVAL_S", 30)
    with http_server() as port, connected(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 57920\r\n\r\n")
        started = time.monotonic()
        for _ in range(40):
            time.sleep(0.002)
            connection.sendall(bytes(1448))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while connection.recv(1000).count(b"200 OK") < 1:
            pass
        assert time.monotonic() - started < 20  # less than one interval


def test_small_pieces_of_earlier_bodies_of_a_connection_do_not_count(monkeypatch):
    monkeypatch.setattr("services.serving.limits.PIECE_INTERVAL_S", 1000.0)
    with http_server(answer_to_body) as port, connected(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(3):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            for _ in range(5):
                time.sleep(0.02)
                connection.sendall(b"x")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_body_in_many_small_pieces_is_read_now_and_then_and_is_whole(monkeypatch):
    monkeypatch.setattr("services.serving.limits.PIECE_INTERVAL_S", 1.0)
    pieces: list[bytes] = []

    async def read_body(scope, receive, send):
        while (message := await receive())["more_body"]:
            pieces.append(message["body"])
        pieces.append(message["body"])
        await answer(send)

    body = bytes(range(150))
    with http_server(read_body) as port, connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 150\r\n\r\n")
        for byte in body:
            time.sleep(0.01)
            connection.sendall(bytes([byte]))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nend")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert b"".join(pieces) == body + b"end"
    assert sum(1 for piece in pieces if piece) < 40  # 8 at once, then one each second, and the last


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("::1", ["192.0.2.7"], "192.0.2.7"),
        ("127.0.0.1", ["forged", "192.0.2.7"], "192.0.2.7"),
        ("127.0.0.1", ["forged, 192.0.2.7"], "192.0.2.7"),
        ("192.0.2.7", ["forged"], "192.0.2.7"),
    ],
)
def test_the_address_of_a_client_is_the_one_that_a_proxy_on_this_machine_adds(peer, forwarded, address):
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    request = Request({"type": "http", "client": (peer, 1234), "headers": headers})
    assert client_address(request, forwarded_for=True) == address
    assert client_address(request, forwarded_for=False) == peer  # the header may be the client's


@pytest.fixture
def limited_headers(monkeypatch):
    """This process after `limit_headers`, whose changes are taken back."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    monkeypatch.setattr(http_util, "socket", socket)
    limit_headers()


def test_uvicorn_leaves_the_address_of_a_client_to_us(limited_headers):
    seen = []

    async def application(scope, receive, send):
        seen.append(scope["client"][0])
        await answer(send)

    with http_server(application) as port:
        httpx.get(f"http://127.0.0.1:{port}", headers={"X-Forwarded-For": "192.0.2.7"}, timeout=60)
    assert seen == ["127.0.0.1"]


def test_a_server_listens_on_a_port_whose_last_connections_are_not_forgotten(limited_headers):
    with http_util.socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        port = first.getsockname()[1]
        with connected(port) as client:
            first.accept()[0].close()  # before the client closes it
            assert client.recv(1) == b""
    with socket.socket() as serves_own, pytest.raises(OSError, match="in use"):
        serves_own.bind(("127.0.0.1", port))
    with http_util.socket.socket() as next_one:
        next_one.bind(("127.0.0.1", port))


async def answer(send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answer_at_once(scope, receive, send):
    await answer(send)


async def answer_to_body(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await answer(send)


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=60)


@contextlib.contextmanager
def http_server(app=answer_at_once):
    """Run uvicorn with the limited protocol; yields its port."""
    config = uvicorn.Config(app, port=0, http=LimitedHttpProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
