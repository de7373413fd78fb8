"""The workflow that calls .ci/run, by GitHub's schema."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
from shipped import ROOT, load

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_the_workflow_has_githubs_form_and_runs_what_ci_runs() -> None:
    text = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "github-workflows.json"
    tree = load(WORKFLOW)
    tree["on"] = tree.pop(True)  # YAML 1.1 reads `on` as a truth value, GitHub does not
    jsonschema.validate(tree, json.loads(text.read_text(encoding="utf-8")))
    steps = tree["jobs"]["test"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run" and (ROOT / ".ci" / "run").is_file()
    assert tree["jobs"]["test"]["strategy"]["matrix"]["python"][0] == "3.11"
