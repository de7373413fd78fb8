"""LabelStudioAnnotators: people answer, in a Label Studio project of the run's own.

Reviews of inputs that a server received, and that were in a failure scenario of its run, are reviews of their own:

    <run>/traffic-1/     run.yaml, the Gallery of inputs, the state of the project, votes and verdicts

People can still answer once the votes are stored: `answer_changes` counts what they gave, changed and deleted since.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from time import monotonic, sleep
from typing import TYPE_CHECKING, TypeAlias

from defuse_core.artifacts import F32, Gallery, Verdicts, Votes
from defuse_core.config import STEPS
from defuse_core.errors import InputError, LabelsPending, ServiceError, StoreError
from defuse_core.review.overrides import read_overrides
from defuse_core.review.verdicts import review_verdicts, stops_when_sure
from defuse_core.runs import Run
from defuse_core.store import Store
from defuse_core.training.reference_models import Prelabels, ask_models_once
from services.labeling.annotations import PulledAnnotations, read_annotations, read_authors, store_authors
from services.labeling.client import LabelStudioClient
from services.labeling.local_server import running_server
from services.labeling.project import ReviewProject
from services.labeling.state import ProjectState, read_state, update_state
from services.labeling.status import ReviewStatus, review_status, update_queue
from services.labeling.tasks import ReviewTasks, prelabels_by_task, warn_of_large_pictures
from services.settings import Settings

if TYPE_CHECKING:
    from defuse_core.protocols import Compute

log = logging.getLogger("defuse")
Answers: TypeAlias = tuple[tuple[int, int], ...]  # of one annotator to one task: images by row, and classes
# after which Label Studio gets this process's credentials again: those of a role may have 10 minutes left
RENEWAL_S = 600
PAUSE_PER_PULL = 9  # so that waiting for people takes the server a tenth of its time at most


def connect(settings: Settings) -> LabelStudioClient:
    """Return a client of the server in LABEL_STUDIO_URL, else of the local server if it runs. Raises InputError."""
    if settings.label_studio_url is None:
        local = running_server(settings.cache)
        if local is None:
            raise InputError(
                "no Label Studio: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or start one here with "
                "`defuse label-studio up`"
            )
        return LabelStudioClient(local.address, local.token)
    if settings.label_studio_api_key is None:
        raise InputError(
            "LABEL_STUDIO_URL is set, LABEL_STUDIO_API_KEY is not; set it to an administrator's token"
        )
    return LabelStudioClient(
        settings.label_studio_url, settings.label_studio_api_key, public_address=settings.label_studio_host
    )


class LabelStudioAnnotators:
    """The protocol `Annotators`, answered by people."""

    first_pause_s, longest_pause_s = 5.0, 60.0  # between two pulls while waiting
    pull_s = 0.0  # seconds that the last pull took
    renewed_s = 0.0  # when Label Studio last got this process's credentials, of time.monotonic

    def __init__(
        self, run: Run, settings: Settings, compute: Compute | None = None, wait: bool = False
    ) -> None:
        self.run, self.settings, self.compute, self.wait = run, settings, compute, wait
        if STEPS.index(run.until) >= STEPS.index("review") and not run.store.exists("votes.safetensors"):
            self.client.check_access()  # now, not after an hour of training
            if not run.store.exists("gallery.safetensors"):
                warn_of_large_pictures(run)

    @cached_property
    def client(self) -> LabelStudioClient:
        """The connection to the server; a run that has its votes needs none."""
        return connect(self.settings)

    def review(self, gallery: Gallery) -> Votes:
        """Return all answers, once each image has as many as requested, is sure, or its scenario is decided.

        Raises LabelsPending before that; with `wait`, polls the server instead, less often while nothing changes.
        """
        if stops_when_sure(self.run.spec.review):
            self._probabilities(gallery)  # stored, also for `defuse review status`
        state = self.push(gallery)
        status, state = self._pull(gallery, state)
        while status.outstanding:
            if not self.wait:
                raise LabelsPending(f"{self._pending(status, state)}, then give the same command again")
            log.info("%s", self._pending(status, state))
            status, state = self._poll(gallery, state, status.given)
        self.push(gallery)  # raises if the project was edited in the meantime
        log.info("review: all answers are in; %d were not needed any more", status.saved)
        return status.final_votes(state)

    def push(self, gallery: Gallery, repair: bool = False) -> ProjectState:
        """Create or complete the run's project, and return its state."""
        tasks, prelabels = self._tasks(gallery), None
        if self.run.spec.review.prelabel:
            prelabels = prelabels_by_task(tasks, self._probabilities(gallery))
        project = ReviewProject(
            self.client,
            self.run,
            tasks,
            access=self.settings.label_studio_s3,
            prelabels=prelabels,
            repair=repair,
        )
        state = project.push()
        self.renewed_s = monotonic()
        return state

    def status(self, gallery: Gallery) -> tuple[ReviewStatus, ProjectState]:
        """Return the status of the review; until its votes are stored, decided scenarios leave the queue.

        Raises InputError before a push.
        """
        state = read_state(self.run.store, gallery)
        if state.project is None:
            raise InputError(
                f"run {self.run.name} was not pushed yet; `defuse review push {self.run.name}` does"
            )
        return self._pull(gallery, state)

    def _pull(self, gallery: Gallery, state: ProjectState) -> tuple[ReviewStatus, ProjectState]:
        """Return the status now, and the state, which numbers all annotators."""
        started = monotonic()
        tasks, authors = self._tasks(gallery), read_authors(self.run.store)
        pulled = read_annotations(ReviewProject(self.client, self.run, tasks).pull(), tasks, authors)
        store_authors(self.run.store, authors, pulled)
        annotators = pulled.annotators()
        # numbered in the state that the store has now: other commands may have changed it
        state = update_state(self.run.store, state, lambda known: known.with_annotators(annotators))
        crowdlab = self.run.spec.review.consensus == "crowdlab"
        stored = self.run.load(Prelabels) if crowdlab else None
        status = review_status(
            tasks,
            pulled,
            self._names(pulled, state),
            read_overrides(self.run.store),
            None if stored is None else stored.probabilities,
        )
        if not self.run.store.exists("votes.safetensors"):  # a closed review asks nobody any more
            update_queue(self.client, status)
        self.pull_s = monotonic() - started
        return status, state

    def _poll(self, gallery: Gallery, state: ProjectState, given: int) -> tuple[ReviewStatus, ProjectState]:
        """Return the next status with another number of answers than `given`, and the state.

        A server that cannot be reached for a while is waited for.
        """
        pause_s, is_out = self.first_pause_s, False
        while True:
            sleep(max(pause_s, self.pull_s * PAUSE_PER_PULL))
            pause_s = min(pause_s * 1.5, self.longest_pause_s)
            try:
                self._renew_credentials(gallery)
                status, state = self._pull(gallery, state)
            except ServiceError as failure:
                log.warning("review: %s", failure)
                is_out = True
                continue
            if is_out:
                log.info("review: Label Studio answers again")
                is_out = False
            if status.given != given or not status.outstanding:
                return status, state

    def _renew_credentials(self, gallery: Gallery) -> None:
        """Give Label Studio shared credentials again after RENEWAL_S; where that fails, the next poll tries again."""
        access = self.settings.label_studio_s3
        if not access.share_own or monotonic() - self.renewed_s <= RENEWAL_S:
            return
        try:
            ReviewProject(self.client, self.run, self._tasks(gallery), access=access).renew_credentials()
            self.renewed_s = monotonic()
        except (InputError, ServiceError, StoreError) as failure:
            log.warning("review: the credentials for the pictures are not renewed, trying again: %s", failure)

    def _pending(self, status: ReviewStatus, state: ProjectState) -> str:
        decided, skips, way_out = int(status.decided.sum()), len(status.blocking_skips()), status.way_out()
        return (
            f"waiting for people: {status.given} answers are in and {status.still_wanted}, "
            f"{decided} of {len(status.decided)} scenarios are decided; "
            + (
                f"{skips} were skipped or are not readable, see `defuse review status {self.run.name}`; "
                if skips
                else ""
            )
            + (f"{way_out}; " if way_out else "")
            + f"label at {self.client.labeling_url(state.number)}"
        )

    def _names(self, pulled: PulledAnnotations, state: ProjectState) -> dict[int, str]:
        """Return the annotators' names in the run, by user id; `state` numbers them."""
        pseudonyms = {annotator: state.pseudonym(annotator) for annotator in pulled.annotators()}
        if not self.run.spec.review.real_names:
            return pseudonyms
        names = self.client.user_names()
        return {
            annotator: names.get(annotator, f"deleted account ({pseudonym})")
            for annotator, pseudonym in pseudonyms.items()
        }

    def _tasks(self, gallery: Gallery) -> ReviewTasks:
        return ReviewTasks(gallery, self.run.spec.review, self.run.store)

    def _probabilities(self, gallery: Gallery) -> F32:
        """Return the reference models' probabilities on the gallery, (W, S, R, C), which the run stores."""
        compute = self.compute
        if compute is None:  # `defuse review push`, outside `defuse run`
            from defuse_core.local import LocalCompute
            from defuse_core.training.precision import resolve_precision

            compute = LocalCompute()
            resolve_precision(self.run, compute)
        return ask_models_once(self.run, compute, gallery)


