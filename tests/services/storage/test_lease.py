"""Leases on a bucket: drivers that die, pause or lose their run."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from buckets import THIEF, steal

from defuse_core.errors import RunBusyError, StoreError
from defuse_core.runs import Run
from defuse_core.store import Store
from services.storage import lease, s3
from services.storage.lease import LeaseObject
from tests.conftest import tiny
from tests.waiting import wait_until


def test_the_lease_of_a_dead_driver_is_taken_over(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, pickle, sys\n"
        "with pickle.loads(sys.stdin.buffer.read()).lock():\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(bucket), check=False)
    assert bucket.is_locked()  # for all that can be known
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    wait_until(lambda: not bucket.is_locked())
    begun = time.monotonic()
    with bucket.lock():
        bucket.write("mine", b"now")
    assert 1.0 <= time.monotonic() - begun < 25  # less than by default


def test_a_driver_that_lost_its_lease_writes_no_more_and_is_told_to_end(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    assert isinstance(bucket, s3.S3Store)
    with bucket.lock():
        bucket.require_lock()
        steal(bucket)
        wait_until(lambda: bucket.leases[bucket.prefix].lost)
        for write in (bucket.write, bucket.within("trials").write, bucket.create):
            with pytest.raises(RunBusyError, match="a thief holds it now"):
                write("a", b"1")
        with pytest.raises(RunBusyError, match="another one took the run over"):
            bucket.within("trials").require_lock()
    assert bucket._client.get_object(Bucket="bucket", Key=bucket.prefix + lease.KEY)["Body"].read() == THIEF


def test_a_driver_that_was_paused_replaces_nothing_whatever_its_clocks_say(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 1000.0)  # no heartbeat: the process is stopped
    with bucket.lock():
        bucket.write("kept", b"ours")
        steal(bucket)
        taken = "process .* held this run; a thief holds it now"
        for write, key in ((bucket.write, "kept"), (bucket.within("x").write, "new"), (bucket.create, "new")):
            with pytest.raises(RunBusyError, match=taken):
                write(key, b"theirs")
        with pytest.raises(RunBusyError):
            bucket.delete("kept")
    assert bucket.read("kept") == b"ours"


def pause_after_the_next_check(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Call `meanwhile` once, between a store's check of its fence and what it does then."""
    require = s3.S3Store._require_fence

    def check_and_pause(store: s3.S3Store) -> None:
        require(store)
        monkeypatch.setattr(s3.S3Store, "_require_fence", require)
        meanwhile()

    monkeypatch.setattr(s3.S3Store, "_require_fence", check_and_pause)


