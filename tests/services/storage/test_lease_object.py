"""Leases on an object in memory, in which others write at every moment that matters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from buckets import THIEF, steal

from defuse_core.errors import RunBusyError, StoreError
from defuse_core.store import Store
from services.storage import lease, s3
from services.storage.lease import Lease, LeaseObject, LeaseState, hold
from tests.waiting import WAIT_S, wait_until


class ObjectInMemory:
    """A LeaseObject without a bucket. `before` has what happens before a call; each happens once."""

    address = "memory"

    def __init__(self, content: bytes | None = None, conditional: bool = True) -> None:
        self.content, self.conditional = content, conditional
        self.number = 1
        self.before: dict[str, list[Callable[[], Any]]] = {"read": [], "write_if": []}

    def put(self, content: bytes | None) -> None:
        self.content, self.number = content, self.number + 1

    def read(self) -> tuple[str, bytes] | None:
        self._interrupt("read")
        return None if self.content is None else (str(self.number), self.content)

    def write_if(self, data: bytes, version: str | None) -> str | None:
        self._interrupt("write_if")
        if version != (None if self.content is None else str(self.number)):
            return None
        self.put(data)
        return str(self.number)

    def delete_if(self, version: str) -> None:
        if version == str(self.number):
            self.put(None)

    def is_conditional(self, data: bytes) -> bool:
        return self.conditional

    def _interrupt(self, call: str) -> None:
        if self.before[call]:
            self.before[call].pop(0)()


def state(found: ObjectInMemory) -> LeaseState:
    assert found.content is not None
    return LeaseState.parse(found.content)


def nothing() -> None: ...


def fail() -> None:
    raise StoreError("no answer")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    monkeypatch.setattr(lease, "LEASE_S", 0.3)
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)


NEWER = json.dumps({"holder": "a newer Defuse", "token": "x", "places": 3}).encode()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"3", NEWER])
def test_a_lease_that_cannot_be_read_is_that_of_an_unknown_living_driver(content):
    assert LeaseState.parse(content) == LeaseState("another driver")
    found = ObjectInMemory(content)
    begun = time.monotonic()
    with hold(found, found):
        assert time.monotonic() - begun >= 0.3  # after LEASE_S without a heartbeat


def test_a_released_lease_is_taken_at_once_and_is_of_the_next_generation(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    found = ObjectInMemory()
    for generation in range(3):
        with hold(found, found) as held:
            assert state(found).generation == generation and not state(found).released
            assert state(found).token == held.state.token
        assert state(found).released


@pytest.mark.parametrize("left", [None, LeaseState("the one before", "t", 4, released=True).dump()])
def test_a_lease_that_is_removed_or_released_while_another_driver_watches_it_is_taken_at_once(
    left, monkeypatch
):
    monkeypatch.setattr(lease, "LEASE_S", 1000.0)
    found = ObjectInMemory(THIEF)
    # refused, seen by the write, seen by the taking, and then watched
    found.before["read"] = [nothing, nothing, nothing, lambda: found.put(left)]
    with hold(found, found):
        assert state(found).generation == (0 if left is None else 5)


def test_the_driver_that_writes_now_is_named_to_one_that_watched_another():
    found = ObjectInMemory(THIEF)
    other = LeaseState("a second one", "u", 3).dump()
    found.before["read"] = [nothing, nothing, nothing, lambda: found.put(other)]
    with (
        pytest.raises(RunBusyError, match="memory: a second one writes this run; stop it"),
        hold(found, found),
    ):
        raise AssertionError("taken from a living driver")
    assert found.content == other


def test_of_two_drivers_that_take_a_released_lease_the_slower_one_is_refused():
    found = ObjectInMemory(LeaseState("the one before", "t", 4, released=True).dump())
    found.before["write_if"] = [nothing, lambda: found.put(THIEF)]
    with pytest.raises(RunBusyError, match="memory: another driver has just begun"), hold(found, found):
        raise AssertionError("both hold the run")
    assert found.content == THIEF


@pytest.mark.parametrize("faster", [None, THIEF])
def test_without_conditions_the_driver_that_wrote_last_has_the_lease(faster, monkeypatch):
    found = ObjectInMemory(conditional=False)
    if faster is not None:
        monkeypatch.setattr(time, "sleep", lambda seconds: found.put(faster))
        with pytest.raises(RunBusyError, match="another driver has just begun"):
            Lease(found, "slower").take()
    else:
        Lease(found, "alone").take()
        assert state(found).holder == "alone"


def test_a_store_that_fails_for_a_while_is_asked_again_by_the_heartbeat_and_by_the_release():
    found = ObjectInMemory()
    with hold(found, found) as held:
        found.before["write_if"] = [fail] * 3
        wait_until(lambda: not found.before["write_if"])
        beats = state(found).beats
        wait_until(lambda: state(found).beats > beats + 1)
        assert not held.lost
    quiet = ObjectInMemory()
    with hold(found, quiet):
        found.before["write_if"] = [fail]  # the work is done: that the lease stays is no error of it
    assert not state(found).released


def test_a_write_that_took_effect_is_ones_own_however_often_its_answer_is_lost(monkeypatch):
    found = ObjectInMemory()
    write = found.write_if
    monkeypatch.setattr(found, "write_if", lambda *given: write(*given) and None)
    held = Lease(found, "alone")
    held.take()
    held.beat()
    assert not held.lost and state(found) == held.state


def test_a_driver_that_lost_its_lease_leaves_nothing_of_it_where_the_run_was_deleted():
    found = ObjectInMemory()
    with hold(found, found) as held:
        found.put(THIEF)
        wait_until(lambda: held.lost)
        found.put(None)
    assert found.content is None


def test_a_lease_that_a_server_replaces_in_two_steps_is_there(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(bucket, s3.S3Store)
    bucket.write(lease.KEY, THIEF)
    fetch, missing = s3.S3Store.read_with_version, [True]

    def fetch_between(store: s3.S3Store, key: str) -> tuple[str, bytes]:
        if missing and missing.pop():
            raise FileNotFoundError
        return fetch(store, key)

    monkeypatch.setattr(s3.S3Store, "read_with_version", fetch_between)
    seen = LeaseObject(bucket).read()
    assert seen is not None and seen[1] == THIEF
    bucket.delete(lease.KEY)
    assert LeaseObject(bucket).read() is None


def test_a_heartbeat_outlives_an_error_of_any_kind(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)

    def fail() -> None:
        raise RuntimeError("the refreshed credentials are still expired")

    found = ObjectInMemory()
    with hold(found, found) as held:
        found.before["write_if"].append(fail)
        begun = held.state.beats
        wait_until(lambda: not found.before["write_if"] and state(found).beats > begun + 2)


@pytest.mark.parametrize("heeded", ["IfNoneMatch", "IfMatch"])
def test_a_server_that_heeds_one_condition_of_two_does_not_heed_conditions(heeded, bucket, monkeypatch):
    bucket.write(lease.KEY, THIEF)
    assert LeaseObject(bucket).is_conditional(THIEF)
    put = s3.S3Store._put

    def heed_one(store: s3.S3Store, key: str, data: bytes, **condition: str) -> str | None:
        return put(store, key, data, **{name: value for name, value in condition.items() if name == heeded})

    monkeypatch.setattr(s3.S3Store, "_put", heed_one)
    assert not LeaseObject(bucket).is_conditional(THIEF)


def test_a_value_is_kept_where_the_writer_says_so_also_without_a_lock(store: Store) -> None:
    for data in (b"2", b"1", b"3"):
        store.write("epochs", data, unless=lambda stored, data=data: stored >= data)  # type: ignore[misc]
    assert store.read("epochs") == b"3"


def test_a_run_that_nobody_holds_is_deleted_with_the_lease_of_its_last_driver(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    with bucket.lock():
        bucket.write("run.yaml", b"1")
    bucket.delete_all()
    assert bucket._all_keys() == []
    bucket.require_lock()


def test_no_heartbeat_is_under_way_once_the_lease_is_released():
    found, begun, done = ObjectInMemory(), threading.Event(), list[bool]()

    def slow() -> None:
        begun.set()
        time.sleep(0.1)
        done.append(True)

    with hold(found, found):
        found.before["write_if"] = [slow]
        assert begun.wait(WAIT_S)
    assert done and state(found).released


@pytest.mark.parametrize("held", [False, True])
def test_a_lease_that_changes_between_the_look_and_the_write_is_not_replaced(
    held: bool, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = LeaseObject(bucket)  # type: ignore[arg-type]
    version, read = found.write_if(b"{}", None) if held else None, found.read
    monkeypatch.setattr(found, "read", lambda: (read(), steal(bucket))[0])
    assert found.write_if(b'{"beats": 1}', version) is None
    seen = read()
    assert seen is not None and seen[1] == THIEF
