"""review.tau: auto: how widely each component may be drawn and still be pure and misclassified."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from defuse_core.artifacts import F64, I64, NONE_OF_THE_ABOVE, Scenarios
from defuse_core.config import RunFile
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import Draws, failure_rows, smoothed, truncated_codes
from defuse_core.formatting import percent
from defuse_core.intervals import wilson_lower
from defuse_core.protocols import Compute, Progress, map_in_tasks
from defuse_core.review.sample import Examiner
from defuse_core.review.verdicts import most_common
from defuse_core.seeds import generator

log = logging.getLogger("defuse")
Examine = Callable[[Draws], tuple[I64, I64]]
TAUS = tuple(2.0**-step for step in range(7))  # the widest first
DRAWS = 64  # per component and tau


def tighten(examiner: Examiner, compute: Compute) -> Scenarios:
    """Return the examiner's components with a tau each; those that fail the requirements at every tau are dropped."""
    found = map_in_tasks(compute, "distill", len(examiner.scenarios), _search_taus, examiner)
    return with_taus(examiner.spec, examiner.scenarios, found)


def _search_taus(examiner: Examiner, components: range, *, progress: Progress) -> list[FoundTau]:
    with cpu_threads(1):
        return find_taus(examiner.spec, examiner.scenarios, components, examiner.unanimous, progress)


def find_taus(
    spec: RunFile, scenarios: Scenarios, components: range, examine: Examine, progress: Progress
) -> list[FoundTau]:
    """Return the largest tau of each of some components, for any `examine`: n draws -> answers and labels, each (n,).

    Required are lower bounds (95 %): of the share of draws with one label, review.purity; of the share of labelled
    draws that the classifier gets wrong, review.failing.
    """
    found = []
    progress("tightening components", 0, len(scenarios), "components")
    for done, component in enumerate(components, 1):
        found.append(_Search(spec, examine, scenarios, component).largest_tau())
        progress("tightening components", done, len(scenarios), "components")
    return found


def with_taus(spec: RunFile, scenarios: Scenarios, found: Sequence[FoundTau]) -> Scenarios:
    """Return the components that have a tau, with it; the others become dropped ones."""
    dropped = [
        scenarios.dropped_component(component, "right" if each.right else "unclear", each.last.reason(spec))
        for component, each in enumerate(found)
        if each.tau is None
    ]
    kept = np.array([number for number, each in enumerate(found) if each.tau is not None], np.int64)
    taus = np.array([each.tau for each in found if each.tau is not None], np.float64)
    if len(scenarios):
        log.info("%d of %d components are pure and misclassified at some τ", len(kept), len(scenarios))
    return scenarios.take(kept, taus=taus, dropped=(*scenarios.dropped, *dropped))


@dataclass(frozen=True)
class _Outcome:
    """What the draws of one component at one tau show."""

    of_label: int  # draws with the component's label
    labelled: int
    wrong: int  # labelled draws that the classifier gets wrong
    draws: int = DRAWS

    @property
    def purity_bound(self) -> float:
        """Lower bound of the share of draws with the component's label."""
        return _bound(self.of_label, self.draws)

    @property
    def failing_bound(self) -> float:
        """Lower bound of the share of labelled draws that the classifier gets wrong."""
        return _bound(self.wrong, self.labelled)

    def passes(self, spec: RunFile) -> bool:
        """Whether the draws are pure and misclassified: review.purity, review.failing and review.rho."""
        review, failing = spec.review, self.failing_bound
        return self.purity_bound >= review.purity and failing >= review.failing and failing > review.rho

    def reason(self, spec: RunFile) -> str:
        """Return which requirement the draws at the smallest tau do not meet."""
        review = spec.review
        if self.purity_bound < review.purity:
            found = f"{self.of_label} of {self.draws} draws have one label"
            bound, least = self.purity_bound, review.purity
        else:
            found = f"f is wrong on {self.wrong} of {self.labelled} labelled draws"
            bound, least = self.failing_bound, max(review.failing, review.rho)
        known = f"at least {percent(bound, 0)} (95 % confidence)"
        return f"at τ = {TAUS[-1]:g} {found}: {known}, and {percent(least, 0)} are required"


def _bound(hits: int, total: int) -> float:
    return float(wilson_lower(np.array([hits]), np.array([total]))[0])


class FoundTau(NamedTuple):
    """What the search for the largest tau of one component found."""

    tau: float | None  # the largest that passes; None where none does
    last: _Outcome  # at the last one tried
    # pure at the last one tried, and f is wrong on no more than rho of the labelled draws wherever it is pure
    right: bool = False


class _Search:
    """The search for the largest tau of one component. The same normal draws serve every tau."""

    def __init__(self, spec: RunFile, examine: Examine, scenarios: Scenarios, component: int) -> None:
        self.spec, self.examine, self.scenarios, self.component = spec, examine, scenarios, component
        rng = generator(spec.seed, "tighten", component)
        self.normal: F64 = rng.standard_normal((DRAWS, scenarios.means.shape[1]))
        self.failures: I64 | None = None
        if scenarios.failures is not None:
            self.failures = failure_rows(scenarios.failures, component, DRAWS, rng, held_out=False)

    def largest_tau(self) -> FoundTau:
        """Return the largest tau that passes, if any does, and the outcome at the last one tried.

        All are tried, since the share that the classifier gets wrong may fall towards the mean.
        """
        review, pure_ones = self.spec.review, list[_Outcome]()
        for tau in TAUS:
            outcome = self._outcome(tau)
            if outcome.passes(self.spec):
                return FoundTau(tau, outcome)
            if outcome.purity_bound >= review.purity:
                pure_ones.append(outcome)
        right = outcome in pure_ones and all(one.wrong <= review.rho * one.labelled for one in pure_ones)
        return FoundTau(None, outcome, right)

    def _outcome(self, tau: float) -> _Outcome:
        predicted, labels = self.examine(self._draws(tau))
        label = most_common(labels)
        labelled = labels != NONE_OF_THE_ABOVE
        of_label = 0 if label is None else int((labels == label).sum())
        return _Outcome(of_label, int(labelled.sum()), int((labelled & (labels != predicted)).sum()))

    def _draws(self, tau: float) -> Draws:
        scenarios, component = self.scenarios, self.component
        if self.failures is not None:
            return smoothed(scenarios, component, self.failures, tau, self.normal, truncated=True)
        covariance = tau * scenarios.covariances[component]
        return Draws(truncated_codes(scenarios.means[component], covariance, self.normal))
