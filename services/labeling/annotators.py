"""LabelStudioAnnotators: people answer, in a Label Studio project of the run's own."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cached_property
from time import monotonic, sleep
from typing import TYPE_CHECKING

import numpy as np

from defuse_core.artifacts import F32, Gallery, Votes
from defuse_core.errors import (
    DamagedError,
    InputError,
    LabelsPending,
    ServiceError,
    StoreError,
    StoreSettingsError,
)
from defuse_core.formatting import count_of
from defuse_core.review.overrides import read_overrides
from defuse_core.review.verdicts import stops_when_sure
from defuse_core.runs import Run
from defuse_core.steps import STEPS
from defuse_core.training.reference_models import Prelabels, ask_models_once
from services.labeling.annotations import PulledAnnotations, read_annotations, read_authors, store_authors
from services.labeling.client import LabelStudioClient, PageError
from services.labeling.local_server import running_server
from services.labeling.project import ReviewProject
from services.labeling.records import STATE_KEY, ProjectState, read_state, update_state
from services.labeling.status import ReviewStatus, review_status, update_queue
from services.labeling.tasks import ReviewTasks, prelabels_by_task
from services.settings import Environment

if TYPE_CHECKING:
    from defuse_core.protocols import Compute

log = logging.getLogger("defuse")
# without the store, after which waiting ends: the credentials of this process may have expired
STORE_OUTAGE_S = 3600
PAUSE_PER_PULL = 9  # so that waiting for people takes the server a tenth of its time at most


def connect(environment: Environment) -> LabelStudioClient:
    """Return a client of the server in LABEL_STUDIO_URL, else of the local server if it runs. Raises InputError."""
    if environment.label_studio_url is None:
        local = running_server(environment.cache)
        if local is None:
            raise InputError(
                "no Label Studio: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or start one here with "
                "`defuse label-studio up`"
            )
        return LabelStudioClient(local.address, local.token)
    if environment.label_studio_api_key is None:
        raise InputError(
            "LABEL_STUDIO_URL is set, LABEL_STUDIO_API_KEY is not; set it to an administrator's token"
        )
    return LabelStudioClient(
        environment.label_studio_url,
        environment.label_studio_api_key,
        public_address=environment.label_studio_host,
    )


class LabelStudioAnnotators:
    """The protocol `Annotators`, answered by people."""

    first_pause_s, longest_pause_s = 5.0, 60.0  # between two pulls while waiting
    pull_s = 0.0  # seconds that the last pull took
    lost_before = 0  # answers of earlier pulls that the last one lacked

    def __init__(
        self, run: Run, environment: Environment, compute: Compute | None = None, wait: bool = False
    ) -> None:
        self.run, self.environment, self.compute, self.wait = run, environment, compute, wait
        if STEPS.index(run.until) >= STEPS.index("review") and not run.store.exists("votes.safetensors"):
            # now, not after an hour of training
            self.client.check_access(to_create=not run.store.exists(STATE_KEY))

    @cached_property
    def client(self) -> LabelStudioClient:
        """The connection to the server; a run that has its votes needs none."""
        return connect(self.environment)

    def review(self, gallery: Gallery) -> Votes:
        """Return all answers, once each image has as many as requested, is sure, or its scenario is decided.

        Raises LabelsPending before that; with `wait`, polls the server instead, less often while nothing changes.
        Nobody is asked about a gallery without a scenario.
        """
        if not len(gallery):
            nothing = np.zeros(0, np.int64)
            return Votes(nothing, nothing, nothing, nothing, np.zeros(0), (), answered_by="people", notes={})
        if stops_when_sure(self.run.spec.review):
            self._probabilities(gallery)  # stored, also for `defuse review status`
        status = self._checked_pull(gallery, self.push(gallery))
        while status.outstanding:
            if not self.wait:
                raise LabelsPending(f"{self._pending(status)}, then give the same command again")
            log.info("%s", self._pending(status))
            status = self._poll(gallery, status)
        log.info("review: all answers are in; %d were not needed any more", status.saved)
        return status.final_votes()

    def push(self, gallery: Gallery, repair: bool = False) -> ProjectState:
        """Create or complete the run's project, and return its state. Raises InputError without a scenario to label."""
        if not len(gallery):
            raise InputError(f"run {self.run.name} has no candidate scenario, so there is nothing to label")
        tasks, prelabels = self._tasks(gallery), None
        if self.run.spec.review.prelabel:
            prelabels = prelabels_by_task(tasks, self._probabilities(gallery))
        return ReviewProject(self.client, self.run, tasks, prelabels=prelabels, repair=repair).push()

    def status(self, gallery: Gallery) -> ReviewStatus:
        """Return the status of the review; until its votes are stored, decided scenarios leave the queue.

        Raises InputError before a push.
        """
        state = read_state(self.run.store, gallery)
        if state.project is None:
            raise InputError(
                f"run {self.run.name} was not pushed yet; `{self.run.command('review push')}` does"
            )
        return self._pull(gallery, state)

    def _pull(self, gallery: Gallery, state: ProjectState) -> ReviewStatus:
        """Return the status now; its state numbers all annotators."""
        started = monotonic()
        tasks = self._tasks(gallery)
        listed = ReviewProject(self.client, self.run, tasks).pull()
        # after pull(), which deletes those of a project that has another number now
        authors = read_authors(self.run.store)
        pulled = read_annotations(listed, tasks, authors, most_asked=state.most_asked)
        is_open = not self.run.store.exists("votes.safetensors")  # a closed review asks nobody any more
        lost = pulled.missing_since(authors) if is_open else Counter[int]()
        annotators = (*pulled.annotators(), *lost)
        # numbered in the state that the store has now: other commands may have changed it
        state = update_state(self.run.store, state, lambda known: known.with_annotators(annotators))
        # after that, which raises for a run that was deleted meanwhile
        store_authors(self.run.store, authors, pulled)
        crowdlab = self.run.spec.review.consensus == "crowdlab"
        stored = self.run.load(Prelabels) if crowdlab else None
        status = review_status(
            tasks,
            pulled,
            state,
            self._names(pulled, state),
            read_overrides(self.run.store),
            None if stored is None else stored.probabilities,
        )
        if is_open:
            self._warn_of_lost(lost, state)
            update_queue(self.client, status)
        self.pull_s = monotonic() - started
        return status

    def _checked_pull(self, gallery: Gallery, state: ProjectState) -> ReviewStatus:
        """Return the status now. Raises InputError if the project was edited before the last answer."""
        status = self._pull(gallery, state)
        if not status.outstanding:
            for _ in ReviewProject(self.client, self.run, self._tasks(gallery)).pull():
                pass
        return status

    def _warn_of_lost(self, lost: Counter[int], state: ProjectState) -> None:
        """Warn where more answers are lost than at the last pull."""
        if lost.total() > self.lost_before:
            by = ", ".join(
                f"{state.pseudonym(annotator)}: {count}" for annotator, count in lost.most_common()
            )
            log.warning(
                "project %d has lost %s (%s): they were deleted in Label Studio, or an older backup was restored; `%s` "
                "accepts that",
                state.number,
                count_of(lost.total(), "answer"),
                by,
                self.run.command("review push", "--repair"),
            )
        self.lost_before = lost.total()

    def _poll(self, gallery: Gallery, before: ReviewStatus) -> ReviewStatus:
        """Return the next status with another number of answers than `before`.

        A server that cannot be reached for a while is waited for, also where a proxy answers in its place, and so is
        the store, for STORE_OUTAGE_S.
        """
        status, pause_s, is_out, store_out_since = before, self.first_pause_s, False, 0.0
        while True:
            sleep(max(pause_s, self.pull_s * PAUSE_PER_PULL))
            pause_s = min(pause_s * 1.5, self.longest_pause_s)
            try:
                status = self._checked_pull(gallery, status.state)
            except (ServiceError, PageError, StoreError) as failure:
                is_out = True
                store_out_since = (store_out_since or monotonic()) if isinstance(failure, StoreError) else 0.0
                too_long = store_out_since and monotonic() - store_out_since > STORE_OUTAGE_S
                if too_long or isinstance(failure, DamagedError | StoreSettingsError):
                    raise
                log.warning("review: %s", failure)
                continue
            if is_out:
                log.info("review: the wait goes on")
                is_out, store_out_since = False, 0.0
            if status.given != before.given or not status.outstanding:
                return status

    def _pending(self, status: ReviewStatus) -> str:
        parts = [
            f"waiting for people: {status.given} answers are in and {status.still_wanted}, "
            f"{status.decided.sum()} of {len(status.decided)} scenarios are decided"
        ]
        if skips := status.blocking_skips():
            parts.append(f"{len(skips)} skipped or not readable, see `{self.run.command('review status')}`")
        if way_out := status.way_out(self.run):
            parts.append(way_out)
        return "; ".join([*parts, f"label at {self.client.labeling_url(status.state.number)}"])

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
        return ReviewTasks(gallery, self.run.spec.review)

    def _probabilities(self, gallery: Gallery) -> F32:
        """Return the reference models' probabilities on the gallery, (W, S, R, C), which the run stores."""
        if self.compute is not None:
            return ask_models_once(self.run, self.compute, gallery)
        # `defuse review push`, outside `defuse run`
        from defuse_core.local import local_compute
        from defuse_core.training.precision import resolve_precision

        with local_compute(self.run.spec) as compute:
            resolve_precision(self.run, compute)
            return ask_models_once(self.run, compute, gallery)
