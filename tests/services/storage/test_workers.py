"""Workers that outlive their driver, on both stores."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from buckets import KEYS, steal
from s3_servers import rclone_server

from defuse_core.errors import RunBusyError
from defuse_core.store import FolderStore, Store
from services.storage import lease, open_store, s3


@pytest.fixture
def worker_of_a_dead_driver(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store as a worker has it whose driver ended; another driver holds the run now."""
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    with store.within("run").lock():
        orphan: Store = pickle.loads(pickle.dumps(store.within("run").within("trials")))
        orphan.write("lam-1.0", b"epoch 1")
    return orphan


def test_a_worker_is_refused_once_its_driver_has_ended(worker_of_a_dead_driver: Store) -> None:
    with pytest.raises(RunBusyError, match=f"process {os.getpid()} on .* nobody holds it now"):
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
        send = store._sending_client.upload_part

        def send_late(**part: Any) -> Any:
            if not other.exists("models"):
                if taken_over:
                    steal(other)
                other.write("models", b"theirs")
            return send(**part)

        with store.lock():
            aws.setattr(store._sending_client, "upload_part", send_late)
            expected = pytest.raises(RunBusyError) if taken_over else contextlib.nullcontext()
            with expected:
                store.write("models", bytes(6 * 2**20), unless=lambda stored: stored == b"theirs")
        assert other.read("models") == b"theirs"
