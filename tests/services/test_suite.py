"""Failure scenarios over time: a suite that any classifier is checked against."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from junitparser import Failure, JUnitXml
from safetensors.torch import load_file, save_file

from defuse_core.artifacts import Models, Weights
from defuse_core.codec import encode
from defuse_core.data import open_splits
from defuse_core.errors import InputError
from defuse_core.export.suite import SuitePictures, load_suite, save_suite
from defuse_core.formatting import percent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.options import section_overrides
from tests.command_line import call, one_line
from tests.conftest import tiny
from tests.services.serving.synthetic_runs import make_run, swap_classes
from tests.services.suite_runs import NET, planted_runs, the_tiny_cnn, with_scenarios

OF_48 = "tests.services.test_init_image_size:of_48"


def with_own_weights() -> torch.nn.Module:
    """The tiny CNN as a factory that loads its weights itself."""
    net = the_tiny_cnn()
    net.load_state_dict(load_file(os.environ["OWN_WEIGHTS"]))
    return net


class Of255(torch.nn.Module):
    """The tiny CNN behind its own scaling of pixels from 0 to 255."""

    def __init__(self) -> None:
        super().__init__()
        self.net = the_tiny_cnn()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(images / 255)
        return logits


class Guarded(torch.nn.Module):
    """The tiny CNN, which here takes no pixels outside [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = the_tiny_cnn()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.min() < 0 or images.max() > 1:
            raise ValueError("images must be in [0, 1]")
        logits: torch.Tensor = self.net(images)
        return logits


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_models: Models) -> FolderStore:
    return planted_runs(tmp_path_factory.mktemp("store"), tiny_models)


