"""The status of a review: what is answered, what is missing, which verdicts are final, and what stays in the queue.

A verdict is final when no missing answer can change it or its label, except for a rejection that rests on tied labels.
A missing answer may turn out to be any class, none-of-the-above, or never come. The rules are those of
`defuse_core.review.verdicts`; the tests hold both against each other over all completions of small cases.

With review.consensus: crowdlab no further answer is asked for where CROWDLAB is sure of an image's label. Answers to
other images change how much an annotator counts, so an image that was sure can be asked about again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from defuse_core.artifacts import F32, I64, Bool, Override, Verdicts, Votes
from defuse_core.config import ReviewSection
from defuse_core.formatting import first_few
from defuse_core.review.verdicts import (
    Consensus,
    count_not_majority,
    crowdlab_consensus,
    decide_verdicts,
    stops_when_sure,
    tally,
)
from defuse_core.runs import Run
from services.labeling.annotations import (
    PSEUDONYMS,
    UNKNOWN,
    DiscardedAnnotation,
    PulledAnnotations,
    QueuedTask,
    SkippedTask,
)
from services.labeling.client import LabelStudioClient
from services.labeling.records import ProjectState
from services.labeling.tasks import ReviewTasks

log = logging.getLogger("defuse")

IMPOSSIBLE = 10**6  # beyond the score of any image: where it cannot have a label, or cannot lack one


@dataclass(frozen=True, eq=False)
class ReviewStatus:
    tasks: ReviewTasks
    pulled: PulledAnnotations
    state: ProjectState  # of the run's project
    names: Mapping[int, str]  # of annotators, by user id
    votes: Votes  # so far
    consensus: Consensus | None  # by CROWDLAB, where the run asks for it and its models' answers are stored
    sure: Bool  # (S, R) stop_early, and CROWDLAB is sure of the label
    missing: I64  # (S, R) answers that were requested and not given; 0 where the label is sure
    overrides: tuple[Override, ...]  # of the vote, oldest first
    final: Bool  # (S,) stop_early, and no missing answer can change verdict or label

    @cached_property
    def overridden(self) -> Bool:
        """(S,) whether a person overrode the vote."""
        return np.isin(np.arange(len(self.missing)), [override.scenario for override in self.overrides])

    @property
    def decided(self) -> Bool:
        """(S,) whether no more answers are needed."""
        complete: Bool = self.missing.sum(axis=1) == 0
        return complete | self.overridden | self.final

    @property
    def provisional(self) -> Bool:
        """(S,) whether nobody is asked further, and answers to other scenarios can still change the verdict.

        A false discovery rate is over all scenarios, and CROWDLAB's weights follow from all answers.
        """
        can_change = self.outstanding > 0 and not _are_independent(self.tasks.review)
        provisional: Bool = self.decided & ~self.overridden & can_change
        return provisional

    @property
    def requested(self) -> int:
        """Number of answers requested in all, one per task and annotator, with those given while more were asked."""
        return int(np.maximum(self.given_per_task, self.tasks.review.answers_per_task).sum())

    @property
    def given(self) -> int:
        """Number of answers that count."""
        return len(self.pulled.answers)

    @cached_property
    def given_per_task(self) -> I64:
        """(T,) answers to each task."""
        return np.bincount(self.pulled.answers["task"], minlength=len(self.tasks))

    @cached_property
    def missing_per_task(self) -> I64:
        """(S, T / S) answers that each task lacks: for a page, as many as the image that lacks most."""
        scenarios, images = self.missing.shape
        of_task = (scenarios, self.tasks.per_scenario, images // self.tasks.per_scenario)
        missing: I64 = self.missing.reshape(of_task).max(axis=2)
        return missing

    @cached_property
    def wanted_per_task(self) -> I64:
        """(T,) further answers that each task may need: none once its scenario is decided."""
        wanted: I64 = np.where(self.decided[:, None], 0, self.missing_per_task)
        return wanted.ravel()

    @property
    def saved(self) -> int:
        """Number of answers that were requested and are not needed any more."""
        return self.requested - self.given - self.outstanding

    @property
    def outstanding(self) -> int:
        """Number of answers that annotators still have to give; with CROWDLAB each can change it."""
        return int(self.wanted_per_task.sum())

    @property
    def stops_when_sure(self) -> bool:
        """Whether sure images are not asked about: the run file says so, and the models' answers are stored."""
        return stops_when_sure(self.tasks.review) and self.consensus is not None

    @property
    def not_majority(self) -> int:
        """Number of images that CROWDLAB labels otherwise than the majority of their votes, or whose tie it breaks."""
        if self.consensus is None:
            return 0
        return count_not_majority(self.consensus.labels, self.votes, len(self.tasks.gallery.classes))

    @property
    def still_wanted(self) -> str:
        """The number of outstanding answers, in words."""
        return f"{'about ' if self.stops_when_sure else ''}{self.outstanding:,} are still wanted"

    def verdicts(self) -> Verdicts:
        """Return the verdicts that follow from the votes so far, and from the decisions that override them.

        They are by majority where review.consensus: crowdlab lacks the reference models' answers, which the run makes.
        """
        review, gallery = self.tasks.review, self.tasks.gallery
        return decide_verdicts(review, gallery, self.votes, self.overrides, consensus=self.consensus)

    def per_annotator(self) -> dict[str, int]:
        """Return how many tasks each annotator answered, by name."""
        given = Counter(self.pulled.answers["annotator"].tolist())
        counts: Counter[str] = Counter()
        for annotator in self.pulled.annotators():
            counts[self.names[annotator]] += given[annotator]  # two annotators may have one name
        return dict(counts)

    def name_of(self, discarded: DiscardedAnnotation | SkippedTask) -> str:
        return self.names[discarded.annotator]

    def blocking_skips(self) -> list[SkippedTask]:
        """Return the skips of tasks that lack answers, and the unreadable answers there.

        Label Studio does not ask those annotators again.
        """
        both = (*self.pulled.skips, *self.pulled.unreadable)
        return [skip for skip in both if self.wanted_per_task[skip.index]]

    def way_out(self, run: Run) -> str:
        """Return how the review ends with fewer answers, where those who answered so far may not give the others.

        That is where none of them can, or where each task has more than half of its answers. Empty elsewhere.
        """
        asked, wanted = self.tasks.review.answers_per_task, self.wanted_per_task > 0
        fewest = int(self.given_per_task[wanted].min(initial=asked))
        if not wanted.any() or not fewest:
            return ""
        rows = zip(
            self.pulled.answers["annotator"].tolist(), self.pulled.answers["task"].tolist(), strict=True
        )
        skips = ((skip.annotator, skip.index) for skip in (*self.pulled.skips, *self.pulled.unreadable))
        done = Counter(annotator for annotator, task in {*rows, *skips} if wanted[task])
        able = (by for by in self.pulled.annotators() if by != UNKNOWN and done[by] < wanted.sum())
        left = [self.names[by] for by in able]
        if left and 2 * fewest <= asked:
            return ""  # they may well give the others
        fewer = f"--set review.answers_per_task={fewest}"
        command = f"`defuse run` with `{fewer}`"
        then = " (give it from then on, and end a waiting `defuse run --wait` first)"
        if self.tasks.gallery.failure is not None:  # of traffic
            push, status = run.command("review push", *fewer.split()), run.command("review status")
            command, then = f"`{push}`, then `{status}`,", ""
        return (
            f"of those who answered so far, {first_few(left) or 'nobody'} can still answer; if nobody else will, "
            f"{command} ends the review with fewer answers{then}"
        )

    def final_votes(self) -> Votes:
        """Return the votes with their notes: what the report shows, and who is who under real names."""
        review, state = self.tasks.review, self.state
        notes: dict[str, object] = {
            "project": state.number,
            "form": review.form,
            "answers_wanted": self.requested,
            "answers_given": self.given,
            "answers_saved": self.saved,
            "decided_early": np.flatnonzero(self.final & (self.missing.sum(axis=1) > 0)).tolist(),
            "skips": len(self.pulled.skips),
            "discarded_answers": [
                {
                    "scenario": discarded.subject.scenario,
                    "image": discarded.subject.image,  # None: the page of the whole scenario
                    "annotator": self.name_of(discarded),
                    "annotation": discarded.annotation,
                    "why": discarded.reason,
                }
                for discarded in self.pulled.discarded
            ],
        }
        if review.prelabel:
            notes["prelabel"] = "annotators saw the reference models' answer preselected, which biases a vote"
        if review.real_names:
            notes[PSEUDONYMS] = [state.pseudonym(annotator) for annotator in self.pulled.annotators()]
        answered_by = "reference models" if state.simulated else "people"
        return replace(self.votes, answered_by=answered_by, notes=notes)


