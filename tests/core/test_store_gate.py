"""What a folder's store holds while it writes: the gate of writers, bytes on the disk, and names that it refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from defuse_core import store as module
from defuse_core.errors import InputError, RunBusyError
from defuse_core.files import CREATING, replace_file
from defuse_core.store import GATE, FolderStore, checked_name


def is_free(gate: Path, how: int) -> bool:
    """Whether somebody else could lock it now."""
    with gate.open("a+") as handle:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def probing(patch: pytest.MonkeyPatch, owner: Any, name: str, gate: Path) -> list[tuple[bool, bool]]:
    """Return what each call of owner.name adds to: whether another writer, and a driver, could have the gate then."""
    real: Callable[..., Any] = getattr(owner, name)
    found: list[tuple[bool, bool]] = []

    def probe(*args: Any, **kwargs: Any) -> Any:
        found.append((is_free(gate, fcntl.LOCK_SH), is_free(gate, fcntl.LOCK_EX)))
        return real(*args, **kwargs)

    patch.setattr(owner, name, probe)
    return found


@pytest.mark.parametrize(
    ("act", "owner", "name", "others_may_write"),
    [
        (lambda run: run.write("a", b"2"), Path, "replace", True),
        (lambda run: run.write("a", b"2", unless=lambda stored: False), Path, "replace", False),
        (lambda run: run.create("b", b"2"), os, "link", True),
        (lambda run: run.delete("a"), Path, "unlink", True),
        (lambda run: run.delete_all(), Path, "rename", False),
    ],
)
def test_no_driver_takes_a_run_over_in_the_middle_of_a_write(
    act: Callable[[FolderStore], None],
    owner: Any,
    name: str,
    others_may_write: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = FolderStore(tmp_path / "run")
    with monkeypatch.context() as patch, run.lock():
        run.write("a", b"1")
        found = probing(patch, owner, name, run.folder / GATE)
        act(run)
    assert found[0] == (others_may_write, False)


def test_a_driver_does_not_begin_while_a_worker_of_an_earlier_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GATE_S", 0.2)
    (tmp_path / GATE).touch()
    with (tmp_path / GATE).open("a+") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
        with (
            pytest.raises(RunBusyError, match="is in the middle of a write; end it"),
            FolderStore(tmp_path).lock(),
        ):
            pass
    with FolderStore(tmp_path).lock():
        pass


def test_without_hard_links_one_creates_a_key_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "link", without)
    with monkeypatch.context() as patch:
        found = probing(patch, Path, "replace", tmp_path / CREATING)
        assert FolderStore(tmp_path).create("run.yaml", b"1")
    assert found == [(False, False)]


def test_a_worker_asks_whether_its_driver_still_holds_the_run(tmp_path: Path) -> None:
    run = FolderStore(tmp_path / "run")
    run.require_lock()  # nobody has locked it
    with run.lock():
        worker = pickle.loads(pickle.dumps(run.within("trials")))
        worker.require_lock()
    with pytest.raises(RunBusyError, match="nobody holds it now"):
        worker.require_lock()
    with (
        FolderStore(run.folder).lock(),
        pytest.raises(RunBusyError, match=f"process {os.getpid()} on .* holds it now"),
    ):
        worker.require_lock()


def test_bytes_are_on_the_disk_before_they_have_their_name_and_all_may_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = FolderStore(tmp_path), []

    def noting(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, store.exists("a"), store.exists("b")))

    monkeypatch.setattr(os, "fsync", noting)
    store.write("a", b"12345")
    store.create("b", b"123")
    replace_file("--to", tmp_path / "model", b"1234")
    assert synced == [(5, False, False), (3, True, False), (4, True, True)]
    assert [(tmp_path / key).stat().st_mode & 0o777 for key in ("a", "b")] == [0o644, 0o644]


def test_a_run_with_brackets_in_its_name_is_deleted_as_a_whole(tmp_path: Path) -> None:
    run = FolderStore(tmp_path / "run[1]")
    with run.lock():
        run.write("run.yaml", b"1")
        run.delete_all()
    assert list(tmp_path.iterdir()) == []
    run.write("run.yaml", b"of a run that begins again")
    assert FolderStore(tmp_path).list() == ["run[1]/run.yaml"]


@pytest.mark.parametrize("name", ["a", "parts-2.1_B", "9", "a" * 100])
def test_a_name_of_a_run_can_name_a_folder_everywhere(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        *((name, f"run name {name}: expected another name") for name in ("registry", "Traffic")),
        *(
            (name, r"expected letters \(a to z\), digits, .*, at most 100, the first a letter or digit$")
            for name in ("", ".a", "-a", "_a", "a/b", "a b", "é", "a\n", "a" * 101)
        ),
    ],
)
def test_a_name_that_cannot_name_a_folder_or_names_one_of_the_store_is_refused(name: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        checked_name(name)
