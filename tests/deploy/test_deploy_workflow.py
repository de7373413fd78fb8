"""The workflow that calls .ci/run, by GitHub's schema."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from importlib import resources

import jsonschema
from packaging.specifiers import SpecifierSet
from shipped import ROOT, load

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_the_workflow_has_githubs_form_and_runs_what_ci_runs() -> None:
    text = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "github-workflows.json"
    tree = load(WORKFLOW)
    tree["on"] = tree.pop(True)  # YAML 1.1 reads `on` as a truth value, GitHub does not
    jsonschema.validate(tree, json.loads(text.read_text(encoding="utf-8")))
    steps = tree["jobs"]["test"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run" and (ROOT / ".ci" / "run").is_file()


def test_the_workflow_and_the_makefile_take_the_pythons_that_pip_takes() -> None:
    tested = load(WORKFLOW)["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = SpecifierSet(project["requires-python"])
    assert tested == [version for version in (f"3.{minor}" for minor in range(30)) if version in wanted]
    least, most = (int(version.partition(".")[2]) for version in (tested[0], tested[-1]))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {least}) <= sys.version_info < (3, {most + 1})" in makefile


def test_the_modules_that_the_makefile_compiles_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (modules,) = re.findall(r"^COMPILED := (.+)$", makefile, re.MULTILINE)
    assert all(importlib.util.find_spec(module) for module in modules.split(", "))
