"""Stores: the same tests over a folder and a bucket; then what only a bucket can do wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import numpy as np
import pytest
from s3_servers import moto_server, rclone_server

from defuse_core.artifacts import Psi
from defuse_core.codec import decode, encode
from defuse_core.errors import InputError, RunBusyError, StoreError
from defuse_core.runs import Run
from defuse_core.store import FolderStore, Store
from services.storage import lease, open_store, s3
from tests.conftest import tiny
from tests.waiting import wait_until

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hush-hush-hush"}


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Credentials of nobody in particular, and no client left from the test before."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3._client.cache_clear()
    yield monkeypatch
    s3._client.cache_clear()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        client.create_bucket(Bucket="bucket")
        yield address


@pytest.fixture
def bucket(moto: str, aws: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A store in a bucket, below a prefix of this test's own."""
    aws.setenv("AWS_ENDPOINT_URL", moto)
    return open_store(f"s3://bucket/{request.node.name.replace('[', '/').strip(']')}")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "runs") if request.param == "folder" else request.getfixturevalue("bucket")


def test_what_is_written_is_read_back(store: Store) -> None:
    store.write("a/b.bin", b"\x00one")
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    assert store.exists("a/b.bin")


def test_a_missing_key_is_a_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    assert not store.exists("nothing")


def test_create_leaves_what_is_there(store: Store) -> None:
    assert store.create("run.yaml", b"first")
    assert not store.create("run.yaml", b"second")
    assert store.read("run.yaml") == b"first"


def test_of_many_that_create_at_once_one_wins(store: Store) -> None:
    store.write("warm", b"up")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.create("run.yaml", b"%d" % i), range(8)))
    assert won.count(True) == 1
    assert store.read("run.yaml") == b"%d" % won.index(True)


def test_keys_are_listed_in_order_below_a_prefix(store: Store) -> None:
    for key in ("psi/2", "psi/1", "psi2/1", "run.yaml"):
        store.write(key, b"")
    assert store.list() == ["psi/1", "psi/2", "psi2/1", "run.yaml"]
    assert store.list("psi/") == ["psi/1", "psi/2"]
    assert store.within("psi").list() == ["1", "2"]
    assert store.within("elsewhere").list() == []


def test_a_folder_is_listed_while_runs_in_it_are_deleted(tmp_path: Path) -> None:
    store, ended = FolderStore(tmp_path), threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            run = store.within("gone")
            for number in range(30):
                run.write(f"psi/{number}/part", b"1")
            with run.lock():
                run.delete_all()

    store.write("kept", b"1")
    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(150):
            assert "kept" in store.list()
    finally:
        ended.set()
        other.join()


def test_a_deleted_key_is_gone_and_may_be_deleted_again(store: Store) -> None:
    store.write("a", b"1")
    store.delete("a")
    store.delete("a")
    assert store.list() == []


def test_a_store_travels_to_another_process_without_secrets(store: Store) -> None:
    store.write("a", b"1")
    packed = pickle.dumps(store)
    assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in packed
    assert "hush" not in repr(store)
    script = "import pickle, sys; sys.stdout.buffer.write(pickle.loads(sys.stdin.buffer.read()).read('a'))"
    read = subprocess.run([sys.executable, "-c", script], input=packed, stdout=subprocess.PIPE, check=True)
    assert read.stdout == b"1"


