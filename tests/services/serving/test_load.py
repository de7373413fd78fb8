"""Under load: limits hold, replicas die, versions change, and requests are not lost."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from load_generator import Reply, limited, load, request_bytes

from defuse_core.artifacts import NO_SCENARIO
from defuse_core.models import build_classifier, weights_of
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.candidate import prepare_candidate
from services.serving.registry import PromotionRequest, Registry, promote
from services.serving.traffic import read_traffic


def requests_for(app, pictures, count=100):
    return [
        request_bytes(picture, app.predict, "image/png", **{"X-Request-Key": f"user-{n}"})
        for n, picture in enumerate(pictures[:count])
    ]


def candidate(store, name):
    return prepare_candidate(Run.open(store, name))[1]


def statuses(replies: list[Reply]) -> Counter[int]:
    return Counter(reply.status for reply in replies)


class Load(threading.Thread):
    """Load in the background until `stop` is called, for at most a minute or 20,000 requests."""

    def __init__(self, port, clients, requests):
        super().__init__(daemon=True)
        next_request = limited(requests, 20_000, 60)
        self.ended = threading.Event()
        self.replies: list[Reply] = []
        self.work = lambda: load(
            port, clients, lambda: None if self.ended.is_set() else next_request(), self.replies
        )

    def run(self):
        self.work()

    def wait_for_answers(self, count, since, timeout_s=45):
        """Wait until `count` requests that were sent after `since` are answered with 200."""
        end = time.monotonic() + timeout_s
        while sum(r.status == 200 and r.at - r.seconds > since for r in self.replies.copy()) < count:
            assert time.monotonic() < end, f"fewer than {count} answers in {timeout_s} s"
            time.sleep(0.1)

    def stop(self) -> list[Reply]:
        self.ended.set()
        self.join()
        return self.replies


def test_32_clients_are_all_answered_in_bounded_time(serving, planted, pictures):
    app = serving(planted, run="first", pin=True)
    started = time.monotonic()
    replies = load(app.port, 32, limited(requests_for(app, pictures), 1500, 60))
    assert statuses(replies) == {200: 1500}
    assert time.monotonic() - started < 60
    assert np.quantile([reply.seconds for reply in replies], 0.99) < 5


def test_overload_is_answered_503_with_retry_after_at_once(serving, planted, pictures):
    busy = serving(
        planted, run="first", pin=True, max_ongoing=2, max_queued=2, batch_wait_s=0.5, retry_after_s=3
    )
    replies = load(busy.port, 24, limited(requests_for(busy, pictures), 200, 60))
    assert set(statuses(replies)) == {200, 503}
    refused = [reply for reply in replies if reply.status == 503]
    assert len(refused) > 100
    assert {reply.headers.get("retry-after") for reply in refused} == {"3"}
    assert np.median([reply.seconds for reply in refused]) < 0.5
    assert statuses(load(busy.port, 1, limited(requests_for(busy, pictures), 3, 60))) == {200: 3}


def test_a_killed_replica_loses_only_its_requests_in_flight(serving, planted, pictures):
    app = serving(planted, run="first", pin=True, min_replicas=2, max_replicas=2)
    clients = 8
    running = Load(app.port, clients, requests_for(app, pictures))
    running.start()
    time.sleep(1.5)
    os.kill(one_replica_of(app.name), signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(2)
    running.wait_for_answers(50, since=killed + 2)
    replies = running.stop()
    lost = [reply for reply in replies if reply.status != 200]
    assert len(lost) <= clients
    assert max((reply.at for reply in lost), default=killed) < killed + 5


def one_replica_of(name: str) -> int:
    """Return the process of one replica of an application."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    replica = next(a for a in actors if a["name"].startswith(f"SERVE_REPLICA::{name}#"))
    actor = ray.get_actor(replica["name"], replica["namespace"])
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


class Live:
    """An application that follows a registry in which every planted run is a version."""

    def __init__(self, app, registry, store):
        self.app, self.registry = app, registry
        self.number = {
            name: registry.add(candidate(store, name), "ana", "", forced=True)
            for name in ("first", "second", "swapped", "broken")
        }

    def version(self, name):
        return str(self.number[name])


@pytest.fixture(scope="module")
def live_app(serving, planted, tmp_path_factory):
    store = FolderStore(tmp_path_factory.mktemp("live"))
    for key in planted.list():
        store.write(key, planted.read(key))
    return Live(serving(store, run=None), Registry(store), store)


@pytest.fixture
def live(live_app):
    """The same with `first` in production and no canary or shadow."""
    live_app.registry.to_production(live_app.number["first"], "ana", "")
    end = time.monotonic() + 15
    while live_app.app.http.get("/readyz").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    live_app.app.wait_for(live_app.version("first"))
    time.sleep(0.5)  # a canary of the previous test has ended too
    return live_app


def test_a_promotion_and_a_rollback_under_load_lose_no_request(live, pictures):
    old, new = live.version("first"), live.version("second")
    running = Load(live.app.port, 8, requests_for(live.app, pictures))
    running.start()
    time.sleep(1)
    live.registry.to_production(int(new), "ana", "")
    live.app.wait_for(new)
    time.sleep(1)
    live.registry.roll_back("bo", "to see it work")
    live.app.wait_for(old)
    time.sleep(1)
    replies = running.stop()
    assert set(statuses(replies)) == {200}
    versions = [reply.json()["version"] for reply in sorted(replies, key=lambda reply: reply.at)]
    changes = [a + b for a, b in itertools.pairwise(versions) if a != b]
    assert old + new in changes and new + old in changes
    assert versions[0] == versions[-1] == old and len(changes) < 40


