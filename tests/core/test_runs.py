import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from defuse_core.artifacts import MeasuredPrecision, Psi
from defuse_core.codec import FORMATS, decode, encode
from defuse_core.config import dump_run_file
from defuse_core.errors import DamagedError, InputError, RunBusyError, RunMismatchError, StoreError
from defuse_core.files import UNFINISHED
from defuse_core.runs import ReachedStep, Run
from defuse_core.store import FolderStore
from tests.conftest import ROOT, tiny


def psi(total: int = 3) -> Psi:
    return Psi(np.array([total]), 10, 40, 2, 1, 0.5)


def test_an_artefact_is_made_once_and_then_loaded(tmp_path):
    made = []
    for _ in range(2):
        run = Run.start(FolderStore(tmp_path), "a", tiny())
        found = run.once("identify", Psi, lambda: made.append(1) or psi())
        assert found.total == 3
    assert made == [1]


def test_what_failed_half_way_leaves_nothing_and_is_made_anew(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    with pytest.raises(ZeroDivisionError):
        run.once("identify", Psi, lambda: 1 // 0)
    assert run.load(Psi) is None
    assert run.once("identify", Psi, psi).total == 3


def test_an_artefact_that_could_not_be_read_back_is_not_stored(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    with pytest.raises(StoreError, match=r"psi: .* other fields \(images: Input should be a valid integer"):
        run.once("identify", Psi, lambda: Psi(np.array([3]), None, 40, 2, 1, 0.5))
    assert run.load(Psi) is None and run.manifest()["artefacts"] == {}
    assert run.once("identify", Psi, psi).total == 3


def test_a_damaged_manifest_is_said_before_the_work_and_not_after_it(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    run.store.write("manifest.json", b"{")
    made = []
    with pytest.raises(StoreError, match=r"manifest\.json: .* damaged JSON; delete it and run again"):
        run.once("identify", Psi, lambda: made.append(1) or psi())
    assert made == []


def test_the_manifest_tells_what_was_made_with_what(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    run.once("identify", Psi, psi)
    manifest = run.manifest()
    assert manifest["artefacts"]["psi"]["step"] == "identify"
    assert manifest["artefacts"]["psi"]["bytes"] == (tmp_path / "a" / "psi.safetensors").stat().st_size
    assert {"python", "torch", "numpy", "scikit-learn"} <= manifest["versions"].keys()


def test_the_time_of_an_artefact_that_was_made_inside_another_counts_once(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())

    def inside() -> Psi:
        time.sleep(0.3)
        return psi()

    started = time.time()
    run.once("distill", Psi, lambda: run.once("identify", Psi, inside), "outer")
    entries = run.manifest()["artefacts"]
    assert entries["psi"]["seconds"] >= 0.3
    assert sum(entry["seconds"] for entry in entries.values()) <= time.time() - started


def test_the_time_of_an_artefact_is_not_below_zero_when_the_clock_is_set_back(tmp_path, monkeypatch):
    run = Run.start(FolderStore(tmp_path), "a", tiny())

    def set_back() -> Psi:
        monkeypatch.setattr("time.time", lambda: 0.0)
        return psi()

    run.once("identify", Psi, set_back)
    assert 0 <= run.manifest()["artefacts"]["psi"]["seconds"] < 60


def test_an_artefact_is_not_held_while_its_bytes_are_read_back(tmp_path, monkeypatch):
    made = []

    def make() -> Psi:
        made.append(weakref.ref(artefact := psi()))
        return artefact

    def reading(kind, data, key):
        assert made[0]() is None
        return decode(kind, data, key)

    monkeypatch.setattr("defuse_core.runs.decode", reading)
    Run.start(FolderStore(tmp_path), "a", tiny()).once("identify", Psi, make)
    assert made


def test_the_manifest_has_an_entry_of_every_artefact_whenever_the_driver_dies(tmp_path):
    class Dying(FolderStore):
        def write(self, key, data, unless=None):
            super().write(key, data, unless)
            if key == "psi.safetensors":
                raise KeyboardInterrupt

        def within(self, prefix):
            return Dying(self.folder / prefix)

    run = Run.start(Dying(tmp_path), "a", tiny())
    with pytest.raises(KeyboardInterrupt):
        run.once("identify", Psi, psi)
    assert run.store.exists("psi.safetensors") and "psi" in run.manifest()["artefacts"]


def test_what_killed_writers_left_is_swept_away_in_time(tmp_path):
    old, new = tmp_path / f".a.1{UNFINISHED}", tmp_path / f".a.2{UNFINISHED}"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with FolderStore(tmp_path).lock():
        assert not old.exists() and new.exists()


def test_steps_after_until_are_not_made(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny(), until="identify")
    run.once("identify", Psi, psi)
    with pytest.raises(ReachedStep):
        run.once("distill", Psi, psi, "other")


def test_a_changed_run_file_under_a_used_name_is_refused(tmp_path):
    Run.start(FolderStore(tmp_path), "a", tiny()).once("identify", Psi, psi)
    with pytest.raises(RunMismatchError, match="identify.draws: 4 in the run, 5 now; .* name= in Python"):
        Run.start(FolderStore(tmp_path), "a", tiny(identify={"draws": 5}))
    assert Run.open(FolderStore(tmp_path), "a").spec == tiny()


def test_a_run_that_has_made_nothing_takes_the_mended_run_file(tmp_path):
    Run.start(FolderStore(tmp_path), "a", tiny(identify={"draws": 5}))
    Run.start(FolderStore(tmp_path), "a", tiny())
    assert Run.open(FolderStore(tmp_path), "a").spec == tiny()


def test_a_run_whose_training_is_under_way_takes_no_other_run_file(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    run.store.write("training/vae.safetensors", b"half-way")
    with pytest.raises(RunMismatchError, match=r"vae\.beta: 0\.3 in the run, 4\.0 now"):
        Run.start(FolderStore(tmp_path), "a", tiny(vae={"beta": 4.0}))


def test_a_field_that_changes_no_result_is_recorded_anew(tmp_path):
    Run.start(FolderStore(tmp_path), "a", tiny()).once("identify", Psi, psi)
    Run.start(FolderStore(tmp_path), "a", tiny(check={"max_loss": 0.001}))
    assert Run.open(FolderStore(tmp_path), "a").spec.check.max_loss == 0.001


def test_how_people_are_asked_may_change_until_their_votes_are_stored(tmp_path):
    fewer = tiny(review={"answers_per_task": 4, "stop_early": False, "certainty": 0.9, "real_names": True})
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    run.once("identify", Psi, psi)
    Run.start(FolderStore(tmp_path), "a", fewer)
    assert Run.open(FolderStore(tmp_path), "a").spec.review.answers_per_task == 4
    run.store.write("votes.safetensors", b"of people")
    with pytest.raises(RunMismatchError, match=r"review\.answers_per_task: 4 in the run, 5 now"):
        Run.start(FolderStore(tmp_path), "a", tiny())


def test_a_run_of_an_older_format_is_refused_in_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    now = FORMATS["Psi"]
    monkeypatch.setitem(FORMATS, "Psi", now - 1)
    body = encode(psi())
    monkeypatch.undo()
    run = Run.start(store, "a", tiny())
    run.store.write("psi.safetensors", body)
    with pytest.raises(DamagedError) as refused:
        Run.start(store, "a", tiny()).once("identify", Psi, psi)
    assert str(refused.value) == (
        f"{run.store.address}/psi.safetensors: expected artefact format {now}, found artefact format {now - 1}; "
        "use the version of Defuse that wrote it, or run again under another name (--name, or name= in Python)"
    )


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (("draws: 4", "draws: 9"), r"identify\.draws: 4 in the run, 9 now"),
        (("seed: 0", "seed: 1"), "seed: 0 in the run, 1 now"),
        (("  precision: f32", "  precision: bf16"), r"resources\.precision: 'f32' in the run, 'bf16' now"),
    ],
)
def test_settings_that_were_edited_in_a_run_are_not_taken_for_those_it_was_made_with(tmp_path, edit, named):
    store = FolderStore(tmp_path)
    Run.start(store, "a", tiny()).once("identify", Psi, psi)
    text = store.read("a/run.yaml").decode()
    assert text.count(edit[0]) == 1
    store.write("a/run.yaml", text.replace(*edit).encode())
    with pytest.raises(RunMismatchError, match=rf"a/run\.yaml was edited, or .*: {named}; undo the edit, or"):
        Run.open(store, "a")
    Run.start(store, "a", tiny())  # puts it back
    assert store.read("a/run.yaml").decode() == text
    assert Run.open(store, "a").load(Psi) is not None


def test_a_run_whose_run_file_was_deleted_is_not_one_of_other_settings(tmp_path):
    store = FolderStore(tmp_path)
    Run.start(store, "a", tiny()).once("identify", Psi, psi)
    store.delete("a/run.yaml")
    with pytest.raises(RunMismatchError, match="seed: 0 in the run, 5 now"):
        Run.start(store, "a", tiny().model_copy(update={"seed": 5}))
    assert Run.start(store, "a", tiny()).load(Psi) is not None
    assert Run.open(store, "a").spec == tiny()


def test_limits_workers_and_places_may_be_edited_in_a_run(tmp_path):
    store = FolderStore(tmp_path)
    run = Run.start(store, "a", tiny())
    limited = run.spec.with_fields("check", min_scenario_accuracy=0.5).with_fields("resources", workers=7)
    store.write("a/run.yaml", dump_run_file(limited).replace("\n", "\r\n").encode())
    assert Run.open(store, "a").spec == limited
    moved = limited.with_fields("data", root=Path("/elsewhere"))
    Run.start(store, "a", moved)
    assert Run.open(store, "a").spec == moved


def test_a_run_that_made_nothing_and_one_with_an_added_lambda_are_of_their_new_settings(tmp_path):
    store = FolderStore(tmp_path)
    Run.start(store, "a", tiny())
    other = tiny().model_copy(update={"seed": 5})
    Run.start(store, "a", other).once("identify", Psi, psi)
    assert Run.open(store, "a").spec.seed == 5
    more = other.with_fields("correct", lambdas=(*other.correct.lambdas, 77.0))
    Run.start(store, "a", more).add_lambdas()
    assert Run.open(store, "a").spec.correct.lambdas[-1] == 77.0


def test_a_run_whose_noted_settings_are_damaged_names_the_file(tmp_path):
    store = FolderStore(tmp_path)
    Run.start(store, "a", tiny())
    store.write("a/settings.json", b"{")
    with pytest.raises(
        DamagedError, match=r"a/settings\.json: .* delete it and run again: the settings in run\.yaml"
    ):
        Run.open(store, "a")
    store.delete("a/settings.json")  # as where the first start was stopped before it noted them
    assert Run.open(store, "a").spec == tiny()


def test_settings_that_a_stopped_start_did_not_note_are_noted_by_the_next_one(tmp_path):
    store = FolderStore(tmp_path)
    Run.start(store, "a", tiny()).once("identify", Psi, psi)
    store.delete("a/settings.json")
    Run.start(store, "a", tiny())
    store.write("a/run.yaml", dump_run_file(tiny().model_copy(update={"seed": 5})).encode())
    with pytest.raises(RunMismatchError, match=r"run\.yaml was edited, .*: seed: 0 in the run, 5 now"):
        Run.open(store, "a")


def test_weights_are_known_by_what_is_in_their_file(tmp_path):
    store, first, second = FolderStore(tmp_path / "runs"), tmp_path / "first.pt", tmp_path / "second.pt"
    first.write_bytes(b"first")
    Run.start(store, "a", tiny(vae={"weights": first})).once("identify", Psi, psi)
    second.write_bytes(b"first")
    Run.start(store, "a", tiny(vae={"weights": second}))
    second.write_bytes(b"second")
    with pytest.raises(RunMismatchError, match=r"run a: vae\.weights: the weights file has changed since"):
        Run.start(store, "a", tiny(vae={"weights": second}))
    second.unlink()
    Run.start(store, "a", tiny(vae={"weights": second}))  # who needs them will say that they are gone
    os.mkfifo(second)
    Run.start(store, "a", tiny(vae={"weights": second}))  # and that this has no end


def test_weights_that_were_mended_before_anything_was_made_are_the_runs(tmp_path):
    store, weights = FolderStore(tmp_path / "runs"), tmp_path / "w.pt"
    weights.write_bytes(b"broken")
    Run.start(store, "a", tiny(vae={"weights": weights}))
    weights.write_bytes(b"mended")
    Run.start(store, "a", tiny(vae={"weights": weights})).once("identify", Psi, psi)
    Run.start(store, "a", tiny(vae={"weights": weights}))


def test_weights_that_are_mended_after_the_precision_was_measured_are_the_runs(tmp_path):
    """A run with resources.precision: auto has measured it before it loads the weights."""
    store, weights = FolderStore(tmp_path / "runs"), tmp_path / "w.pt"
    measured = MeasuredPrecision({"classifier": "bf16"})
    weights.write_bytes(b"broken")
    spec = tiny(vae={"weights": weights}, resources={"precision": "auto"})
    Run.start(store, "a", spec).once("train", MeasuredPrecision, lambda: measured)
    assert Run.start(store, "a", spec).load(MeasuredPrecision) == measured
    weights.write_bytes(b"mended")
    assert Run.start(store, "a", spec).load(MeasuredPrecision) is None  # it is measured on other weights
    Run.start(store, "a", spec).once("train", MeasuredPrecision, lambda: measured)
    other = spec.with_fields("vae", beta=4.0)
    assert Run.start(store, "a", other).load(MeasuredPrecision) is None
    assert Run.open(store, "a").spec == other


def test_opening_a_run_that_is_not_there_says_so(tmp_path):
    store = FolderStore(tmp_path)
    with pytest.raises(
        InputError, match="no run called b in .*, which has no runs; give another store with --store"
    ):
        Run.open(store, "b")
    for name in ("ash", "bee", "cat", "demo", "elk", "fox"):
        Run.start(store, name, tiny())
    (tmp_path / "demno").mkdir()
    with pytest.raises(
        InputError, match="no run called demno in .*, which has demo, ash, bee, cat, elk and 1 more"
    ):
        Run.open(store, "demno")


def test_a_damaged_artefact_is_named_and_not_used(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    run.once("identify", Psi, psi)
    path = tmp_path / "a" / "psi.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"psi.safetensors: its bytes changed"):
        run.once("identify", Psi, psi)


HOLD = """
import sys, time
from pathlib import Path
from defuse_core.store import FolderStore
with FolderStore(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)  # until it is killed
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_driver_is_refused_and_told_who_the_first_is(tmp_path, holder):
    with (
        pytest.raises(RunBusyError, match=f"process {holder.pid} on .* is writing this run"),
        FolderStore(tmp_path).lock(),
    ):
        pass


def test_a_worker_that_does_not_see_the_drivers_folder_says_that_nodes_must_share_it(tmp_path, monkeypatch):
    store = FolderStore(tmp_path / "run")
    with store.lock():
        there = pickle.loads(pickle.dumps(store))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunBusyError, match="run: this run is gone; was its folder moved or deleted"):
        there.write("a", b"")
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    with pytest.raises(
        InputError, match="elsewhere does not see its folder; the store .* must be one that all nodes"
    ):
        there.write("a", b"")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("defuse_core.store.fcntl.flock", no_locks)
    with pytest.raises(StoreError, match="this file system cannot lock a file"), FolderStore(tmp_path).lock():
        pass


def test_a_driver_killed_lets_go_of_its_run(tmp_path, holder):
    assert FolderStore(tmp_path).is_locked()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not FolderStore(tmp_path).is_locked()
    with FolderStore(tmp_path).lock():
        pass


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs a device that is full"
)
def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_bytes(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    store.write("a", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left on device; free space"):
        store.write("a", b"new")
    assert store.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_full_before_the_run_is_held_is_said_in_one_line(tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))  # no file may hold a byte
    try:
        with (
            pytest.raises(StoreError, match="File too large; free space") as refused,
            FolderStore(tmp_path).lock(),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(refused.value)
    with FolderStore(tmp_path).lock():
        pass
