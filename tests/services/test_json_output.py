"""Commands with --json: stdout is for the JSON alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

from defuse_core.artifacts import Models
from defuse_core.export.suite import save_suite
from defuse_core.runs import Run
from services.cli.options import json_option, print_json
from tests.command_line import call
from tests.conftest import ROOT
from tests.e2e.test_documented_commands import every_command
from tests.services.suite_runs import planted_runs, the_tiny_cnn

PAGE = ROOT / "services/README.md"


class Printing(torch.nn.Module):
    """The tiny CNN, which prints at each call, as people leave it in while they debug."""

    def __init__(self) -> None:
        super().__init__()
        self.net = the_tiny_cnn()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        print("images:", tuple(images.shape))
        logits: torch.Tensor = self.net(images)
        return logits


@pytest.mark.parametrize("right", [False, True])
def test_what_a_classifier_prints_goes_to_stderr(
    right, tmp_path: Path, tiny_models: Models, monkeypatch, capsys
):
    run = Run.open(planted_runs(tmp_path / "store", tiny_models), "first")
    save_suite(run, tmp_path / "suite")
    scale = 1 if right else -1
    weights = {f"net.{name}": scale * torch.tensor(array) for name, array in tiny_models.classifier.items()}
    save_file(weights, tmp_path / "own.safetensors")
    chosen = ["--classifier", f"{__name__}:Printing", "--weights", tmp_path / "own.safetensors"]
    code, out, err = call(monkeypatch, capsys, "check", "--suite", tmp_path / "suite", *chosen, "--json")
    assert json.loads(out)["passed"] == right
    assert code == (0 if right else 1)
    assert err.count("images: (") > 1


@pytest.mark.parametrize("words", [["--json"], []])
def test_stdout_is_reserved_with_json_alone_and_until_the_command_ends(words, capsys):
    @click.command()
    @json_option
    def command(as_json: bool) -> None:
        print("a network")
        click.echo("another")
        if as_json:
            print_json({"β": 1})

    command(words, standalone_mode=False)
    print("after")
    printed = capsys.readouterr()
    shown = "a network\nanother\n"
    expected = ('{"\\u03b2": 1}\nafter\n', shown) if words else (shown + "after\n", "")
    assert (printed.out, printed.err) == expected


def test_a_closed_stdout_gets_no_json_and_stderr_neither(monkeypatch, capsys):
    @click.command()
    @json_option
    def command(as_json: bool) -> None:
        print_json({"β": 1})

    monkeypatch.setattr("sys.stdout", None)  # what Python makes of `>&-`
    command(["--json"], standalone_mode=False)
    assert capsys.readouterr().err == ""


NOISY = """
import ctypes, subprocess, sys
import click
from services.cli.options import json_option, print_json

def noise(text):
    subprocess.run(["echo", text], check=True)
    ctypes.CDLL(None).puts(text.encode())
    print(text, file=sys.__stdout__)

@click.command()
@json_option
def command(as_json):
    noise("before")
    print_json({"a": 1})
    noise("after")

command(["--json"], standalone_mode=False)
noise("end")
"""


def test_what_child_processes_and_libraries_print_goes_to_stderr():
    words = [sys.executable, "-c", NOISY]
    # with it, Python switches off C's buffer, too
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(words, cwd=ROOT, env=buffered, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ['{"a": 1}']
    assert sorted(done.stderr.split()) == ["after"] * 3 + ["before"] * 3 + ["end"] * 3


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">/dev/full", "| true"])
def test_json_that_cannot_be_printed_leaves_nothing_on_stderr_and_no_traceback(closed: str, tmp_path: Path):
    command = f"{shlex.quote(sys.executable)} -m services.cli status --store {tmp_path} --json {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not any(text in done.stderr for text in ("{", "Traceback", "Exception ignored"))
    assert ("cannot print to the end: no space left there" in done.stderr) is (closed == ">/dev/full")
    assert (done.stdout != "") is (closed == "2>&-")


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize(
    ("accepted", "undecided", "low", "worse", "code"),
    [
        (2, None, 0.95, False, 0),
        (0, None, None, False, 0),
        (0, "the β-VAE is poor", None, False, 1),
        (2, None, 0.5, False, 1),
        (2, None, 0.95, True, 1),
    ],
)
def test_the_documented_condition_on_a_report_holds_only_where_the_run_could_tell(
    accepted, undecided, low, worse, code, tmp_path
):
    (command,) = re.findall(
        r"^jq -e .*?report\.json$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    evidence = {"own_label": {"defuse": {"low": low}}, "judges": {"worse": worse}}
    scenarios = {"accepted": accepted, "undecided": undecided}
    report = {"scenarios": scenarios, "evidence": evidence if accepted else None}
    (tmp_path / "report.json").write_text(json.dumps(report))
    done = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == code, done.stderr


def test_every_json_is_this_option():
    (reserve,) = json_option(lambda: None).__click_params__
    found = [
        (path, parameter.callback)
        for path, child in every_command()
        for parameter in child.params
        if "--json" in parameter.opts
    ]
    assert {path for path, _ in found} >= {("check",), ("compare",)}
    assert {callback for _, callback in found} == {reserve.callback}
