"""Deleting a run, on both stores."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from buckets import THIEF, steal

from defuse_core.errors import RunBusyError, StoreError
from defuse_core.store import FolderStore, Store
from services.cli.runs import is_left_behind
from services.storage import lease, s3
from tests.waiting import WAIT_S

STEPS = [  # artefacts in the order in which a run makes them
    "run.yaml", "models.safetensors", "psi/000000.safetensors", "psi.safetensors", "gallery.safetensors",
    "votes.safetensors", "verdicts.safetensors", "corrections.safetensors", "sweep.safetensors", "trials/1",
    "report.json",
]  # fmt: skip


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
    (tmp_path / ".other.a1b2c3.deleted").mkdir()  # which its own next driver finishes
    assert FolderStore(tmp_path).list() == []
    with FolderStore(tmp_path / "run").lock():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".other.a1b2c3.deleted"}


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


def test_the_files_of_a_bucket_are_deleted_several_at_once(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        bucket.write(f"psi/{number}", b"1")
    two, delete = threading.Barrier(2), s3.S3Store.delete

    def meet(store: s3.S3Store, key: str) -> None:
        if key.startswith("psi/"):
            two.wait(WAIT_S)
        delete(store, key)

    monkeypatch.setattr(s3.S3Store, "delete", meet)
    with bucket.lock():
        bucket.delete_all()
    assert everything(bucket) == []


def test_what_commands_have_stored_since_a_run_was_deleted_from_a_bucket_is_known(bucket: Store) -> None:
    for key in (
        "candidates/0123456789abcdef.safetensors", "labeling.json", "labeling-12-abcd.json", "manifest.json",
        "prelabels.safetensors", "traffic-1/run.yaml", "traffic-1/votes.safetensors",
    ):  # fmt: skip
        bucket.write(f"gone/{key}", b"1")
        bucket.write(f"others/{key}", b"1")
    bucket.write("others/notes.txt", b"not of a run")
    bucket.write("page/manifest.json", b"not of a run")
    bucket.write("page/report.html", b"not of a run")
    assert is_left_behind(bucket.within("gone"))
    assert not any(is_left_behind(bucket.within(name)) for name in ("others", "page", "nothing"))


@pytest.mark.parametrize("deleted", range(len(STEPS)))
def test_a_deletion_of_a_bucket_that_is_cut_off_leaves_the_run_at_an_earlier_point(
    deleted: int, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in STEPS:
        bucket.write(key, b"1")
    delete, left = s3.S3Store.delete, itertools.count()

    def cut_off(store: s3.S3Store, key: str) -> None:
        if next(left) >= deleted:
            raise StoreError("cut off")
        delete(store, key)

    monkeypatch.setattr(s3.S3Store, "delete", cut_off)
    with pytest.raises(StoreError, match="cut off"):
        bucket.delete_all()
    assert bucket.list() == sorted(STEPS[: len(STEPS) - deleted])


def test_only_uploads_to_a_bucket_that_began_long_ago_are_removed_without_its_lock(
    bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(bucket, s3.S3Store)
    bucket._client.create_multipart_upload(Bucket="bucket", Key=bucket.prefix + "000001.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(s3, "UPLOAD_AGE", timedelta(days=365 * 99))  # moto's begin in 2010
        bucket.remove_unfinished()
    assert len(everything(bucket)) == 1
    bucket.remove_unfinished()
    assert everything(bucket) == []


def test_a_deleter_that_lost_its_lease_deletes_nothing_more(bucket: Store) -> None:
    with bucket.lock():
        bucket.write("run.yaml", b"1")
        steal(bucket)
        with pytest.raises(RunBusyError, match="a thief holds it now"):
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
        with pytest.raises(RunBusyError, match="this run is gone|nobody holds it now"):
            write("lam-1.0", b"1")
    assert everything(store) == []
