"""How a review stands: what is answered, what is missing, and what can no longer change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defuse_core.artifacts import F64, I64, Bool, Verdicts, Votes
from defuse_core.judge import judge, tally
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
        return len(self.samples.places) * self.samples.review.answers_per_task

    @property
    def given(self) -> int:
        return sum(len(answers) for answers in self.pulled.answers.values())

    @property
    def saved(self) -> int:
        """Answers that were asked for and that nobody has to give any more."""
        return self._short(self.decided)

    @property
    def open(self) -> int:
        """Answers that people still have to give."""
        return self._short(~self.decided)

    def _short(self, scenarios: Bool) -> int:
        asked = self.samples.review.answers_per_task
        chosen = (key for key, place in self.samples.places.items() if scenarios[place.scenario])
        return sum(asked - len(self.pulled.answers[key]) for key in chosen)

    def verdicts(self) -> Verdicts:
        """Return the verdicts that the votes so far amount to."""
        return judge(self.samples.gallery, self.votes, self.samples.review.rho)

    def per_annotator(self) -> dict[str, int]:
        """Return how many tasks each annotator answered."""
        counts = {self.names[person]: 0 for person in self.pulled.people()}
        for answer in (answer for answers in self.pulled.answers.values() for answer in answers):
            counts[self.names[answer.person]] += 1
        return counts

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
    if samples.review.stop_early:
        counts = tally(votes, (shape[0], shape[1]), len(samples.gallery.classes))
        cases = zip(counts, missing, samples.gallery.predicted, strict=True)
        settled = np.array([is_decided(*case, samples.review.rho) for case in cases], bool)
    return Standing(samples, pulled, names, votes, missing, above, settled)


def _votes(pulled: Pulled, samples: Samples, names: Mapping[int, str]) -> Votes:
    people = pulled.people()
    index = {person: number for number, person in enumerate(people)}
    rows = (
        (samples.places[key].scenario, image, index[answer.person], label, answer.when)
        for key, answers in pulled.answers.items()
        for answer in answers
        for image, label in answer.labels
    )
    table: F64 = np.fromiter(rows, np.dtype((np.float64, 5)))
    scenario, image, annotator, answer = table[:, :4].T.astype(np.int64)
    return Votes(
        scenario=scenario,
        image=image,
        annotator=annotator,
        answer=answer,
        when=table[:, 4].copy(),
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
