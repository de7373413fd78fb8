"""How a review stands: what is answered, what is missing, and what can no longer change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from defuse_core.artifacts import I64, Bool, Verdicts, Votes
from defuse_core.judge import false_discovery_rate, judge, tally
from services.labeling.answers import Pulled, Refusal
from services.labeling.early import is_decided
from services.labeling.record import Record
from services.labeling.tasks import Samples


@dataclass(frozen=True, eq=False)
class Standing:
    """The review at one moment."""

    samples: Samples
    pulled: Pulled
    names: Mapping[int, str]  # of annotators, by user id
    votes: Votes  # so far
    missing: I64  # (S, R) answers that were asked for and not given
    overridden: Bool  # (S,) a person decided above the vote
    settled: Bool  # (S,) stop_early, and no missing answer can change verdict or label

    @property
    def decided(self) -> Bool:
        """(S,) whether nobody needs to answer any more."""
        complete: Bool = self.missing.sum(axis=1) == 0
        return complete | self.overridden | self.settled

    @property
    def wanted(self) -> int:
        """Answers asked for in all, one per task and annotator."""
        return len(self.samples) * self.samples.review.answers_per_task

    @property
    def given(self) -> int:
        return len(self.pulled.answers)

    @cached_property
    def given_per_task(self) -> I64:
        """(T,) answers to each task."""
        return np.bincount(self.pulled.answers["task"], minlength=len(self.samples))

    @property
    def saved(self) -> int:
        """Answers that were asked for and that nobody has to give any more."""
        return self._short(self.decided)

    @property
    def open(self) -> int:
        """Answers that people still have to give."""
        return self._short(~self.decided)

    def _short(self, scenarios: Bool) -> int:
        short = self.samples.review.answers_per_task - self.given_per_task
        return int(short.reshape(len(scenarios), self.samples.per_scenario)[scenarios].sum())

    def verdicts(self) -> Verdicts:
        """Return the verdicts that the votes so far amount to."""
        review = self.samples.review
        rate = false_discovery_rate(review)
        return judge(self.samples.gallery, self.votes, review.rho, max_false=rate)

    def per_annotator(self) -> dict[str, int]:
        """Return how many tasks each annotator answered."""
        given = Counter(self.pulled.answers["person"].tolist())
        counts: Counter[str] = Counter()
        for person in self.pulled.people():
            counts[self.names[person]] += given[person]  # two people may have one name
        return dict(counts)

    def refusals(self) -> list[dict[str, Any]]:
        """Return the annotations that are not counted, one by one."""
        return [_described(refusal, self.names) for refusal in self.pulled.refused]

    def finished(self, record: Record) -> Votes:
        """Return the votes with what the report is to tell of them."""
        review = self.samples.review
        notes: dict[str, Any] = {
            "project": record.number,
            "form": review.form,
            "answers_wanted": self.wanted,
            "answers_given": self.given,
            "answers_saved": self.saved,
            "decided_early": np.flatnonzero(self.settled & (self.missing.sum(axis=1) > 0)).tolist(),
            "skips": self.pulled.skips,
            "refused_answers": self.refusals(),
        }
        if review.prelabel:
            notes["prelabel"] = "annotators saw the reference models' answer preselected, which biases a vote"
        answered_by = "reference models" if record.simulated else "people"
        return replace(self.votes, answered_by=answered_by, notes=notes)


def stand(samples: Samples, pulled: Pulled, names: Mapping[int, str], overridden: Iterable[int]) -> Standing:
    """Return how the review stands; `overridden` are the scenarios that a person decided above the vote."""
    shape = samples.gallery.predicted.shape
    votes = _votes(pulled, samples, names)
    given = np.zeros(shape, np.int64)
    np.add.at(given, (votes.scenario, votes.image), 1)
    missing = np.maximum(samples.review.answers_per_task - given, 0)
    above = np.isin(np.arange(len(samples.gallery)), list(overridden))
    settled: Bool = np.zeros(len(samples.gallery), bool)
    if samples.review.stop_early and samples.review.accept == "share":
        counts = tally(votes, (shape[0], shape[1]), len(samples.gallery.classes))
        cases = zip(counts, missing, samples.gallery.predicted, strict=True)
        settled = np.array([is_decided(*case, samples.review.rho) for case in cases], bool)
    return Standing(samples, pulled, names, votes, missing, above, settled)


def _votes(pulled: Pulled, samples: Samples, names: Mapping[int, str]) -> Votes:
    answers, people = pulled.answers, pulled.people()
    images = samples.gallery.predicted.shape[1]
    per_task = images // samples.per_scenario
    labels = np.array(pulled.labels, np.int64).reshape(-1, per_task)[answers["labels"]]  # (answers, per_task)
    scenario, image = np.divmod(answers["task"][:, None] * per_task + np.arange(per_task), images)
    by_number = np.argsort(people)
    annotator = by_number[np.searchsorted(people, answers["person"], sorter=by_number)]
    return Votes(
        scenario=scenario.ravel(),
        image=image.ravel(),
        annotator=np.repeat(annotator, per_task),
        answer=labels.ravel(),
        when=np.repeat(answers["when"], per_task),
        annotators=tuple(names[person] for person in people),
        answered_by="people",
        notes={},
    )


def _described(refusal: Refusal, names: Mapping[int, str]) -> dict[str, Any]:
    return {
        "scenario": refusal.place.scenario,
        "image": refusal.place.image,
        "annotator": names.get(refusal.person, "unknown"),
        "annotation": refusal.annotation,
        "why": refusal.why,
    }