def traffic_reviews(store: Store, run: str) -> list[str]:
    """Return the names of the run's reviews of traffic, oldest first: mnist/traffic-1, mnist/traffic-2, ..."""
    folder = store.within(run)
    found = (re.match(r"traffic-(\d+)/gallery\.safetensors$", key) for key in folder.list("traffic-"))
    return [f"{run}/traffic-{number}" for number in sorted(int(match[1]) for match in found if match)]


def open_traffic_review(store: Store, run: Run) -> Run:
    """Return the review of traffic that is not finished yet, or a new one of inputs that no review has shown.

    Raises InputError if no scenario has as many such inputs as run.spec.review.images, or if they are not of this run.
    """
    from services.serving.traffic import new_inputs, read_traffic, traffic_gallery

    known = [Run.open(store, name) for name in traffic_reviews(store, run.name)]
    if known and known[-1].load(Votes) is None:
        return known[-1]
    shown = {
        image.tobytes()
        for review in known
        for scenario in review.require(Gallery).images
        for image in scenario
    }
    drawn, wanted = run.require(Gallery), run.spec.review.images
    traffic = read_traffic(store, run.name, drawn)
    new = new_inputs(traffic, shown)
    newest = {scenario: inputs[-wanted:] for scenario, inputs in new.items() if len(inputs) >= wanted}
    if not newest:
        raise InputError(
            f"no scenario of run {run.name} has {wanted} inputs that were not reviewed yet, of {len(traffic)} kept; "
            "serve it with a larger `serve.reservoir`, or wait for more traffic"
        )
    if len(new) > len(newest):
        log.info(
            "review: left out %d of %d scenarios, which have fewer than %d inputs that no review has shown",
            len(new) - len(newest),
            len(new),
            wanted,
        )
    versions = {sampled.version for inputs in newest.values() for sampled in inputs}
    if len(versions) > 1:
        in_order = sorted(versions, key=lambda version: (len(version), version))
        log.info("review: inputs of versions %s are counted together", ", ".join(in_order))
    # Every input is asked about, not only as many as a verdict needs: it measures the served model.
    spec = run.spec.with_fields(
        "review",
        annotators="label-studio",
        prelabel=False,
        stop_early=False,
        accept="share",  # a report on the served model, not a decision about a scenario
        consensus="majority",
    )
    number = int(known[-1].name.rpartition("-")[2]) + 1 if known else 1
    review = Run.start(store, f"{run.name}/traffic-{number}", spec)
    review.once("draw", Gallery, lambda: traffic_gallery(newest, drawn.classes))
    return review