def test_a_locked_store_is_refused_to_a_second_driver_who_is_told_the_holder(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    run = store.within("run")
    with run.lock():
        with (
            pytest.raises(RunBusyError, match=f"process {os.getpid()} on ") as refused,
            store.within("run").lock(),
        ):
            raise AssertionError("both hold the run")
        assert store.address in str(refused.value)
        run.write("still", b"mine")
        with store.within("other run").lock():
            pass
    with store.within("run").lock():
        pass
    assert run.list() == ["still"]


@pytest.mark.parametrize("address", ["gs://bucket", "s3://", "s3://UPPER/x", "s3:///x"])
def test_an_address_of_another_kind_is_bad_input(address: str) -> None:
    with pytest.raises(InputError, match=r"expected"):
        open_store(address)


@pytest.mark.parametrize(
    "address",
    [
        "s3:/bucket/runs",
        "S3://bucket",
        "s3:bucket",
        "s3//bucket",
        "s3a:/bucket",
        "gs:/x",
        "file:/x",
        "C:/runs",
    ],
)
def test_a_misspelled_address_does_not_become_a_folder(address: str) -> None:
    with pytest.raises(InputError, match="expected s3://bucket/prefix or a folder"):
        open_store(address)


@pytest.mark.parametrize("address", ["a:b", "s3", "s3/bucket", "./s3:/bucket", "runs/a:/b"])
def test_a_folder_may_have_a_colon_in_its_name(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store(address).address == str(tmp_path / address)


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/runs").address == str(tmp_path / "runs")
    with pytest.raises(InputError, match="expected the home of an existing user after ~"):
        open_store("~nobody-of-this-name/runs")


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_store_that_is_a_file_is_bad_input(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*: expected a folder, found a file in its place"):
        open_store(f"{tmp_path}/file{below}")


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="run again") as refused:
        FolderStore(tmp_path / "file").write("a", b"")
    assert "\n" not in str(refused.value)


# ---- only a bucket


def test_more_keys_than_fit_on_a_page_are_all_listed(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE", 3)
    for number in range(10):
        bucket.write(f"{number}", b"")
    assert bucket.list() == [f"{number}" for number in range(10)]


def test_a_large_object_goes_in_parts(bucket: Store, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "LARGE_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(11 * 2**20)
    with bucket.lock():
        bucket.write("large", data[::-1])
        bucket.write("large", data)
    assert bucket.read("large") == data
    assert isinstance(bucket, s3.S3Store)
    etag = bucket._client.head_object(Bucket="bucket", Key=bucket.prefix + "large")["ETag"]
    assert etag.strip('"').endswith("-3")


def test_altered_bytes_are_noticed_by_the_digest_in_the_artefact(bucket: Store) -> None:
    counts = np.array([3, 4])
    bucket.write("psi.safetensors", encode(Psi(counts, 10, 40, 3, 1, 0.5)))
    bucket.write("psi.safetensors", bucket.read("psi.safetensors").replace(counts.tobytes(), bytes(16)))
    with pytest.raises(
        StoreError, match="its bytes changed since they were written; delete it and run again"
    ):
        decode(Psi, bucket.read("psi.safetensors"), "psi.safetensors")


def test_an_object_that_another_tool_wrote_is_read(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    bucket._client.put_object(Bucket="bucket", Key=bucket.prefix + "notes.json", Body=b"[]")
    assert bucket.read("notes.json") == b"[]"


def test_the_lease_of_a_dead_driver_is_taken_over(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    script = (
        "import os, pickle, sys\n"
        "with pickle.loads(sys.stdin.buffer.read()).lock():\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(bucket), check=False)
    begun = time.monotonic()
    with bucket.lock():
        bucket.write("mine", b"now")
    assert 1.0 <= time.monotonic() - begun < 25  # less than by default


THIEF = b'{"holder": "a thief", "token": "of the thief", "generation": 2}'


def steal(bucket: Store, prefix: str = "") -> None:
    """Put another driver's lease in place, as one does that has waited long enough."""
    assert isinstance(bucket, s3.S3Store)
    bucket._client.put_object(Bucket="bucket", Key=f"{bucket.prefix}{prefix}{lease.KEY}", Body=THIEF)


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
            with pytest.raises(RunBusyError, match="took the run over"):
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
        taken = "another one took the run over: process .* a thief does now"
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
        with pytest.raises(RunBusyError, match="another one took the run over"):
            bucket.write("trial", b"epoch 2")
    assert bucket.read("trial") == b"of the next driver"


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
            with pytest.raises(RunBusyError, match="another one took the run over"):
                bucket.delete("trial")
        else:
            bucket.delete("trial")  # at the second attempt
    assert bucket.exists("trial") == by_thief


def test_a_heartbeat_whose_answer_was_lost_is_ones_own(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 1000.0)
    assert isinstance(bucket, s3.S3Store)
    put = s3.S3Store._put_if

    def answer_lost(store: s3.S3Store, key: str, data: bytes, **condition: str) -> None:
        put(store, key, data, **condition)
        raise StoreError("no answer")

    with bucket.lock():
        held = bucket.leases[bucket.prefix]
        monkeypatch.setattr(s3.S3Store, "_put_if", answer_lost)
        with pytest.raises(StoreError, match="no answer"):
            held.beat()
        monkeypatch.setattr(s3.S3Store, "_put_if", put)
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
        with pytest.raises(RunBusyError, match="took the run over"):
            run.store.within("trials/defuse").write("lam-1.0.safetensors", b"1")
        bucket.within("another").write("a", b"1")


# ---- deleting a run, on both stores


def everything(store: Store) -> list[str]:
    """The files or objects of a store, with those that `list` does not show, and uploads that were not finished."""
    if isinstance(store, FolderStore):
        return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*"))
    assert isinstance(store, s3.S3Store)
    below = {"Bucket": store.bucket, "Prefix": store.prefix}
    found = store._client.list_objects_v2(**below).get("Contents", [])
    found += store._client.list_multipart_uploads(**below).get("Uploads", [])
    return [one["Key"] for one in found]


def test_a_deleted_run_leaves_no_lock_and_no_unfinished_writes(store: Store) -> None:
    for key in ("run.yaml", "psi/1.safetensors", ".odd", "traffic-1/.lease.json"):
        store.write(f"run/{key}", b"1")
    run = store.within("run")
    if isinstance(run, s3.S3Store):
        run._client.create_multipart_upload(Bucket="bucket", Key=run.prefix + "models.safetensors")
    with run.lock():
        run.write("models.safetensors", b"1")
        run.delete_all()
    assert everything(store) == []
    with run.lock():
        run.write("run.yaml", b"another run of that name")
    assert store.list() == ["run/run.yaml"]


def test_the_run_is_held_until_the_last_of_it_is_deleted(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    run = bucket.within("run")
    with run.lock():
        run.write("run.yaml", b"1")
        run.delete_all()
        with pytest.raises(RunBusyError, match=f"process {os.getpid()} on "), bucket.within("run").lock():
            raise AssertionError("another driver has begun before the deletion was over")
    assert everything(bucket) == []


def test_a_driver_that_begins_a_folder_again_while_it_is_deleted_loses_nothing(tmp_path: Path) -> None:
    deleter, begun = FolderStore(tmp_path / "run"), FolderStore(tmp_path / "run")
    with contextlib.ExitStack() as held:
        with deleter.lock():
            deleter.write("run.yaml", b"1")
            deleter.delete_all()
            held.enter_context(begun.lock())
            begun.write("run.yaml", b"2")
        begun.write("psi/1", b"2")
        with pytest.raises(RunBusyError), FolderStore(tmp_path / "run").lock():
            raise AssertionError("the end of the deletion took the lock away")
    assert FolderStore(tmp_path).list() == ["run/psi/1", "run/run.yaml"]


def test_a_deletion_that_was_killed_is_finished_by_the_next_driver(tmp_path: Path) -> None:
    (tmp_path / ".run.a1b2c3.deleted" / "psi").mkdir(parents=True)
    (tmp_path / ".run.a1b2c3.deleted" / "psi" / "1").touch()
    (tmp_path / ".run.a1b2c3.deleted" / "run.yaml").touch()
    assert FolderStore(tmp_path).list() == []
    with FolderStore(tmp_path / "run").lock():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_bucket_keeps_the_run_file_until_all_else_is_deleted(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a", "run.yaml", "trials/1"):
        bucket.write(key, b"1")
    delete = s3.S3Store.delete

    def killed_before_the_last(store: s3.S3Store, key: str) -> None:
        if store.list() == ["run.yaml"]:
            raise StoreError("killed")
        delete(store, key)

    monkeypatch.setattr(s3.S3Store, "delete", killed_before_the_last)
    with pytest.raises(StoreError, match="killed"), bucket.lock():
        bucket.delete_all()
    assert bucket.list() == ["run.yaml"]
    monkeypatch.setattr(s3.S3Store, "delete", delete)
    with bucket.lock():  # the lease was released, not left
        bucket.delete_all()
    assert everything(bucket) == []


def test_a_deleter_that_lost_its_lease_deletes_nothing_more(bucket: Store) -> None:
    with bucket.lock():
        bucket.write("run.yaml", b"1")
        steal(bucket)
        with pytest.raises(RunBusyError, match="a thief does now"):
            bucket.delete_all()
    assert bucket.list() == ["run.yaml"]


def test_a_deleter_leaves_the_lease_of_a_driver_that_took_it_over(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    with bucket.lock():
        bucket.delete_all()
        steal(bucket)
    assert bucket._client.get_object(Bucket="bucket", Key=bucket.prefix + lease.KEY)["Body"].read() == THIEF


def test_a_worker_of_a_deleted_run_writes_nothing(store: Store) -> None:
    run = store.within("run")
    with run.lock():
        run.write("run.yaml", b"1")
        orphan: Store = pickle.loads(pickle.dumps(run.within("trials")))
        run.delete_all()
    for write in (orphan.write, orphan.create):
        with pytest.raises(RunBusyError, match="nobody does now"):
            write("lam-1.0", b"1")
    assert everything(store) == []


# ---- workers that outlive their driver, on both stores


@pytest.fixture
def worker_of_a_dead_driver(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store as a worker has it whose driver ended; another driver holds the run now."""
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    with store.within("run").lock():
        orphan: Store = pickle.loads(pickle.dumps(store.within("run").within("trials")))
        orphan.write("lam-1.0", b"epoch 1")
    return orphan


def test_a_worker_is_refused_once_its_driver_has_ended(worker_of_a_dead_driver: Store) -> None:
    with pytest.raises(RunBusyError, match=f"process {os.getpid()} on .* nobody does now"):
        worker_of_a_dead_driver.write("lam-1.0", b"epoch 2")


def test_a_worker_of_a_driver_before_replaces_creates_and_deletes_nothing(
    store: Store, worker_of_a_dead_driver: Store
) -> None:
    orphan = worker_of_a_dead_driver
    with store.within("run").lock():
        for write in (orphan.write, orphan.within("deeper").write, orphan.create):
            with pytest.raises(RunBusyError):
                write("lam-2.0", b"of an orphan")
        with pytest.raises(RunBusyError):
            orphan.delete("lam-1.0")
        store.within("run").write("trials/lam-1.0", b"epoch 2")
        pickle.loads(pickle.dumps(store.within("run"))).write("trials/lam-1.0", b"epoch 3")
    assert {key: store.read(key) for key in store.list()} == {"run/trials/lam-1.0": b"epoch 3"}


def test_a_value_is_kept_where_the_writer_says_so_and_else_replaced(store: Store) -> None:
    with store.lock():
        for data in (b"2", b"1", b"3", b"2"):
            store.write("epochs", data, unless=lambda stored, data=data: stored >= data)  # type: ignore[misc]
        assert store.read("epochs") == b"3"
        store.write("epochs", b"1")
        assert store.read("epochs") == b"1"


def test_of_writers_at_the_same_time_the_highest_stays(store: Store) -> None:
    with store.lock():
        copies = [pickle.loads(pickle.dumps(store)) for _ in range(4)]

        def count_up(worker: Store) -> None:
            for number in range(5):
                data = b"%d" % number
                worker.write("epochs", data, unless=data.__le__)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count_up, copies))
        assert store.read("epochs") == b"4"


def test_a_driver_killed_in_a_folder_leaves_workers_that_the_next_driver_shuts_out(tmp_path: Path) -> None:
    script = (
        "import os, pickle, sys\n"
        "from defuse_core.store import FolderStore\n"
        f"store = FolderStore({str(tmp_path)!r})\n"
        "with store.lock():\n"
        "    sys.stdout.buffer.write(pickle.dumps(store)); sys.stdout.flush()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    orphan: Store = pickle.loads(killed.stdout)
    orphan.write("before", b"the next driver began")
    with FolderStore(tmp_path).lock(), pytest.raises(RunBusyError, match=f"process {os.getpid()} on"):
        orphan.write("after", b"1")
    assert FolderStore(tmp_path).list() == ["before"]


def test_a_server_that_ignores_conditions_is_told_and_settled(
    tmp_path: Path, aws: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    aws.setattr(lease, "SETTLE_S", 0.3)
    aws.setattr(lease, "BEAT_S", 0.2)
    with rclone_server(tmp_path, *KEYS.values()) as endpoint:
        aws.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store("s3://bucket/run")
        assert store.create("run.yaml", b"1")
        assert not store.create("run.yaml", b"2")
        with store.lock(), pytest.raises(RunBusyError), open_store("s3://bucket/run").lock():
            raise AssertionError("both hold the run")


@pytest.mark.parametrize("taken_over", [True, False], ids=["of the next driver", "of a faster worker"])
def test_a_large_write_replaces_nothing_that_was_written_while_its_parts_were_sent(
    taken_over: bool, tmp_path: Path, aws: pytest.MonkeyPatch
) -> None:
    """On a server that ignores conditions."""
    (tmp_path / "bucket").mkdir()
    aws.setattr(lease, "SETTLE_S", 0.3)
    aws.setattr(lease, "BEAT_S", 1000.0)
    aws.setattr(s3, "LARGE_BYTES", 5 * 2**20)
    aws.setattr(s3, "PART_BYTES", 5 * 2**20)
    with rclone_server(tmp_path, *KEYS.values()) as endpoint:
        aws.setenv("AWS_ENDPOINT_URL", endpoint)
        store, other = open_store("s3://bucket/run"), open_store("s3://bucket/run")
        assert isinstance(store, s3.S3Store)
        send = store._client.upload_part

        def send_late(**part: Any) -> Any:
            if not other.exists("models"):
                if taken_over:
                    steal(other)
                other.write("models", b"theirs")
            return send(**part)

        with store.lock():
            aws.setattr(store._client, "upload_part", send_late)
            expected = pytest.raises(RunBusyError) if taken_over else contextlib.nullcontext()
            with expected:
                store.write("models", bytes(6 * 2**20), unless=lambda stored: stored == b"theirs")
        assert other.read("models") == b"theirs"


def _refused(aws: pytest.MonkeyPatch, address: str = "s3://bucket/run") -> str:
    s3._client.cache_clear()
    with pytest.raises(StoreError) as refused:
        open_store(address).write("a", b"1")
    line = str(refused.value)
    assert "\n" not in line
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in line and "wrong-secret" not in line
    return line


def test_every_way_to_be_refused_says_what_to_do(tmp_path: Path, aws: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    with rclone_server(tmp_path, *KEYS.values()) as endpoint:
        aws.setenv("AWS_ENDPOINT_URL", endpoint)
        open_store("s3://bucket/run").write("a", b"1")
        assert "has no such bucket; create it" in _refused(aws, "s3://other/run")
        aws.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        assert "refused the credentials (SignatureDoesNotMatch)" in _refused(aws)
        aws.setenv("AWS_ACCESS_KEY_ID", "nobody")
        assert "refused the credentials" in _refused(aws)
        aws.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no complete AWS credentials found" in _refused(aws)
        aws.delenv("AWS_ACCESS_KEY_ID")
        assert "no complete AWS credentials found" in _refused(aws)
        aws.setenv("AWS_PROFILE", "nobody's")
        assert "check AWS_PROFILE" in _refused(aws)
    assert (tmp_path / "bucket" / "run" / "a").read_bytes() == b"1"


def test_an_endpoint_that_is_down_is_said_at_once(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    assert "no answer from http://127.0.0.1:9" in _refused(aws)
    assert time.monotonic() - begun < 60
    aws.setenv("AWS_ENDPOINT_URL", "http://ana:secret@127.0.0.1:9")
    assert "no answer from http://***@127.0.0.1:9 (" in _refused(aws)


def test_an_endpoint_without_its_scheme_is_said(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL: expected such as http://host:9000"):
        open_store("s3://bucket/runs")


class _Flaky(BaseHTTPRequestHandler):
    """A proxy to moto that fails every fifth call: by hanging up, with a 503, or by losing the answer."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    every = 5
    calls = 0
    failed = 0
    lock = threading.Lock()

    def _pass(self) -> None:
        cls = type(self)
        with cls.lock:
            cls.calls += 1
            fails, how = cls.calls % cls.every == 0, cls.calls // cls.every % 3
            cls.failed += fails
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fails and how == 0:
            self.close_connection = True
            return
        if fails and how == 1:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        sent = {"Content-Type": "application/octet-stream"} | dict(
            self.headers
        )  # else urllib says it is a form
        request = Request(cls.upstream + self.path, body or None, sent, method=self.command)
        try:
            with urlopen(request) as answer:
                status, headers, data = answer.status, answer.headers, answer.read()
        except OSError as error:
            status, headers, data = error.code, error.headers, error.read()  # type: ignore[attr-defined]
        if fails:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {"connection", "transfer-encoding", "server", "date"}:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = _pass  # noqa: N815

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def flaky(moto: str, aws: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    _Flaky.upstream, _Flaky.calls, _Flaky.failed = moto, 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Flaky) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        yield lambda: _Flaky.failed
        proxy.shutdown()


def test_a_server_that_fails_every_fifth_call_is_borne_with(flaky: Callable[[], int]) -> None:
    store = open_store("s3://bucket/flaky")
    with store.lock():
        for number in range(8):
            store.write(f"{number}", b"%d" % number)
        assert [store.read(key) for key in store.list()] == [b"%d" % number for number in range(8)]
    assert flaky() >= 4


def test_an_object_is_created_although_the_answer_is_lost(flaky: Callable[[], int]) -> None:
    store = open_store("s3://bucket/echo")
    made = [store.create(f"{number}", b"%d" % number) for number in range(30)]
    assert all(made) and flaky() >= 9
    assert not any(store.create(f"{number}", b"other") for number in range(30))


class _Stalling(_Flaky):
    """A proxy to moto that, once armed, answers one heartbeat never, and all else."""

    every = 10**9
    armed, stalled, freed = threading.Event(), threading.Event(), threading.Event()

    def do_PUT(self) -> None:
        cls = type(self)
        if cls.armed.is_set() and not cls.stalled.is_set() and self.path.endswith(lease.KEY):
            cls.stalled.set()
            cls.freed.wait()
            self.close_connection = True
        else:
            self._pass()


def test_a_heartbeat_that_gets_no_answer_is_followed_by_another_before_the_lease_ends(
    moto: str, aws: pytest.MonkeyPatch
) -> None:
    aws.setattr(lease, "BEAT_S", 0.2)
    _Stalling.upstream = moto
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stalling) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        watching = s3.S3Store("bucket", "stalled/", moto, "us-east-1")
        try:
            with open_store("s3://bucket/stalled").lock():
                _Stalling.armed.set()
                assert _Stalling.stalled.wait(60)
                begun, content = time.monotonic(), watching.read(lease.KEY)
                wait_until(lambda: watching.read(lease.KEY) != content)
                assert time.monotonic() - begun < lease.LEASE_S
        finally:
            _Stalling.freed.set()
            proxy.shutdown()
