"""Under load: limits hold, replicas die, versions change, and requests are not lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from load import Reply, bounded, load, request_bytes

from defuse_core.runs import Run
from services.serving.candidate import prepare
from services.serving.promotion import How, promote
from services.serving.registry import Registry
from services.serving.reservoir import read_traffic
from services.serving.rollout import roll_back


def requests_for(app, pictures, count=100):
    return [
        request_bytes(picture, app.predict, "image/png", **{"X-Request-Key": f"user-{n}"})
        for n, picture in enumerate(pictures[:count])
    ]


def candidate(store, name):
    return prepare(Run.open(store, name))[1]


def statuses(replies: list[Reply]) -> Counter[int]:
    return Counter(reply.status for reply in replies)


class Load(threading.Thread):
    """Load in the background until `stop` is called, and no longer than a minute or 20,000 requests."""

    def __init__(self, port, clients, requests):
        super().__init__(daemon=True)
        take = bounded(requests, 20_000, 60)
        self.ended = threading.Event()
        self.work = lambda: load(port, clients, lambda: None if self.ended.is_set() else take())
        self.replies: list[Reply] = []

    def run(self):
        self.replies = self.work()

    def stop(self) -> list[Reply]:
        self.ended.set()
        self.join()
        return self.replies


def test_a_load_of_32_clients_is_answered_whole_and_stays_bounded(serving, planted, pictures):
    app = serving(planted, run="first", pin=True)
    started = time.monotonic()
    replies = load(app.port, 32, bounded(requests_for(app, pictures), 1500, 60))
    assert statuses(replies) == {200: 1500}
    assert time.monotonic() - started < 60
    assert np.quantile([reply.seconds for reply in replies], 0.99) < 5


def test_overload_is_answered_503_with_retry_after_at_once_and_passes(serving, planted, pictures):
    busy = serving(
        planted, run="first", pin=True, max_ongoing=2, max_queued=2, batch_wait_s=0.5, retry_after_s=3
    )
    replies = load(busy.port, 24, bounded(requests_for(busy, pictures), 200, 60))
    assert set(statuses(replies)) == {200, 503}
    refused = [reply for reply in replies if reply.status == 503]
    assert len(refused) > 100
    assert {reply.headers.get("retry-after") for reply in refused} == {"3"}
    assert np.median([reply.seconds for reply in refused]) < 0.5
    assert statuses(load(busy.port, 1, bounded(requests_for(busy, pictures), 3, 60))) == {200: 3}


def test_a_killed_replica_costs_no_more_than_what_it_was_working_on(serving, planted, pictures):
    app = serving(planted, run="first", pin=True, min_replicas=2, max_replicas=2)
    clients = 8
    running = Load(app.port, clients, requests_for(app, pictures))
    running.start()
    time.sleep(1.5)
    os.kill(one_replica_of(app.name), signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(6)
    replies = running.stop()
    lost = [reply for reply in replies if reply.status != 200]
    assert len(lost) <= clients
    assert max((reply.at for reply in lost), default=killed) < killed + 5
    assert sum(reply.status == 200 and reply.at > killed + 2 for reply in replies) > 50


def one_replica_of(name: str) -> int:
    """Return the process of one replica of an application."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    replica = next(a for a in actors if a["name"].startswith(f"SERVE_REPLICA::{name}#"))
    actor = ray.get_actor(replica["name"], replica["namespace"])
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def test_a_new_version_and_a_rollback_take_over_under_load_with_no_request_lost(serving, own_store, pictures):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), How("ana", ""))
    app = serving(own_store, run=None)
    running = Load(app.port, 8, requests_for(app, pictures))
    running.start()
    time.sleep(1)
    promote(registry, candidate(own_store, "second"), How("ana", ""))
    app.wait_for("2")
    time.sleep(1)
    roll_back(registry, "bo", "to see it work")
    app.wait_for("1")
    time.sleep(1)
    replies = running.stop()
    assert set(statuses(replies)) == {200}
    versions = [reply.json()["version"] for reply in sorted(replies, key=lambda reply: reply.at)]
    changes = [a + b for a, b in zip(versions, versions[1:], strict=False) if a != b]
    assert "12" in changes and "21" in changes
    assert versions[0] == "1" == versions[-1] and len(changes) < 40


def test_a_canary_answers_its_share_by_request_key_and_production_the_rest(serving, own_store, pictures):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), How("ana", ""))
    promote(registry, candidate(own_store, "second"), How("ana", "", canary=0.3))
    app = serving(own_store, run=None)
    requests = requests_for(app, pictures, 100)
    replies = load(app.port, 8, bounded(requests, 600, 60))
    assert set(statuses(replies)) == {200}
    share = np.mean([reply.json()["version"] == "2" for reply in replies])
    assert 0.15 < share < 0.45
    again = [load(app.port, 1, bounded([request], 3, 60)) for request in requests[:10]]
    assert all(len({reply.json()["version"] for reply in same}) == 1 for same in again)
    assert registry.standing().canary == 2


@pytest.mark.parametrize(("name", "words"), [("broken", "images failed"), ("swapped", "answers agreed")])
@pytest.mark.parametrize("shadow", [False, True])
def test_a_canary_or_shadow_that_fails_or_disagrees_is_rolled_back_and_no_request_fails(
    serving, own_store, pictures, name, words, shadow
):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), How("ana", ""))
    how = How("ana", "", force="to see it fail", canary=None if shadow else 0.5, shadow=shadow)
    promote(registry, candidate(own_store, name), how)
    app = serving(own_store, run=None)
    replies = load(app.port, 8, bounded(requests_for(app, pictures, 500), 1000, 60))
    end = time.monotonic() + 10
    while (standing := registry.standing()).canary or standing.shadow:
        assert time.monotonic() < end, "the trial goes on"
        time.sleep(0.1)
    assert set(statuses(replies)) == {200}
    assert words in standing.why and standing.by == "defuse serve" and standing.production == 1
    expected = {"1"} if shadow or name == "broken" else {"1", "2"}
    assert {reply.json()["version"] for reply in replies} == expected


def test_a_version_that_cannot_be_loaded_leaves_the_present_one_in_place(serving, own_store, pictures):
    registry = Registry(own_store)
    promote(registry, candidate(own_store, "first"), How("ana", ""))
    app = serving(own_store, run=None)
    registry.store.create("versions/000002.safetensors", b"cut")
    registry.change("version 2 to production", "ana", "", lambda _: {"production": 2})
    time.sleep(1)
    assert set(statuses(load(app.port, 2, bounded(requests_for(app, pictures), 20, 30)))) == {200}
    promote(registry, candidate(own_store, "second"), How("ana", ""))
    app.wait_for("3")


def test_inputs_that_lie_in_a_scenario_are_kept_within_the_bound(serving, own_store, pictures):
    app = serving(own_store, run="first", pin=True, reservoir=3, watch_share=0.2)
    load(app.port, 4, bounded(requests_for(app, pictures, 300), 300, 60))
    time.sleep(1)
    traffic = read_traffic(own_store, "first")
    assert {int(s) for s in traffic.scenario} == {0, 1}
    assert len(traffic) == 6
