"""Starting and stopping `defuse serve`, on an embedded Ray and on a running cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from defuse_core.errors import ComputeError, InputError
from services.serving.arguments import ServeArgs
from services.serving.launch import ShutdownSignal, running_application
from services.serving.proxy import is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_only_loopback_addresses_are_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_defuse_serve_listens_on_loopback_requires_the_token_and_stops_on_a_signal(own_store, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from services.cli import main; main()", "serve", "first"]
    options = ["--store", own_store.address, "--port", str(port), "--set", "serve.cpus_per_replica=0.5"]
    environment = {**os.environ, "DEFUSE_SERVE_TOKEN": "a long secret", "PYTHONPATH": str(Path.cwd())}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        environment.pop(name, None)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        try:
            http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
            _until_ready(http, process)
            _check_authentication(http)
            assert listening_addresses(port) == {"0100007F"}
            _until(lambda: "serving on http://127.0.0.1" in (tmp_path / "log").read_text())
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
    assert code == 0 and "a long secret" not in (tmp_path / "log").read_text()


def test_a_signal_interrupts_the_start_and_ends_the_wait():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        shutdown = ShutdownSignal()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        later = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        later.start()
        shutdown.wait()  # and returns
        later.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_on_a_shared_cluster_a_second_application_is_an_error_and_the_first_goes_on(planted, serve_port):
    from ray import serve as ray_serve

    args = ServeArgs(store=planted.address, run="first", pin=True, settings={"cpus_per_replica": 0.1})
    with running_application(args, "127.0.0.1", 1, shared=True) as address:
        assert address == f"http://127.0.0.1:{serve_port}"  # where Serve listened already
        again = running_application(
            args.model_copy(update={"run": "second"}), "127.0.0.1", serve_port, shared=True
        )
        with pytest.raises(InputError, match="already serves an application named defuse"), again:
            pass
        assert httpx.get(f"{address}/v1/model").json()["run"] == "first"
    assert "defuse" not in ray_serve.status().applications


def test_the_error_of_a_replica_that_cannot_start_is_reported(planted, serve_port):
    args = ServeArgs(store=planted.address, run="first", settings={"device": "cuda", "gpus_per_replica": 0})
    started = running_application(args, "127.0.0.1", serve_port, shared=True)
    with pytest.raises(ComputeError, match=r"did not start: .*serve.device: cuda, but"), started:
        pass


def listening_addresses(port):
    """Return the addresses, in the hexadecimal notation of /proc, of the sockets that listen on `port`."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, at in places if int(at, 16) == port}


def _until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def _until_ready(http, process):
    for _ in range(240):
        assert process.poll() is None
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise AssertionError("defuse serve did not get ready within a minute")


def _check_authentication(http):
    assert http.get("/healthz").status_code == 200
    for path in ("/v1/model", "/metrics", "/docs", "/openapi.json", "/nothing"):
        reply = http.get(path)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert set(reply.json()) == {"error"}
    assert http.post("/v1/predict", content=b"?").status_code == 401
    assert http.get("/v1/model", headers={"Authorization": "Bearer another"}).status_code == 401
    assert http.get("/v1/model", headers={"Authorization": "Bearer a long secret"}).status_code == 200
