"""Folders for temporary files, and those that processes leave that are killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from defuse_core.files import temporary_folder

HOLD = """
import sys
from pathlib import Path
from defuse_core.files import temporary_folder
with temporary_folder("defuse-tune-") as folder:
    (Path(folder) / "state").touch()
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_that_a_killed_process_left_is_removed_by_the_next_one_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "defuse-tune-new_0000").mkdir()  # of a process that is about to hold it
    for name in ("defuse-job-ofothers", "defuse-tune-notes", "defuse-tune-Of_ A-man"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").touch()
    (tmp_path / "defuse-tune-fileonly").touch()
    kept = set(tmp_path.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (held,) = set(tmp_path.iterdir()) - kept
        with temporary_folder("defuse-tune-") as folder:
            assert set(tmp_path.iterdir()) == {*kept, held, Path(folder)}
            assert (held / "state").exists()
        holder.kill()
        holder.wait()
    assert held.exists()
    with temporary_folder("defuse-tune-") as folder:
        assert set(tmp_path.iterdir()) == {*kept, Path(folder)}
    assert set(tmp_path.iterdir()) == kept
