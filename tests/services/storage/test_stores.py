"""What every store does: the same tests over a folder and a bucket."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from buckets import KEYS

from defuse_core.errors import InputError, NoAnswerError, RunBusyError, StoreError
from defuse_core.store import FolderStore, Store
from services.storage import lease, open_store


def test_what_is_written_is_read_back(store: Store) -> None:
    store.write("a/b.bin", b"\x00one")
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    assert store.exists("a/b.bin")


def test_a_missing_key_is_a_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    assert not store.exists("nothing")


def test_the_version_of_a_key_changes_with_its_bytes_alone(store: Store) -> None:
    assert store.version("a/b") is None
    store.write("a/b", b"one")
    first = store.version("a/b")
    assert first is not None and store.version("a/b") == first
    store.write("a/b", b"two")
    assert store.version("a/b") not in (None, first)
    store.delete("a/b")
    assert store.version("a/b") is None


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
    for key in ("psi/2", "psi/1", "psi2/1", "psi/.own", "run.yaml"):
        store.write(key, b"")
    assert store.list() == ["psi/1", "psi/2", "psi2/1", "run.yaml"]
    assert store.list("psi/") == ["psi/1", "psi/2"]
    assert store.within("psi").list() == ["1", "2"]
    assert store.within("elsewhere").list() == []


def test_folders_are_listed_without_what_is_in_them(store: Store) -> None:
    assert store.folders() == []
    for key in ("runs/b/psi/1", "runs/b/run.yaml", "runs/a/run.yaml", "runs/file", "runs/.gone/run.yaml"):
        store.write(key, b"")
    assert store.folders() == ["runs"]
    assert store.within("runs").folders() == ["a", "b"]


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


@pytest.mark.parametrize("bucket", ["bk", "b" * 64, "Our-runs", "-runs"])
def test_a_name_that_no_bucket_can_have_is_refused_with_the_rule(bucket: str) -> None:
    with pytest.raises(InputError, match="name has 3 to 63 characters: a-z, 0-9, dots, hyphens, underscores"):
        open_store(f"s3://{bucket}/runs")


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


def test_a_store_in_rays_copy_of_a_jobs_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(
        InputError, match="--store runs: expected s3://bucket/prefix or an absolute folder; Ray"
    ):
        open_store("runs")
    open_store(str(tmp_path / "runs"))


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


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_store_behind_a_link_whose_disk_is_not_mounted_is_bad_input(below: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(
        InputError, match="link is a link to .*/unmounted, which does not exist; is its disk mo"
    ):
        open_store(f"{tmp_path}/link{below}")
    (tmp_path / "unmounted").mkdir()
    open_store(f"{tmp_path}/link{below}").write("a", b"1")


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="run again") as refused:
        FolderStore(tmp_path / "file").write("a", b"")
    assert "\n" not in str(refused.value) and not isinstance(refused.value, NoAnswerError)


@pytest.mark.parametrize(
    "code", [errno.ESTALE, errno.ECONNRESET, errno.ENETUNREACH, errno.EAGAIN, errno.EMFILE]
)
def test_a_network_folder_whose_server_is_away_gives_no_answer(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(NoAnswerError, match=os.strerror(code)):
        FolderStore(tmp_path).read("a")


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


def test_a_store_is_locked_while_a_driver_holds_it(store: Store) -> None:
    assert not store.is_locked()
    with store.lock():
        assert store.is_locked()
        assert not store.within("other").is_locked()
    assert not store.is_locked()