def test_a_driver_paused_in_the_middle_of_a_write_replaces_nothing(
    bucket: Store, moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(bucket, s3.S3Store)
    other = s3.S3Store("bucket", bucket.prefix, moto, "us-east-1")

    def take_over() -> None:
        steal(bucket)
        other.write("trial", b"of the next driver")

    with bucket.lock():
        bucket.write("trial", b"epoch 1")
        pause_after_the_next_check(monkeypatch, take_over)
        with pytest.raises(RunBusyError, match="a thief holds it now"):
            bucket.write("trial", b"epoch 2")
    assert bucket.read("trial") == b"of the next driver"


@pytest.mark.parametrize("method", ["write", "create"])
def test_a_driver_paused_after_a_write_deletes_nothing_that_the_next_driver_may_use(
    method: str, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = s3.S3Store.write_if

    def put_and_pause(store: s3.S3Store, key: str, data: bytes, version: str | None) -> str | None:
        written = put(store, key, data, version)
        if key == "models":
            steal(bucket)
        return written

    monkeypatch.setattr(s3.S3Store, "write_if", put_and_pause)
    with bucket.lock():
        getattr(bucket, method)("models", b"of this driver")
        with pytest.raises(RunBusyError, match="a thief holds it now"):
            bucket.write("psi", b"of this driver")
    assert bucket.read("models") == b"of this driver"


@pytest.mark.parametrize("by_thief", [False, True], ids=["of this driver", "of the next driver"])
def test_a_driver_paused_in_the_middle_of_a_deletion_deletes_nothing_of_the_next_driver(
    by_thief: bool, bucket: Store, moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(bucket, s3.S3Store)
    other = s3.S3Store("bucket", bucket.prefix, moto, "us-east-1")

    def write_meanwhile() -> None:
        if by_thief:
            steal(bucket)
        other.write("trial", b"of another writer")

    with bucket.lock():
        bucket.write("trial", b"epoch 1")
        pause_after_the_next_check(monkeypatch, write_meanwhile)
        if by_thief:
            with pytest.raises(RunBusyError, match="a thief holds it now"):
                bucket.delete("trial")
        else:
            bucket.delete("trial")  # at the second attempt
    assert bucket.exists("trial") == by_thief


def test_a_heartbeat_whose_answer_was_lost_is_ones_own(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 1000.0)
    assert isinstance(bucket, s3.S3Store)
    put = s3.S3Store.write_if

    def answer_lost(store: s3.S3Store, key: str, data: bytes, version: str | None) -> None:
        put(store, key, data, version)
        raise StoreError("no answer")

    with bucket.lock():
        held = bucket.leases[bucket.prefix]
        monkeypatch.setattr(s3.S3Store, "write_if", answer_lost)
        with pytest.raises(StoreError, match="no answer"):
            held.beat()
        monkeypatch.setattr(s3.S3Store, "write_if", put)
        held.beat()
        assert not held.lost
        bucket.write("still", b"mine")
    assert bucket.read("still") == b"mine"


def test_generations_of_the_lease_grow_over_releases_and_deaths(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.5)
    assert isinstance(bucket, s3.S3Store)
    seen = []
    for _ in range(2):
        with bucket.lock():
            seen.append(bucket.leases[bucket.prefix].state.generation)
    steal(bucket)  # generation 2, and no heartbeat
    with bucket.lock():
        seen.append(bucket.leases[bucket.prefix].state.generation)
    assert seen == [0, 1, 3]


def test_a_run_whose_driver_lost_its_lease_makes_no_more(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    assert isinstance(bucket, s3.S3Store)
    with bucket.within("mnist").lock():  # as `defuse run` does it
        run = Run.start(bucket, "mnist", tiny())
        steal(bucket, "mnist/")
        wait_until(lambda: bucket.leases[f"{bucket.prefix}mnist/"].lost)
        with pytest.raises(RunBusyError, match="a thief holds it now"):
            run.store.within("trials/defuse").write("lam-1.0.safetensors", b"1")
        bucket.within("another").write("a", b"1")


def test_a_lease_is_released_by_the_client_that_waits_longer_than_the_heartbeats(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(bucket, s3.S3Store)
    release, released = lease.Lease.release, []

    def noted(self: lease.Lease) -> None:
        released.append(self.object)
        release(self)

    monkeypatch.setattr(lease.Lease, "release", noted)
    found, beating = LeaseObject(bucket), LeaseObject(bucket)
    with lease.hold(found, beating) as held:
        assert held.object is beating
    assert len(released) == 1 and released[0] is found


def test_a_command_that_is_stopped_does_not_wait_for_a_server_that_is_away(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    found, beating = LeaseObject(bucket), LeaseObject(bucket)
    with pytest.raises(KeyboardInterrupt), lease.hold(found, beating) as held:
        raise KeyboardInterrupt
    assert held.object is beating and not bucket.is_locked()


def test_a_heartbeat_that_fails_is_logged_once_per_outage_without_passwords_and_repeated(
    bucket: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(held: lease.Lease) -> None:
        failures.append(held)
        raise TypeError("no answer from http://ana:sup3r@host")

    def outage() -> None:
        failures.clear()
        monkeypatch.setattr(lease.Lease, "beat", fail)
        wait_until(lambda: len(failures) >= 3)
        monkeypatch.setattr(lease.Lease, "beat", beat)
        beats = held.state.beats
        wait_until(lambda: held.state.beats > beats)

    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    beat, failures = lease.Lease.beat, list[lease.Lease]()
    assert isinstance(bucket, s3.S3Store)
    with bucket.lock():
        held = bucket.leases[bucket.prefix]
        outage()
        outage()
    told = f"{bucket.address}: the lease was not renewed, trying again: no answer from http://***@host"
    assert [line for line in caplog.messages if "lease" in line] == [told, told]


def test_a_heartbeat_without_an_answer_is_given_up_long_before_others_may_take_the_lease(
    bucket: Store,
) -> None:
    assert isinstance(bucket, s3.S3Store)
    with bucket.lock():
        beating = bucket.leases[bucket.prefix].object.store
        assert beating.attempts * beating.timeout_s < lease.LEASE_S / 2
