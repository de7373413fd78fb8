"""The table of attacks: what was done to a run, what came of it before, and what comes of it now.

    python tests/bench/faults.py                   # all of it: half an hour on two quiet cores
    python tests/bench/faults.py commands damage   # parts: commands, damage, kills, bucket, tests

Runs the tests' tiny run file, with more draws and epochs, through the command line: once undisturbed, then once for
each attack, with the same command again where the first one did not survive. Reports must be equal. Attacks on Label
Studio, serving and single functions are tests; part `tests` runs them. `README.md` beside this file holds the table.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import yaml

from tests.bench.attack_tests import TESTS
from tests.conftest import TINY
from tests.ports import free_port
from tests.s3_servers import rclone_server

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_EC2_METADATA_DISABLED": "true"}
OUTAGE_S = 15.0
PATIENCE_S = 1800  # longest time of one command, on a machine that does other work
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


@dataclass(frozen=True)
class Damage:
    """A file of a finished run that is cut off, or replaced by another one; `forgotten` makes it needed again."""

    key: str
    source: str | None  # what is copied over it; None: its last 20 bytes are cut off
    forgotten: tuple[str, ...]
    before: str


SWEPT = ("sweep.safetensors", "evaluation.safetensors", "report.json")
PSI = ("psi.safetensors", "scenarios.safetensors")
UNNOTICED = "not noticed, another report"
NO_REMEDY = "an error without the file, or whose remedy did not work"
DAMAGES = (
    Damage("manifest.json", None, ("evaluation.safetensors",), NO_REMEDY),
    Damage("models.safetensors", None, (), NO_REMEDY),
    Damage("psi/000003.safetensors", None, PSI, NO_REMEDY),
    Damage("psi/000003.safetensors", SHARD, PSI, UNNOTICED),
    Damage("psi/000003.safetensors", SHARD, PSI[1:], UNNOTICED),
    Damage(TRIAL, None, SWEPT, NO_REMEDY),
    Damage(TRIAL, "trials/defuse/lam-10.0.safetensors", SWEPT, UNNOTICED),
)


@dataclass(frozen=True)
class Typed:
    """A command that is wrong in one way."""

    point: int
    attack: str
    before: str
    words: tuple[str, ...]  # after `defuse`; FOLDER is that of the scene
    environment: dict[str, str] = field(default_factory=dict)


RUN = ("run", "FOLDER/tiny.yaml", "--store", "FOLDER/runs")
LOCAL = (*RUN, "--on", "local")
COMMANDS = (
    Typed(16, "`--address 127.0.0.1:9`", "no word for minutes", (*RUN, "--address", "127.0.0.1:9")),
    Typed(16, "`RAY_ADDRESS=10.255.255.1:6379`", "no word for minutes", RUN, {"RAY_ADDRESS": "10.255.255.1:6379"}),
    Typed(12, "`RAY_AUTH_MODE=disabled`", "any code, on every interface", RUN, {"RAY_AUTH_MODE": "disabled"}),
    Typed(17, '`--name ""`', "an old run reported as today's", (*LOCAL, "--name", "")),
    Typed(
        17,
        "λ = 1e30 alone",
        "counts as a success",
        (*LOCAL, "--name", "overflow", "--set", "correct.lambdas=[1e30]"),
    ),
    Typed(
        18,
        "a class called `\\x1b[2Jdog`",
        "an error after training began",
        (*LOCAL, "--name", "odd", "--set", "data.name=npz", "--set", "data.root=FOLDER/odd.npz"),
    ),
    Typed(
        18,
        "`data.root: /\\x1b[2J`",
        "clears the terminal",
        (*LOCAL, "--name", "odd", "--set", 'data.root="/\\e[2J"'),
    ),
    Typed(
        18,
        "`defuse delete` in a bucket",
        "leaves `.lease.json`",
        ("delete", "whole", "--yes", "--store", "s3://copy"),
    ),
)  # fmt: skip


@dataclass
class Scene:
    """Where runs lie, and how they are begun."""

    folder: Path
    store: str  # --store
    environment: dict[str, str]
    where: str = "ray"

    def call(self, words: tuple[str, ...], name: str) -> subprocess.Popen[bytes]:
        """Begin a command of `defuse`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "services.cli", *words],
                cwd=ROOT, env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Begin the run `name`, or go on with it."""
        runfile = str(self.folder / "tiny.yaml")
        return self.call(("run", runfile, "--on", self.where, "--store", self.store, "--name", name), name)

    def finish(self, name: str) -> int:
        """Run the same command until it ends well; return how often it took another one."""
        for again in range(1, 4):
            if self.start(name).wait(PATIENCE_S) == 0:
                return again
        raise SystemExit(f"{name} does not finish: {self.log(name)[-2000:]}")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def last_line(self, name: str) -> str:
        """Return the last line of the log, for a cell of the table."""
        lines = self.log(name).replace(str(self.folder), "").strip().splitlines()
        return lines[-1].replace("|", "\\|") if lines else "nothing"

    def report(self, name: str) -> dict[str, object]:
        """Return the report without what depends on the clock."""
        report: dict[str, object] = json.loads((self.folder / "runs" / name / "report.json").read_text())
        report.pop("provenance")
        return report | {"run": report["run"] | {"name": ""}}  # type: ignore[operator]


def print_row(point: int, attack: str, before: str, after: str) -> None:
    """Print one line of the table."""
    print(f"| {point} | {attack} | {before} | {after} |", flush=True)


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


class Attacks:
    """The parts of the table. Each compares with the report of one undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scene = Scene(folder, str(folder / "runs"), {})
        self.scene.finish("whole")
        self.whole = self.scene.report("whole")

    def outcome(self, scene: Scene, name: str, again: int) -> str:
        """Return in words how a run went on, what it made again, and whether its report is equal."""
        equal = "equal report" if scene.report(name) == self.whole else "DIFFERENT REPORT"
        commands = "the same command again" if again else "went on by itself"
        return f"{equal}; {commands}; made again: {made_again(scene.log(name))}"

    def kills(self) -> None:
        """Processes are killed with kill -9 in the middle of each step."""
        for number, fault in enumerate(FAULTS):
            name = f"fault{number}"
            driver = self.scene.start(name)
            strike(driver, fault, self.folder / "runs" / name / fault.key)
            again = 0 if driver.wait(PATIENCE_S) == 0 else self.scene.finish(name)
            after = self.outcome(self.scene, name, again)
            print_row(1, f"kill -9 of {fault.killed} in {fault.step}", "equal report", after)

    def bucket(self) -> None:
        """The bucket is away for a while; the driver is killed; a driver is stopped until another took over."""
        port = free_port()
        scene = Scene(self.folder, "s3://runs", KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        runs = self.folder / "runs"
        with bucket(self.folder, port):
            driver = scene.start("outage")
            while not (runs / "outage" / SHARD).exists() and driver.poll() is None:
                time.sleep(0.01)
        time.sleep(OUTAGE_S)
        with bucket(self.folder, port):
            again = 0 if driver.wait(PATIENCE_S) == 0 else scene.finish("outage")
            after = self.outcome(scene, "outage", again)
            print_row(1, f"the S3 server away for {OUTAGE_S:.0f} s in identify", "equal report", after)
            strike(scene.start("killed"), FAULTS[5], runs / "killed" / SHARD)
            after = self.outcome(scene, "killed", scene.finish("killed"))
            print_row(1, "kill -9 of the driver in identify, on S3", "equal report", after)
            self._split_brain(scene, runs / "split" / TRIAL)

    def _split_brain(self, scene: Scene, trial: Path) -> None:
        stopped = scene.start("split")
        while not trial.exists() and stopped.poll() is None:
            time.sleep(0.01)
        stopped.send_signal(signal.SIGSTOP)
        again = scene.finish("split")
        stopped.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        code, took = stopped.wait(PATIENCE_S), time.monotonic() - resumed
        print_row(
            1,
            "SIGSTOP of the driver in the sweep, on S3; another takes over and ends; SIGCONT",
            "exit 0 after 27 s with a wrong report: 23 of 40 rows, another λ",
            f"{self.outcome(scene, 'split', again)}; the first ends with {code} after {took:.0f} s: "
            f"{scene.last_line('split')}",
        )

    def damage(self) -> None:
        """Files of a finished run are damaged, and the remedy that the error names is applied."""
        scene = Scene(self.folder, self.scene.store, {}, where="local")
        for number, damage in enumerate(DAMAGES):
            name = f"damage{number}"
            run = self.folder / "runs" / name
            shutil.copytree(self.folder / "runs" / "whole", run)
            data = (run / (damage.source or damage.key)).read_bytes()
            (run / damage.key).write_bytes(data if damage.source else data[:-20])
            for other in damage.forgotten:
                (run / other).unlink()
            code = scene.start(name).wait(PATIENCE_S)
            said = scene.last_line(name)
            if remedy := re.search(r"delete (\S+) and run again", scene.log(name)):
                (run / damage.key if remedy[1] == "it" else Path(remedy[1])).unlink()
                code = scene.start(name).wait(PATIENCE_S)
            equal = "equal report" if code == 0 and scene.report(name) == self.whole else "DIFFERENT REPORT"
            how = (
                f"`{damage.source}` copied over `{damage.key}`"
                if damage.source
                else f"`{damage.key}` cut off"
            )
            after = f"{said}; after that remedy: {equal}" if remedy else f"{equal}; made again by itself"
            print_row(3, how, damage.before, after)

    def commands(self) -> None:
        """Commands that are wrong in one way: exit code, seconds and the line that they end with."""
        odd = np.array(["cat", "\x1b[2Jdog", "hen", "cow"])
        images, labels = np.zeros((40, 16, 16), np.uint8), np.arange(40) % 4
        np.savez(self.folder / "odd.npz", train_images=images, train_labels=labels, classes=odd)
        shutil.copytree(self.folder / "runs" / "whole", self.folder / "copy" / "whole")
        port = free_port()
        served = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        with bucket(self.folder, port):
            for number, typed in enumerate(COMMANDS):
                scene = Scene(self.folder, self.scene.store, served | typed.environment)
                words = tuple(word.replace("FOLDER", str(self.folder)) for word in typed.words)
                begun = time.monotonic()
                code = scene.call(words, f"command{number}").wait(PATIENCE_S)
                took, said = time.monotonic() - begun, scene.last_line(f"command{number}")
                if typed.words[0] == "delete":
                    left = [path.name for path in (self.folder / "copy").rglob("*") if path.is_file()]
                    said += f"; files left: {', '.join(left) or 'none'}"
                print_row(typed.point, typed.attack, typed.before, f"exit {code} after {took:.0f} s: {said}")


def run_tests() -> None:
    """Run the attacks that are tests, and print whether they hold."""
    names = sorted({test for attack in TESTS for test in attack.tests})
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=no",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--timeout=900",
    ]
    done = subprocess.run([*words, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    results: dict[str, set[str]] = collections.defaultdict(set)
    for outcome, name in re.findall(
        r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+?)(?:\[.*)?(?: - .*)?$", done.stdout, re.M
    ):
        results[name].add(outcome)
    for attack in TESTS:
        found = set().union(*(results[name] or {"NOT RUN"} for name in attack.tests))
        held = "holds" if found == {"PASSED"} else " and ".join(sorted(found))
        tests = ", ".join(f"`{name.removeprefix('tests/')}`" for name in attack.tests)
        print_row(attack.point, attack.attack, attack.before, f"{held}: {attack.after} ({tests})")


@contextlib.contextmanager
def bucket(folder: Path, port: int) -> Iterator[None]:
    """Serve the runs of `folder` as S3."""
    with rclone_server(folder, KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], port):
        yield


def main() -> None:
    """Print the parts that were asked for."""
    wanted = sys.argv[1:] or ["commands", "damage", "kills", "bucket", "tests"]
    print("| point | attack | before | after |\n|---|---|---|---|", flush=True)
    if set(wanted) - {"tests"}:
        with tempfile.TemporaryDirectory() as name:
            slower = TINY | {
                "identify": TINY["identify"] | {"draws": 300},
                "correct": TINY["correct"] | {"epochs": 6},
            }
            (Path(name) / "tiny.yaml").write_text(yaml.safe_dump(slower))
            attacks = Attacks(Path(name))
            parts: dict[str, Callable[[], None]] = {
                "commands": attacks.commands,
                "damage": attacks.damage,
                "kills": attacks.kills,
                "bucket": attacks.bucket,
            }
            for part in wanted:
                if part != "tests":
                    parts[part]()
    if "tests" in wanted:
        run_tests()


if __name__ == "__main__":
    main()
