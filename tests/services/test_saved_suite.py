"""What a saved suite holds: the pictures that the correction was not tuned on, and whose they are."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from junitparser import JUnitXml
from safetensors.torch import save_file

from defuse_core.artifacts import Corrections, Gallery, Models, Sweep
from defuse_core.codec import encode
from defuse_core.config import dump_run_file
from defuse_core.data import open_splits
from defuse_core.device import F32_FLAGS, device, ieee_f32
from defuse_core.errors import InputError
from defuse_core.export.suite import (
    SHEET,
    Suite,
    SuiteClassifier,
    _described,
    _sheet,
    least_accuracy,
    load_suite,
    save_suite,
)
from defuse_core.models import load_classifier, load_vae, predict
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.command_line import call, one_line
from tests.conftest import ROOT, tiny
from tests.services.serving.synthetic_runs import make_run, swap_classes
from tests.services.suite_runs import EASY, NET, with_scenarios

SUITE, NEW = "(the suite)", "(a new folder)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_models: Models) -> Run:
    """A run that accepted component 1, as 8, before component 0, as 3; people labelled them."""
    spec = tiny(**EASY)
    store, splits = FolderStore(tmp_path_factory.mktemp("store")), open_splits(spec.data, spec.seed)
    made = make_run(store, "first", spec, tiny_models, splits, tiny_models.classifier)
    fixes = made.require(Corrections)
    turned = Corrections(fixes.scenario[::-1], fixes.labels[::-1], fixes.tune[::-1], fixes.test[::-1])
    made.store.write("corrections.safetensors", encode(turned))
    made.store.write("manifest.json", json.dumps(made.manifest() | {"annotators": "people"}).encode())
    return made


@pytest.fixture(scope="module")
def suite(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "suite"
    save_suite(run, folder)
    return folder


def disk_full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_junit_file_that_cannot_be_written_leaves_no_result_of_an_earlier_check(
    suite: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "report.xml"
    report.write_text("<old/>")
    words = ["check", "first", "--store", Path(run.store.address).parent, "--suite", suite, "--junit", report]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", disk_full)
        code, out, err = call(patch, capsys, *words)
    assert f"--junit {report}: cannot be written (No space left on device)" in one_line(err)
    assert (code, bool(out), report.exists()) == (2, True, False)
    os.mkfifo(report)
    assert "cannot be written (no ordinary file)" in one_line(call(monkeypatch, capsys, *words)[2])
    assert report.is_fifo()


def raising() -> torch.nn.Module:
    raise ValueError("no \x1b[2J licence")


def leaving() -> torch.nn.Module:
    sys.exit("no licence")


@pytest.mark.parametrize("factory", ["raising", "leaving"])
def test_a_check_that_cannot_be_made_replaces_the_junit_file_of_an_earlier_one_by_an_error(
    suite: Path, run: Run, tmp_path: Path, monkeypatch, capsys, factory: str
):
    words = ["check", "--suite", suite, "--junit", report := tmp_path / "report.xml"]
    where = ["first", "--store", Path(run.store.address).parent]
    assert call(monkeypatch, capsys, *words, *where)[0] == 0
    (tests,) = JUnitXml.fromfile(str(report))
    assert (tests.name, tests.tests, tests.errors) == ("defuse first: run first", 2, 0)
    assert call(monkeypatch, capsys, *words, "--classifier", f"{__name__}:{factory}")[0] == 2
    (tests,) = JUnitXml.fromfile(str(report))
    assert (tests.tests, tests.failures, tests.skipped, tests.errors) == (1, 0, 0, 1)
    (case,) = tests
    assert case.name == "the suite was checked" and "licence" in case.result[0].message


def test_the_json_and_the_junit_file_name_the_weights_that_were_checked(
    suite: Path, tiny_models: Models, tmp_path: Path, monkeypatch, capsys
):
    weights, report = tmp_path / "new.safetensors", tmp_path / "report.xml"
    save_file({name: torch.tensor(each) for name, each in tiny_models.classifier.items()}, weights)
    words = ["check", "--suite", suite, "--junit", report, "--json", "--classifier", NET, "--weights"]
    code, out, _ = call(monkeypatch, capsys, *words, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    page = json.loads(out)
    assert (code, page["classifier"], page["weights"], page["sha256"]) == (0, NET, weights.name, digest)
    (tests,) = JUnitXml.fromfile(str(report))
    assert tests.name == f"defuse first: {NET} with new.safetensors"


@pytest.fixture
def loaded(suite: Path) -> Suite:
    return load_suite(suite)


def test_its_pictures_are_those_that_the_correction_was_not_tuned_on(run: Run, loaded: Suite):
    fixes = run.require(Corrections)
    assert not np.array_equal(fixes.tune, fixes.test)
    np.testing.assert_array_equal(loaded.pictures.codes, fixes.test)
    with torch.no_grad():
        decoded = load_vae(run.spec, run.require(Models).vae).decode(torch.tensor(fixes.test[1]))
    levels = decoded.numpy() * 255
    assert np.abs(levels - loaded.pictures.pixels[1]).max() < 0.6


def test_a_scenario_keeps_the_number_of_its_component_and_who_labelled_it(run: Run, loaded: Suite):
    rows = loaded.description.scenarios
    assert [(row.number, row.label, row.mistaken_for) for row in rows] == [(1, "8", "3"), (0, "3", "8")]
    assert loaded.pictures.numbers.tolist() == [1, 0] and loaded.pictures.labels.tolist() == [8, 3]
    assert loaded.description.annotators == "people"


def test_each_row_of_an_edited_description_meets_its_own_pictures(suite: Path, loaded: Suite, tmp_path: Path):
    edited = with_scenarios(suite, tmp_path / "suite", lambda rows: rows.sort(key=lambda row: row["number"]))
    assert load_suite(edited).description == loaded.description


def test_a_right_and_a_wrong_classifier_get_the_accuracy_of_their_own_scenario(run: Run, loaded: Suite):
    models = run.require(Models)  # its classifier takes 3 for 8
    wrong, right = models.classifier, swap_classes(models.classifier, (3, 8))
    for weights, half in ((right, False), (wrong, True)):
        net = load_classifier(run.spec, weights, 10)
        assert [result.accuracy < 0.5 for result in loaded.check(net)] == [half, half]


def test_its_classifiers_are_checked_in_the_f32_of_the_run(loaded: Suite):
    found = set[str]()

    class Noting(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found.update(flag.fp32_precision for flag in F32_FLAGS)
            return torch.zeros(len(images), 10)

    with ieee_f32():  # for the flags of this process to be put back
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        loaded.check(Noting())
    assert found == {"ieee"}


@pytest.mark.parametrize(("gpus", "kind"), [(0, "cpu"), ("auto", "cuda")])
@pytest.mark.parametrize(
    ("computes", "arguments"),
    [
        ("suite.Suite.check", ["check", "first", "--suite", SUITE]),
        ("suite.save_suite", ["suite", "save", "first", "--out", NEW]),
        ("finished.export_scenarios", ["export", "first", "--scenarios", NEW]),
        ("compare.compare_runs", ["compare", "first", "first"]),
    ],
)
def test_a_command_computes_on_the_cpu_if_its_run_has_no_gpus(
    computes: str,
    arguments: list[object],
    gpus: object,
    kind: str,
    run: Run,
    suite: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
):
    def compute(*_: object) -> object:
        raise InputError(f"computed on {device().type}")

    monkeypatch.setattr(run, "spec", run.spec.with_fields("resources", gpus_per_worker=gpus))
    monkeypatch.setattr("services.cli.results.open_run", lambda *_: run)
    monkeypatch.setattr("services.cli.results._classifier_of", lambda *_: None)
    monkeypatch.setattr("defuse_core.device.can_use_gpu", lambda: True)
    monkeypatch.setattr(f"defuse_core.export.{computes}", compute)
    paths = {SUITE: suite, NEW: tmp_path / "new"}
    code, _, err = call(monkeypatch, capsys, *[paths.get(given, given) for given in arguments])
    assert (code, f"computed on {kind}" in err) == (2, True)


@pytest.mark.parametrize(("right", "expected"), [(True, 0), (False, 1)])
def test_a_run_that_corrected_nothing_is_checked_by_the_classifier_that_it_debugged(
    right: bool,
    expected: int,
    run: Run,
    suite: Path,
    tiny_models: Models,
    tmp_path: Path,
    monkeypatch,
    capsys,
):
    for key in run.store.list():
        FolderStore(tmp_path).within("first").write(key, run.store.read(key))
    own = Run.open(FolderStore(tmp_path), "first")
    own.store.write("sweep.safetensors", encode(Sweep((), None, {}, ())))
    if right:
        own.store.write("models.safetensors", encode(tiny_models))
        gallery = own.require(Gallery)
        images = gallery.images.reshape(-1, *gallery.images.shape[2:])
        answers = predict(load_classifier(own.spec, tiny_models.classifier, 10), images)
        gallery = replace(gallery, predicted=answers.reshape(gallery.predicted.shape))
        own.store.write("gallery.safetensors", encode(gallery))
    code, out, err = call(monkeypatch, capsys, "check", "first", "--store", tmp_path, "--suite", suite)
    assert (code, "FAILED" in out) == (expected, not right)
    assert "note: run first corrected nothing: the classifier that it debugged is checked" in err


def test_a_run_with_other_classes_than_the_suite_is_refused_with_both(
    run: Run, suite: Path, tiny_models: Models, tmp_path: Path, monkeypatch, capsys
):
    for key in run.store.list():
        FolderStore(tmp_path).within("first").write(key, run.store.read(key))
    models = replace(run.require(Models), classes=tuple("abcdefghij"))
    FolderStore(tmp_path).within("first").write("models.safetensors", encode(models))
    code, _, err = call(monkeypatch, capsys, "check", "first", "--store", tmp_path, "--suite", suite)
    assert code == 2
    told = "0, 1, 2, 3, 4 and 5 more only in the suite"
    assert f"suite (run first); a, b, c, d, e and 5 more only in run first; {told}" in one_line(err)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("image_size", 32, "data.image_size of the suite (run first), 16, found 32"),
        ("channels", 3, "data.channels of the suite (run first), 1, found 3"),
    ],
)
def test_a_run_with_other_images_than_the_suite_is_refused_with_both(
    field: str, value: int, told: str, run: Run, suite: Path, tmp_path: Path, monkeypatch, capsys
):
    for key in run.store.list():
        FolderStore(tmp_path).within("first").write(key, run.store.read(key))
    FolderStore(tmp_path).delete("first/settings.json")
    other = dump_run_file(run.spec.with_fields("data", **{field: value}))
    FolderStore(tmp_path).write("first/run.yaml", other.encode())
    code, _, err = call(monkeypatch, capsys, "check", "first", "--store", tmp_path, "--suite", suite)
    assert code == 2 and told in err


def test_the_networks_of_the_run_are_described_as_they_are_and_without_its_files():
    spec = tiny(data={"channels": 3})
    vae = spec.vae.model_copy(update={"weights": "vae.safetensors", "epochs": 0})
    run = SimpleNamespace(spec=spec.model_copy(update={"vae": vae}), name="first", manifest=dict)
    found = _described(run, SimpleNamespace(classes=("a", "b")), ())  # type: ignore[arg-type]
    assert found.channels == 3 and found.image_size == 16
    assert found.vae["weights"] is None and found.vae["epochs"] == 1
    assert found.vae["latent_dim"] == spec.vae.latent_dim


@pytest.mark.parametrize(
    ("fields", "described"),
    [
        ({"architecture": "resnet18"}, "imagenet"),
        ({"architecture": "cnn", "input_range": "imagenet"}, "0..1"),
        ({"architecture": "custom", "import_path": "nets:build", "input_range": "-1..1"}, "-1..1"),
    ],
)
def test_the_input_range_is_that_of_the_network_itself(fields: dict[str, object], described: str):
    run = SimpleNamespace(spec=tiny(classifier=fields), name="first", manifest=dict)
    found = _described(run, SimpleNamespace(classes=("a", "b")), ())  # type: ignore[arg-type]
    assert found.classifier.input_range == described


@pytest.mark.parametrize("architecture", ["program", "custom"])
def test_other_inputs_than_those_of_the_run_are_right_for_an_exported_program(
    loaded: Suite, architecture: str
):
    ranged = SuiteClassifier(input_range="imagenet", outputs="logits", class_order=None)
    suite = replace(loaded, description=loaded.description.model_copy(update={"classifier": ranged}))
    own = {"program": {"weights": "model.pt2", "epochs": 0}, "custom": {"import_path": "nets:build"}}
    (line,) = suite.other_inputs({"architecture": architecture, **own[architecture]})
    assert line.startswith("classifier.input_range is 0..1; for the classifier of run first it was imagenet")
    assert line.endswith("; a file of `defuse export` needs no such field") is (architecture == "program")


def test_an_overview_has_the_first_pictures_row_by_row_and_white_after_the_last():
    count = 2 * SHEET + 3
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 1, 4, 4), np.uint8)
    pixels[-1, 0, 0] = 77  # its upper edge
    shown = np.asarray(_sheet(pixels))
    assert shown.shape == (3 * 4, SHEET * 4)
    cells = shown.reshape(3, 4, SHEET, 4)[:, 3, :, 0].ravel()
    assert cells.tolist() == [*range(count), *[255] * (3 * SHEET - count)]
    assert shown[8, 2 * 4] == 77
    assert np.asarray(_sheet(np.repeat(pixels, 9, axis=0))).shape == (SHEET * 4, SHEET * 4)


@pytest.mark.parametrize(
    ("before", "after", "least"),
    [(0.2, 1.0, 0.9), (0.2, 0.8, 0.8), (0.95, 1.0, 0.96), (0.995, 1.0, 1.0), (0.95, 0.95, 0), (0.3, 0.1, 0)],
)
def test_what_is_asked_is_over_the_classifier_before_and_within_reach_of_the_correction(before, after, least):
    assert least_accuracy(0.9, before, after, 100) == pytest.approx(least)


def test_a_suite_whose_description_is_cut_off_is_named(suite, tmp_path):
    shutil.copytree(suite, tmp_path / "suite")
    (tmp_path / "suite/suite.json").write_text("{")
    with pytest.raises(InputError, match=r"suite\.json: the file: Invalid JSON.*; undo the edit$"):
        load_suite(tmp_path / "suite")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["suite.json", "suite.safetensors"])
def test_a_pipe_in_place_of_a_file_of_a_suite_is_not_waited_for(name, suite, tmp_path):
    shutil.copytree(suite, tmp_path / "suite")
    (tmp_path / "suite" / name).unlink()
    os.mkfifo(tmp_path / "suite" / name)
    with pytest.raises(InputError, match=f"{name} .a pipe, a device or a socket"):
        load_suite(tmp_path / "suite")


def test_a_suite_of_another_artefact_format_is_saved_again_from_another_run(suite, tmp_path, monkeypatch):
    shutil.copytree(suite, tmp_path / "suite")
    pictures = load_suite(suite).pictures
    monkeypatch.setattr("defuse_core.codec.FORMAT", 1)
    (tmp_path / "suite/suite.safetensors").write_bytes(encode(pictures))
    monkeypatch.undo()
    line = (
        "found artefact format 1; use the Defuse that saved it, or save the suite of a run of this one with"
    )
    with pytest.raises(InputError, match=line):
        load_suite(tmp_path / "suite")


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["--suite", "suite"], "give either RUN or --classifier"),
        (["--suite", "suite", "digits", "--weights", "x.safetensors"], "--weights and --set need"),
        (["--suite", "suite", "--store", "gone", "digits"], "no run called digits"),
        (["digits"], "--junit needs --suite FOLDER"),
        (["--suite", "suite", "--classifier", ""], "expected a value, found an empty one"),
        (["--suite", "suite", "--weight", "x.safetensors"], "No such option"),
        (["--suite", "suite", "one", "two"], "unexpected extra argument (two)"),
        # where a variable of a script is empty and not quoted
        (["--suite", "suite", "--classifier", NET, "--weights"], "a value, found the option --junit"),
        (["--suite", "suite", "--classifier"], "expected a value, found the option --junit"),
        (["--suite", "suite", "--classifier", NET, "--set"], "expected a value, found the option --junit"),
        (["--classifier", NET, "--suite"], "expected a value, found the option --junit"),
    ],
)
@pytest.mark.parametrize("given", [["--junit", "report.xml"], ["--junit=report.xml"]])
def test_the_result_of_an_earlier_check_is_not_left_where_the_command_is_wrong(
    wrong, line, given, suite, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite").symlink_to(suite)
    (tmp_path / "report.xml").write_text("<testsuite/>")
    code, _, err = call(monkeypatch, capsys, "check", *wrong, *given)
    assert code == 2 and line in err
    (tests,) = JUnitXml.fromfile("report.xml")
    (case,) = tests
    assert tests.errors == 1 and line in case.result[0].message


@pytest.mark.parametrize("words", [["--help"], ["--junit"], ["--bad", "--", "--junit", "report.xml"]])
def test_a_file_that_junit_does_not_name_is_left(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.xml").write_text("<old/>")
    before = ["--junit", "report.xml"] if words == ["--help"] else []
    call(monkeypatch, capsys, "check", *before, *words)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["<old/>"]


def test_a_check_that_is_killed_leaves_no_result_of_an_earlier_one(suite: Path, tmp_path: Path):
    report = tmp_path / "report.xml"
    report.write_text("<testsuite/>")
    words = ["check", "--suite", suite, "--classifier", "tests.own_classifiers:killing", "--junit", report]
    ended = subprocess.run([sys.executable, "-m", "services.cli", *words], check=False, cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    (tests,) = JUnitXml.fromfile(str(report))
    assert tests.errors == 1
