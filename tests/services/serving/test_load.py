"""Under load: limits hold, replicas die, versions change, and requests are not lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from load_generator import Reply, limited, load, request_bytes
from ray import serve
from synthetic_runs import assign, copied_store, unverified

from defuse_core.artifacts import NO_SCENARIO, Gallery
from defuse_core.models import build_classifier, weights_of
from defuse_core.runs import Run
from services.serving.candidate import prepare_candidate
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest
from services.serving.traffic import read_traffic
from tests.waiting import WAIT_S, wait_until


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
    """Load in the background until `stop` is called, for at most 4 minutes or 20,000 requests.

    Its clients pause between requests: what happens meanwhile takes seconds, and needs the processors too.
    """

    def __init__(self, port, clients, requests, pause_s=0.1):
        super().__init__(daemon=True)
        next_request = limited(requests, 20_000)
        self.ended = threading.Event()
        self.replies: list[Reply] = []
        self.work = lambda: load(
            port, clients, lambda: None if self.ended.is_set() else next_request(), self.replies, pause_s
        )

    def run(self):
        self.work()

    def wait_for_answers(self, count, since):
        """Wait until `count` requests that were sent after `since` are answered with 200."""

        def answered():
            return sum(r.status == 200 and r.at - r.seconds > since for r in self.replies.copy())

        wait_until(lambda: answered() >= count, lambda: f"{answered()} of {count} answers")

    def stop(self) -> list[Reply]:
        self.ended.set()
        self.join()
        return self.replies


def test_overload_is_answered_503_with_retry_after_at_once(serving, planted, pictures, pixels):
    busy = serving(planted, run="first", pin=True, max_ongoing=2, max_queued=2)
    many = request_bytes(
        json.dumps({"pixels": pixels[:64].tolist()}).encode(), busy.predict, "application/json"
    )
    replies = load(busy.port, 24, limited([many], 100))
    assert set(statuses(replies)) == {200, 503}
    refused = [reply for reply in replies if reply.status == 503]
    assert len(refused) > 40
    assert {reply.headers.get("retry-after") for reply in refused} == {"1"}
    assert np.median([reply.seconds for reply in refused]) < 1.0
    assert statuses(load(busy.port, 1, limited(requests_for(busy, pictures), 3))) == {200: 3}


def test_a_killed_replica_loses_only_its_requests_in_flight(serving, planted, pictures):
    app = serving(planted, run="first", pin=True, min_replicas=2, max_replicas=2)
    clients = 8
    running = Load(app.port, clients, requests_for(app, pictures))
    running.start()
    running.wait_for_answers(40, since=0)  # both replicas work
    os.kill(one_replica_of(app.name), signal.SIGKILL)
    killed = time.monotonic()
    running.wait_for_answers(50, since=killed + 2)
    replies = running.stop()
    lost = [reply for reply in replies if reply.status != 200]
    assert len(lost) <= clients
    assert max((reply.at for reply in lost), default=killed) < killed + 20


def test_a_replica_that_cannot_load_the_version_does_not_start_beside_one_that_answers(
    serving, own_store, pictures
):
    registry, key = Registry(own_store), "versions/000001.safetensors"
    promote(registry, candidate(own_store, "first"), PromotionRequest("ana", ""))
    app = serving(own_store, run=None, min_replicas=2, max_replicas=2)
    whole = registry.store.read(key)
    registry.store.write(key, b"cut")
    os.kill(one_replica_of(app.name), signal.SIGKILL)
    wait_until(lambda: "others answer until" in deployment_of(app.name).message, every_s=0.5)
    assert statuses(load(app.port, 4, limited(requests_for(app, pictures), 50))) == {200: 50}
    registry.store.write(key, whole)
    wait_until(lambda: deployment_of(app.name).replica_states == {"RUNNING": 2}, every_s=0.5)


def deployment_of(name):
    return serve.status().applications[name].deployments["classifier"]


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
    store = copied_store(planted, tmp_path_factory.mktemp("live"))
    return Live(serving(store, run=None, max_canary_s=30), Registry(store), store)


@pytest.fixture
def live(live_app):
    """The same with `first` in production and no canary or shadow."""
    assign(live_app.registry, live_app.number["first"], PromotionRequest("ana", ""))
    wait_until(lambda: live_app.app.http.get("/readyz").status_code == 200)
    live_app.app.wait_for(live_app.version("first"))
    live_app.app.wait_for_others(set())
    return live_app


def test_32_clients_are_all_answered_in_bounded_time(live, pictures):
    started = time.monotonic()
    replies = load(live.app.port, 32, limited(requests_for(live.app, pictures), 160))
    assert statuses(replies) == {200: 160}
    assert time.monotonic() - started < WAIT_S
    assert np.quantile([reply.seconds for reply in replies], 0.99) < 5


def test_a_promotion_and_a_rollback_under_load_lose_no_request(live, pictures):
    old, new = live.version("first"), live.version("second")
    running = Load(live.app.port, 8, requests_for(live.app, pictures))
    running.start()
    running.wait_for_answers(25, since=0)
    assign(live.registry, int(new), PromotionRequest("ana", ""))
    live.app.wait_for(new)
    running.wait_for_answers(25, since=time.monotonic())
    live.registry.roll_back("bo", "to see it work", unverified)
    live.app.wait_for(old)
    running.wait_for_answers(25, since=time.monotonic())
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
    assign(live.registry, live.number["second"], PromotionRequest("ana", "", canary=0.3))
    live.app.wait_for_others({live.version("second")})
    assert set(statuses(running.stop())) == {200}  # nobody noticed it come
    replies = load(live.app.port, 8, limited(requests, 100))
    assert set(statuses(replies)) == {200}
    share = np.mean([reply.json()["version"] == live.version("second") for reply in replies])
    assert 0.15 < share < 0.45
    again = [load(live.app.port, 1, limited([request], 3)) for request in requests[:10]]
    assert all(len({reply.json()["version"] for reply in same}) == 1 for same in again)
    assert live.registry.state().canary == live.number["second"]


@pytest.mark.parametrize(("name", "words"), [("broken", "requests failed"), ("swapped", "agreed with")])
@pytest.mark.parametrize("shadow", [False, True])
def test_a_canary_or_shadow_that_fails_or_disagrees_is_rolled_back_and_no_request_fails(
    live, pictures, name, words, shadow
):
    number = live.number[name]
    if shadow:
        assign(live.registry, number, PromotionRequest("ana", "", shadow=True))
    else:
        assign(live.registry, number, PromotionRequest("ana", "", canary=0.5))
    live.app.wait_for_others({str(number)})
    running = Load(live.app.port, 8, requests_for(live.app, pictures, 500))
    running.start()  # until it ends: a shadow leaves requests out where it has too little time
    wait_until(lambda: not {live.registry.state().canary, live.registry.state().shadow} - {None})
    replies = running.stop()
    state = live.registry.state()
    assert set(statuses(replies)) == {200}
    assert words in state.why and state.by == "defuse serve"
    assert state.production == live.number["first"]
    sides = {"first"} if shadow or name == "broken" else {"first", name}
    assert {reply.json()["version"] for reply in replies} == {live.version(side) for side in sides}


def test_a_canary_that_cannot_be_loaded_is_ended_and_the_server_starts(serving, own_store, pictures):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), PromotionRequest("ana", ""))
    unfit = dataclasses.replace(candidate(own_store, "second"), classifier={}, digest="unfit")
    promote(registry, unfit, PromotionRequest("ana", "", canary=0.5))
    app = serving(own_store, run=None)
    assert app.model()["canary"] is None
    state = registry.state()
    assert state.canary is None and "the weights lack" in state.why


def test_inputs_inside_a_scenario_are_stored_up_to_the_limit(serving, own_store, pictures):
    app = serving(own_store, run="first", pin=True, reservoir=3, watch_share=0.2)
    load(app.port, 4, limited(requests_for(app, pictures, 200), 200))

    def stored_scenarios():
        if not own_store.list("traffic/first"):
            return []
        drawn = Run.open(own_store, "first").require(Gallery)
        return [sampled.scenario for sampled in read_traffic(own_store, "first", drawn)]

    wait_until(lambda: {stored_scenarios().count(scenario) for scenario in (0, 1)} == {3}, stored_scenarios)
    time.sleep(1)  # for more than that
    stored = stored_scenarios()  # NO_SCENARIO: flagged as probably wrong, outside all scenarios
    assert {0, 1} <= set(stored) <= {NO_SCENARIO, 0, 1}
    assert stored.count(0) == stored.count(1) == 3 and stored.count(NO_SCENARIO) <= 3


@pytest.fixture(scope="module")
def slow_app(serving, planted, tmp_path_factory):
    """An application with `first` in production, and version 2: a network that is some hundred times as slow."""
    store = copied_store(planted, tmp_path_factory.mktemp("slow"))
    registry, first = Registry(store), candidate(store, "first")
    promote(registry, first, PromotionRequest("ana", ""))
    spec = first.run_file()
    wide = spec.model_copy(update={"classifier": spec.classifier.model_copy(update={"channels": 384})})
    weights = weights_of(build_classifier(wide, 10))
    slow = dataclasses.replace(
        first, spec=wide.model_dump(mode="json"), classifier=weights, digest="slow", checks=()
    )
    registry.add(slow, "ana", "", forced=True)
    return Live(serving(store, run=None, max_canary_s=0.002, min_agreement=0), registry, store)


def test_a_canary_that_is_too_slow_is_ended_and_production_answers_for_it(slow_app, pictures):
    assign(slow_app.registry, 2, PromotionRequest("ana", "", canary=0.5))
    slow_app.app.wait_for_others({"2"})
    running = Load(slow_app.app.port, 8, requests_for(slow_app.app, pictures))
    running.start()
    wait_until(lambda: slow_app.registry.state().canary is None)
    running.wait_for_answers(50, since=time.monotonic())
    replies = running.stop()
    assert set(statuses(replies)) == {200} and len(replies) > 100
    assert "took longer than 0.002 s" in slow_app.registry.state().why
