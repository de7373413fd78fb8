"""The real server and its people for every test here; each test has a run and thereby a project of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from label_studio_live import digits_gallery, live_server, people, review_run, settings_for
from proxy import Proxy, proxy_to

from defuse_core.artifacts import Gallery
from defuse_core.runs import Run
from services.labeling import LabelStudioAnnotators, push
from services.labeling.client import Server, Task
from services.labeling.record import Record, read_record
from services.labeling.server import LocalServer
from services.labeling.simulate import Person


@pytest.fixture(scope="session")
def server() -> LocalServer:
    return live_server()


@pytest.fixture(scope="session")
def crowd(server: LocalServer) -> tuple[Person, ...]:
    return people()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "PAUSE_S", 0.05)


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
    api: Server

    @property
    def record(self) -> Record:
        return read_record(self.run.store, self.gallery)

    def tasks(self) -> dict[str, Task]:
        """The tasks of the project by key; a key that is there twice fails the test."""
        tasks = list(self.api.tasks(self.record.number, with_data=True))
        found = {str(task.key): task for task in tasks}
        assert len(found) == len(tasks)
        return found

    def through(self, address: str) -> LabelStudioAnnotators:
        """The same review by another way to the server."""
        return LabelStudioAnnotators(self.run, settings_for(live_server(), address))

    def everyone_says(self, crowd: tuple[Person, ...], choice: Callable[[Task], str]) -> None:
        for person in crowd:
            for task in self.tasks().values():
                person.answer(task.id, "page" if "samples" in (task.data or {}) else "image", choice(task))


@pytest.fixture
def make_review(tmp_path: Path, server: LocalServer) -> Callable[..., Review]:
    def make(gallery: Gallery | None = None, **review: object) -> Review:
        shown = gallery or digits_gallery()
        run = review_run(tmp_path, shown, **review)
        annotators = LabelStudioAnnotators(run, settings_for(server))
        return Review(run, shown, annotators, annotators.server)

    return make
