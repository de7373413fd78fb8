"""The table of faults: what was killed, stopped or damaged, what was made again, and whether the report was equal.

    python tests/bench/faults.py

Runs the tests' tiny run file, with more draws and epochs, through the command line on an embedded Ray: once
undisturbed, then once for each fault, with the same command again where the first one did not survive.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import yaml

from tests.conftest import TINY
from tests.s3_servers import free_port, rclone_server

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_EC2_METADATA_DISABLED": "true"}
OUTAGE_S = 15.0
SHARD, TRIAL = "psi/000001.safetensors", "trials/defuse/lam-1.0.safetensors"


@dataclass(frozen=True)
class Fault:
    """Once `key` is in the run, the newest process whose title begins with `title` is killed with kill -9."""

    killed: str
    step: str
    key: str
    title: str


FAULTS = (
    Fault("the task's process", "train", "training/classifier.safetensors", "ray::train"),
    Fault("a worker's process", "identify", SHARD, "ray::ShardWorker"),
    Fault("the task's process", "distill", "psi.safetensors", "ray::distill"),
    Fault("a trial's process", "correct", TRIAL, "ray::correct"),
    Fault("the raylet", "identify", SHARD, "raylet"),
    Fault("the driver", "identify", SHARD, "driver"),
    Fault("the driver", "correct", TRIAL, "driver"),
)


SWEPT = ("sweep.safetensors", "evaluation.safetensors", "report.json")
DAMAGES: tuple[
    tuple[str, str | None, tuple[str, ...]], ...
] = (  # key, what is copied over it, what is made again
    ("manifest.json", None, ("evaluation.safetensors",)),
    ("models.safetensors", None, ()),
    ("psi/000003.safetensors", None, ("psi.safetensors", "scenarios.safetensors")),
    ("psi/000003.safetensors", "psi/000001.safetensors", ("psi.safetensors", "scenarios.safetensors")),
    ("psi/000003.safetensors", "psi/000001.safetensors", ("scenarios.safetensors",)),
    (TRIAL, None, SWEPT),
    (TRIAL, "trials/defuse/lam-10.0.safetensors", SWEPT),
)


@dataclass
class Scene:
    """Where runs lie, and how they are begun."""

    folder: Path
    store: str  # --store
    environment: dict[str, str]

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Begin the run `name`, or go on with it."""
        words = ["run", str(self.folder / "tiny.yaml"), "--store", self.store, "--name", name]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "services.cli", *words],
                cwd=ROOT, env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def finish(self, name: str) -> int:
        """Run the same command until it ends well; return how often it took another one."""
        for again in range(1, 4):
            if self.start(name).wait(300) == 0:
                return again
        raise SystemExit(f"{name} does not finish: {self.log(name)[-2000:]}")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def report(self, name: str) -> dict[str, object]:
        """Return the report without what depends on the clock."""
        report: dict[str, object] = json.loads((self.folder / "runs" / name / "report.json").read_text())
        report.pop("provenance")
        return report | {"run": report["run"] | {"name": ""}}  # type: ignore[operator]


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below `pid` with their titles, the oldest first."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            child = int(entry.name)
            parents[child] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            titles[child] = (
                Path(title.split(" ")[0]).name + title.partition(" ")[2] if "/" in title else title
            )
    found = {pid}
    for child in sorted(parents):
        if parents[child] in found:
            found.add(child)
    return {child: titles[child] for child in sorted(found - {pid})}


def strike(driver: subprocess.Popen[bytes], fault: Fault, key: Path) -> str:
    """Wait for the moment, and kill; return the title of what was killed."""
    while driver.poll() is None:
        if not key.exists():
            time.sleep(0.01)
            continue
        if fault.title == "driver":
            os.kill(driver.pid, signal.SIGKILL)
            return "driver"
        victims = {
            pid: title for pid, title in descendants(driver.pid).items() if title.startswith(fault.title)
        }
        if victims:
            os.kill(max(victims), signal.SIGKILL)
            return victims[max(victims)]
        time.sleep(0.01)
    raise SystemExit(f"{fault}: the run ended before")


def made_again(log: str) -> str:
    """Return what the log tells of shards and steps that were begun more than once."""
    shards = len(re.findall(r"identify: shard \d+ (again|not stored)", log))
    made = collections.Counter(re.findall(r"(\w+): (\w+) made in", log))
    steps = [artefact for (_, artefact), count in made.items() if count > 1]
    return ", ".join([*steps, *([f"{shards} of 10 shards"] if shards else [])]) or "nothing finished"


