"""Finding that a server can no longer answer, and the metrics page that merges the metrics of all nodes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from defuse_core.errors import ComputeError
from defuse_core.store import FolderStore
from services.serving.api import build_api
from services.serving.app import registry_changes
from services.serving.monitoring import (
    LIVENESS_FAILURES,
    LivenessCheck,
    ServingMetrics,
    _exporters,
    _scrape,
    merge_pages,
    metrics_page,
)
from services.serving.registry import Registry
from tests.ports import free_port
from tests.services.serving.replicas import new_replica, put

NODE, DEAD = {"Alive": True}, {"Alive": False}


class Healthy(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class WithoutReplica(Healthy):
    """As a proxy answers."""

    status = 503


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the address of a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def nobody() -> str:
    """An address at which nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def ask(check: LivenessCheck) -> None:
    for _ in range(3 * LIVENESS_FAILURES):
        check()


def test_the_command_ends_with_an_error_where_nothing_answers_and_ray_has_no_node(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(ray, "nodes", lambda: [DEAD])
    pauses = iter([None] * 10)  # and then StopIteration
    monkeypatch.setattr("services.serving.app.sleep", lambda _: next(pauses))
    url = nobody()
    with pytest.raises(ComputeError, match=f"nothing answers at {url}, and Ray.* has ended") as failure:
        list(registry_changes(Registry(FolderStore(tmp_path)), check=LivenessCheck(url), has_model=True))
    assert len(list(pauses)) == 11 - LIVENESS_FAILURES and failure.value.exit_code == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"nothing answers at {url}, and Ray, which would start a replica, has ended (one of its processes died, "
        "as when memory is short)"
    ]


def test_requests_without_the_token_and_to_unknown_routes_are_counted_as_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFUSE_SERVE_TOKEN", "secret")
    replica, counted = new_replica(FolderStore(tmp_path)), []
    monkeypatch.setattr(replica.metrics.rejected, "inc", lambda *count: counted.append(count))

    async def ask_all() -> list[int]:
        transport = httpx.ASGITransport(build_api(replica))
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            replies = [await client.get("/v1/model")]
            client.headers["Authorization"] = "Bearer secret"
            replies += [await client.get(route) for route in ("/v2", "/v1/predict", "/v1/model", "/healthz")]
        return [reply.status_code for reply in replies]

    assert asyncio.run(ask_all()) == [401, 404, 405, 503, 200]
    assert counted == [(1, {"status": str(status)}) for status in (401, 404, 405, 503)]


def test_the_command_ends_at_once_with_its_head_though_a_replica_still_answers(monkeypatch, caplog):
    monkeypatch.setattr("services.serving.monitoring._answers", lambda _: True)
    dead = {"raylet"}  # without it, too, a replica goes on
    node = SimpleNamespace(dead_processes=lambda: [(kind, None) for kind in dead])
    monkeypatch.setattr("ray._private.worker._global_node", node)
    ask(LivenessCheck("http://127.0.0.1:1"))
    assert [record.getMessage() for record in caplog.records] == [
        "Ray, which would start a replica, has ended (one of its processes died, as when memory is short); the "
        "replicas still answer, but none is replaced: start the command again"
    ]
    dead.add("gcs_server")
    with pytest.raises(
        ComputeError, match="^Ray, which would start a replica, has ended .*; start the command"
    ) as end:
        ask(LivenessCheck("http://127.0.0.1:1"))
    assert end.value.exit_code == 4


def test_a_proxy_without_a_replica_does_not_count_as_an_answer(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [DEAD])
    with serving(WithoutReplica) as url, pytest.raises(ComputeError):
        ask(LivenessCheck(url))


def test_a_replica_that_is_replaced_is_no_failure_however_long_it_takes(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [DEAD, NODE])
    ask(LivenessCheck(nobody()))


def test_the_command_ends_where_its_application_was_deleted_from_a_cluster(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [NODE])
    found = [True, None, None, True, *[None] * LIVENESS_FAILURES]
    check = LivenessCheck(nobody(), lambda: found.pop(0))
    with pytest.raises(ComputeError, match="the application was deleted from the cluster"):
        while found:
            check()
    assert not found