def test_a_canary_answers_its_share_by_request_key_and_production_the_rest(live, pictures):
    requests = requests_for(live.app, pictures, 100)
    running = Load(live.app.port, 8, requests)
    running.start()
    live.registry.to_canary(live.number["second"], 0.3, "ana", "")
    wait_until(lambda: live.app.http.get("/v1/model").json()["canary"] == live.version("second"))
    assert set(statuses(running.stop())) == {200}  # nobody noticed it come
    replies = load(live.app.port, 8, limited(requests, 600, 60))
    assert set(statuses(replies)) == {200}
    share = np.mean([reply.json()["version"] == live.version("second") for reply in replies])
    assert 0.15 < share < 0.45
    again = [load(live.app.port, 1, limited([request], 3, 60)) for request in requests[:10]]
    assert all(len({reply.json()["version"] for reply in same}) == 1 for same in again)
    assert live.registry.state().canary == live.number["second"]


@pytest.mark.parametrize(("name", "words"), [("broken", "images failed"), ("swapped", "answers agreed")])
@pytest.mark.parametrize("shadow", [False, True])
def test_a_canary_or_shadow_that_fails_or_disagrees_is_rolled_back_and_no_request_fails(
    live, pictures, name, words, shadow
):
    number = live.number[name]
    if shadow:
        live.registry.to_shadow(number, "ana", "")
    else:
        live.registry.to_canary(number, 0.5, "ana", "")
    wait_until(
        lambda: (
            str(number) in (page := live.app.http.get("/v1/model").json(), page["canary"], page["shadow"])[1:]
        )
    )
    replies = load(live.app.port, 8, limited(requests_for(live.app, pictures, 500), 800, 60))
    wait_until(lambda: not {live.registry.state().canary, live.registry.state().shadow} - {None})
    state = live.registry.state()
    assert set(statuses(replies)) == {200}
    assert words in state.why and state.by == "defuse serve"
    assert state.production == live.number["first"]
    sides = {"first"} if shadow or name == "broken" else {"first", name}
    assert {reply.json()["version"] for reply in replies} == {live.version(side) for side in sides}


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def test_a_version_that_cannot_be_loaded_leaves_the_current_one_active(serving, own_store, pictures):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), PromotionRequest("ana", ""))
    app = serving(own_store, run=None)
    registry.store.create("versions/000002.safetensors", b"cut")
    registry.change("version 2 to production", "ana", "", lambda _: {"production": 2})
    time.sleep(1)
    assert set(statuses(load(app.port, 2, limited(requests_for(app, pictures), 20, 30)))) == {200}
    promote(
        registry, candidate(own_store, "second"), PromotionRequest("ana", "", force="version 2 is broken")
    )
    app.wait_for("3")


def test_a_canary_that_cannot_be_loaded_is_ended_and_the_server_starts(serving, own_store, pictures):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), PromotionRequest("ana", ""))
    unfit = dataclasses.replace(candidate(own_store, "second"), classifier={}, digest="unfit")
    promote(registry, unfit, PromotionRequest("ana", "", canary=0.5))
    app = serving(own_store, run=None)
    assert app.http.get("/v1/model").json()["canary"] is None
    state = registry.state()
    assert state.canary is None and "the weights lack" in state.why


def test_inputs_inside_a_scenario_are_stored_up_to_the_limit(serving, own_store, pictures):
    app = serving(own_store, run="first", pin=True, reservoir=3, watch_share=0.2)
    load(app.port, 4, limited(requests_for(app, pictures, 300), 300, 60))
    time.sleep(1)
    traffic = read_traffic(own_store, "first")
    stored = traffic.scenario.tolist()  # NO_SCENARIO: flagged as probably wrong, outside all scenarios
    assert {0, 1} <= set(stored) <= {NO_SCENARIO, 0, 1}
    assert stored.count(0) == stored.count(1) == 3 and stored.count(NO_SCENARIO) <= 3


@pytest.fixture
def slow_app(serving, own_store):
    """An application with `first` in production, and version 2: a network that is some hundred times as slow."""
    registry, first = Registry(own_store), candidate(own_store, "first")
    promote(registry, first, PromotionRequest("ana", ""))
    spec = first.run_file()
    wide = spec.model_copy(update={"classifier": spec.classifier.model_copy(update={"channels": 384})})
    weights = weights_of(build_classifier(wide, 10))
    slow = dataclasses.replace(
        first, spec=wide.model_dump(mode="json"), classifier=weights, digest="slow", checks=()
    )
    registry.add(slow, "ana", "", forced=True)
    return Live(serving(own_store, run=None, max_canary_s=0.002, min_agreement=0), registry, own_store)


def test_a_slow_shadow_leaves_production_its_speed(slow_app, pictures):
    requests = requests_for(slow_app.app, pictures)
    rate = request_rate(slow_app.app.port, requests)
    slow_app.registry.to_shadow(2, "ana", "")
    wait_until(lambda: slow_app.app.http.get("/v1/model").json()["shadow"] == "2")
    assert request_rate(slow_app.app.port, requests) > 0.5 * rate


def request_rate(port, requests):
    started = time.monotonic()
    replies = load(port, 8, limited(requests, 10_000, 4))
    assert set(statuses(replies)) == {200}
    return len(replies) / (time.monotonic() - started)


def test_a_canary_that_is_too_slow_is_ended_and_production_answers_for_it(slow_app, pictures):
    slow_app.registry.to_canary(2, 0.5, "ana", "")
    wait_until(lambda: slow_app.app.http.get("/v1/model").json()["canary"] == "2")
    replies = load(slow_app.app.port, 8, limited(requests_for(slow_app.app, pictures), 400, 60))
    assert set(statuses(replies)) == {200}
    wait_until(lambda: slow_app.registry.state().canary is None)
    assert "took longer than 0.002 s" in slow_app.registry.state().why
