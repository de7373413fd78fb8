"""Compute the report's figures on evidence from what the judges found."""

from __future__ import annotations

import math
from typing import Literal, cast

import numpy as np

from defuse_core.artifacts import F64
from defuse_core.evaluate import Findings
from defuse_core.evidence import CLASSIFIERS, WIDER, Evidence
from defuse_core.report.schema import (
    BeforeAfter,
    EvidenceFigures,
    FourShares,
    Judges,
    McNemar,
    ScenarioEvidence,
    Share,
    WiderDraws,
)


def evidence_figures(found: Findings, evidence: Evidence) -> EvidenceFigures:
    """Return the figures over all scenarios."""
    references = None if found.references is None else found.references.test
    return EvidenceFigures(
        judges=Judges(
            count=len(evidence.judges),
            accuracy=_values(evidence.judges),
            reference_models=() if references is None else _values(references),
            classifier=defined(evidence.before_test),
            labelled=defined(evidence.labelled),
        ),
        purity=_share(evidence.purity),
        own_label=_four(evidence.own_label),
        one_label=_four(evidence.one_label),
        left_out=BeforeAfter(before=_share(evidence.left_out[0]), defuse=_share(evidence.left_out[1])),
        wider=tuple(
            WiderDraws(factor=factor, before=_share(row[0]), defuse=_share(row[1]))
            for factor, row in zip(WIDER, evidence.wider, strict=True)
        ),
        real_failures=_four(evidence.real_failures),
        real_failure_images=evidence.real_failure_images,
        mcnemar_plain=_mcnemar(evidence.mcnemar[0]),
        mcnemar_defuse=_mcnemar(evidence.mcnemar[1]),
        krippendorff=defined(evidence.krippendorff),
    )


def scenario_evidence(found: Findings, evidence: Evidence, column: int) -> ScenarioEvidence:
    """Return the figures of the accepted scenario at place `column` of the accepted ones."""
    support = found.scenarios.support
    number = int(found.fixes.scenario[column])
    right = dict(zip(CLASSIFIERS, map(defined, evidence.scenario_own_label[column]), strict=True))
    return ScenarioEvidence(
        name=evidence.names[column],
        purity=defined(evidence.scenario_purity[column]),
        before=right["before"],
        baseline=right["baseline"],
        plain=right["plain"],
        defuse=right["defuse"],
        left_out=defined(evidence.scenario_left_out[column]),
        confirmed=bool(evidence.confirmed[column]),
        at_fault=cast(Literal["classifier", "β-VAE", "unclear"], evidence.at_fault[column]),
        support=None if support is None else int(support[number]),
        real_error=defined(evidence.real.error[column]),
        real_error_of_all=defined(evidence.real.error_of_all),
        seen_in_real_data=bool(evidence.real.seen[column]),
    )


def defined(value: float | None) -> float | None:
    """Return the value, or None where it is missing, nan or infinite."""
    return None if value is None or not math.isfinite(value) else float(value)


def _values(values: F64) -> tuple[float | None, ...]:
    return tuple(defined(value) for value in values.tolist())


def _share(row: F64) -> Share:
    value, low, high = map(defined, row.tolist())
    return Share(value=value, low=low, high=high)


def _four(table: F64) -> FourShares:
    return FourShares(**{name: _share(row) for name, row in zip(CLASSIFIERS, table, strict=True)})


def _mcnemar(row: F64) -> McNemar | None:
    if not np.isfinite(row).all():
        return None
    return McNemar(gained=int(row[0]), lost=int(row[1]), p_value=float(row[2]))
