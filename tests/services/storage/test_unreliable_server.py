"""A bucket whose server fails, loses answers or stalls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pytest

from services.storage import lease, open_store, s3
from tests.waiting import wait_until


class _Flaky(BaseHTTPRequestHandler):
    """A proxy to moto that fails every fifth call: by hanging up, with a 503, or by losing the answer."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    every = 5
    calls = 0
    failed = 0
    lock = threading.Lock()

    def _pass(self) -> None:
        cls = type(self)
        with cls.lock:
            cls.calls += 1
            fails, how = cls.calls % cls.every == 0, cls.calls // cls.every % 3
            cls.failed += fails
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fails and how == 0:
            self.close_connection = True
            return
        if fails and how == 1:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        sent = {"Content-Type": "application/octet-stream"} | dict(
            self.headers
        )  # else urllib says it is a form
        request = Request(cls.upstream + self.path, body or None, sent, method=self.command)
        try:
            with urlopen(request) as answer:
                status, headers, data = answer.status, answer.headers, answer.read()
        except OSError as error:
            status, headers, data = error.code, error.headers, error.read()  # type: ignore[attr-defined]
        if fails:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {"connection", "transfer-encoding", "server", "date"}:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = _pass  # noqa: N815

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def flaky(moto: str, aws: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    _Flaky.upstream, _Flaky.calls, _Flaky.failed = moto, 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Flaky) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        yield lambda: _Flaky.failed
        proxy.shutdown()


def test_a_server_that_fails_every_fifth_call_is_borne_with(flaky: Callable[[], int]) -> None:
    store = open_store("s3://bucket/flaky")
    with store.lock():
        for number in range(8):
            store.write(f"{number}", b"%d" % number)
        assert [store.read(key) for key in store.list()] == [b"%d" % number for number in range(8)]
    assert flaky() >= 4


def test_an_object_is_created_although_the_answer_is_lost(flaky: Callable[[], int]) -> None:
    store = open_store("s3://bucket/echo")
    made = [store.create(f"{number}", b"%d" % number) for number in range(30)]
    assert all(made) and flaky() >= 9
    assert not any(store.create(f"{number}", b"other") for number in range(30))


class _Stalling(_Flaky):
    """A proxy to moto that, once armed, answers one heartbeat never, and all else."""

    every = 10**9
    armed, stalled, freed = threading.Event(), threading.Event(), threading.Event()

    def do_PUT(self) -> None:
        cls = type(self)
        if cls.armed.is_set() and not cls.stalled.is_set() and self.path.endswith(lease.KEY):
            cls.stalled.set()
            cls.freed.wait()
            self.close_connection = True
        else:
            self._pass()


def test_a_heartbeat_that_gets_no_answer_is_followed_by_another_before_the_lease_ends(
    moto: str, aws: pytest.MonkeyPatch
) -> None:
    aws.setattr(lease, "BEAT_S", 0.2)
    _Stalling.upstream = moto
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stalling) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        watching = s3.S3Store("bucket", "stalled/", moto, "us-east-1")
        try:
            with open_store("s3://bucket/stalled").lock():
                _Stalling.armed.set()
                assert _Stalling.stalled.wait(60)
                begun, content = time.monotonic(), watching.read(lease.KEY)
                wait_until(lambda: watching.read(lease.KEY) != content)
                assert time.monotonic() - begun < lease.LEASE_S
        finally:
            _Stalling.freed.set()
            proxy.shutdown()