@pytest.fixture(scope="module")
def suite(store: FolderStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "suite"
    save_suite(Run.open(store, "first"), folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_models: Models) -> Path:
    """Weights of a right and of a wrong classifier, and a program that returns probabilities."""
    folder = tmp_path_factory.mktemp("files")
    good, bad = tiny_models.classifier, swap_classes(tiny_models.classifier, (3, 8))
    for name, weights in (("good", good), ("bad", bad)):
        save_file(
            {key: torch.tensor(array) for key, array in weights.items()}, folder / f"{name}.safetensors"
        )
    net = the_tiny_cnn()
    net._forward_hooks.clear()
    net.load_state_dict({key: torch.tensor(array) for key, array in good.items()})
    torch.jit.script(torch.nn.Sequential(net, torch.nn.Softmax(1))).save(folder / "good.pt")
    return folder


def test_a_suite_holds_all_it_needs_and_nothing_of_the_machine(suite, store):
    files = sorted(path.relative_to(suite).as_posix() for path in suite.rglob("*") if path.is_file())
    pictures = ["pictures/scenario-000.png", "pictures/scenario-001.png"]
    assert files == [*pictures, "suite.json", "suite.safetensors"]
    text = (suite / "suite.json").read_text()
    assert store.address not in text
    loaded = load_suite(suite)
    assert [scenario.label for scenario in loaded.description.scenarios] == ["3", "8"]
    assert [scenario.mistaken_for for scenario in loaded.description.scenarios] == ["8", "3"]
    assert loaded.pictures.pixels.shape == (2, 24, 1, 16, 16)
    for scenario in loaded.description.scenarios:
        assert scenario.before < 0.5 <= scenario.least <= scenario.after


def test_a_right_classifier_passes_and_a_wrong_one_fails_with_junit(
    suite, files, tmp_path, monkeypatch, capsys
):
    report = ["--junit", tmp_path / "report.xml"]
    options = ["check", "--suite", suite, "--classifier", NET, *report, "--weights"]
    code, out, _ = call(monkeypatch, capsys, *options, files / "good.safetensors")
    assert code == 0
    assert out.count("ok     ") == out.count(" % by its label, expected at least ") == 2
    assert "3 read as 8 (scenario 0): " in out
    (tests,) = JUnitXml.fromfile(str(tmp_path / "report.xml"))
    assert (tests.tests, tests.failures) == (2, 0)
    code, out, err = call(monkeypatch, capsys, *options, files / "bad.safetensors")
    assert code == 1
    assert out.count("FAILED ") == 2
    assert f"{NET} with bad.safetensors fails 2 of 2 scenarios" in one_line(err)
    (tests,) = JUnitXml.fromfile(str(tmp_path / "report.xml"))
    assert (tests.tests, tests.failures) == (2, 2)
    case = next(iter(tests))
    assert case.name == "3 read as 8 (scenario 0)"
    assert isinstance(case.result[0], Failure)


def test_a_factory_that_loads_its_own_weights_needs_no_file_of_them(suite, files, monkeypatch, capsys):
    own = ["--classifier", "tests.services.test_suite:with_own_weights"]
    monkeypatch.setenv("OWN_WEIGHTS", str(files / "good.safetensors"))
    assert call(monkeypatch, capsys, "check", "--suite", suite, *own)[0] == 0


def test_a_program_and_a_run_are_checked_too(suite, files, store, monkeypatch, capsys):
    monkeypatch.setenv("DEFUSE_TRUST_TORCHSCRIPT", "1")
    options = "--suite", suite, "--classifier", files / "good.pt"
    code, _, err = call(monkeypatch, capsys, "check", *options)
    assert code == 2
    assert "set classifier.outputs: probabilities" in one_line(err)
    options += "--set", "classifier.outputs=probabilities", "--json"
    code, out, _ = call(monkeypatch, capsys, "check", *options)
    assert (code, (page := json.loads(out))["passed"], len(page["scenarios"])) == (0, True, 2)
    assert call(monkeypatch, capsys, "check", "first", "--store", store.address, "--suite", suite)[0] == 0


def test_the_junit_file_is_written_also_where_nobody_reads_the_results(
    suite, files, tmp_path, monkeypatch, capsys
):
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", closed)
    weights = ["--weights", files / "bad.safetensors", "--junit", tmp_path / "a.xml"]
    call(monkeypatch, capsys, "check", "--suite", suite, "--classifier", NET, *weights)
    (tests,) = JUnitXml.fromfile(str(tmp_path / "a.xml"))
    assert (tests.tests, tests.failures) == (2, 2)


def test_results_are_shown_also_where_the_junit_file_cannot_be_written(
    suite, store, tmp_path, monkeypatch, capsys
):
    options = ["check", "first", "--store", store.address, "--suite", suite, "--junit", tmp_path]
    code, out, err = call(monkeypatch, capsys, *options)
    assert (code, out.count("ok     ")) == (2, 2)
    assert f"--junit {tmp_path}: cannot be written (Is a directory); choose another place" in one_line(err)


def test_a_threshold_may_be_edited(suite, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(suite, tmp_path / "suite")
    page = json.loads((suite / "suite.json").read_text())
    page["scenarios"][0]["least"] = 1.0
    page["scenarios"][1]["least"] = 0.0
    (tmp_path / "suite/suite.json").write_text(json.dumps(page))
    options = ["--suite", tmp_path / "suite", "--classifier", NET, "--weights", files / "bad.safetensors"]
    code, out, _ = call(monkeypatch, capsys, "check", *options)
    assert code == 1
    assert (out.count("–      "), out.count("FAILED ")) == (1, 1)


def test_a_classifier_that_passes_far_below_the_corrected_one_is_told_where(
    suite, files, tmp_path, monkeypatch, capsys
):
    shutil.copytree(suite, tmp_path / "suite")
    options = ["check", "--suite", tmp_path / "suite", "--classifier", NET]
    options += ["--weights", files / "good.safetensors"]
    _, _, err = call(monkeypatch, capsys, *options)
    assert "significantly worse" not in err
    pictures = load_suite(suite).pictures
    pictures.pixels[0, :9] = pictures.pixels[1, :9]  # of another class: 15 of 24 are right
    (tmp_path / "suite/suite.safetensors").write_bytes(encode(pictures))
    code, out, err = call(monkeypatch, capsys, *options)
    assert (code, out.count("ok     ")) == (0, 2)
    assert "3 read as 8 (scenario 0): 62.5 % by its label" in out
    assert one_line(err).startswith(
        "note: passed, but significantly worse than the corrected classifier of run first on 3 read as 8 (scenario 0); "
        "to let the check fail there, raise `least` in suite.json"
    )


def saved(store: FolderStore, name: str, folder: Path, monkeypatch, capsys) -> tuple[dict, str]:
    """Return suite.json of a run's suite, and what `suite save` printed."""
    options = ["suite", "save", name, "--store", store.address, "--out", folder]
    code, out, err = call(monkeypatch, capsys, *options)
    assert code == 0, err
    return json.loads((folder / "suite.json").read_text()), out


def test_what_the_correction_did_not_improve_is_not_asked(store, files, tmp_path, monkeypatch, capsys):
    folder, weights = tmp_path / "my suite", files / "bad.safetensors"
    page, out = saved(store, "unimproved", folder, monkeypatch, capsys)
    assert [scenario["least"] for scenario in page["scenarios"]] == [0, 0]
    assert out.count("nothing is required, since the correction did not improve it") == 2
    assert f"next: defuse check --suite '{folder}' --classifier ..." in out
    bad = ["check", "--suite", folder, "--classifier", NET, "--weights", weights]
    code, out, err = call(monkeypatch, capsys, *bad, "--junit", tmp_path / "a.xml")
    assert (code, out.count("ok "), out.count("–      "), out.count("nothing is required")) == (2, 0, 2, 2)
    assert "nothing is required of any scenario, so every classifier would pass" in one_line(err)
    (tests,) = JUnitXml.fromfile(str(tmp_path / "a.xml"))
    assert (tests.tests, tests.failures, tests.skipped, tests.errors) == (3, 0, 2, 1)
    code, out, _ = call(monkeypatch, capsys, *bad, "--json")
    assert (code, json.loads(out)["passed"]) == (2, False)


def test_saving_prints_the_fields_that_a_check_needs(store, tmp_path, monkeypatch, capsys):
    _, out = saved(store, "first", tmp_path / "plain", monkeypatch, capsys)
    assert "--set" not in out
    asked = {"input_range": "imagenet", "outputs": "probabilities", "class_order": (1, 0, *range(2, 10))}
    monkeypatch.setattr(
        "defuse_core.export.suite.plain_section", lambda section: section.model_copy(update=asked)
    )
    _, out = saved(store, "first", tmp_path / "suite", monkeypatch, capsys)
    printed = shlex.split(out.partition("next: defuse ")[2].splitlines()[0])
    assert (printed[:2], printed[3:6]) == (["check", "--suite"], ["--classifier", "...", "--set"])
    assert "classifier.input_range=imagenet" in printed and "needs no --set" in out
    tree = {"classifier": {"architecture": "custom", "import_path": NET}}
    section = section_overrides("classifier", tuple(printed[6::2]), tree)
    assert load_suite(tmp_path / "suite").other_inputs(section) == []


def test_scenarios_may_be_sorted_in_the_description(suite, tmp_path):
    edited = with_scenarios(suite, tmp_path / "suite", lambda scenarios: scenarios.reverse())
    assert load_suite(edited).description == load_suite(suite).description


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda rows: rows[0].update(number=7), "expected the numbers [0, 1], found [1, 7]; undo the edit"),
        (lambda rows: rows[0].update(number=1), "expected the numbers [0, 1], found [1, 1]"),
        (lambda rows: rows[0].update(label="8"), "scenario 0: expected label 3 and 24 pictures, as in"),
        (lambda rows: rows[1].update(pictures=5), "scenario 1: expected label 8 and 24 pictures, as in"),
        (lambda rows: rows.pop(), "suite.json has 1 scenarios, suite.safetensors has 2"),
    ],
)
def test_a_description_of_other_pictures_is_refused(change, line, suite, tmp_path):
    with pytest.raises(InputError) as refused:
        load_suite(with_scenarios(suite, tmp_path / "suite", change))
    assert line in str(refused.value)


