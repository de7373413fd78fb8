"""Simulated people for the local server: they sign up through the invite link and answer what the queue hands them.

They answer as the reference models do, so that the whole of a review can be tried without asking anyone. The votes are
models' all the same: use it to see how the parts work together, not to find out what is right.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import httpx
import numpy as np

from defuse_core.artifacts import Gallery
from defuse_core.errors import InputError, ServiceError
from defuse_core.protocols import Compute
from defuse_core.reference_models import ReferenceAnnotators
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.client import hush
from services.labeling.config import LABEL, choice_names
from services.labeling.explain import explained
from services.labeling.record import read_record, update_record
from services.labeling.server import LocalServer


class Person:
    """One account of a Label Studio server, acting through HTTP as the browser would."""

    def __init__(self, address: str, email: str, password: str) -> None:
        self.email, self.password = email, password
        self.http = httpx.Client(base_url=address, timeout=60.0, trust_env=False)

    @classmethod
    def sign_up(cls, address: str, invite: str, email: str) -> Self:
        """Make an account through the invite link and its form, as people do."""
        person = cls(address, email, secrets.token_urlsafe(12))
        form = person.http.get(invite).text
        found = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form)
        fields = {
            "email": email,
            "password": person.password,
            "csrfmiddlewaretoken": found[1] if found else "",
        }
        person._done(person.http.post(invite, data=fields, headers={"Referer": address}))
        token = person._done(person.http.get("/api/current-user/token")).json()["token"]
        person.http = httpx.Client(
            base_url=address, timeout=60.0, trust_env=False, headers={"Authorization": f"Token {token}"}
        )
        return person

    def next_task(self, project: int) -> Mapping[str, Any] | None:
        """Return the task that the queue hands this person, or None where nothing is left to do."""
        reply = self.http.get(f"/api/projects/{project}/next")
        if reply.status_code == 404:
            return None
        task: Mapping[str, Any] = self._done(reply).json()
        return task

    def submit(self, task: int, result: Sequence[Mapping[str, Any]], **fields: Any) -> int:
        """Submit an annotation, whatever it says, and return its number."""
        reply = self.http.post(f"/api/tasks/{task}/annotations/", json={"result": result, **fields})
        return int(self._done(reply).json()["id"])

    def answer(self, task: int, shown: str, choice: str, images: Mapping[int, str] | None = None) -> int:
        """Answer a task with `choice`; `shown` is image or page, `images` the labels of single images on a page."""
        result = [chosen(LABEL, shown, choice)]
        result += [chosen(f"{LABEL}_{n}", f"image_{n}", name) for n, name in (images or {}).items()]
        return self.submit(task, result)

    def change(self, annotation: int, result: Sequence[Mapping[str, Any]]) -> None:
        self._done(self.http.patch(f"/api/annotations/{annotation}/", json={"result": result}))

    @staticmethod
    def _done(reply: httpx.Response) -> httpx.Response:
        if reply.status_code >= 400:
            raise ServiceError(f"{reply.request.url.path} answered {reply.status_code}")
        return reply


def chosen(control: str, shown: str, choice: str) -> dict[str, Any]:
    """Return one choice as Label Studio's page submits it."""
    return {"from_name": control, "to_name": shown, "type": "choices", "value": {"choices": [choice]}}


def invite_link(server: LocalServer) -> str:
    """Return the link through which people sign up."""
    reply = httpx.get(
        f"{server.address}/api/invite",
        headers={"Authorization": f"Token {server.token}"},
        timeout=60.0,
        trust_env=False,
    )
    return str(Person._done(reply).json()["invite_url"])


def simulate(
    annotators: LabelStudioAnnotators,
    gallery: Gallery,
    server: LocalServer,
    compute: Compute,
    tell: Callable[[str], None],
) -> int:
    """Have one simulated person per reference model answer until the queue is empty; return the number of answers.

    They come one after the other, and in between what is decided leaves the queue, so the later ones have less to do.
    """
    hush()
    run = annotators.run
    record = read_record(run.store, gallery)
    if record.project is None or record.address != server.address:
        raise InputError(
            f"run {run.name} is not in the local Label Studio; `defuse review push {run.name}` first"
        )
    # before the first answer: no report may call them people's
    update_record(run.store, record, lambda known: replace(known, simulated=True))
    votes = ReferenceAnnotators(run, compute).review(gallery)
    answers = np.zeros((len(votes.annotators), *gallery.predicted.shape), np.int64)  # (W, S, R)
    answers[votes.annotator, votes.scenario, votes.image] = votes.answer
    names, total = choice_names(gallery.classes), 0
    with explained(server.address):
        invite = invite_link(server)
    for number, own in enumerate(answers):
        email = f"simulated-{number + 1}-{secrets.token_hex(3)}@defuse.local"
        with explained(server.address):
            done = _work(Person.sign_up(server.address, invite, email), record.number, own, names)
        tell(f"{email} answered {done} tasks")
        total += done
        annotators.standing(gallery)
    return total


def _work(person: Person, project: int, answers: np.ndarray, names: Sequence[str]) -> int:  # type: ignore[type-arg]
    done = 0
    while (task := person.next_task(project)) is not None:
        if "scenario" not in task["data"]:
            raise InputError(
                f"project {project} also holds tasks of somebody else (task {task['id']}), which simulated people "
                "cannot answer; delete them in Label Studio"
            )
        own = answers[task["data"]["scenario"]]  # (R,)
        if "picture" in task["data"]:
            person.answer(task["id"], "image", names[own[task["data"]["picture"]]])
        else:
            values, counts = np.unique(own, return_counts=True)
            page = int(values[counts.argmax()])
            apart = {int(n): names[own[n]] for n in np.flatnonzero(own != page)}
            person.answer(task["id"], "page", names[page], apart)
        done += 1
    return done
