"""Options of `defuse run` that have no effect are refused or named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling.local_server import NEWEST_PYTHON
from tests.command_line import call, npz, one_line
from tests.conftest import ROOT, TINY
from tests.no_access import write_all_but_run_file
from tests.waiting import WAIT_S


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> list[object]:
    """The words of the command that made the finished run, on a copy of it."""
    shutil.copytree(finished_run, tmp_path / "copy")
    return ["run", tmp_path / "copy/tiny.yaml", "--store", tmp_path / "copy/runs", "--on", "local"]


def test_a_cluster_is_not_ignored_where_the_run_is_computed_here(finished, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *finished, "--address", "head:6379")
    assert code == 2
    assert "--address goes with --on ray" in err


@pytest.mark.usefixtures("no_figures")
def test_a_step_that_was_made_before_is_not_traced_in_silence(finished, monkeypatch, capsys):
    for until in ([], ["--until", "train"]):
        code, out, err = call(monkeypatch, capsys, *finished, "--profile", "train", *until)
        assert code == 0, err
        assert one_line(err).startswith("note: --profile train: nothing was traced, since nothing was left")
    assert "tiny: done until train; the run is finished, see `defuse report tiny --store" in out


def test_the_result_of_a_run_until_a_step_is_printed_once_its_bars_are_gone(finished, monkeypatch, capsys):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("services.cli.console.Terminal", lambda **_: Console(file=sys.stdout))
    code, out, _ = call(monkeypatch, capsys, *finished, "--until", "train")
    assert code == 0
    assert out.index("\x1b[?25h") < out.index("tiny: done until train")  # the cursor is shown again


def test_a_step_that_is_not_reached_is_not_traced_in_silence(finished, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *finished, "--profile", "correct", "--until", "train")
    assert code == 2
    assert "--profile correct comes after --until train" in err


def test_a_shell_gets_its_completions() -> None:
    asked = os.environ | {"_DEFUSE_COMPLETE": "bash_complete", "COMP_WORDS": "defuse sta", "COMP_CWORD": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("defuse"))],
        env=asked,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,status\n", "")


@pytest.mark.parametrize("where", [["--on", "local"], []])
def test_a_run_whose_images_are_not_there_is_not_begun(where, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = ROOT / "deploy/runs/mnist-laptop.yaml"
    words = [file, "--store", tmp_path, "--set", f"data.root={tmp_path}/gone", "--set", "data.download=false"]
    code, _, err = call(monkeypatch, capsys, "run", *words, *where)
    assert code == 2
    assert "/gone does not exist; set it to the path of the mnist images" in one_line(err)
    assert not list(tmp_path.iterdir())


def test_images_are_found_from_every_folder(tmp_path, monkeypatch, capsys):
    npz(tmp_path / "images.npz")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("defuse_core.pipeline.run_defuse", lambda *_: 1 / 0)
    images = ("--set", "data.name=npz", "--set", "data.root=images.npz")
    call(monkeypatch, capsys, "run", "tiny.yaml", "--on", "local", *images)
    assert Run.open(FolderStore("runs"), "tiny").spec.data.root == tmp_path / "images.npz"
    code, _, err = call(
        monkeypatch, capsys, "run", "tiny.yaml", "--on", "local", *images[:3], "data.root=gone.npz"
    )
    assert code == 2 and "gone.npz does not exist" in one_line(err)
    assert Run.open(FolderStore("runs"), "tiny").spec.data.root == tmp_path / "images.npz"


def test_the_file_inside_a_run_begins_no_other_run(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "copy/runs/tiny/run.yaml"
    code, _, err = call(monkeypatch, capsys, "run", file, "--on", "local")
    assert code == 2
    assert f"to continue it, give `--name tiny --store {tmp_path}/copy/runs` too" in one_line(err)
    assert not (tmp_path / "runs").exists()


def test_the_command_of_a_run_puts_back_a_run_file_that_was_edited_inside_it(
    finished, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "copy/runs/tiny/run.yaml"
    text = file.read_text()
    file.write_text(text.replace("draws: 4", "draws: 9"))
    code, _, err = call(monkeypatch, capsys, "status", "tiny", "--store", tmp_path / "copy/runs")
    assert code == 2 and "identify.draws: 4 in the run, 9 now; undo the edit, or give the last `defuse" in err
    code, _, err = call(monkeypatch, capsys, *finished, "--until", "identify")
    assert (code, file.read_text()) == (0, text), err


def test_the_same_command_goes_on_where_one_was_stopped_before_it_wrote_the_run_file(
    finished, tmp_path, monkeypatch, capsys
):
    words = [*finished, "--set", "correct.lambdas=[0.001, 1, 10, 2]", "--until", "correct"]
    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "write", write_all_but_run_file)
        assert call(patch, capsys, *words)[0] == 4
    code, _, err = call(monkeypatch, capsys, "status", "tiny", "--store", tmp_path / "copy/runs")
    assert code == 2 and "or a command was stopped before it wrote it: correct.lambdas: " in err
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 0, err
    assert Run.open(FolderStore(tmp_path / "copy/runs"), "tiny").spec.correct.lambdas == (0.001, 1, 10, 2)


def test_the_cluster_is_the_one_that_is_given_and_else_that_of_the_environment(tmp_path, monkeypatch, capsys):
    asked = list[str]()
    monkeypatch.setattr("cluster.compute.on_ray", lambda address, *_: asked.append(address) or 1 / 0)
    monkeypatch.setenv("RAY_ADDRESS", "ours:6379")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for words in ([], ["--address", "given:6379"]):
        call(monkeypatch, capsys, "run", tmp_path / "tiny.yaml", "--store", tmp_path / "runs", *words)
    assert asked == ["ours:6379", "given:6379"]


@pytest.mark.skipif(sys.version_info[:2] > NEWEST_PYTHON, reason="Label Studio is for older Pythons")
@pytest.mark.parametrize("options", [(), ("--wait",)])
def test_a_run_waits_for_people_only_where_that_is_asked_for(options, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("defuse_core.pipeline.run_defuse", lambda *given: asked.append(given[2]) or 1 / 0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    # no server is asked before the review
    people = ("--set", "review.annotators=label-studio", "--until", "train", "--on", "local", *options)
    call(monkeypatch, capsys, "run", tmp_path / "tiny.yaml", "--store", tmp_path, *people)
    assert [annotators.wait for annotators in asked] == [bool(options)]


def test_that_nobody_is_waited_for_is_said_before_anything_runs(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("defuse_core.pipeline.run_defuse", lambda *_: 1 / 0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ("run", tmp_path / "tiny.yaml", "--store", tmp_path, "--on", "local")
    call(monkeypatch, capsys, *words)
    assert "--wait" not in caplog.text
    call(monkeypatch, capsys, *words, "--wait")
    assert "--wait: nobody is waited for, since models answer (review.annotators: refer" in caplog.text