def review_status(
    tasks: ReviewTasks,
    pulled: PulledAnnotations,
    state: ProjectState,
    names: Mapping[int, str],
    overrides: Sequence[Override],
    probabilities: F32 | None = None,
) -> ReviewStatus:
    """Return the status of the review; `overrides` are those of the vote, oldest first.

    `probabilities` (W, S, R, C) are those of the reference models, for review.consensus: crowdlab.
    """
    shape, votes = tasks.gallery.predicted.shape, _votes(pulled, tasks, names)
    given = np.zeros(shape, np.int64)
    np.add.at(given, (votes.scenario, votes.image), 1)
    review, sure = tasks.review, np.zeros(shape, bool)
    consensus = None
    if review.consensus == "crowdlab" and probabilities is not None:
        consensus = crowdlab_consensus(votes, probabilities)
    if consensus is not None and stops_when_sure(review):
        sure = consensus.sure(review.certainty)
    missing = np.where(sure, 0, np.maximum(review.answers_per_task - given, 0))
    final: Bool = np.zeros(len(tasks.gallery), bool)
    if review.stop_early and _are_independent(review):
        counts = tally(votes, (shape[0], shape[1]), len(tasks.gallery.classes))
        cases = zip(counts, missing, tasks.gallery.predicted, strict=True)
        final = np.array([verdict_is_final(*case, review.rho) for case in cases], bool)
    return ReviewStatus(tasks, pulled, state, names, votes, consensus, sure, missing, tuple(overrides), final)


