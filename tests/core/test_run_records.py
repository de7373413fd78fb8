"""What a run records beside its artefacts: its run file, weights and manifest."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

from defuse_core.artifacts import Models, Psi, Sweep, SweepRow, Votes
from defuse_core.errors import DamagedError, RunFileError, RunMismatchError
from defuse_core.files import source_digest
from defuse_core.pipeline import rewrite_report
from defuse_core.runs import CREATION_ORDER, FROM_SWEEP, IMAGES, REPORT_FILES, WEIGHTS, Run, utc_now
from defuse_core.store import FolderStore
from tests.conftest import ROOT, tiny


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "runs")


def psi() -> Psi:
    return Psi(np.array([3]), 10, 40, 2, 1, 0.5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"{", "no YAML"),
        (b"seed: 2023-02-30", "no YAML"),
        (b"", "NoneType"),
        (b"[1]", "list"),
        (b"\xff", "no YAML"),
    ],
)
def test_a_damaged_run_file_of_a_run_is_named_with_what_to_do(store, text, found):
    store.write("a/run.yaml", text)
    with pytest.raises(
        RunFileError, match=f"a/run.yaml: expected what Defuse wrote there, found {found}; delete it"
    ):
        Run.open(store, "a")


def test_the_order_in_which_a_run_is_made_names_every_artefact(finished_run):
    run = Run.open(FolderStore(finished_run / "runs"), "tiny")
    assert set(run.manifest()["artefacts"]) <= set(CREATION_ORDER)


@pytest.mark.parametrize("key", ["run.yaml", "settings.json"])
def test_a_run_with_a_field_of_another_version_names_the_file_and_says_what_to_do(store, key):
    Run.start(store, "a", tiny())
    tree = yaml.safe_load(store.read(f"a/{key}"))
    tree["vae"]["warmup"] = 3
    store.write(f"a/{key}", json.dumps(tree).encode())
    for begin in (lambda: Run.open(store, "a"), lambda: Run.start(store, "a", tiny())):
        with pytest.raises(RunFileError) as refused:
            begin()
        assert str(refused.value) == (
            f"{store.folder}/a/{key}: vae.warmup: unknown field; undo what was edited there, or use the version of "
            "Defuse that wrote it, or run again under another name (--name, or name= in Python)"
        )


ENTRY = {"step": "train", "made": "2026-01-31T12:00:00Z", "seconds": 1, "bytes": 2}
ENTRIES = [None, {}, ENTRY | {"seconds": "1"}, ENTRY | {"step": None}, ENTRY | {"made": 3}]
DAMAGED = [json.dumps({"artefacts": {"models": entry}}).encode() for entry in ENTRIES]


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]", b'{"artefacts": []}', *DAMAGED])
def test_a_damaged_manifest_is_named(store, text):
    run = Run.start(store, "a", tiny())
    run.store.write("manifest.json", text)
    with pytest.raises(
        DamagedError, match="manifest.json: expected what Defuse wrote there, found damaged JSON"
    ):
        run.manifest()


@pytest.mark.usefixtures("no_figures")
def test_a_report_of_a_run_with_a_damaged_manifest_names_the_manifest(finished_run, tmp_path, caplog):
    shutil.copytree(finished_run / "runs" / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "manifest.json").write_text("{")
    run = Run.open(FolderStore(tmp_path), "tiny")
    with pytest.raises(DamagedError, match=r"tiny/manifest.json: .* found damaged JSON; delete it and run"):
        rewrite_report(run)
    assert "cannot be written" not in caplog.text
    run.store.delete("manifest.json")
    assert rewrite_report(run).run.name == "tiny"


def test_weights_in_a_folder_are_known_by_the_files_that_are_read(store, tmp_path, monkeypatch):
    folder, parts = tmp_path / "weights", [f"model-{n}-of-2.safetensors" for n in (1, 2)]
    folder.mkdir()
    for name in ("config.json", *parts):
        (folder / name).write_bytes(name.encode())
    spec = tiny(vae={"weights": folder})
    Run.start(store, "a", spec).once("identify", Psi, psi)
    for name in (".DS_Store", "README.md", "training_args.bin"):
        (folder / name).write_bytes(b"of another program")
        Run.start(store, "a", spec)
    in_order = Path.glob  # another file system lists in another order
    monkeypatch.setattr(Path, "glob", lambda *found: reversed([*in_order(*found)]))
    Run.start(store, "a", spec)
    for name in ("config.json", *parts, "model.safetensors"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(b"another")
        with pytest.raises(RunMismatchError, match=r"vae\.weights: the weights file has changed since"):
            Run.start(store, "a", spec)
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    Run.start(store, "a", spec)


def test_a_run_whose_weights_were_replaced_goes_on_with_its_own_at_a_path_without_a_file(store, tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"1")
    run = Run.start(store, "a", tiny(vae={"weights": weights}))
    run.once("identify", Psi, psi)
    weights.write_bytes(b"2")
    changed = tiny(vae={"weights": weights}, check={"max_loss": 0.5})
    with pytest.raises(RunMismatchError, match="since the run began; choose"):
        Run.start(store, "a", changed)
    store.write("a/models.safetensors", b"from these weights")
    with pytest.raises(
        RunMismatchError, match=r"that the run holds, set it to a path without a file\); choose"
    ):
        Run.start(store, "a", changed)
    gone = tiny(vae={"weights": tmp_path / "gone.pt"}, check={"max_loss": 0.5})
    assert Run.start(store, "a", gone).spec == gone == Run.open(store, "a").spec


def test_a_run_that_began_before_weights_were_noted_goes_on(store, tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"1")
    spec = tiny(vae={"weights": weights})
    Run.start(store, "a", spec).once("identify", Psi, psi)
    store.delete(f"a/{WEIGHTS}")
    Run.start(store, "a", spec)


def test_an_added_lambda_is_recorded_and_what_follows_from_the_sweep_but_trials_is_made_again(store):
    run = Run.start(store, "a", tiny(correct={"lambdas": [1.0]}))
    run.once("identify", Psi, psi)
    gone = [f"{name}.safetensors" for name in {"baseline", "sweep", *FROM_SWEEP}]
    gone += ["report.json", "report.html"]
    kept = [
        "verdicts.safetensors",
        "trials/defuse/1",
        "trials/baseline/1",
        "trials/plain/1",
        "trials/left_out_0/1",
    ]
    for key in (*gone, *kept):
        run.store.write(key, b"1")
    artefacts = run.manifest()["artefacts"]
    listed = {"artefacts": artefacts | {"verdicts": artefacts["psi"], "left_out_0": artefacts["psi"]}}
    run.store.write("manifest.json", json.dumps(listed).encode())
    before = {key: run.store.read(key) for key in run.store.list()}
    run = Run.start(store, "a", tiny(correct={"lambdas": [1.0, 2.0]}))
    assert {key: run.store.read(key) for key in run.store.list()} == before
    run.add_lambdas()
    assert sorted(run.manifest()["artefacts"]) == ["psi", "verdicts"]  # the report lists these alone
    assert Run.open(store, "a").spec.correct.lambdas == (1.0, 2.0)
    assert run.store.list() == sorted(
        [*kept, "psi.safetensors", "manifest.json", "run.yaml", "settings.json"]
    )


@pytest.mark.parametrize(
    ("change", "kept"),
    [({"check": {"max_class_loss": 0.5}}, False), ({"serve": {"failure_threshold": 0.5}}, False), ({}, True)],
)
def test_a_report_by_other_limits_is_deleted_before_these_are_recorded(store, change, kept):
    run = Run.start(store, "a", tiny())
    run.once("identify", Psi, psi)
    for key in REPORT_FILES:
        run.store.write(key, b"by the limits of before")
    changed = tiny(resources={"workers": 7}, **change)
    Run.start(store, "a", changed)
    assert [run.store.exists(key) for key in REPORT_FILES] == [kept] * 2
    assert Run.open(store, "a").spec == changed


def test_only_images_that_were_given_in_memory_are_looked_for_in_the_runs_own_folder(store, tmp_path):
    for root, own in ((tmp_path / "other.npz", False), (tmp_path / "a" / IMAGES, True)):
        Run.start(store, "a", tiny(data={"name": "npz", "root": root}))
        store.write(f"a/{IMAGES}", b"1")
        expected = Path(store.address) / "a" / IMAGES if own else root
        assert Run.open(store, "a").spec.data.root == expected


def test_an_artefact_is_the_same_when_it_is_made_as_when_it_is_loaded(store):
    row = SweepRow(1.0, 1, 0.1, train=0.5, validation=float("nan"), test=None, tune=0.5, scenario=0.5)
    run = Run.start(store, "a", tiny())
    for _ in range(2):
        assert run.once("correct", Sweep, lambda: Sweep((row,), None, {}, ())).rows[0].validation is None


def test_the_manifest_names_device_images_annotators_and_the_versions_of_all_artefacts(
    store, tiny_models, caplog
):
    run = Run.start(store, "a", tiny())
    now = platform.python_version()
    before = {"python": f"{now}0", "platform": "another kernel"}
    run.store.write("manifest.json", json.dumps({"versions": before}).encode())
    run.once("train", Models, lambda: replace(tiny_models, device="a card"))
    one = np.zeros(1, np.int64)
    run.once("review", Votes, lambda: Votes(one, one, one, one, np.zeros(1), ("Ada",), "people", {}))
    manifest = run.manifest()
    assert (manifest["name"], manifest["seed"], manifest["device"]) == ("a", tiny().seed, "a card")
    assert manifest["data_fingerprint"] == tiny_models.data_fingerprint
    assert manifest["annotators"] == "people"
    assert manifest["versions"]["python"] == f"{now}0, {now}"
    assert manifest["versions"]["platform"] == f"another kernel, {platform.platform()}"
    (warning,) = caplog.messages  # of the first artefact alone, and not of the kernel
    assert f"made with python {now}0, and now with {now}" in warning


def test_each_state_of_the_code_is_a_version_of_its_own(store, tmp_path):
    for root in ("before", "same", "after"):
        (tmp_path / root / "cluster").mkdir(parents=True)
        (tmp_path / root / "cluster/sweep.py").write_text("x = 2" if root == "after" else "x = 1")
        (tmp_path / root / "cluster/.#sweep.py").symlink_to("nobody@nowhere")
    before, same, after = (source_digest(tmp_path / root) for root in ("before", "same", "after"))
    assert before == same != after
    run = Run.start(store, "a", tiny())
    run.once("identify", Psi, psi)
    assert run.manifest()["versions"]["defuse"] == f"{metadata.version('defuse')}+{source_digest(ROOT)}"


def test_times_are_those_of_greenwich(monkeypatch):
    monkeypatch.setenv("TZ", "XXX-9")
    time.tzset()
    try:
        said = datetime.datetime.strptime(utc_now(), "%Y-%m-%dT%H:%M:%S%z")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert abs(datetime.datetime.now(datetime.UTC) - said) < datetime.timedelta(minutes=1)
