"""Objects, and errors in place of one, whose body breaks off or stalls on its way, after the answer has begun.

botocore does not ask for them again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from defuse_core.errors import NoAnswerError
from services.storage import s3
from services.storage.lease import LeaseObject

CONTENT = b"0123456789" * 10


class _Stuttering(BaseHTTPRequestHandler):
    """Sends every object, but of the first answers only the first half: it hangs up, or says no more."""

    protocol_version = "HTTP/1.1"
    stalls = False
    halves = 2  # answers that are cut
    status = 200  # of these
    given_up = threading.Event()  # the client reads no more

    def do_GET(self) -> None:
        cls = type(self)
        self.send_response(cls.status if cls.halves else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if cls.halves:
            cls.halves -= 1
            self.wfile.write(CONTENT[: len(CONTENT) // 2])
            self.wfile.flush()
            self.close_connection = True
            cls.given_up.wait(60 if cls.stalls else 0)
        else:
            self.wfile.write(CONTENT)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(params=["hangs up", "stalls"])
def stuttering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.S3Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.0)
    s3._forget_clients()
    _Stuttering.stalls, _Stuttering.halves, _Stuttering.status = request.param == "stalls", 2, 200
    _Stuttering.given_up.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stuttering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield s3.S3Store("bucket", "run/", f"http://127.0.0.1:{server.server_port}", "us-east-1")
        _Stuttering.given_up.set()
        server.shutdown()
    s3._forget_clients()


def test_an_object_whose_body_breaks_off_is_read_again(stuttering: s3.S3Store) -> None:
    assert stuttering.read("models.safetensors") == CONTENT


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_whose_text_breaks_off_is_asked_for_again(stuttering: s3.S3Store, status: int) -> None:
    _Stuttering.status = status
    assert stuttering.read("models.safetensors") == CONTENT


def test_a_lease_whose_body_breaks_off_is_read_again(stuttering: s3.S3Store) -> None:
    assert LeaseObject(stuttering).read() == ('"1"', CONTENT)


@pytest.mark.parametrize("status", [200, 500])
def test_a_body_that_always_breaks_off_is_one_line(stuttering: s3.S3Store, status: int) -> None:
    _Stuttering.halves, _Stuttering.status = 100, status
    with pytest.raises(NoAnswerError, match=r"s3://bucket/run/a: "):
        stuttering.read("a")
    assert _Stuttering.halves <= 100 - s3.READ_ATTEMPTS  # the client itself asks again where headers are late
