"""A driver killed with kill -9 in the middle of each step, and the same command again."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ray

from defuse_core.artifacts import Psi
from defuse_core.codec import decode
from defuse_core.store import FolderStore
from tests.cluster.checks import assert_equal_psi, assert_same_psi
from tests.e2e import forked_commands
from tests.start_forked_worker import fork_workers
from tests.waiting import wait_until

MADE_BY = {  # step -> its artefacts
    "train": ("models",),
    "identify": ("psi",),
    "distill": ("scenarios",),
    "draw": ("gallery",),
    "review": ("votes", "verdicts"),
    "correct": ("corrections", "baseline", "sweep"),
    "report": ("evaluation",),
}
UNDER_WAY = {  # step -> a key that appears in the middle of it, or just before it begins
    "train": "training/classifier.safetensors",
    "identify": "psi/000002.safetensors",
    "distill": "psi.safetensors",
    "draw": "scenarios.safetensors",
    "review": "gallery.safetensors",
    "correct": "trials/defuse/lam-1.0.safetensors",
    "report": "sweep.safetensors",
}
STEPS = list(MADE_BY)
WAIT_S = 360  # six times what a quiet machine needs


def start(
    runfile: Path, where: Sequence[str], store: Path, until: str, *before: Callable[[], None]
) -> BaseProcess:
    words = ["run", str(runfile), *where, "--store", str(store), "--until", until]
    log = store.parent / f"{store.name}.log"
    return forked_commands.start(words, log, forked_commands.no_figures, *before)


@pytest.fixture
def whole(finished_run) -> Path:
    """The run that nothing disturbed; its run file is `tiny.yaml` two folders above."""
    return finished_run / "runs" / "tiny"


def copy_until(whole: Path, run: Path, step: str) -> None:
    """Begin a run with all that comes before `step`."""
    run.mkdir(parents=True)
    made = [name for before in STEPS[: STEPS.index(step)] for name in MADE_BY[before]]
    for name in ("run.yaml", "manifest.json", *(f"{name}.safetensors" for name in made)):
        shutil.copy(whole / name, run / name)
    if "psi" in made:
        shutil.copytree(whole / "psi", run / "psi")
    if step != "train":
        shutil.copy(whole / "references.safetensors", run)


def kill_once_there(driver: BaseProcess, key: Path, how: signal.Signals = signal.SIGKILL) -> bool:
    """Kill the driver as soon as `key` exists; False if it ended before."""
    deadline = time.monotonic() + WAIT_S
    while not key.exists():
        if not driver.is_alive() or time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    os.kill(driver.pid or 0, how)
    driver.join()
    return True


def psi_of(run: Path) -> Psi:
    return decode(Psi, (run / "psi.safetensors").read_bytes(), "psi")


@pytest.fixture
def place(request) -> Sequence[str]:
    """The options that say where the driver computes: an embedded Ray dies with it, a cluster goes on."""
    if request.param != "cluster":
        return "--on", request.param
    request.getfixturevalue("ray_session")
    return "--address", ray.get_runtime_context().gcs_address


@pytest.mark.parametrize(
    ("steps", "place"),
    [
        *((steps, "local") for steps in (STEPS[:2], STEPS[2:5], STEPS[5:])),
        (STEPS[:2], "cluster"),
        (STEPS[2:3], "ray"),
        (STEPS[3:5], "cluster"),
        (STEPS[5:], "cluster"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
    indirect=["place"],
)
def test_a_driver_killed_in_the_middle_of_each_step_goes_on_to_the_same_artefacts(
    steps, place, whole, tmp_path
):
    runfile, store = whole.parents[1] / "tiny.yaml", tmp_path / "killed"
    run = store / "tiny"
    before = [fork_workers] if "ray" in place else []
    copy_until(whole, run, steps[0])
    for step in steps:
        driver = start(runfile, place, store, steps[-1], *before)
        assert kill_once_there(driver, run / UNDER_WAY[step]), step
        assert not (run / f"{MADE_BY[step][-1]}.safetensors").exists(), f"{step} had ended before the kill"
    driver = start(runfile, place, store, steps[-1], *before)
    driver.join(WAIT_S)
    assert driver.exitcode == 0, (tmp_path / "killed.log").read_text()[-2000:]
    for name in (name for step in steps for name in MADE_BY[step] if name != "psi"):
        key = f"{name}.safetensors"
        assert (run / key).read_bytes() == (whole / key).read_bytes(), name
    assert_equal_psi(psi_of(run), psi_of(whole))
    assert_same_psi(len(psi_of(whole).codes), FolderStore(run), FolderStore(whole))


@pytest.mark.parametrize(
    ("place", "how", "code"),
    [("local", signal.SIGTERM, 143), ("local", signal.SIGINT, 130), ("ray", signal.SIGTERM, 143)],
    indirect=["place"],
)
def test_a_driver_that_is_asked_to_end_does_so_in_one_line_and_leaves_no_lock_and_no_process(
    place, how, code, whole, tmp_path
):
    run = tmp_path / "ended" / "tiny"
    copy_until(whole, run, "identify")
    before = [fork_workers] if "ray" in place else []
    # steps that take longer follow
    driver = start(
        whole.parents[1] / "tiny.yaml", place, run.parent, "correct", *before, partial(os.chdir, tmp_path)
    )
    wait_until(lambda: (run / UNDER_WAY["identify"]).exists() or not driver.is_alive(), within_s=WAIT_S)
    started = processes_in(tmp_path)
    assert len(started) > (4 if before else 0), "not those of Ray: GCS, raylet, its agents and workers"
    assert kill_once_there(driver, run / UNDER_WAY["identify"], how)
    log = (tmp_path / "ended.log").read_text()
    assert log.endswith("\ndefuse: stopped; the same command continues from here\n")
    assert "***" not in log  # the stack of Ray's C++ part
    assert driver.exitcode == code
    assert (run / ".lock").read_text() == ""
    wait_until(lambda: not processes_in(tmp_path), lambda: processes_in(tmp_path), every_s=1.0)


def processes_in(folder: Path) -> dict[str, str]:
    """Return which processes of this machine work in `folder`, as those do that one in it has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (path / "cwd").readlink() == folder:
                found[path.name] = (path / "cmdline").read_text()
    return found
