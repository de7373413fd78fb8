"""Addresses for `defuse submit` and `defuse jobs` at which something else than a dashboard answers, or by a detour."""

from __future__ import annotations

import contextlib
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.jobs import Jobs
from defuse_core.errors import ComputeError, InputError

VERSION = b'{"version": "4", "ray_version": "2.50.0", "ray_commit": ""}'


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which Ray's client replaces
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def answering_with(status: int, body: bytes, location: str = "") -> Iterator[ThreadingHTTPServer]:
    """A server that answers every question with the same, and redirects to `location` where that is given."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_submission_without_an_answer_names_the_job_that_it_may_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with answering_with(200, VERSION) as head:  # and 501 to a POST
        found = Jobs(f"http://127.0.0.1:{head.server_port}")
        began = rf"`defuse jobs stop (defuse-\w+) --address {found.address}` ends it$"
        with pytest.raises(ComputeError, match=rf"status code 501.*; .*{began}"):
            found.submit("true", tmp_path, "mine", {})

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(found.client, "_do_request", interrupt)
        with pytest.raises(KeyboardInterrupt):
            found.submit("true", tmp_path, "mine", {})
    assert re.search(began, caplog.text.strip())


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_lose_a_submission_names_the_final_address(status: int) -> None:
    with answering_with(200, VERSION) as final:
        there = f"localhost:{final.server_port}"
        with answering_with(status, b"", f"http://ana:sesame@{there}/api/version?a=b") as moved:
            here = f"http://127.0.0.1:{moved.server_port}"
            with pytest.raises(InputError, match=f"^{here} redirects to http://[*]+@{there}; give"):
                Jobs(here)


def test_a_redirect_that_keeps_a_submission_is_followed_and_a_browser_s_address_is_understood() -> None:
    with answering_with(200, VERSION) as final:
        location = f"http://127.0.0.1:{final.server_port}/api/version"
        with answering_with(308, b"", location) as moved:
            found = Jobs(f"http://127.0.0.1:{moved.server_port}/#/overview")
    assert found.address == found.shown == f"http://127.0.0.1:{moved.server_port}"


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"ray_version": "?"}', b"<html>"])
def test_a_server_with_other_answers_than_ray_s_is_no_dashboard(body: bytes) -> None:
    with answering_with(200, body) as other:
        address = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(InputError, match=f"^no Ray dashboard answers at {address}; check --address"):
            Jobs(address)


@pytest.mark.parametrize("address", ["http://[::1:8265", "http://127.0.0.1:82x65"])
def test_an_address_that_cannot_be_read_is_no_dashboard(address: str) -> None:
    with pytest.raises(
        InputError, match=rf"^no Ray dashboard answers at {re.escape(address)}; check --address"
    ):
        Jobs(address)


def test_a_certificate_of_another_ca_is_named_with_the_variable_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering_with(200, VERSION) as https:
        https.socket = context.wrap_socket(https.socket, server_side=True)
        address = f"https://localhost:{https.server_port}"
        for file in (None, key):
            if file is not None:
                monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))
            with pytest.raises(
                InputError, match=rf"{address}: its certificate is not accepted \(.+\); .*, set REQUESTS_CA"
            ):
                Jobs(address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        Jobs(address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "gone"))
        with pytest.raises(
            InputError, match=r"^REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE: Could not find .*/gone"
        ):
            Jobs(address)