def _are_independent(review: ReviewSection) -> bool:
    """Whether the verdict on a scenario follows from the answers to it alone."""
    return review.accept == "share" and review.consensus == "majority"


def _votes(pulled: PulledAnnotations, tasks: ReviewTasks, names: Mapping[int, str]) -> Votes:
    answers, annotators = pulled.answers, pulled.annotators()
    images = tasks.gallery.predicted.shape[1]
    per_task = images // tasks.per_scenario
    rows = np.array(pulled.labels, np.int64).reshape(-1, per_task)
    labels = rows[answers["labels_row"]]  # (answers, per_task)
    scenario, image = np.divmod(answers["task"][:, None] * per_task + np.arange(per_task), images)
    by_id = np.argsort(annotators)
    annotator = by_id[np.searchsorted(annotators, answers["annotator"], sorter=by_id)]
    return Votes(
        scenario=scenario.ravel(),
        image=image.ravel(),
        annotator=np.repeat(annotator, per_task),
        answer=labels.ravel(),
        when=np.repeat(answers["when"], per_task),
        annotators=tuple(names[annotator] for annotator in annotators),
        answered_by="people",
        notes={},
    )


def update_queue(client: LabelStudioClient, status: ReviewStatus) -> None:
    """Take decided tasks out of Label Studio's queue and put those back that lack answers.

    Label Studio itself knows of no decided scenarios. It calls a task that lacks answers done when one of its
    annotations was discarded, or when a changed answer opened a scenario again that had been decided.

    With review.consensus: crowdlab a task is open for its first answers, and then, if CROWDLAB is not sure of them, for
    all others at once. One at a time would save a little more, but the queue would be empty until the next pull, and
    Label Studio keeps a task for whoever opened it, for an hour or a day.
    """
    changes, seen = list[tuple[int, int, bool]](), np.zeros(len(status.tasks), bool)
    for queued in status.pulled.queue:
        overlap, labeled = _queue_target(status, queued, duplicate=bool(seen[queued.index]))
        seen[queued.index] = True
        if (overlap, labeled) != (queued.overlap, queued.labeled):
            changes.append((queued.task, overlap, labeled))
    if changes:  # logged first, since each takes a request
        log.info("review: taking tasks out of the queue or putting them back, %d in all", len(changes))
    for change in changes:
        client.set_overlap(*change)


