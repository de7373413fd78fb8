"""A server that takes connections and does not answer: one warning, and an end."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from defuse_core.errors import NoAnswerError, StoreError
from services.storage import open_store, s3, s3_errors
from tests.ports import free_port

QUIET_S = 0.1  # the read timeout of a test


@pytest.fixture
def hasty(aws: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.MonkeyPatch:
    """A hundredth of all times, and hardly a pause between attempts."""
    caplog.set_level(logging.INFO, "defuse")
    for name, seconds in (("SILENCE_S", 0.5), ("WARN_S", 0.05), ("MAX_PAUSE_S", 0.02), ("_silent", set())):
        aws.setattr(s3_errors, name, seconds)
    aws.setattr(s3, "READ_TIMEOUT_S", QUIET_S)
    aws.setattr(s3, "SEND_TIMEOUT_S", 3 * QUIET_S)
    aws.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    return aws


@dataclass
class StalledServer:
    """As a process that was stopped: the system accepts connections in its place."""

    socket: socket.socket

    @property
    def store(self) -> s3.S3Store:
        return s3.S3Store("bucket", "run/", f"http://127.0.0.1:{self.socket.getsockname()[1]}", "us-east-1")

    def attempts(self) -> int:
        """Return how often it was asked since the last call; each attempt has a connection of its own."""
        count = 0
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.socket.accept()[0].close()
                count += 1
        return count


@pytest.fixture
def stalled(hasty: pytest.MonkeyPatch) -> Iterator[StalledServer]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        hasty.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield StalledServer(server)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_request_without_an_answer_ends_after_a_time_and_warns_once(stalled, caplog):
    with pytest.raises(StoreError, match=r"s3://bucket/run/a: no answer from .* \(ReadTimeoutError\)"):
        stalled.store.read("a")
    assert stalled.attempts() == 5 < s3.PATIENCE
    with pytest.raises(StoreError, match="no answer"):
        stalled.store.list()
    assert warnings(caplog) == [f"the S3 server {stalled.store.endpoint} does not answer, trying again"]


def test_a_store_that_does_not_answer_at_the_start_is_an_error_soon_after_the_warning(stalled, caplog):
    with pytest.raises(StoreError, match="no answer"):
        open_store("s3://bucket/run")
    assert stalled.attempts() == 2
    assert len(warnings(caplog)) == 1


def test_each_attempt_to_send_a_large_object_waits_longer(stalled):
    with pytest.raises(StoreError, match="no answer"):
        stalled.store.write("a", bytes(s3.SEND_BYTES))
    assert stalled.attempts() == 2


def test_a_server_that_is_away_is_warned_of_and_its_return_is_told(hasty, caplog):
    port = free_port()
    store = s3.S3Store("bucket", "away/", f"http://127.0.0.1:{port}", "us-east-1")
    with pytest.raises(StoreError, match="EndpointConnectionError"):
        store.read("a")
    assert len(warnings(caplog)) == 1
    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=_answer_404, args=[server], daemon=True).start()
        with pytest.raises(FileNotFoundError):
            store.read("a")
    assert caplog.messages[-1] == f"the S3 server {store.endpoint} answers again"


def _answer_404(server: socket.socket) -> None:
    body = b"<Error><Code>NoSuchKey</Code></Error>"
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def test_a_glitch_that_the_next_attempt_mends_is_no_outage(hasty, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up_first() -> None:
            server.accept()[0].close()
            _answer_404(server)

        threading.Thread(target=hang_up_first, daemon=True).start()
        store = s3.S3Store("bucket", "", f"http://127.0.0.1:{server.getsockname()[1]}", "us-east-1")
        with pytest.raises(FileNotFoundError):
            store.read("a")
    assert not caplog.messages


class FailsAtFirst(BaseHTTPRequestHandler):
    """Answers the first requests with an error that has the header of a checksum, and then with the object."""

    asked, failures, status = 0, 1, 500

    def do_GET(self) -> None:
        cls = type(self)
        cls.asked += 1
        fails = cls.asked <= cls.failures
        self.send_response(cls.status if fails else 200)
        self.send_header("x-amz-checksum-crc32", "AAAAAA==")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"error" if fails else b"bytes")

    def log_message(self, *_: object) -> None:
        """Nothing: the requests are expected."""


@pytest.fixture
def failing(hasty: pytest.MonkeyPatch) -> Iterator[s3.S3Store]:
    hasty.setattr(FailsAtFirst, "asked", 0)
    with HTTPServer(("127.0.0.1", 0), FailsAtFirst) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield s3.S3Store("bucket", "run/", f"http://127.0.0.1:{server.server_port}", "us-east-1")
        server.shutdown()


@pytest.mark.parametrize("status", sorted(s3_errors.PASSING_STATUS))
def test_an_error_of_a_server_that_is_busy_is_tried_again(failing, hasty, status):
    hasty.setattr(FailsAtFirst, "status", status)
    assert failing.read("key") == b"bytes"
    assert FailsAtFirst.asked == 2


@pytest.mark.parametrize("status", [500, 503])
def test_a_request_has_all_its_attempts_whatever_others_before_it_needed(failing, hasty, status):
    hasty.setattr(FailsAtFirst, "status", status)
    hasty.setattr(FailsAtFirst, "failures", s3.PATIENCE - 1)
    for _ in range(12):
        hasty.setattr(FailsAtFirst, "asked", 0)
        assert failing.read("key") == b"bytes"


def test_requests_at_the_same_time_have_all_their_attempts_each(hasty):
    store = s3.S3Store("bucket", "away/", f"http://127.0.0.1:{free_port()}", "us-east-1")
    attempts = list[int]()
    store._client.meta.events.register("request-created.s3", lambda **_: attempts.append(1))
    with ThreadPoolExecutor(8) as pool:
        for read in [pool.submit(store.read, str(number)) for number in range(8)]:
            assert isinstance(read.exception(), NoAnswerError)
    assert len(attempts) == 8 * s3.PATIENCE


@pytest.mark.parametrize("status", [503, 520])
def test_a_server_that_stays_busy_is_given_up_after_the_attempts_of_the_store(failing, hasty, status):
    hasty.setattr(FailsAtFirst, "status", status)
    hasty.setattr(FailsAtFirst, "failures", 9)
    failing.attempts = 3
    with pytest.raises(NoAnswerError, match=f"answered {status}"):
        failing.read("key")
    assert FailsAtFirst.asked == 3
