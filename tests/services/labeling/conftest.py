"""The real server and its accounts for every test here; each test has a run and thereby a project of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from label_studio_live import (
    annotator_accounts,
    digits_gallery,
    live_server,
    review_run,
    server_of_process,
    settings_for,
)
from proxy import Proxy, proxy_to

from defuse_core.artifacts import Gallery
from defuse_core.runs import Run
from services.labeling import project
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.client import LabelStudioClient
from services.labeling.local_server import LocalServer
from services.labeling.records import ProjectState, Task, read_state
from services.labeling.simulate import AnnotatorAccount
from services.labeling.tasks import ReviewTasks, TaskSubject
from tests.conftest import MakeOnce


@pytest.fixture(scope="session")
def server(make_once: MakeOnce) -> LocalServer:
    return server_of_process(make_once)


@pytest.fixture(scope="session")
def accounts(server: LocalServer) -> tuple[AnnotatorAccount, ...]:
    return annotator_accounts()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "PAUSE_S", 0.05)


@pytest.fixture
def proxy(server: LocalServer) -> Iterator[Proxy]:
    with proxy_to(server.address) as proxy:
        yield proxy


@dataclass
class Review:
    """A run that is reviewed in a project of its own."""

    run: Run
    gallery: Gallery
    annotators: LabelStudioAnnotators
    api: LabelStudioClient

    @property
    def state(self) -> ProjectState:
        return read_state(self.run.store, self.gallery)

    def tasks(self) -> dict[str, Task]:
        """The tasks of the project by key; a key that occurs twice fails the test."""
        tasks = list(self.api.tasks(self.state.number, with_data=True))
        found = {str(task.key): task for task in tasks}
        assert len(found) == len(tasks)
        return found

    def through(self, address: str) -> LabelStudioAnnotators:
        """The same review through another address of the server."""
        return LabelStudioAnnotators(self.run, settings_for(live_server(), address))

    def subject(self, task: Task) -> TaskSubject:
        """The scenario and image of a task."""
        tasks = ReviewTasks(self.gallery, self.run.spec.review)
        index = tasks.index_of(task.key)
        assert index is not None
        return tasks.subject(index)

    def everyone_answers(
        self, accounts: tuple[AnnotatorAccount, ...], choice: Callable[[TaskSubject], str]
    ) -> None:
        tasks = self.tasks().values()
        for account in accounts:
            for task in tasks:
                account.answer(
                    task.id, "page" if "samples" in (task.data or {}) else "image", choice(self.subject(task))
                )


@pytest.fixture
def no_project_stays(tmp_path: Path, server: LocalServer) -> Iterator[None]:
    """Delete the projects of the runs below `tmp_path` at the end: among many, each first push looks for its own."""
    yield
    token = {"Authorization": f"Token {server.token}"}
    for path in tmp_path.rglob("labeling.json"):
        number = json.loads(path.read_text()).get("project")
        if number is not None:  # it was pushed; a test may have deleted it
            httpx.delete(
                f"{server.address}/api/projects/{number}/", headers=token, timeout=60, trust_env=False
            )


@pytest.fixture
def make_review(tmp_path: Path, server: LocalServer, no_project_stays: None) -> Callable[..., Review]:
    def make(gallery: Gallery | None = None, **review: object) -> Review:
        shown = digits_gallery() if gallery is None else gallery
        run = review_run(tmp_path, shown, **review)
        annotators = LabelStudioAnnotators(run, settings_for(server))
        return Review(run, shown, annotators, annotators.client)

    return make
