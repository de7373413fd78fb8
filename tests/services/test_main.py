"""What `main` makes of errors that nobody expected."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import click
import pytest
import yaml

import services
from defuse_core.errors import InputError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services import stopped_exit_code, stopping_on_signals
from services.cli import GROUPS, defuse
from tests.command_line import call, one_line
from tests.conftest import ROOT, TINY
from tests.e2e.test_documented_commands import every_command
from tests.no_access import refuse_access
from tests.sample_findings import sample_spec

LONG = "n" * 256  # longer than any file system allows


@pytest.fixture
def broken(monkeypatch, tmp_path) -> list[object]:
    """The words of a command that ends with an error that nobody expected."""
    monkeypatch.setattr("services.storage.open_store", lambda *_: 1 / 0)
    return ["status", "--store", tmp_path]


@pytest.mark.parametrize("value", ["1", "wrong"])
def test_with_tracebacks_the_exit_code_is_the_same(broken, monkeypatch, capsys, value):
    """It was that of a failed check."""
    monkeypatch.setenv("DEFUSE_DEBUG", value)
    code, _, err = call(monkeypatch, capsys, *broken)
    assert code == 4
    assert err.startswith("Traceback") and err.endswith(
        "defuse: unexpected ZeroDivisionError: division by zero\n"
    )


@pytest.fixture
def full_disk() -> Iterator[TextIO]:
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as file:
        yield file


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (click.echo, "cannot print to the end: no space left there; what the command made is stored"),
        (print, "unexpected OSError: [Errno 28] No space left on device (DEFUSE_DEBUG=1 shows where)"),
    ],
    ids=["printing", "another file"],
)
def test_only_a_full_disk_that_is_printed_to_is_called_that(
    write, line, full_disk, monkeypatch, capsys, tmp_path
):
    def write_all(_: str) -> None:
        write("text", file=full_disk)
        full_disk.flush()

    monkeypatch.delenv("DEFUSE_DEBUG", raising=False)
    monkeypatch.setattr("services.storage.open_store", write_all)
    code, _, err = call(monkeypatch, capsys, "status", "--store", tmp_path)
    assert code == 4
    assert one_line(err) == f"defuse: {line}"


@pytest.mark.parametrize("name", ["DEFUSE_FORWARDED_FOR", "DEFUSE_CACHE"])
def test_a_wrong_value_of_another_variable_shows_no_traceback(broken, monkeypatch, capsys, name):
    monkeypatch.delenv("DEFUSE_DEBUG", raising=False)
    monkeypatch.setenv(name, "~nosuchuser/cache")
    code, _, err = call(monkeypatch, capsys, *broken)
    assert code == 4
    assert one_line(err).endswith("division by zero (DEFUSE_DEBUG=1 shows where)")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("DEFUSE_CACHE", "~nosuchuser/cache"), ("XDG_CACHE_HOME", "~nosuchuser/cache/defuse")],
)
def test_a_cache_below_an_unknown_home_is_one_line_for_what_uses_it(monkeypatch, capsys, name, shown):
    monkeypatch.delenv("DEFUSE_CACHE", raising=False)
    monkeypatch.setenv(name, "~nosuchuser/cache")
    code, _, err = call(monkeypatch, capsys, "label-studio", "status")
    assert code == 2
    assert one_line(err).startswith(f"defuse: {shown}: this machine knows no such home folder")
    assert one_line(err).endswith("set DEFUSE_CACHE, XDG_CACHE_HOME or HOME to a folder")


@pytest.mark.parametrize(
    ("command", "line"),
    [("run", "stopped; the same command continues from here"), ("init", "stopped"), ("promote", "stopped")],
)
def test_ctrl_c_while_modules_are_imported_is_one_line_too(command, line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["defuse", command])
    found = builtins.__import__

    def interrupted(name, *args, **kwargs):
        if name == "services.cli":
            raise KeyboardInterrupt
        return found(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        services.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"defuse: {line}\n"


STOPPED_AGAIN = """
import atexit, os, signal, sys, time
import services.cli, services.storage

def stop(*_):
    os.kill(os.getpid(), number)
    time.sleep(20)

def stop_while_it_is_said():
    os.kill(os.getpid(), number)
    return "stopped"

signal.signal(signal.SIGINT, signal.default_int_handler)  # which the process of the tests may ignore
number = int(sys.argv.pop())
services.storage.open_store, services.cli.stopped_line = stop, stop_while_it_is_said
atexit.register(stop)
services.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_further_signals_while_the_program_ends_add_nothing_to_the_one_line(number, tmp_path):
    words = [sys.executable, "-c", STOPPED_AGAIN, "status", "--store", tmp_path, str(int(number))]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.stderr.strip(), ended.returncode) == ("defuse: stopped", -number)


