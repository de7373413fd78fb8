"""Simulated annotators for the local server: they sign up through the invitation and answer the tasks of the queue.

They give the answers of the reference models, so that a whole review can be tried without people. The votes are the
models': use it to see how the parts work together, not to find out what is right.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import httpx
import numpy as np

from defuse_core.artifacts import I64, Gallery, Votes
from defuse_core.errors import InputError, RunBusyError, ServiceError
from defuse_core.protocols import Compute, Progress
from defuse_core.runs import Run
from defuse_core.training.precision import resolve_precision
from defuse_core.training.reference_models import ReferenceAnnotators
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.client import translated_errors
from services.labeling.local_server import LocalServer
from services.labeling.records import ChoiceResult, choice_result, read_state, update_state
from services.labeling.tasks import LABEL, ReviewTasks

log = logging.getLogger("defuse")
LOGIN = "/user/login/"  # Label Studio's page


class AnnotatorAccount:
    """One account of a Label Studio server, used through HTTP as a browser would."""

    def __init__(self, address: str, email: str, password: str) -> None:
        self.email, self.password = email, password
        self.http = httpx.Client(base_url=address, timeout=60.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def enter(self, *pages: str) -> Self:
        """Fill in the forms of these pages, one after the other, until one accepts the account."""
        for page in pages:
            found = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', self.http.get(page).text)
            fields = {
                "email": self.email,
                "password": self.password,
                "csrfmiddlewaretoken": found[1] if found else "",
            }
            headers = {"Referer": str(self.http.base_url)}
            if self._checked(self.http.post(page, data=fields, headers=headers)).is_redirect:
                break
        token = self._checked(self.http.get("/api/current-user/token")).json()["token"]
        self.http.cookies.clear()  # of the page, whose requests would need its CSRF token
        self.http.headers["Authorization"] = f"Token {token}"
        return self

    def next_task(self, project: int) -> Any:
        """Return the next task of this account's queue, by the API's names, or None if the queue is empty."""
        reply = self.http.get(f"/api/projects/{project}/next")
        if reply.status_code == 404:
            return None
        return self._checked(reply).json()

    def submit(self, task: int, result: Sequence[ChoiceResult], **fields: object) -> int:
        """Submit an annotation, valid or not, and return its id."""
        reply = self.http.post(f"/api/tasks/{task}/annotations/", json={"result": result, **fields})
        return int(self._checked(reply).json()["id"])

    def answer(self, task: int, target: str, choice: str, images: Mapping[int, str] | None = None) -> int:
        """Answer a task with `choice`; `target` is image or page, `images` are labels of single images on a page."""
        result = [choice_result(LABEL, target, choice)]
        result += [choice_result(f"{LABEL}_{n}", f"image_{n}", name) for n, name in (images or {}).items()]
        return self.submit(task, result)

    @staticmethod
    def _checked(reply: httpx.Response) -> httpx.Response:
        if reply.status_code >= 400:
            raise ServiceError(f"{reply.request.url.path} answered {reply.status_code}")
        return reply


def simulate(
    annotators: LabelStudioAnnotators,
    gallery: Gallery,
    server: LocalServer,
    compute: Compute,
    progress: Progress,
) -> int:
    """Let one simulated annotator per reference model answer until the queue is empty; return the number of answers.

    They answer one after the other. Between them decided scenarios leave the queue, so later ones get fewer tasks. Each
    has one account for the project: repeated, no model answers a task again. Where there are fewer of them than
    review.answers_per_task asks for, a warning says that answers are missing.
    """
    run = annotators.run
    state = read_state(run.store, gallery)
    if state.project is None or state.address != server.address:
        raise InputError(
            f"run {run.name} is not in the local Label Studio; `{run.command('review push')}` first"
        )
    if not state.simulated and annotators.status(gallery).pulled.annotators():
        raise InputError(
            f"people have answered in the project of run {run.name}, so simulated annotators would mix models' answers "
            "with theirs; use another run"
        )
    votes = _votes_of_models(run, compute, gallery)
    # before the first answer: no report may call these people's answers
    update_state(run.store, state, lambda known: replace(known, simulated=True))
    answers = np.zeros((len(votes.annotators), *gallery.predicted.shape), np.int64)  # (W, S, R)
    answers[votes.annotator, votes.scenario, votes.image] = votes.answer
    tasks, total = ReviewTasks(gallery, run.spec.review), 0
    invitation = annotators.client.invitation()
    for number, own in enumerate(answers):
        email = f"simulated-{number + 1}-{state.mark[-6:]}@defuse.local"
        password = hmac.digest(state.secret.encode(), email.encode(), "sha256").hex()
        shown = partial(progress, f"annotator {number + 1} of {len(answers)} answers")
        with (
            translated_errors(server.address),
            AnnotatorAccount(server.address, email, password).enter(LOGIN, invitation) as account,
        ):
            total += _answer_queue(account, state.number, tasks, own, shown)
        status = annotators.status(gallery)
    if status.outstanding:
        log.warning(
            "%d reference models answer each task once, and review.answers_per_task is %d: %s",
            len(answers),
            tasks.review.answers_per_task,
            status.still_wanted,
        )
    return total


def _votes_of_models(run: Run, compute: Compute, gallery: Gallery) -> Votes:
    """Return the votes of the run's reference models, which are trained under its lock if it has none yet."""
    models = ReferenceAnnotators(run, compute)
    if run.store.exists("references.safetensors"):
        return models.review(gallery)
    try:
        with run.store.lock():
            resolve_precision(run, compute)
            return models.review(gallery)
    except RunBusyError as error:
        raise RunBusyError(
            f"{error}, and it has no reference models yet, which would be trained now; end that driver first"
        ) from error


def _answer_queue(
    account: AnnotatorAccount,
    project: int,
    tasks: ReviewTasks,
    answers: I64,  # (S, R)
    progress: Callable[[int, int, str], None],
) -> int:
    """Answer tasks until the account's queue is empty; return their number."""
    answered = 0
    while (task := account.next_task(project)) is not None:
        number, meta = task["id"], task["meta"] or {}  # none of a task that Defuse did not import
        index = tasks.index_of(meta.get("sample_key"))
        if index is None:
            raise InputError(
                f"project {project} also contains tasks that Defuse did not import (task {number}), which "
                "simulated annotators cannot answer; delete them in Label Studio"
            )
        subject = tasks.subject(index)
        own = answers[subject.scenario]  # (R,)
        if subject.image is not None:
            account.answer(number, "image", tasks.names[own[subject.image]])
        else:
            values, counts = np.unique(own, return_counts=True)
            page = int(values[counts.argmax()])
            exceptions = {int(image): tasks.names[own[image]] for image in np.flatnonzero(own != page)}
            account.answer(number, "page", tasks.names[page], exceptions)
        answered += 1
        progress(answered, len(tasks), "tasks")
    return answered