@pytest.mark.parametrize("edit", [{"image_size": 64}, {"channels": 3}])
def test_a_description_of_pictures_of_another_size_is_refused(edit, suite, tmp_path):
    shutil.copytree(suite, tmp_path / "suite")
    page = json.loads((suite / "suite.json").read_text()) | edit
    (tmp_path / "suite/suite.json").write_text(json.dumps(page))
    with pytest.raises(InputError, match="expected image_size 16 and channels 1, as in .*; undo the edit"):
        load_suite(tmp_path / "suite")


@pytest.mark.parametrize("version", [2, 4])
def test_a_suite_of_another_version_is_no_edit(version, suite, tmp_path):
    shutil.copytree(suite, tmp_path / "suite")
    page = json.loads((suite / "suite.json").read_text()) | {"version": version, "more": 1}
    (tmp_path / "suite/suite.json").write_text(json.dumps(page))
    with pytest.raises(
        InputError, match=f"expected 3, found {version}; use the Defuse that saved it, or save"
    ):
        load_suite(tmp_path / "suite")


def half_right_on_eights(weights: Weights, pictures: SuitePictures) -> Weights:
    """Return weights with a smaller logit of class 8, whose scenario is then half right."""
    net = the_tiny_cnn()
    net.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    with torch.inference_mode():
        logits = net(torch.tensor(pictures.pixels[1] / 255, dtype=torch.float32)).numpy()
    margin = logits[:, 8] - np.delete(logits, 8, axis=1).max(axis=1)
    last = sorted(name for name in weights if name.endswith(".bias"))[-1]
    return weights | {last: weights[last] - np.median(margin) * (np.arange(10) == 8).astype(np.float32)}


