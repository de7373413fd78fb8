"""The command line as a user meets it: exit codes, one line for every failure, resume, documentation that is true."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.command_line import call, npz, one_line
from tests.conftest import ROOT, TINY


@pytest.fixture
def runfile(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from services.cli import main; main()", *map(str, args)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["identify.draws=none"], "identify.draws"),
        (["identify.drawz=1"], "identify.drawz: unknown field"),
        (["data.name=mnist", "data.root=/nowhere"], "/nowhere"),
        (["data.name=npz", "data.root=/nowhere.npz"], "/nowhere.npz"),
        (["classifier.weights=/nowhere.safetensors", "classifier.epochs=0"], "/nowhere.safetensors"),
        (
            ["classifier.weights=/dev/zero", "classifier.epochs=0"],
            "weights, found a pipe, a device",
        ),
        (["classifier.keep=best_validation", "data.validation_share=0"], "classifier.keep"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_makes_nothing(
    settings, message, runfile, tmp_path, monkeypatch, capsys
):
    options = [part for setting in settings for part in ("--set", setting)]
    store = tmp_path / "runs"
    code, _, err = call(monkeypatch, capsys, "run", runfile, "--store", store, "--on", "local", *options)
    assert code == 2
    assert message in one_line(err)
    left = [
        path
        for path in store.rglob("*")
        if path.is_file() and path.name not in {"run.yaml", "settings.json", ".lock", ".writers"}
    ]
    assert left == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.full(40, -1)}, "labels"),
        ({"train_images": np.zeros((40, 8, 8), np.uint8)}, "16"),
        ({"train_images": np.full((40, 16, 16), np.nan, np.float32)}, "NaN"),
    ],
)
def test_bad_images_exit_2_and_are_named(changes, message, runfile, tmp_path, monkeypatch, capsys):
    path = npz(tmp_path / "mine.npz", **changes)
    options = ["--set", "data.name=npz", "--set", f"data.root={path}"]
    code, _, err = call(
        monkeypatch, capsys, "run", runfile, "--store", tmp_path / "runs", "--on", "local", *options
    )
    assert code == 2
    assert message in one_line(err)
    assert "mine.npz" in err


@pytest.mark.parametrize("command", [("run", "--on", "local"), ("submit", "--address", "http://127.0.0.1:9")])
@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_class_names_with_control_characters_are_refused_before_anything_begins(
    kind, command, runfile, tmp_path, monkeypatch, capsys
):
    name = "\x1b[2Jdog"
    if kind == "npz":
        root = npz(tmp_path / "mine.npz", classes=np.array(["cat", name, "hen", "cow"]))
    else:
        root = tmp_path / "parts"
        (root / "train" / name).mkdir(parents=True)
    options = ["--set", f"data.name={kind}", "--set", f"data.root={root}", "--store", tmp_path / "runs"]
    code, _, err = call(monkeypatch, capsys, command[0], runfile, *options, *command[1:])
    assert code == 2
    assert r"found '\x1b[2Jdog'; rename the class" in one_line(err)
    assert not (tmp_path / "runs").exists()


def test_a_mended_run_file_goes_on_under_the_same_name(runfile, tmp_path, monkeypatch, capsys):
    where = ["--store", tmp_path / "runs", "--on", "local", "--until", "train"]
    short = ["--set", "classifier.epochs=1", "--set", "vae.epochs=1"]
    assert call(monkeypatch, capsys, "run", runfile, *where, *short, "--set", "data.validation_share=0",
                "--set", "classifier.keep=best_validation")[0] == 2  # fmt: skip
    assert call(monkeypatch, capsys, "run", runfile, *where, *short)[0] == 0


@pytest.mark.parametrize("name", ["../up", "a b", "-x", "registry", "traffic"])
def test_names_that_could_leave_the_store_are_refused(name, runfile, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "status", "--", name)
    assert code == 2
    assert "run name" in err


@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_run_file_whose_name_no_run_can_have_asks_for_another(command, runfile, monkeypatch, capsys):
    odd = runfile.rename(runfile.with_name("my run.yaml"))
    code, _, err = call(monkeypatch, capsys, command, odd)
    assert code == 2
    assert "run name 'my run': expected letters" in one_line(err)
    assert "choose one with --name" in err


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("s3:/bucket/runs", "expected s3://bucket/prefix or a folder"),
        ("s3://", "expected s3://bucket/prefix; a bucket's name has 3 to 63 characters"),
        ("s3:///runs", "expected s3://bucket/prefix; a bucket's name has"),
    ],
)
def test_a_misspelled_store_is_refused_before_anything_begins(
    command, store, words, runfile, monkeypatch, capsys
):
    code, _, err = call(monkeypatch, capsys, command, runfile, "--store", store)
    assert code == 2
    assert f"--store {store}: {words}" in one_line(err)


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize("option", ["--name", "--store", "--address"])
def test_the_empty_value_of_an_unset_variable_is_refused(command, option, runfile, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, command, runfile, option, "")
    assert code == 2
    assert f"'{option}': expected a value, found an empty one" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["serve", ""], "run name '': expected letters"),
        (["serve", "--address", ""], "expected a value, found an empty one"),
        (["status", ""], "run name '': expected letters"),
        (["check", ""], "run name '': expected letters"),
        (["jobs", "stop", ""], "'JOB_ID': expected a value, found an empty one"),
        (["jobs", "logs", ""], "'JOB_ID': expected a value, found an empty one"),
    ],
)
def test_an_empty_name_of_a_run_or_job_is_refused(words, line, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert line in err


@pytest.fixture
def no_page(monkeypatch, no_figures) -> None:
    """The report without its pictures, which take longer than all else: for tests that compare its figures."""
    monkeypatch.setattr("defuse_core.report.html.render_page", lambda *_: "")


@pytest.fixture
def copied(finished_run, tmp_path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(finished_run, tmp_path / "copy")
    return tmp_path / "copy"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def copy_over(path: Path) -> None:
    path.write_bytes(path.with_name("000001.safetensors").read_bytes())


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "key", "remade"),
    [
        (cut, "manifest.json", ["verdicts"]),
        (cut, "verdicts.safetensors", []),
        (alter, "sweep.safetensors", []),
        (cut, "psi.safetensors", []),
        (cut, "psi/000003.safetensors", ["scenarios"]),
        (alter, "psi/000003.safetensors", ["scenarios"]),
        (copy_over, "psi/000003.safetensors", ["scenarios"]),
        (Path.unlink, "psi/000003.safetensors", ["scenarios"]),
    ],
)
def test_what_is_damaged_is_named_with_a_remedy_that_works(
    damage, key, remade, copied, finished_run, no_page, monkeypatch, capsys
):
    run = copied / "runs" / "tiny"
    damage(run / key)
    for name in remade:  # so that the damaged file is needed again
        (run / f"{name}.safetensors").unlink()
    words = ["run", copied / "tiny.yaml", "--store", copied / "runs", "--on", "local"]
    code, _, err = call(monkeypatch, capsys, *words)
    line = one_line(err)
    assert (code, str(run / key) in line) == (2, True), line  # starting it again does not help
    (named,) = re.findall(r"delete (\S+) and run again", line)
    (run / key if named == "it" else Path(named)).unlink()
    assert call(monkeypatch, capsys, *words)[0] == 0
    reports = [
        json.loads((folder / "runs/tiny/report.json").read_text()) for folder in (copied, finished_run)
    ]
    for report in reports:
        report.pop("provenance")
    assert reports[0] == reports[1]


def test_a_damaged_run_file_of_a_run_is_named_with_a_remedy_that_works(copied, no_page, monkeypatch, capsys):
    run = copied / "runs" / "tiny"
    (run / "run.yaml").write_text("data: [")
    words = ["run", copied / "tiny.yaml", "--store", copied / "runs", "--on", "local"]
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert f"{run}/run.yaml: expected what Defuse wrote there, found no YAML; delete it and run" in one_line(
        err
    )
    (run / "run.yaml").unlink()
    assert call(monkeypatch, capsys, *words)[0] == 0


def test_a_report_is_shown_where_it_cannot_be_written(copied, monkeypatch, capsys, caplog):
    page = copied / "runs" / "tiny" / "report.html"
    page.unlink()
    page.mkdir()  # no file can be written here: as on a read-only disk, for root as well
    code, out, _ = call(monkeypatch, capsys, "report", "tiny", "--store", copied / "runs")
    assert code == 0
    assert "Defuse" in out and "report.html" not in out
    assert "the page is not written again, since the store cannot be written" in caplog.text


@pytest.mark.usefixtures("no_figures")
def test_a_run_is_made_resumed_shown_and_reported(runfile, tmp_path, monkeypatch, capsys):
    where = ["--store", tmp_path / "runs"]
    settings = ("classifier.epochs=3", "vae.epochs=5", "vae.accept=blind")
    short = ["--on", "local", *(part for setting in settings for part in ("--set", setting))]
    assert call(monkeypatch, capsys, "run", runfile, *where, *short, "--until", "identify")[0] == 0
    code, out, _ = call(monkeypatch, capsys, "status", "tiny", *where)
    assert code == 0
    assert "identify" in out
    assert call(monkeypatch, capsys, "report", "tiny", *where)[0] == 2
    code, out, _ = call(monkeypatch, capsys, "run", runfile, *where, *short)
    assert code == 0
    assert "report.html" in out
    code, again, _ = call(monkeypatch, capsys, "report", "tiny", *where)
    assert (code, again) == (0, out)
    assert "tiny" in call(monkeypatch, capsys, "status", *where)[1]
    (listed,) = json.loads(call(monkeypatch, capsys, "status", "--json", *where)[1])["runs"]
    page = json.loads(call(monkeypatch, capsys, "status", "tiny", "--json", *where)[1])
    assert listed == {key: page[key] for key in listed} and listed["state"] == "done"
    assert {step["state"] for step in page["steps"]} == {"done"}
    written = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert json.loads(call(monkeypatch, capsys, "report", "tiny", "--json", *where)[1]) == written
    assert written["annotators"] == "reference models"


def test_a_classifier_of_ones_own_is_found_in_the_folder_where_the_command_is_typed(runfile, tmp_path):
    nets = (
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    (tmp_path / "my_nets.py").write_text(nets)
    installed = Path(sys.executable).with_name("defuse")  # as people type it: without this folder on the path
    own = ("architecture=custom", "import_path=my_nets:build", "epochs=1")
    settings = [*(f"classifier.{setting}" for setting in own), "vae.epochs=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    where = ["--store", "runs", "--on", "local", "--until", "train"]
    done = subprocess.run(
        [installed, "run", runfile, *where, *options], check=False, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "runs" / "tiny" / "models.safetensors").exists()


def test_a_changed_run_file_is_refused_by_field(copied, monkeypatch, capsys):
    words = ["run", copied / "tiny.yaml", "--store", copied / "runs", "--on", "local"]
    code, _, err = call(monkeypatch, capsys, *words, "--set", "identify.draws=9")
    assert code == 2
    assert "identify.draws: 4 in the run, 9 now" in one_line(err)


def test_a_second_driver_exits_4(runfile, tmp_path, monkeypatch, capsys):
    from defuse_core.store import FolderStore

    with FolderStore(tmp_path / "runs" / "tiny").lock():
        code, _, err = call(
            monkeypatch, capsys, "run", runfile, "--store", tmp_path / "runs", "--on", "local"
        )
    assert code == 4
    assert "is writing this run" in one_line(err)


def test_an_unexpected_error_is_one_line_too(runfile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("defuse_core.pipeline.run_defuse", lambda *_: 1 / 0)
    monkeypatch.setattr("defuse_core.runs.Run.start", lambda *_, **__: 1 / 0)
    code, _, err = call(monkeypatch, capsys, "run", runfile, "--store", tmp_path / "runs", "--on", "local")
    assert code == 4
    assert "unexpected ZeroDivisionError" in one_line(err)


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def write_to(stream: str, pipe: int, unbuffered: str, *words: object) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: pipe}
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(command(*words), cwd=ROOT, env=environment, text=True, check=False, **streams)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["status"]])  # printed by click, and by rich
def test_output_that_nobody_reads_is_no_failed_check(words, unbuffered, closed_pipe, tmp_path):
    store = ["--store", tmp_path] if words == ["status"] else []
    ended = write_to("stdout", closed_pipe, unbuffered, *words, *store)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_runs_are_listed_without_torch_whose_import_takes_seconds(finished_run):
    code = "import sys; from services.cli.run import status; status(sys.argv[1:], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    listed = [sys.executable, "-c", code, "--store", finished_run / "runs"]
    assert "tiny" in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_is_one_line(unbuffered):
    with Path("/dev/full").open("wb") as full:
        ended = write_to("stdout", full.fileno(), unbuffered, "--help")
    assert ended.returncode == 4
    said = "cannot print to the end: no space left there; what the command made is stored"
    assert ended.stderr == f"defuse: {said}\n"


def test_a_failure_that_nobody_reads_keeps_its_exit_code(closed_pipe):
    assert write_to("stderr", closed_pipe, "", "status", "no run").returncode == 2


def test_a_run_whose_log_nobody_reads_goes_on(closed_pipe, runfile, tmp_path):
    words = ["run", runfile, "--store", tmp_path / "runs", "--on", "local", "--until", "train"]
    short = [part for name in ("classifier", "vae") for part in ("--set", f"{name}.epochs=1")]
    ended = write_to("stderr", closed_pipe, "", *words, *short)
    assert (ended.returncode, ended.stdout.startswith("tiny: done until train")) == (0, True)
    assert (tmp_path / "runs/tiny/models.safetensors").exists()


def test_a_terminal_of_ascii_shows_a_run(copied):
    words = command("status", "tiny", "--store", copied / "runs")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "0"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "tiny ? digits ? seed 0" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) > 40


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("label-studio", "up", "--port", "99999"), "a whole number from 1 to 65,535, found '99999'"),
        (("serve", "--port", "80.5"), "a whole number from 1 to 65,535, found '80.5'"),
        (("rollback", "--from", "0"), "a whole number of at least 1, found '0'"),
        (("review", "set", "mine", "x", "--reason", "y"), "a whole number of at least 0, found 'x'"),
        (("init", "x", "--minutes", "half"), "a number from 1 to 10,000, found 'half'"),
        (("init", "x", "--image-size", ""), "a value, found an empty one; is the variable set?"),
    ],
)
def test_numbers_out_of_their_bounds_are_refused_with_what_is_expected(words, refusal, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert f": expected {refusal}" in err
