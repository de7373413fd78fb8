"""A real Serve on loopback: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from load_generator import Client, limited, load, request_bytes
from synthetic_runs import png

from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from defuse_core.models import load_classifier, predict_probabilities
from defuse_core.runs import Run
from services.cli.serve import serve
from services.serving.active_versions import InitialModel
from services.serving.candidate import prepare_candidate
from services.serving.deployment import ClassifierDeployment
from services.settings import read_environment
from tests.waiting import wait_until

IMAGE = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def app(serving, planted):
    return serving(planted, run="first", pin=True, max_body_mb=1)


@pytest.fixture(scope="module")
def unbatched(serving, planted):
    """Also without the watch, whose absence changes no probability."""
    return serving(planted, run="first", pin=True, batch_size=1, watch=False)


def answers(app, pictures, clients):
    """Return the predictions for all pictures, in their order, asked by several clients at once."""
    waiting = [(n, request_bytes(p, app.predict, "image/png")) for n, p in enumerate(pictures)]
    found = {}

    async def client():
        connection = Client(app.port)
        while waiting:
            number, request = waiting.pop()
            found[number] = await connection.ask(request)
        connection.close()

    async def all_clients():
        await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(all_clients())
    assert {reply.status for reply in found.values()} == {200}
    return [found[number].json()["predictions"][0] for number in range(len(pictures))]


def test_hundreds_of_answers_equal_the_plain_model_with_and_without_batches(
    app, unbatched, planted, good_spec, pictures, pixels
):
    run = Run.open(planted, "first")
    classifier = load_classifier(good_spec, prepare_candidate(run)[1].classifier, 10)
    chosen = [*range(60), *range(500, 560)]  # of the test images and of the training images
    levels = np.round(pixels[chosen] * 255).astype(np.float32)
    plain = predict_probabilities(classifier, levels / np.float32(255))
    for served, clients in ((app, 16), (unbatched, 4)):
        found = answers(served, [pictures[number] for number in chosen], clients)
        shares = np.array([one["probabilities"] for one in found])
        np.testing.assert_allclose(shares, plain, atol=2e-5)
        assert [one["class"] for one in found] == plain.argmax(axis=1).tolist()


def test_files_raw_bytes_and_pixels_give_the_same_answer_one_or_many(app, pictures, pixels):
    raw = app.http.post("/v1/predict", content=pictures[0], headers=IMAGE).json()
    octets = {"Content-Type": "application/octet-stream"}
    assert app.http.post("/v1/predict", content=pictures[0], headers=octets).json() == raw
    files = app.http.post("/v1/predict", files=[("image", one) for one in pictures[:3]]).json()
    lists = app.http.post("/v1/predict", json={"pixels": np.round(pixels[:3] * 255).astype(int).tolist()})
    assert lists.status_code == 422
    levels = (np.round(pixels[:3] * 255) / 255).tolist()
    lists = app.http.post("/v1/predict", json={"pixels": levels}).json()
    assert [p["class"] for p in files["predictions"]] == [p["class"] for p in lists["predictions"]]
    assert files["predictions"][0] == raw["predictions"][0]
    assert len(app.http.post("/v1/predict", json={"pixels": levels[0][0]}).json()["predictions"]) == 1


def test_bad_requests_are_rejected_in_one_sentence_and_good_ones_among_them_answered(
    app, pictures, good_spec
):
    good = request_bytes(pictures[0], app.predict, "image/png")
    bad = [
        request_bytes(b"no image at all", app.predict, "image/png"),
        request_bytes(b"", app.predict, "image/png"),
        request_bytes(b'{"pixels": [[NaN]]}', app.predict, "application/json"),
        request_bytes(b'{"pixels": [[0.5]], "more": 1}', app.predict, "application/json"),
        request_bytes(b"{", app.predict, "application/json"),
        request_bytes(b"text", app.predict, "text/plain"),
        request_bytes(b"nothing", app.predict, "multipart/form-data; boundary=x"),
    ]
    replies = load(app.port, 8, limited([good, *bad], 160))
    by_status = {status: [r for r in replies if r.status == status] for status in {r.status for r in replies}}
    assert set(by_status) == {200, 400, 415, 422}
    assert len(by_status[200]) == 20
    assert all(
        reply.json()["predictions"][0]["class"] == by_status[200][0].json()["predictions"][0]["class"]
        for reply in by_status[200]
    )
    for reply in replies:
        if reply.status != 200:
            assert set(reply.json()) == {"error"} and "\n" not in reply.json()["error"]


def test_a_compressed_body_is_rejected_with_the_encoding(app, pictures):
    compressed = gzip.compress(pictures[0])
    reply = app.http.post("/v1/predict", content=compressed, headers={**IMAGE, "Content-Encoding": "gzip"})
    assert reply.status_code == 415
    assert reply.json() == {
        "error": "the content encoding gzip is not supported; send the body without compressing it"
    }
    plain = {**IMAGE, "Content-Encoding": "identity"}
    assert app.http.post("/v1/predict", content=pictures[0], headers=plain).status_code == 200


@pytest.mark.parametrize("route", ["/healthz", "/readyz"])
def test_head_of_a_health_route_is_answered_as_get_without_the_body(app, route):
    """Some load balancers ask so."""
    head, get = app.http.head(route), app.http.get(route)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"] != "0"


def test_a_body_of_100_mb_is_rejected_before_it_is_read(app):
    def endless():
        for _ in range(100):
            yield b"\0" * 1_000_000

    head = f"POST {app.predict} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", app.port), timeout=60) as raw:
        raw.sendall(head.encode() + b"\0" * 1000)
        assert b"413" in raw.recv(4096).split(b"\r\n")[0]
    started = time.monotonic()
    try:
        status = app.http.post("/v1/predict", content=endless(), headers=IMAGE).status_code
    except (httpx.WriteError, httpx.RemoteProtocolError):
        status = 413  # the server answered and hung up while this was still sending
    assert status == 413 and time.monotonic() - started < 60
    assert app.http.get("/readyz").status_code == 200


def test_a_body_that_does_not_arrive_in_time_is_answered_408(serving, planted):
    hurried = serving(planted, run="first", pin=True, timeout_s=0.8)
    head = f"POST {hurried.predict} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hurried.port), timeout=60) as raw:
        raw.sendall(head.encode() + b"\0" * 10)
        reply = b""
        while b"}" not in reply and (more := raw.recv(4096)):
            reply += more
    assert b"408" in reply.split(b"\r\n")[0] and b"did not arrive within 0.8 s" in reply


def test_a_token_from_a_file_may_end_in_a_newline(monkeypatch):
    monkeypatch.setenv("DEFUSE_SERVE_TOKEN", "secret\n")
    assert read_environment().serve_token == "secret"


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "expected a token, found an empty value; .* Unset it to serve without a token"),
        *((token, "expected one word") for token in ("\n", "two words", "ümlaut")),
    ],
)
def test_a_token_that_is_empty_or_that_no_client_can_send_is_refused_at_the_start(
    planted, monkeypatch, token, reason
):
    monkeypatch.setenv("DEFUSE_SERVE_TOKEN", token)
    with pytest.raises(InputError, match=f"DEFUSE_SERVE_TOKEN: {reason}"):
        ClassifierDeployment(planted.address, InitialModel(), ServeSection(), {}, require_token=False)
    with pytest.raises(InputError, match=f"DEFUSE_SERVE_TOKEN: {reason}"):
        CliRunner().invoke(
            serve, ["first", "--store", planted.address], standalone_mode=False, catch_exceptions=False
        )


def test_the_model_route_describes_the_model_in_production(app):
    page = app.http.get("/v1/model").json()
    assert (page["version"], page["run"], page["lam"]) == ("first", "first", 1.0)
    assert [s["name"] for s in page["scenarios"]] == ["3 read as 8 (scenario 0)", "8 read as 3 (scenario 1)"]
    assert all(s["fixed"] for s in page["scenarios"])
    failures = page["failures"]
    assert failures["method"] == "softmax-and-distance" and failures["verdict"].startswith("Finds failing")
    assert failures["test"]["auroc"]["low"] > 0.6 and 0 < failures["threshold"] < 1


def test_doubtful_answers_are_flagged_counted_and_the_detector_is_in_the_metrics(app, pictures):
    found = answers(app, pictures[:200], 8)
    threshold = app.http.get("/v1/model").json()["failures"]["threshold"]
    assert all(one["flagged"] == (one["failure_probability"] >= threshold) for one in found)
    flagged = [one for one in found if one["flagged"]]
    assert flagged and len(flagged) < 60
    assert all(one["explanation"] is None for one in found if not one["flagged"])
    least = {max(one["probabilities"]) for one in flagged}
    assert np.median([*least]) < np.median([max(one["probabilities"]) for one in found])
    names = ["defuse_flagged_images", "defuse_expected_errors", 'figure="auroc_low"']

    def missing():
        page = app.http.get("/metrics").text
        return [name for name in names if name not in page]

    wait_until(lambda: not missing(), lambda: f"not on the metrics page: {missing()}", every_s=0.5)


def test_an_input_inside_a_failure_scenario_is_marked_and_counted(app, planted, good_spec):

    from defuse_core.artifacts import Models, Scenarios
    from defuse_core.models import decode_codes, load_vae

    run = Run.open(planted, "first")
    vae = load_vae(good_spec, run.load(Models).vae)
    centre = decode_codes(vae, run.load(Scenarios).means[:1].astype(np.float32))[0]
    hit = app.http.post("/v1/predict", content=png(centre), headers=IMAGE).json()["predictions"][0]
    assert hit["scenarios"][0]["name"] == "3 read as 8 (scenario 0)"
    assert hit["scenarios"][0]["fixed"] and hit["scenarios"][0]["nearer_share"] < 0.01
    wait_until(
        lambda: any(is_count(line) for line in app.http.get("/metrics").text.splitlines()),
        lambda: "no counter of the scenario appeared on the metrics page",
        every_s=0.5,
    )


def is_count(line):
    return line.startswith("ray_defuse_scenario_images") and 'scenario="0"' in line and 'fixed="true"' in line


def test_without_the_watch_scenarios_are_null(app, unbatched, pictures):
    reply = unbatched.http.post("/v1/predict", content=pictures[0], headers=IMAGE).json()
    seen = app.http.post("/v1/predict", content=pictures[0], headers=IMAGE).json()
    assert reply["predictions"][0]["scenarios"] is None
    assert 0 <= reply["predictions"][0]["failure_probability"] <= 1
    assert reply["predictions"][0]["probabilities"] == seen["predictions"][0]["probabilities"]


def test_bfloat16_answers_like_float32(serving, planted, pictures, unbatched):
    half = serving(planted, run="first", pin=True, precision="bfloat16")
    found = np.array([one["probabilities"] for one in answers(half, pictures[:50], 4)])
    full = np.array([one["probabilities"] for one in answers(unbatched, pictures[:50], 4)])
    assert np.abs(found - full).max() < 0.05 and not np.array_equal(found, full)


def test_before_the_first_promotion_the_server_is_alive_but_not_ready(serving, own_store, pictures):
    empty = serving(own_store, run=None)
    assert empty.http.get("/healthz").status_code == 200
    assert empty.http.head("/healthz").status_code == 200
    assert empty.http.head("/readyz").status_code == 503
    for reply in (
        empty.http.get("/readyz"),
        empty.http.post("/v1/predict", content=pictures[0], headers=IMAGE),
    ):
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json() == {"error": "no version is in production"}
