"""A store in a folder, where the file system refuses something. What all stores do is in tests/services."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from defuse_core import store as module
from defuse_core.errors import InputError, RunBusyError, StoreError
from defuse_core.files import expect_no_own_folder
from defuse_core.store import LOCK, FolderStore
from tests.no_access import refuse_access


@pytest.fixture
def unlistable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that cannot be listed, for root too."""
    folder, scandir = tmp_path / "registry" / "changes", os.scandir

    def refusing(path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    FolderStore(folder).write("000001.json", b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        yield folder


def test_a_folder_that_cannot_be_listed_does_not_count_as_empty(unlistable: Path, tmp_path: Path) -> None:
    for store in (FolderStore(tmp_path), FolderStore(unlistable)):
        with pytest.raises(StoreError, match="registry/changes: Permission denied"):
            store.list()
    assert FolderStore(tmp_path / "nothing").list() == []


def test_a_key_in_a_folder_that_cannot_be_entered_does_not_count_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StoreError, match="run.yaml: Permission denied; free"):
        refuse_access(patch, tmp_path / "private")
        FolderStore(tmp_path).exists("private/run.yaml")


def test_a_link_to_where_this_process_may_not_look_is_listed_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    stat = os.stat

    def refusing(path: Any, **options: Any) -> os.stat_result:
        if Path(path) == tmp_path / "link":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refusing)
        assert FolderStore(tmp_path).folders() == ["link", "run"]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_keys_are_created_once_on_a_file_system_without_hard_links(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", without)
    run = FolderStore(tmp_path / "run")
    with run.lock(), ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: run.create("run.yaml", b"%d" % number), range(8)))
    assert won.count(True) == 1
    assert run.read("run.yaml") == b"%d" % won.index(True)
    assert FolderStore(tmp_path).list() == ["run/run.yaml"]


def test_a_mount_whose_files_all_have_one_owner_takes_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "chmod", refused)
    run = FolderStore(tmp_path / "run")
    with run.lock():
        assert run.create("run.yaml", b"1")
        run.write("run.yaml", b"2")
    assert run.read("run.yaml") == b"2"


def test_a_deletion_that_is_killed_leaves_the_run_file_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FolderStore(tmp_path / "run")
    for second, key in enumerate(("run.yaml", "models.safetensors", "psi/1", "baseline")):
        run.write(key, b"1")
        os.utime(run.folder / key, (second, second))
    with monkeypatch.context() as patch, run.lock():
        unlink, left = Path.unlink, iter(range(2))

        def killed(path: Path, missing_ok: bool = False) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run.delete_all()
        assert run.list() == ["models.safetensors", "run.yaml"]  # as it was before the newest two
    with run.lock():
        run.delete_all()
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_waited_for_the_end_of_a_deletion_begins_the_run_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleter, begun, found = (
        FolderStore(tmp_path / "run"),
        FolderStore(tmp_path / "run"),
        module.locked_at_once,
    )
    deleting = ExitStack()
    deleting.enter_context(deleter.lock())
    asked: list[bool] = []

    def deleted_after_the_first_look(handle: Any, *how: int) -> bool:
        if not asked:
            asked.append(found(handle, *how))
            deleter.delete_all()
            deleting.close()
            return asked[0]
        return found(handle, *how)

    monkeypatch.setattr(module, "locked_at_once", deleted_after_the_first_look)
    with begun.lock():
        begun.write("run.yaml", b"2")
        assert asked == [False] and begun.is_locked()
    assert FolderStore(tmp_path).list() == ["run/run.yaml"]


@pytest.mark.parametrize("full_disk", [errno.ENOSPC, errno.EDQUOT])
def test_a_run_on_a_full_disk_can_be_deleted_while_a_second_driver_is_kept_out(
    full_disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FolderStore(tmp_path / "run")
    for key in ("run.yaml", "models.safetensors"):
        run.write(key, b"1")
    killed = FolderStore(run.folder)
    killed.holders[run.folder] = "process 1 on node (abc)"  # as a worker of an earlier driver has it

    def full(*_: object) -> int:
        raise OSError(full_disk, os.strerror(full_disk))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with run.lock():
            for other in (FolderStore(run.folder).lock(), killed.lock()):
                with pytest.raises(RunBusyError, match="another driver is writing this run"), other:
                    pass
            with pytest.raises(RunBusyError, match="process 1 on node"):
                killed.write("models.safetensors", b"2")
            worker = FolderStore(run.folder)
            worker.holders.update(run.holders)
            run.delete_all()
            with pytest.raises(RunBusyError, match="this run is gone"):
                worker.write("models.safetensors", b"2")
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_a_lock_turns_no_driver_away(tmp_path: Path) -> None:
    run = FolderStore(tmp_path)
    run.write("run.yaml", b"1")
    with run.lock():
        pass  # leaves its file
    with (tmp_path / LOCK).open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        looking = threading.Timer(0.05, fcntl.flock, (looked_at, fcntl.LOCK_UN))
        looking.start()
        with run.lock():
            assert run.is_locked()
        looking.join()


@pytest.mark.parametrize("key", ["report.json", "trials/1.json"])
def test_a_folder_that_is_moved_or_deleted_is_not_made_again(key: str, tmp_path: Path) -> None:
    FolderStore(tmp_path / "runs" / "a").write("run.yaml", b"")
    runs, run = FolderStore(tmp_path / "runs"), FolderStore(tmp_path / "runs").within("a")
    run.write("psi.json", b"")
    (tmp_path / "runs" / "a").rename(tmp_path / "b")
    for write in (run.write, run.create):
        with pytest.raises(StoreError, match="runs/a: it was moved or deleted meanwhile; put it back"):
            write(key, b"{}")
    assert runs.folders() == []
    runs.within("a").write(key, b"{}")  # who begins it anew
    (tmp_path / "runs").rename(tmp_path / "other")
    with pytest.raises(StoreError, match="runs: it was moved"):
        runs.within("c").write(key, b"{}")
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_edited_in_its_place_has_another_version(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("a", b"one")
    before = store.version("a")
    time.sleep(0.05)  # of the clock that a file system uses
    (tmp_path / "a").write_bytes(b"two")
    assert store.version("a") not in (None, before)


@pytest.mark.parametrize("names", [("run.yaml", "settings.json"), ("run.yaml", "manifest.json")])
def test_a_folder_is_a_run_also_where_one_of_its_damaged_files_was_deleted(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        FolderStore(tmp_path / "run").write(name, b"")
    expect_no_own_folder("--out", tmp_path / "out.json")
    with pytest.raises(InputError, match=r"--out .*/run/out\.json: is inside the run .*/run, which it could"):
        expect_no_own_folder("--out", tmp_path / "run" / "out.json")