def _queue_target(status: ReviewStatus, queued: QueuedTask, duplicate: bool) -> tuple[int, bool]:
    """Return the overlap that the task should have, and whether it should be out of the queue.

    `duplicate`: another task of the same image came before.
    """
    wanted = int(status.wanted_per_task[queued.index])
    if duplicate or not wanted:
        return (queued.overlap, True) if queued.labeled else (max(queued.submitted, 1), True)
    first = status.tasks.first_answers - int(status.given_per_task[queued.index])
    # Label Studio counts annotations that are discarded here, so the overlap grows by them.
    return queued.submitted + (first if first > 0 else wanted), False


def verdict_is_final(counts: I64, missing: I64, predicted: I64, rho: float) -> bool:
    """Return whether the verdict and label of one scenario are the same under every completion of its votes.

    counts: (R, C) votes per class so far, none-of-the-above left out. missing: (R,) answers that may still
    come. predicted: (R,). One exception, which would take assignment problems: a scenario that would stay rejected
    only because its labels are bound to be tied is not final.
    """
    least = _ratio_over(rho, len(counts))
    labels, unlabelled = reachable_labels(counts, missing)
    misclassified = np.arange(counts.shape[1]) != predicted[:, None]  # (R, C)
    # (R, C) its sum over the images is 0 or more where the share of misclassified ones is `least` or more
    score = np.where(misclassified, least.denominator - least.numerator, -least.numerator)
    highest = np.where(labels, score, -IMPOSSIBLE).max(axis=1)
    most = np.maximum(highest, np.where(unlabelled, 0, -IMPOSSIBLE)).sum()
    if most < 0 or not (labels & misclassified).any():
        return True  # the share of misclassified ones is too low in every completion
    return _always_accepted(labels, unlabelled, score)


def reachable_labels(counts: I64, missing: I64) -> tuple[Bool, Bool]:
    """Return which classes (R, C) each image can still end with, and (R,) whether it can end without one."""
    # the padding replaces the second class where C = 1
    ranked = np.sort(np.pad(counts, ((0, 0), (1, 0))), axis=1)
    first, second = ranked[:, -1:], ranked[:, -2:-1]
    others = np.where((counts == first) & ((counts == first).sum(axis=1, keepdims=True) == 1), second, first)
    labels = counts + missing[:, None] > others
    gap = (first - second)[:, 0]
    unlabelled = (gap == 0) | ((gap <= missing) & (counts.shape[1] > 1))
    return labels, unlabelled


def _always_accepted(labels: Bool, unlabelled: Bool, score: I64) -> bool:
    """Whether every completion accepts the scenario, and under one label."""
    lowest = np.where(labels, score, IMPOSSIBLE).min(axis=1)
    if np.minimum(lowest, np.where(unlabelled, 0, IMPOSSIBLE)).sum() < 0:
        return False
    return any(_always_leads(labels, unlabelled, label) for label in np.flatnonzero(labels.any(axis=0)))


def _always_leads(labels: Bool, unlabelled: Bool, label: int) -> bool:
    """Whether `label` has more images than any other class in every completion."""
    only = labels[:, label] & ~unlabelled & (labels.sum(axis=1) == 1)
    margin = only.astype(int)[:, None] - labels  # (R, C) an image for another class counts against
    margin[:, label] = 1
    return bool((margin.sum(axis=0) > 0).all())


def _ratio_over(rho: float, images: int) -> Fraction:
    """Return the least share w/k of at most so many images that is more than rho, which is below 1.

    The shares are compared as the floats that decide_verdicts() compares.
    """
    return min(Fraction(w, k) for k in range(1, images + 1) for w in range(k + 1) if w / k > rho)