def test_a_replica_that_answers_is_left_alone_though_ray_has_ended(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [DEAD])
    with serving(Healthy) as url:
        ask(LivenessCheck(url))


def test_failures_that_are_not_in_a_row_do_not_add_up(monkeypatch):
    check = LivenessCheck(nobody())
    for nodes in ([DEAD], [NODE]) * LIVENESS_FAILURES:
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        check()


def test_the_pages_of_several_nodes_become_one_page_with_one_header_per_metric():
    head = "# HELP ray_defuse_images_total x\n# TYPE ray_defuse_images_total counter\n"
    page = head + 'ray_defuse_images_total{n="%d"} 1.0\n# HELP other y\nother 2\n'
    assert merge_pages([page % 1, page % 2, ""]) == (
        "# HELP ray_defuse_images_total x\n# TYPE ray_defuse_images_total counter\n"
        'ray_defuse_images_total{n="1"} 1.0\nray_defuse_images_total{n="2"} 1.0\n'
    )
    assert merge_pages([page % 1 + "other 3"]) == merge_pages([page % 1])  # cut behind a line of others


def test_a_page_that_is_cut_within_a_line_is_left_out():
    page = '# TYPE ray_defuse_images_total counter\nray_defuse_images_total{n="0"} 1.0\n'
    line = 'ray_defuse_images_total{n="1"}'
    whole = f"{page}{line} 1.0\n"
    for end in range(1, len(line) + 2):  # within the value, what is left may be a number
        assert merge_pages([whole[: len(page) + end], whole]) == merge_pages([whole])


def test_only_living_nodes_with_metrics_are_asked(monkeypatch):
    found = [(True, 81), (False, 82), (True, 0), (True, 84)]
    nodes = [
        {"Alive": alive, "MetricsExportPort": port, "NodeManagerAddress": "10.0.0.7"} for alive, port in found
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert _exporters() == ["http://10.0.0.7:81/metrics", "http://10.0.0.7:84/metrics"]


def test_nodes_are_not_asked_through_an_http_proxy(monkeypatch):
    class Node(Healthy):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ray_defuse_x 1\n")

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, nobody())
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(Node) as address:
        assert _scrape(f"{address}/metrics") == "ray_defuse_x 1\n"


def test_predictions_go_on_while_rays_head_is_asked_for_the_nodes(monkeypatch):
    asked_in = []
    monkeypatch.setattr(ray, "nodes", lambda: asked_in.append(threading.current_thread()) or [])
    assert asyncio.run(metrics_page()) == ""
    assert asked_in and asked_in != [threading.current_thread()]