def test_saving_says_where_less_than_the_limit_is_asked(
    store, suite, tiny_models, tmp_path, monkeypatch, capsys
):
    spec, good = tiny(check={"min_each_scenario": 0.9}), tiny_models.classifier
    half = half_right_on_eights(good, load_suite(suite).pictures)
    make_run(store, "half", spec, tiny_models, open_splits(spec.data, spec.seed), half)
    page, out = saved(store, "half", tmp_path / "half", monkeypatch, capsys)
    assert [scenario["least"] for scenario in page["scenarios"]] == [0.9, 0.5]
    assert "(scenario 1): the suite requires only 50.0 %, which the correction reaches, not 90.0 %" in out
    assert "3 read as 8" not in out


def test_saving_says_where_the_classifier_before_is_over_the_limit(
    store, suite, tiny_models, tmp_path, monkeypatch, capsys
):
    spec, good = tiny(check={"min_each_scenario": 0.2}), tiny_models.classifier
    half = half_right_on_eights(good, load_suite(suite).pictures)
    before = dataclasses.replace(tiny_models, classifier=swap_classes(half, (3, 8)))
    make_run(store, "half-before", spec, before, open_splits(spec.data, spec.seed), good)
    page, out = saved(store, "half-before", tmp_path / "half-before", monkeypatch, capsys)
    eights = page["scenarios"][1]
    assert eights["before"] < eights["least"] < eights["after"]
    assert f"the suite requires {percent(eights['least'])}, since the classifier already reached" in out


def wrapped(kind: str, weights: Path, folder: Path) -> list[object]:
    """Return the options of a class of this file around the network whose `weights` these are."""
    own = folder / "own.safetensors"
    save_file({f"net.{name}": tensor for name, tensor in load_file(weights).items()}, own)
    return ["--classifier", f"tests.services.test_suite:{kind}", "--weights", own]


def test_a_failing_classifier_that_expects_other_pixels_is_told_so(
    suite, files, tmp_path, monkeypatch, capsys
):
    other = wrapped("Of255", files / "good.safetensors", tmp_path)
    code, _, err = call(monkeypatch, capsys, "check", "--suite", suite, *other)
    assert code == 1
    assert "if it was trained on such inputs, add --set classifier.input_range=0..255" in one_line(err)
    ranged = ["--set", "classifier.input_range=0..255"]
    code, _, err = call(monkeypatch, capsys, "check", "--suite", suite, *other, *ranged)
    assert code == 0
    line = "note: classifier.input_range is 0..255; for the classifier of run first it was 0..1"
    assert line in err
    bad = ["--classifier", NET, "--weights", files / "bad.safetensors"]
    code, _, err = call(monkeypatch, capsys, "check", "--suite", suite, *bad)
    assert code == 1
    assert "input_range" not in err


