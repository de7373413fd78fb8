"""A driver killed with kill -9 in the middle of each step, and the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, TINY

IN_THE_MIDDLE_OF = {  # step -> a key that appears while it is under way or just before, and one that it ends with
    "train": ("training/classifier.safetensors", "models.safetensors"),
    "identify": ("psi/000002.json", "psi.safetensors"),
    "distill": ("psi.safetensors", "scenarios.safetensors"),
    "draw": ("scenarios.safetensors", "gallery.safetensors"),
    "review": ("gallery.safetensors", "votes.safetensors"),
    "correct": ("trials/defuse/lam-1.0.safetensors", "sweep.safetensors"),
    "report": ("sweep.safetensors", "report.json"),
}


@pytest.fixture
def runfile(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def start(runfile: Path, where: str, store: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from services.cli import main; main()", "run", str(runfile)]
    with (store.parent / f"{store.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--on", where, "--store", str(store)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def kill_once_there(driver: subprocess.Popen[bytes], key: Path) -> bool:
    """Kill the driver as soon as `key` exists; False if it ended before."""
    deadline = time.monotonic() + 120
    while not key.exists():
        if driver.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    return True


def report_of(store: Path) -> dict[str, object]:
    found = json.loads((store / "tiny" / "report.json").read_text())
    found.pop("provenance")
    return found


@pytest.mark.parametrize("where", ["local", "ray"])
def test_a_driver_killed_in_the_middle_of_each_step_goes_on_to_the_same_report(where, runfile, tmp_path):
    killed = tmp_path / "killed"
    for step, keys in IN_THE_MIDDLE_OF.items():
        under_way, ended = (killed / "tiny" / key for key in keys)
        assert not under_way.exists(), f"{step} began before its turn"
        assert kill_once_there(start(runfile, where, killed), under_way), step
        assert not ended.exists(), f"{step} had ended before the kill"
    assert start(runfile, where, killed).wait(120) == 0, (tmp_path / "killed.log").read_text()[-2000:]
    whole = tmp_path / "whole"
    assert start(runfile, "local", whole).wait(120) == 0
    assert report_of(killed) == report_of(whole)