def test_the_registry_is_followed_while_scrapes_wait_for_rays_head(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(ray, "nodes", lambda: [DEAD] * answered.wait(60))

    async def follow() -> None:
        scrapes = [asyncio.wait_for(metrics_page(), 0.05) for _ in range(40)]
        try:
            given_up = await asyncio.gather(*scrapes, return_exceptions=True)
            assert all(isinstance(page, TimeoutError) for page in given_up)
            await asyncio.wait_for(asyncio.to_thread(int), 10)
        finally:
            answered.set()
        assert await metrics_page() == ""

    asyncio.run(follow())


def test_predictions_go_on_while_the_pages_are_merged_and_lines_of_others_are_not_parsed(monkeypatch):
    page = '# TYPE ray_serve_x gauge\nray_serve_x 1.0\n# TYPE ray_node_y gauge\nray_node_y{a="b"} 2.0\n'
    parsed, parse = [], text_string_to_metric_families

    def recorded(text: str) -> object:
        parsed.append((threading.current_thread(), text))
        return parse(text)

    monkeypatch.setattr("services.serving.monitoring.text_string_to_metric_families", recorded)
    monkeypatch.setattr("services.serving.monitoring._exporters", lambda: ["a node"])
    monkeypatch.setattr("services.serving.monitoring._scrape", lambda address: page)
    assert "ray_serve_x 1.0" in asyncio.run(metrics_page())
    ((thread, text),) = parsed
    assert thread != threading.current_thread() and "ray_node" not in text and "ray_serve_x 1.0" in text


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nray_defuse_x 1\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xff",
        b"no HTTP\r\n\r\n",
        b"",
    ],
)
def test_a_node_that_dies_within_its_answer_is_left_out(reply):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply)

        node = threading.Thread(target=answer)
        node.start()
        assert _scrape(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics") == ""
        node.join()


def test_a_failure_that_repeats_is_logged_once_a_minute_per_version_and_kind(own_store, monkeypatch, caplog):
    put(own_store, "first")
    replica, now, counted = new_replica(own_store), [1000.0], []
    monkeypatch.setattr("services.serving.monitoring.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(replica.metrics.errors, "inc", lambda *count: counted.append(count))
    model = replica.current().in_production
    for _ in range(100):
        replica._count_error(model, 2, RuntimeError("CUDA error: misaligned address\nCUDA kernel errors\n"))
    replica._count_error(model, 1, TimeoutError("no answer within 1 s"))
    replica._count_error(SimpleNamespace(name="2"), 1, TimeoutError("no answer within 1 s"))
    now[0] += 60
    for _ in range(2):
        replica._count_error(model, 1, RuntimeError("x" * 5000))
    assert len(counted) == 104
    assert caplog.messages == [
        "version 1 failed: CUDA error: misaligned address CUDA kernel errors",
        "version 1 failed: no answer within 1 s",
        "version 2 failed: no answer within 1 s",
        f"version 1 failed: {'x' * 600} (99 more failures since the last line)",
    ]


def test_the_gauges_are_set_again_between_two_polls(own_store, monkeypatch):
    """Ray forgets a gauge that is not set for 20 s, as while a store does not answer."""
    put(own_store, "first")
    replica, roles = new_replica(own_store), []
    monkeypatch.setattr("services.serving.deployment.POLL_S", 60.0)
    monkeypatch.setattr("services.serving.deployment.GAUGES_S", 0.01)
    monkeypatch.setattr(replica.metrics, "set_roles", lambda before, now: roles.append(now))

    async def wait() -> None:
        async with replica.following_registry():
            while len(roles) < 3:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(wait(), 20))
    assert roles[:3] == [{"production": "1"}] * 3


def recorded(
    metrics: ServingMetrics, gauge: str, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[str, ...], float]:
    """What a gauge is set to from now on, by the values of its tags."""
    values: dict[tuple[str, ...], float] = {}
    monkeypatch.setattr(
        getattr(metrics, gauge), "set", lambda value, tags: values.update({tuple(tags.values()): value})
    )
    return values


def test_a_version_without_its_role_of_before_is_not_shown_as_serving(monkeypatch):
    metrics, before = ServingMetrics(), {"production": "1", "canary": "2"}
    values = recorded(metrics, "serving", monkeypatch)
    metrics.set_roles({}, before)
    assert values == {("1", "production"): 1, ("2", "canary"): 1}
    metrics.set_roles(before, {"production": "2"})
    assert values == {("1", "production"): 0, ("2", "canary"): 0, ("2", "production"): 1}


def test_the_figures_of_the_detector_are_those_of_their_images_and_none_is_no_figure(candidate, monkeypatch):
    metrics, found = ServingMetrics(), candidate.watch_figures(candidate.run_file().serve)
    values = recorded(metrics, "detection", monkeypatch)
    nothing = found.test.model_copy(update={"average_precision": 0.0, "calibration_error": None})
    metrics.set_detection("1", found.model_copy(update={"test": nothing}))
    of_test = {figure: value for (_, images, figure), value in values.items() if images == "test"}
    assert of_test == {
        "auroc": found.test.auroc.value,
        "auroc_low": found.test.auroc.low,
        "average_precision": 0.0,
        "precision": found.test.precision.value,
        "recall": found.test.recall.value,
    }
    assert values["1", "validation", "auroc"] == found.validation.auroc.value
