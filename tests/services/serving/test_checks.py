"""The checks of a corrected classifier, on answers that are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sample_evidence import sample_evidence
from sample_findings import sample_findings

from defuse_core.codec import encode
from defuse_core.errors import CheckFailed
from defuse_core.runs import Run
from services.serving.candidate import prepare_candidate
from services.serving.checks import own_label_accuracy
from tests.services.serving.test_serve_commands import check, run


def own_labels(before: list[float], after: list[float]) -> np.ndarray:
    """Accuracies (A, B) by own label, alike for baseline and plain further training."""
    return np.stack([before, [0.7] * len(before), [0.7] * len(before), after], axis=1)


@pytest.mark.parametrize(
    ("before", "after", "units", "passed", "worst"),
    [
        ([0.10, 0.5547], [0.99, 0.4531], 256, False, "scenario 1 55.47% -> 45.31%"),
        ([0.10, 0.5547], [0.99, 0.4531], 20, True, "scenario 1 55.47% -> 45.31%"),  # may be chance
        ([0.55, 0.30], [0.55, 1.00], 256, True, "scenario 0 55.00% -> 55.00%"),
        ([0.60, 1.00], [0.30, 0.50], 256, False, "scenario 1 100.00% -> 50.00%"),
    ],
)
def test_a_scenario_that_is_worse_by_its_own_label_fails_a_check(before, after, units, passed, worst):
    corrections = sample_findings(4, 2)[0].fixes
    evidence = sample_evidence(own_labels(before, after), units)
    found = own_label_accuracy(corrections, evidence).check()
    assert (found.name, found.passed) == ("own label", passed)
    assert found.line.startswith(f"own label: {worst} by the judges' label of each image")


def test_without_judged_units_there_is_no_check_by_own_label():
    corrections = sample_findings(4, 2)[0].fixes
    evidence = sample_evidence(own_labels([0.9, 0.9], [0.1, 0.1]))
    assert own_label_accuracy(corrections, None) is None
    assert own_label_accuracy(corrections, replace(evidence, pairs=None)) is None  # of an earlier version
    nobody = own_labels([np.nan, np.nan], [np.nan, np.nan])
    assert own_label_accuracy(corrections, replace(evidence, scenario_own_label=nobody)) is None


def test_check_fails_a_run_whose_judges_find_a_scenario_worse_also_after_a_check_without_them(own_store):
    before = prepare_candidate(Run.open(own_store, "first"))[0]
    evidence = sample_evidence(own_labels([0.1, 0.6], [1.0, 0.3]))
    Run.open(own_store, "first").store.write("evidence.safetensors", encode(evidence))
    with pytest.raises(CheckFailed, match="1 of 8 checks failed"):
        run(check, "first", "--store", own_store.address)
    key, candidate = prepare_candidate(Run.open(own_store, "first"))
    assert key != before
    assert candidate.failed_checks()[0].startswith("own label: scenario 1 60.00% -> 30.00%")
