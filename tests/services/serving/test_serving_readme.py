"""The commands and files that services/serving/README.md names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from defuse_core.config import ServeSection
from services.cli import defuse
from services.serving import monitoring

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "services/serving/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line
    for line in (*"\n".join(BLOCKS).splitlines(), *re.findall(r"`(defuse [^`]+)`", TEXT))
    if line.startswith("defuse ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_the_program_has(line):
    _, *words = shlex.split(line, comments=True)
    command: click.Command = defuse
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_parser(click.Context(command)).parse_args(words)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


def test_every_setting_is_a_field_of_the_section():
    named = set(re.findall(r"serve\.([a-z_]+)\b(?!\.)", TEXT)) - {"yaml"}
    assert named and named <= ServeSection.model_fields.keys()


def test_every_file_exists():
    assert all((ROOT / file).exists() for file in re.findall(r"`((?:deploy|tests)/[\w/.-]+)`", TEXT))


def test_every_metric_of_a_replica_is_named():
    source = Path(monitoring.__file__).read_text(encoding="utf-8")
    kinds = re.findall(r'= (Counter|Gauge)\(\s*"(\w+)"', source)
    assert len(kinds) == len(re.findall(r"(?:Counter|Gauge)\(", source)) > 0
    names = {f"ray_{name}_total" if kind == "Counter" else f"ray_{name}" for kind, name in kinds}
    assert set(re.findall(r"`(ray_defuse_\w+)`", TEXT)) == names
