"""Every command says what it does, and what the READMEs name exists."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from services.cli import defuse
from tests.conftest import ROOT


def every_command(group=defuse, path=()):
    for name, child in sorted(group.commands.items()):
        yield (*path, name), child
        if hasattr(child, "commands"):
            yield from every_command(child, (*path, name))


@pytest.mark.parametrize(
    ("path", "child"),
    list(every_command()),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_command_and_option_says_what_it_does(path, child):
    assert child.help
    for parameter in child.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{' '.join(path)} {parameter.opts[0]}"
    shown = child.get_help(click.Context(child, info_name=" ".join(("defuse", *path)), terminal_width=80))
    assert max(map(len, shown.splitlines())) <= 80


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("services/*/README.md"))]


def documented_commands() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = (
        line.strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    )
    return [line.split("  #")[0] for line in lines if line.startswith("defuse ")]


@pytest.mark.parametrize("line", documented_commands())
def test_every_command_in_the_readme_is_one_that_exists(line):
    _, *words = shlex.split(line.split(" > ")[0].split(" | ")[0])
    group, name = defuse, words[0]
    while hasattr(group, "commands"):
        assert name in group.commands, line
        group, words = group.commands[name], words[1:]
        name = words[0] if words else ""
    group.make_parser(group.context_class(group)).parse_args(list(words))


def gates() -> list[tuple[str, str]]:
    """Return each block of the READMEs that decides by a JSON file, with each command in it that may fail."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "jq " in block]
    return [(block, name) for block in blocks for name in re.findall("^defuse (\\w+)", block, re.MULTILINE)]


@pytest.mark.parametrize(("block", "failing"), [*gates(), *((block, "none") for block, _ in gates()[:1])])
def test_a_documented_gate_does_not_pass_where_a_command_failed(block, failing, tmp_path):
    give_program(tmp_path / "jq", "exit 0")
    assert code_of(block, tmp_path, {failing: 4}) == (0 if failing == "none" else 4)


def give_program(path: Path, code: str) -> None:
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def code_of(block: str, folder: Path, codes: dict[str, int], runs: str = "") -> int:
    """Return the exit code of a block where commands of Defuse end with `codes`, else with 0, and the store has `runs`.

    `called` in the folder lists the commands.
    """
    (folder / "new.safetensors").write_bytes(b"weights")
    (folder / "stored").write_text(runs)
    ends = "".join(f"{name}) exit {code};;" for name, code in codes.items())
    listing = '[ "$1" != status ] || cat stored'
    give_program(folder / "defuse", f'echo "$@" >> called\n{listing}\ncase "$1" in {ends} esac')
    words = {"GIT_COMMIT": "abc", "RUN": "abc-1", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", block], env=words, cwd=folder, check=False).returncode


NIGHTLY = next(block for block, name in gates() if name == "compare")


@pytest.mark.parametrize(
    ("compared", "checked", "code"),
    [(0, 0, 0), (0, 1, 1), (2, 0, 0), (2, 1, 1), (4, 0, 4), (0, 2, 2)],
)
def test_the_nightly_job_ends_as_its_check_whether_or_not_there_is_a_run_to_compare_with(
    compared, checked, code, tmp_path
):
    give_program(tmp_path / "jq", "exit 0")
    assert code_of(NIGHTLY, tmp_path, {"compare": compared, "check": checked}) == code
    called = [line.split()[0] for line in (tmp_path / "called").read_text().splitlines()]
    assert called == ["run", "status", "compare", *(["check"] if compared != 4 else [])]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("earlier", [True, False])
def test_the_nightly_job_compares_with_the_last_other_run_that_is_finished(earlier, tmp_path):
    own = f"abc-{hashlib.sha256(b'weights').hexdigest()[:8]}"
    rows = [(own, "done", "2026-01-04"), ("begun", "stopped", "2026-01-05"), ("odd", "unreadable", None)]
    if earlier:
        rows += [("abc-11111111", "done", "2026-01-03"), ("abb-22222222", "done", "2026-01-02")]
    runs = [{"run": run, "state": state, "made": made, "accepted": 0} for run, state, made in rows]
    assert code_of(NIGHTLY, tmp_path, {}, json.dumps({"runs": runs})) == 0
    called = [line.split()[:3] for line in (tmp_path / "called").read_text().splitlines()]
    assert ["compare", "abc-11111111" if earlier else "null", own] in called


def test_there_are_gates_to_check():
    assert {name for _, name in gates()} == {"run", "status", "compare", "check", "report"}


def test_the_readmes_agree_on_the_commands_that_notice_changed_code():
    scripts, core = (
        " ".join((ROOT / name / "README.md").read_text(encoding="utf-8").split())
        for name in ("services", "defuse_core")
    )
    (row,) = re.findall(r"code has changed since the run began \((.*?)\)", scripts)
    (text,) = re.findall(r"Give changed code another name\. (.*?) end with an error", core)
    assert re.findall("`(.*?)`", row) == re.findall("`(?:defuse )?(.*?)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_a_readme_exist(page):
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / path for path in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [ROOT / path for path in re.findall(r"(?<![\w/])(?:deploy|tests)/[\w/.-]+\.\w+", text)]
    assert [str(path) for path in (*linked, *named) if not path.exists()] == []


def test_each_extra_is_named_in_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = set(project["optional-dependencies"]) - {"dev"}
    assert {name for name in extras if f"`{name}`" not in text} == set()


READ = r'(?:get|is_on)\("([A-Z_0-9]{4,})"|"([A-Z_0-9]+)" not in os\.environ|"(DEFUSE_[A-Z_]+)"'


def test_each_variable_that_is_read_is_in_the_table_of_the_deployment():
    page = (ROOT / "deploy/README.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in page.split("\n## ")[1].splitlines() if line.startswith("|"))
    sources = (path for folder in ("cluster", "services") for path in (ROOT / folder).rglob("*.py"))
    found = (re.findall(READ, path.read_text(encoding="utf-8")) for path in sources)
    names = {"".join(match) for matches in found for match in matches} - {"CUDA_VISIBLE_DEVICES"}
    assert names >= {"DEFUSE_UNAUTHENTICATED_RAY", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_TOKEN", "TMPDIR"}
    linked = {name for name in names if re.match("LABEL_STUDIO_(HOST|S3_)", name)}
    assert len(names) > len(linked) > 0
    assert {name for name in names - linked if f"`{name}`" not in table} == set()