def row(killed: str, step: str, scene: Scene, name: str, whole: dict[str, object], again: int) -> None:
    """Print one line of the table."""
    equal = "equal" if scene.report(name) == whole else "DIFFERENT"
    commands = "the same command again" if again else "went on by itself"
    print(f"| {killed} | {step} | {commands} | {made_again(scene.log(name))} | {equal} |", flush=True)


@contextlib.contextmanager
def bucket(folder: Path, port: int) -> Iterator[None]:
    """Serve the runs of `folder` as S3."""
    with rclone_server(folder, KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], port):
        yield


def outage(folder: Path, whole: dict[str, object]) -> None:
    """The bucket does not answer for a while, in the middle of identification; then the driver is killed."""
    port = free_port()
    scene = Scene(folder, "s3://runs", KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    key = folder / "runs" / "outage" / SHARD
    with bucket(folder, port):
        driver = scene.start("outage")
        while not key.exists() and driver.poll() is None:
            time.sleep(0.01)
    time.sleep(OUTAGE_S)
    with bucket(folder, port):
        code = driver.wait(300)
        again = 0 if code == 0 else scene.finish("outage")
        row(f"the S3 server, for {OUTAGE_S:.0f} s", "identify", scene, "outage", whole, again)
        strike(scene.start("s3-driver"), FAULTS[5], folder / "runs" / "s3-driver" / SHARD)
        row("the driver, on S3", "identify", scene, "s3-driver", whole, scene.finish("s3-driver"))


def split_brain(folder: Path, whole: dict[str, object]) -> None:
    """A driver is stopped in the sweep, with its trials going on; another takes its lease over; then it continues."""
    port = free_port()
    scene = Scene(folder, "s3://runs", KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    run, name = folder / "runs" / "split", "split"
    with bucket(folder, port):
        stopped = scene.start(name)
        while not (run / TRIAL).exists() and stopped.poll() is None:
            time.sleep(0.01)
        stopped.send_signal(signal.SIGSTOP)
        again = scene.finish(name)
        stopped.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        code, took = stopped.wait(300), time.monotonic() - resumed
        said = scene.log(name).splitlines()[-1]
        row(
            f"the driver, stopped until another took over: exit {code} after {took:.0f} s",
            "correct",
            scene,
            name,
            whole,
            again,
        )
        print(f"|   it says: {said} | | | | |", flush=True)


def damage(folder: Path, scene: Scene, whole: dict[str, object]) -> None:
    """A file of a finished run is truncated or copied over another one; the remedy that the error names is applied."""
    for number, (key, source, forgotten) in enumerate(DAMAGES):
        name = f"damage{number}"
        run = folder / "runs" / name
        shutil.copytree(folder / "runs" / "whole", run)
        data = (run / (source or key)).read_bytes()
        (run / key).write_bytes(data if source else data[:-20])
        for other in forgotten:
            (run / other).unlink()
        code = scene.start(name).wait(300)
        said = scene.log(name).splitlines()[-1]
        if remedy := re.search(r"delete (\S+) and run again", said):
            (run / key if remedy[1] == "it" else Path(remedy[1])).unlink()
            code = scene.start(name).wait(300)
        equal = "equal" if code == 0 and scene.report(name) == whole else "DIFFERENT"
        how = f"{source} copied over it" if source else "truncated"
        print(f"| {key}: {how} | | {said if remedy else 'made again by itself'} | | {equal} |", flush=True)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slower = TINY | {
            "identify": TINY["identify"] | {"draws": 300},
            "correct": TINY["correct"] | {"epochs": 6},
        }
        (folder / "tiny.yaml").write_text(yaml.safe_dump(slower))
        scene = Scene(folder, str(folder / "runs"), {})
        scene.finish("whole")
        whole = scene.report("whole")
        print("| killed | in step | then | made again | report |\n|---|---|---|---|---|", flush=True)
        for number, fault in enumerate(FAULTS):
            driver = scene.start(f"fault{number}")
            strike(driver, fault, folder / "runs" / f"fault{number}" / fault.key)
            again = 0 if driver.wait(300) == 0 else scene.finish(f"fault{number}")
            row(fault.killed, fault.step, scene, f"fault{number}", whole, again)
        outage(folder, whole)
        split_brain(folder, whole)
        damage(folder, scene, whole)


if __name__ == "__main__":
    main()