def test_a_closed_terminal_ends_a_command_in_order_unless_its_hangup_is_ignored():
    done = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), stopping_on_signals():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)  # as the shell repeats it
            done.append("the end")
    assert (done, stopped_exit_code()) == (["the end"], 128 + signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    with stopping_on_signals():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


WITHOUT_TERMINAL = """
import fcntl, signal, sys, termios, time
import click
import services, services.cli, services.storage

def wait(*_):
    try:
        click.echo("waiting")
        time.sleep(20 if has_hangup else 1)
    finally:
        click.echo("the end, which nobody sees")

has_hangup = sys.argv.pop() == "True"
if has_hangup:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the hangup is that of this process
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the process of the tests may ignore
services.storage.open_store = wait
services.main()
"""


@pytest.mark.parametrize(("has_hangup", "code"), [(True, 128 + signal.SIGHUP), (False, 4)])
def test_a_command_that_cannot_print_its_end_on_a_closed_terminal_says_whether_a_hangup_stopped_it(
    has_hangup, code, tmp_path
):
    ours, terminal = pty.openpty()
    words = [sys.executable, "-c", WITHOUT_TERMINAL, "status", "--store", tmp_path, str(has_hangup)]
    ended = subprocess.Popen(
        words, cwd=ROOT, start_new_session=True, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    assert b"waiting" in os.read(ours, 100)
    os.close(ours)
    assert ended.wait(timeout=20) == code


def test_the_log_has_steps_of_defuse_and_warnings_of_others_with_control_characters_escaped(tmp_path):
    """Torch logs statistics when Ctrl-C ends the program while it is imported."""
    code = (
        "import logging; from services.cli import main; import services.storage as storage; "
        "storage.open_store = lambda _: [logging.getLogger(name).log(level, name) for name, level in "
        "(('defuse', 20), ('defuse', 10), ('other', 20), ('other', 30), ('odd\\nline\\x1b', 30))] and 1 / 0; main()"
    )
    words = [sys.executable, "-c", code, "status", "--store", tmp_path]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    *logged, last = ended.stderr.splitlines()
    assert [line.partition(" ")[2] for line in logged] == ["defuse", "other", "odd", "   line\\x1b"]
    assert last.startswith("defuse: unexpected ZeroDivisionError")


@pytest.mark.parametrize(
    ("words", "late"),
    [
        (
            [[*path, "--help"] for path, _ in every_command()],
            {"numpy", "scipy", "torch", "ray", "pydantic", "asyncio", "ssl", "rich.progress"},
        ),
        ([["status", "--store", "."]], {"scipy", "torch", "ray", "asyncio", "ssl"}),
    ],
)
def test_help_and_the_list_of_runs_import_nothing_that_other_commands_need(words, late, tmp_path):
    Run.start(FolderStore(tmp_path), "mine", sample_spec())
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from services.cli import defuse; "
    code += f"[defuse.main(each, standalone_mode=False) for each in {words}]; print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    imported = {*shown.stderr.split()}
    assert "services.cli.jobs" in imported and not imported & late
    assert shown.stdout.count("Usage: ") == len(words) or "mine" in shown.stdout


def test_an_error_is_one_line_that_keeps_the_spaces_of_a_path():
    assert str(InputError(" my  store:\n    gone\r\n")) == "my  store: gone"


def test_a_working_directory_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    code, _, err = call(monkeypatch, capsys, "status", "--store", "runs")
    assert code == 2
    assert err == "defuse: the working directory was deleted; change to another one\n"


@pytest.mark.parametrize("file", ["cluster.py", "services/__init__.py"])
def test_a_module_that_hides_a_package_of_defuse_from_workers_is_one_line(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster").mkdir()  # a namespace: the package, wherever it is, comes before it
    assert call(monkeypatch, capsys, "--version")[0] == 0
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    code, _, err = call(monkeypatch, capsys, "--version")
    assert code == 2
    assert err.startswith(
        f"defuse: {tmp_path / file} has the name of a package of Defuse and hides it from Ray's"
    )


def test_another_clone_of_defuse_is_not_to_be_renamed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for package in "cluster", "defuse_core", "services":
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    code, _, err = call(monkeypatch, capsys, "--version")
    assert code == 2
    assert err == (
        f"defuse: {tmp_path} has another copy of Defuse, which hides that of this command ({ROOT}) from Ray's workers; "
        "run defuse in another folder, or use the environment of the copy here\n"
    )


def test_a_folder_that_holds_this_defuse_hides_nothing(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call(monkeypatch, capsys, "--version")[0] == 0


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for below in command.commands.values() if isinstance(command, click.Group) else []:
        yield from commands(below)


def test_an_empty_path_is_not_taken_for_the_current_folder(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "init", "")
    assert code == 2
    assert "IMAGES': expected a value, found an empty one; is the variable set?" in err
    paths = [p for each in commands(defuse) for p in each.params if isinstance(p.type, click.Path)]
    assert {path.name for path in paths} >= {
        "images",
        "runfile",
        "suite",
        "weights",
        "junit",
        "out",
        "folder",
    }
    for path in paths:
        with pytest.raises(click.BadParameter, match="found an empty one"):
            path.type.convert("", path, None)


def test_a_tilde_is_the_users_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # bash leaves the tilde of --to=~/model.pt2
    for path in (p for each in commands(defuse) for p in each.params if isinstance(p.type, click.Path)):
        assert path.type.convert("~/one", path, None) == tmp_path / "one"
        with pytest.raises(click.BadParameter, match="expected the home of an existing user after ~"):
            path.type.convert("~nobody-of-this-name/one", path, None)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["status", "--store", LONG], f"/{LONG}: File name too long; choose another folder or name"),
        (["status", "one", "--store", f"{LONG}/runs"], f"/{LONG}/runs: File name too long; choose another folder"),
        (["run", "tiny.yaml", "--store", LONG, "--on", "local"], f"/{LONG}: File name too long; choose anoth"),
        (["run", "tiny.yaml", "--name", LONG], "at most 100"),
        (["run", "tiny.yaml", "--store", ".", "--name", "file", "--on", "local"], "/file: File exists; choose another"),
        (["run", f"{LONG}.yaml"], "cannot read this run file (File name too long)"),
        (["init", LONG], f"/{LONG}: File name too long; check this path"),
        (["init", ".", "--out", LONG], f"--out {LONG}: cannot be written (File name too long)"),
        (["init", ".", "--classifier", LONG], f"{LONG}: File name too long; check this path"),
        (["init", ".", "--classifier", "x:y", "--weights", LONG], f"{LONG}: File name too long; check this path"),
    ],
)  # fmt: skip
def test_a_path_that_no_file_can_have_is_bad_input(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and line in one_line(err)


def test_a_path_that_may_not_be_read_is_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "closed").mkdir()
    refuse_access(monkeypatch, tmp_path / "closed")
    code, _, err = call(monkeypatch, capsys, "init", tmp_path / "closed/images")
    assert code == 2
    assert one_line(err).endswith("/closed/images: Permission denied; check this path")


def test_an_option_in_place_of_a_value_is_named(monkeypatch, capsys):
    """A variable of a script that is empty and not quoted: click takes the next option for the value."""
    for words in (["run", "a.yaml", "--name", "--until", "train"], ["export", "one", "--to", "--store=runs"],
                  ["run", "a.yaml", "--set", "--on", "local"],
                  ["review", "push", "--set", "--repair", "one/traffic-1"]):  # fmt: skip
        code, _, err = call(monkeypatch, capsys, *words)
        assert code == 2
        assert f"expected a value, found the option {words[3]}; is the variable set?" in err


def test_text_with_control_characters_is_refused(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "status", "--store", "a\x1b[2J")
    assert code == 2
    assert r"'--store': expected text on one line without control characters, found 'a\x1b[2J'" in err


def test_the_help_of_export_says_which_pictures_are_missing(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "export", "--help")
    assert code == 0
    assert "nobody reviewed them (correct.unreviewed) are not among the pictures" in " ".join(out.split())


def test_no_line_of_the_list_of_commands_is_cut_on_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(monkeypatch, capsys, "--help")
    commands = [line for line in out.partition("A run:")[2].splitlines() if line.startswith("  ")]
    for group in ("review", "label-studio", "suite", "jobs"):
        _, out, _ = call(monkeypatch, capsys, group, "--help")
        commands += out.partition("Commands:")[2].splitlines()[1:]
    assert len(commands) > 15 + 10 and not [
        line for line in commands if line.endswith("...") or line.startswith("   ")
    ]


def test_a_sign_that_the_encoding_of_the_terminal_lacks_has_a_plain_form(monkeypatch, capsys):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="iso-8859-1", newline="")
    monkeypatch.setattr("sys.stdout", terminal)
    call(monkeypatch, capsys, "--version")
    terminal.write("+5 −34, λ = 1 → 2…, β-VAE, z + ψ(μ(x)), integer ≥ 1, 猫")
    terminal.flush()
    assert terminal.buffer.getvalue().endswith(b"\n+5 -34, l = 1 > 2., b-VAE, z + p(m(x)), integer >= 1, ?")


def test_every_command_is_in_one_group_of_the_help():
    grouped = [command for commands in GROUPS.values() for command in commands]
    assert len(grouped) == len(defuse.commands) and {*grouped} == {*defuse.commands.values()}
