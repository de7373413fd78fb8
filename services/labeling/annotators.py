"""LabelStudioAnnotators: people answer, through a Label Studio project of the run's own."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from defuse_core.artifacts import Gallery, Votes
from defuse_core.config import STEPS
from defuse_core.errors import InputError, LabelsPending, ServiceError
from defuse_core.judge import read_overrides
from defuse_core.runs import Run
from services.labeling.answers import Pulled, pull
from services.labeling.client import Server
from services.labeling.prelabel import prelabels, suggest
from services.labeling.push import Wanted, check_project, push
from services.labeling.queue import tend_queue
from services.labeling.record import Record, read_record, update_record
from services.labeling.server import running
from services.labeling.standing import Standing, stand
from services.labeling.tasks import Samples, Suggestion
from services.settings import Settings

if TYPE_CHECKING:
    from defuse_core.protocols import Compute

log = logging.getLogger("defuse")


def connect(settings: Settings) -> Server:
    """Return the server that the environment names, else the local one if it is up. Raises InputError."""
    if settings.label_studio_url is None:
        local = running(settings.cache)
        if local is None:
            raise InputError(
                "no Label Studio: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or start one here with "
                "`defuse label-studio up`"
            )
        return Server(local.address, local.token)
    if settings.label_studio_api_key is None:
        raise InputError(
            "LABEL_STUDIO_URL is set, LABEL_STUDIO_API_KEY is not; set it to an administrator's token"
        )
    return Server(settings.label_studio_url, settings.label_studio_api_key)


class LabelStudioAnnotators:
    """The protocol `Annotators`, answered by people."""

    first_pause_s, longest_pause_s = 5.0, 60.0  # between two looks while waiting

    def __init__(
        self, run: Run, settings: Settings, compute: Compute | None = None, wait: bool = False
    ) -> None:
        self.run, self.settings, self.compute, self.wait = run, settings, compute, wait
        if STEPS.index(run.until) >= STEPS.index("review") and not run.store.exists("votes.safetensors"):
            self.server.check()  # now, not after an hour of training

    @cached_property
    def server(self) -> Server:
        """The server; a run whose votes are in needs none."""
        return connect(self.settings)

    def review(self, gallery: Gallery) -> Votes:
        """Return all answers, once every image has as many as wanted or its scenario is decided.

        Raises LabelsPending before that; with `wait`, asks again and again instead, less often while nothing
        happens.
        """
        record = self.push(gallery)
        standing = self._look(gallery, record)
        while standing.open:
            record = self._remember(record, standing)
            if not self.wait:
                raise LabelsPending(f"{self._pending(standing, record)}, then give the same command again")
            log.info("%s", self._pending(standing, record))
            standing = self._wait_for_more(gallery, record, standing.given)
        self.push(gallery)  # the answers must still be about what was pushed
        log.info("review: all answers are in; %d were not needed any more", standing.saved)
        return standing.finished(self._remember(record, standing))

    def push(self, gallery: Gallery, repair: bool = False) -> Record:
        """Bring the run's project up to date, and return what is remembered of it."""
        wanted = self._wanted(gallery)
        if self.run.spec.review.prelabel:
            wanted = replace(wanted, suggestions=self._suggestions(gallery))
        return push(self.server, wanted, repair)

    def standing(self, gallery: Gallery) -> tuple[Standing, Record]:
        """Return how the review stands; what is decided leaves the queue. Raises InputError before a push."""
        record = read_record(self.run.store, gallery)
        if record.project is None:
            raise InputError(
                f"run {self.run.name} was not pushed yet; `defuse review push {self.run.name}` does"
            )
        standing = self._look(gallery, record)
        return standing, self._remember(record, standing)

    def _look(self, gallery: Gallery, record: Record) -> Standing:
        wanted = self._wanted(gallery)
        check_project(self.server, wanted, read_record(self.run.store, gallery))
        pulled = pull(self.server.tasks(record.number), wanted.samples)
        overridden = [override.scenario for override in read_overrides(self.run.store)]
        standing = stand(wanted.samples, pulled, self._names(pulled, record), overridden)
        tend_queue(self.server, standing)
        return standing

    def _wait_for_more(self, gallery: Gallery, record: Record, given: int) -> Standing:
        """Look again until there are other than `given` answers.

        A server that is away for a while is waited for.
        """
        pause = self.first_pause_s
        while True:
            time.sleep(pause)
            pause = min(pause * 1.5, self.longest_pause_s)
            try:
                standing = self._look(gallery, record)
            except ServiceError as error:
                log.warning("review: %s", error)
                continue
            if standing.given != given or not standing.open:
                return standing

    def _pending(self, standing: Standing, record: Record) -> str:
        decided = int(standing.decided.sum())
        return (
            f"waiting for people: {standing.given} answers are in and {standing.open} are still wanted, "
            f"{decided} of {len(standing.decided)} scenarios are decided; "
            f"label at {self.server.page_of(record.number)}"
        )

    def _remember(self, record: Record, standing: Standing) -> Record:
        """Keep the numbers of the pseudonyms, beside what other commands have noted meanwhile."""
        people = standing.pulled.people()
        return update_record(self.run.store, record, lambda known: known.with_people(people))

    def _names(self, pulled: Pulled, record: Record) -> dict[int, str]:
        """Return what the annotators are called in the run."""
        people = pulled.people()
        if self.run.spec.review.real_names:
            names = self.server.people()
            return {person: names.get(person, "deleted account") for person in people}
        known = record.with_people(people)
        return {person: known.pseudonym(person) for person in people}

    def _wanted(self, gallery: Gallery) -> Wanted:
        return Wanted(self.run, gallery, Samples(gallery, self.run.spec.review, self.run.store), {})

    def _suggestions(self, gallery: Gallery) -> dict[int, Suggestion]:
        from defuse_core.local import LocalCompute

        review = self.run.spec.review
        made = prelabels(self.run, self.compute or LocalCompute(), gallery)
        return suggest(made.probabilities, review.reference.min_confidence, review.form == "scenario")
