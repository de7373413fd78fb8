"""Every command says what it does, and what the READMEs name exists."""

import os
import re
import shlex
import subprocess
import tomllib

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
    for name, code in (("jq", "exit 0"), ("defuse", f'[ "$1" != {failing} ] || exit 2')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    words = {"GIT_COMMIT": "abc", "LAST": "abb", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", block], env=words, cwd=tmp_path, check=False)
    assert done.returncode == (0 if failing == "none" else 2)
    if failing == "compare":  # as on the first night, which has no run to compare with
        assert (tmp_path / "check.json").exists()


def test_there_are_gates_to_check():
    assert {name for _, name in gates()} == {"run", "status", "compare", "check", "report"}


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