def test_a_classifier_that_refuses_other_pixels_fails_as_any_other(
    suite, files, tmp_path, monkeypatch, capsys
):
    guarded = wrapped("Guarded", files / "bad.safetensors", tmp_path)
    code, _, err = call(monkeypatch, capsys, "check", "--suite", suite, *guarded)
    assert code == 1
    assert "fails 2 of 2 scenarios" in one_line(err) and "input_range" not in err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["check"], "give RUN, or --suite FOLDER with --classifier"),
        (["check", "--suite", "suite"], "with --suite, give either RUN or --classifier"),
        (["check", "first", "--classifier", NET], "--classifier needs --suite FOLDER"),
        (["check", "first", "--weights", "new.safetensors"], "--weights needs --suite FOLDER"),
        (["check", "first", "--set", "check.max_loss=1"], "--set needs --suite FOLDER"),
        (["check", "first", "--junit", "report.xml"], "--junit needs --suite FOLDER"),
        (
            ["check", "first", "--suite", "suite", "--weights", "x.safetensors"],
            "--weights and --set need --classifier",
        ),
        (["check", "--suite", "gone", "--classifier", NET], "found no suite.json"),
        (
            ["check", "--suite", "suite/suite.json", "--classifier", NET],
            "--suite suite/suite.json: expected a folder written by `defuse suite save`; cannot read",
        ),
        (["check", "--suite", "suite", "--classifier", OF_48], "grey: give a classifier that takes these"),
        (["check", "--suite", "edited", "--classifier", NET], "scenarios.0.least: Input should be less than"),
        (
            ["check", "--suite", "odd", "--classifier", NET],
            r"text without control characters, found '\x1b[2J'",
        ),
        (["check", "--suite", "cut", "--classifier", NET], "; save the suite again with `defuse suite save`"),
        (["check", "--suite", "suite", "--classifier", "nothing"], "expected package.module:factory, a file"),
        (["check", "--suite", "suite", "--classifier", ""], "expected a value, found an empty one"),
        (
            ["check", "--suite", "suite", "--classifier", "tests.own_classifiers:with_nan"],
            "found NaN or infinity",
        ),
        (
            ["check", "--suite", "suite", "--classifier", NET],
            "so they are random; give trained ones with --weights FILE",
        ),
        (
            ["check", "--suite", "suite", "--classifier", NET, "--set", "classifiers.epochs=1"],
            "expected classifier.field",
        ),
        (["suite", "save", "first", "--out", "suite"], "expected an empty or new folder, found files"),
        (
            ["suite", "save", "first", "--out", "plain/new"],
            "new: cannot be written (Not a directory)",
        ),
        (["suite", "save", "nothing", "--out", "new"], "accepted no failure scenario"),
        (["suite", "save", "uncorrected", "--out", "new"], "corrected nothing, so a suite of it would req"),
        (["suite", "save", "begun", "--out", "new"], "run begun is not finished"),
        (["compare", "first", "begun"], "run begun is not finished"),
        (["compare", "first", "gone"], "no run called gone"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, line, suite, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("suite", "edited", "odd", "cut"):
        shutil.copytree(suite, tmp_path / name)
    page = json.loads((suite / "suite.json").read_text())
    page["scenarios"][0]["least"] = 2
    Path("edited/suite.json").write_text(json.dumps(page))
    page["scenarios"][0] |= {"least": 1, "label": "\x1b[2J"}
    Path("odd/suite.json").write_text(json.dumps(page))
    Path("plain").touch()
    Path("cut/suite.safetensors").write_bytes(Path("suite/suite.safetensors").read_bytes()[:1000])
    where = ["--store", store.address] if options[0] != "check" else []
    code, _, err = call(monkeypatch, capsys, *options, *where)
    assert line in err
    assert code == 2