def store_traffic_verdicts(review: Run, votes: Votes) -> Verdicts:
    """Store the votes of a review of traffic, once all answers are in, and the verdicts that follow from them."""
    section, gallery = review.spec.review, review.require(Gallery)
    with review.store.lock():
        stored = review.once("review", Votes, lambda: votes)
        return review.once("review", Verdicts, lambda: review_verdicts(section, gallery, stored))


@dataclass(frozen=True)
class AnswerChanges:
    """How many answers were added, changed and deleted after the votes were stored."""

    added: int = 0
    changed: int = 0
    deleted: int = 0

    def __str__(self) -> str:
        counts = {"given": self.added, "changed": self.changed, "deleted": self.deleted}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def answer_changes(tasks: ReviewTasks, before: Votes, now: Votes) -> AnswerChanges:
    """Return how the answers of `now` differ from those of `before`, by task and annotator.

    With review.real_names an account that was renamed or deleted since then has another name: equal answers to a task
    under a name that was not there before and under one that is not there any more are then the same ones.
    """
    old, new = _by_task(tasks, before), _by_task(tasks, now)
    changed = sum(new[key] != answers for key, answers in old.items() if key in new)
    added, deleted, renamed = new.keys() - old.keys(), old.keys() - new.keys(), 0
    if tasks.review.real_names:
        names_before, names_now = {name for _, name in old}, {name for _, name in new}
        came = Counter(new[key] for key in added if key[1] not in names_before)
        gone = Counter(old[key] for key in deleted if key[1] not in names_now)
        renamed = (came & gone).total()
    return AnswerChanges(len(added) - renamed, changed, len(deleted) - renamed)


def _by_task(tasks: ReviewTasks, votes: Votes) -> dict[tuple[int, str], Answers]:
    """Return the answers by task and annotator's name."""
    images = tasks.gallery.predicted.shape[1]
    position = votes.scenario * images + votes.image
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    columns = (position.tolist(), votes.annotator.tolist(), votes.answer.tolist())
    for row, annotator, answer in zip(*columns, strict=True):
        task = row // (images // tasks.per_scenario)
        found.setdefault((task, votes.annotators[annotator]), []).append((row, answer))
    return {key: tuple(sorted(answers)) for key, answers in found.items()}
