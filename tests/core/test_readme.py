"""The calls that the READMEs of defuse_core and cluster list, step by step, are those of the code."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = {"defuse_core": ROOT / "defuse_core", "cluster": ROOT}  # page -> where the names of its modules start
ROWS = [
    (page, row)
    for page in START
    for row in re.findall(
        r"^\|[^|]+\| (`[^|]*→[^|]*) \|$",
        (ROOT / page / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
]


def source(start: Path, module: tuple[str, ...]) -> Path | None:
    """Return the file of a module, by its path from `start`; None where there is none."""
    path = start.joinpath(*module)
    files = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file for file in files if module and file.exists()), None)


def definition(file: Path, name: tuple[str, ...]) -> ast.AST:
    """Return the class, function or method of this name."""
    found: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name:
        found = next(node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == part)
    return found


def steps(start: Path, row: str) -> list[dict[str, ast.AST]]:
    """Return the definitions of each step of a row, by their names. A name without a module is in that before it."""
    found, file = [], None
    for step in row.split("→"):
        definitions = {}
        for parts in (tuple(name.split(".")) for name in re.findall(r"`([\w.]+)`", step)):
            modules = [length for length in range(len(parts)) if source(start, parts[:length])]
            file = source(start, parts[: max(modules)]) if modules else file
            definitions[parts[-1]] = definition(file, parts[max(modules, default=0) :])
        found.append(definitions)
    return found


def used_in(node: ast.AST) -> set[str]:
    """Return the names that a definition uses."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


@pytest.mark.parametrize(("page", "row"), ROWS)
def test_each_name_exists_and_is_used_by_the_one_before_it(page, row):
    for callers, called in pairwise(steps(START[page], row)):
        assert called.keys() <= set().union(*map(used_in, callers.values()))


def test_every_step_has_a_row():
    assert [page for page, _ in ROWS] == ["defuse_core"] * 13 + ["cluster"] * 3
