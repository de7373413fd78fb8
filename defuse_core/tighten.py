"""`review.tau: auto`: draw each component as widely as it stays pure, and drop it where it is impure at its mean.

Components are judged by the reference models alone, before anybody reviews them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    DroppedComponent,
    Models,
    ReferenceSet,
    Scenarios,
)
from defuse_core.config import RunFile
from defuse_core.device import cpu_threads
from defuse_core.intervals import lower_bound
from defuse_core.progress import Progress
from defuse_core.sample import Examiner, truncated_codes
from defuse_core.seeds import generator
from defuse_core.verdicts import most_common

log = logging.getLogger("defuse")
Examine = Callable[[F32], tuple[I64, I64]]
TAUS = tuple(2.0**-step for step in range(7))  # the widest first
DRAWS = 64  # per component and tau


def tighten(
    spec: RunFile, models: Models, references: ReferenceSet, scenarios: Scenarios, *, progress: Progress
) -> Scenarios:
    """Return the components with a tau each; those that fail the requirements at every tau are dropped."""
    with cpu_threads(1):
        examiner = Examiner(spec, models, references)
        return find_taus(spec, scenarios, examiner.examine, progress)


def find_taus(spec: RunFile, scenarios: Scenarios, examine: Examine, progress: Progress) -> Scenarios:
    """Return what `tighten` does, for any `examine`: codes (n, Z) -> answers of f and reference labels, each (n,).

    Required are lower bounds (95 %): of the share of draws with one label, review.purity; of the share of labelled
    draws that the classifier gets wrong, review.rho.
    """
    taus, dropped = np.zeros(len(scenarios)), list(scenarios.dropped)
    for component in range(len(scenarios)):
        progress("tightening components", component, len(scenarios), "components")
        search = _Search(spec, examine, scenarios, component)
        tau, narrowest = search.largest_tau()
        if tau is None:
            dropped.append(_dropped(scenarios, component, narrowest.reason(spec)))
        else:
            taus[component] = tau
    kept = np.flatnonzero(taus > 0)
    log.info("%d of %d components are pure and misclassified at some tau", len(kept), len(scenarios))
    return scenarios.take(kept, taus=taus[kept], dropped=tuple(dropped))


@dataclass(frozen=True)
class _Outcome:
    """What the draws of one component at one tau show."""

    pure: int  # draws with the component's label
    labelled: int
    wrong: int  # labelled draws that the classifier gets wrong
    draws: int = DRAWS

    def passes(self, spec: RunFile) -> bool:
        return self._is_pure(spec) and _bound(self.wrong, self.labelled) > spec.review.rho

    def _is_pure(self, spec: RunFile) -> bool:
        return _bound(self.pure, self.draws) >= spec.review.purity

    def reason(self, spec: RunFile) -> str:
        if not self._is_pure(spec):
            return f"at its mean {self.pure} of {self.draws} draws have one label, too few for {spec.review.purity:.0%}"
        return f"at its mean f is wrong on {self.wrong} of {self.labelled} draws, too few for {spec.review.rho:.0%}"


def _bound(hits: int, total: int) -> float:
    return float(lower_bound(np.array([hits]), np.array([total]))[0])


class _Search:
    """The search for the largest tau of one component. The same normal draws serve every tau."""

    def __init__(self, spec: RunFile, examine: Examine, scenarios: Scenarios, component: int) -> None:
        self.spec, self.examine = spec, examine
        self.mean, self.covariance = scenarios.means[component], scenarios.covariances[component]
        rng = generator(spec.seed, "tighten", component)
        self.normal: F64 = rng.standard_normal((DRAWS, len(self.mean)))

    def largest_tau(self) -> tuple[float | None, _Outcome]:
        """Return the largest tau that passes, if any does, and the outcome at the last one tried.

        All are tried, since the share that the classifier gets wrong may fall towards the mean.
        """
        for tau in TAUS:
            outcome = self._outcome(tau)
            if outcome.passes(self.spec):
                return tau, outcome
        return None, outcome

    def _outcome(self, tau: float) -> _Outcome:
        codes: F32 = truncated_codes(self.mean, tau * self.covariance, self.normal)
        predicted, labels = self.examine(codes)
        label = most_common(labels)
        labelled = labels != NONE_OF_THE_ABOVE
        pure = 0 if label is None else int((labels == label).sum())
        return _Outcome(pure, int(labelled.sum()), int((labelled & (labels != predicted)).sum()))


def _dropped(scenarios: Scenarios, component: int, reason: str) -> DroppedComponent:
    cells, support = scenarios.cells, scenarios.support
    none = NONE_OF_THE_ABOVE
    source, answer = (none, none) if cells is None else (int(cells[component, 0]), int(cells[component, 1]))
    images = 0 if support is None else int(support[component])
    return DroppedComponent(float(scenarios.weights[component]), source, answer, images, reason)
