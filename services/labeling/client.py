"""The one seam to a Label Studio server: what Defuse asks of it, and its failures in one line.

Reads are repeated by the SDK on lost connections and overload. Writes never are: a reply that is lost does
not mean that nothing happened, so who writes looks first (see push.py).
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from defuse_core.errors import InputError

try:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.core.api_error import ApiError

    from services.labeling.explain import explained, is_json, unless_gone
except ModuleNotFoundError as error:
    raise InputError("Label Studio needs its client here: pip install 'defuse[label-studio]'") from error

READ: Any = {"max_retries": 2}
WRITE: Any = {"max_retries": 0}
LIGHT = "id,meta,overlap,is_labeled,annotations,completed_by,result,was_cancelled,created_at,updated_at"
PAGE = 250  # tasks
# A reply of httpx refers to itself, and Python counts objects, not bytes: without a collection, bodies pile up.
COLLECTED_PAGES = 4


@dataclass(frozen=True, slots=True)
class Annotation:
    """One submitted annotation, as the server has it: unchecked."""

    id: int
    person: int | None  # user id; None where the account was deleted
    result: Any
    cancelled: bool  # a skip
    created: float  # seconds since 1970
    updated: float


@dataclass(frozen=True, slots=True)
class Task:
    id: int
    key: str | None  # the sample_key that push.py gave it; None for a task of somebody else's
    digest: str | None  # of what it showed when it was pushed
    overlap: int
    labeled: bool  # Label Studio's own view: out of the queue
    annotations: tuple[Annotation, ...]
    data: Mapping[str, Any] | None  # None unless asked for


@dataclass(frozen=True)
class Project:
    id: int
    title: str
    description: str
    config: str
    overlap: int


class Server:
    """A Label Studio server.

    Every method raises ServiceError or InputError, in one line that says what to do.
    """

    def __init__(self, address: str, token: str, timeout_s: float = 60.0) -> None:
        self.address = checked_address(address)
        hush()
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise InputError(
                "LABEL_STUDIO_API_KEY: expected one word; copy the token again from Account & Settings"
            )
        with explained(self.address):
            self._sdk: Any = LabelStudio(  # type: ignore[no-untyped-call]
                base_url=self.address, api_key=token, timeout=timeout_s, max_retries=0, follow_redirects=False
            )

    def __repr__(self) -> str:
        return f"Server({self.address!r})"

    def check(self) -> None:
        """Ask who we are: the cheapest question that needs the right address and a valid token."""
        with explained(self.address):
            self._sdk.users.whoami(request_options=READ)

    def page_of(self, project: int) -> str:
        """Return the address to open for the project."""
        return f"{self.address}/projects/{project}/data"

    def create_project(self, fields: Mapping[str, Any]) -> Project:
        """Make a project. After a lost reply it may be there nonetheless."""
        with explained(self.address):
            return _project(self._sdk.projects.create(**fields, request_options=WRITE))

    def project(self, number: int) -> Project | None:
        """Return the project, or None where there is none of that number."""
        with explained(self.address):
            try:
                return _project(self._sdk.projects.get(id=number, request_options=READ))
            except ApiError as error:
                if error.status_code == 404 and is_json(error.body):
                    return None
                raise

    def find_projects(self, mark: str) -> list[Project]:
        """Return the projects whose description holds `mark`, oldest first."""
        with explained(self.address):
            pages = self._sdk.projects.list(page_size=100, request_options=READ)
            found = [_project(project) for project in pages if mark in (project.description or "")]
        return sorted(found, key=lambda project: project.id)

    def update_project(self, number: int, fields: Mapping[str, Any]) -> None:
        with explained(self.address):
            self._sdk.projects.update(id=number, **fields, request_options=WRITE)

    def import_tasks(self, project: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Add tasks, all or none. After a lost reply they may be there nonetheless."""
        with explained(self.address):
            self._sdk.projects.import_tasks(id=project, request=list(tasks), request_options=WRITE)

    def tasks(self, project: int, with_data: bool = False) -> Iterator[Task]:
        """Return all tasks with all annotations, page by page. `with_data` brings what they show, too."""
        include, page = (LIGHT + ",data" if with_data else LIGHT), 1
        while (yield from self._page(project, include, page)) == PAGE:
            page += 1
            if page % COLLECTED_PAGES == 0:
                gc.collect()

    def _page(self, project: int, include: str, page: int) -> Generator[Task, None, int]:
        """Return the tasks of one page, and how many they were; nothing of it outlives it."""
        with explained(self.address):
            try:
                answer = self._sdk.tasks.list(
                    project=project,
                    page=page,
                    page_size=PAGE,
                    fields="all",
                    include=include,
                    resolve_uri=False,
                    request_options=READ,
                )
            except ApiError as error:
                if error.status_code == 404 and page > 1 and self.project(project) is not None:
                    return 0  # the page before was full and the last
                raise
            items = answer.items or ()
        for item in items:
            with explained(self.address):
                task = _task(item)
            yield task
        return len(items)

    def delete_task(self, number: int) -> None:
        with explained(self.address), unless_gone():
            self._sdk.tasks.delete(id=str(number), request_options=WRITE)

    def set_overlap(self, task: int, overlap: int, labeled: bool) -> None:
        """Say how many people are to see the task, and whether it leaves the queue now. Safe to repeat."""
        fields = {"overlap": overlap, "is_labeled": labeled}
        with explained(self.address), unless_gone():
            self._sdk.tasks.update(
                id=str(task), request_options=WRITE | {"additional_body_parameters": fields}
            )

    def people(self) -> dict[int, str]:
        """Return the names of the users: first and last name, or else the e-mail address."""
        with explained(self.address):
            users = self._sdk.users.list(request_options=READ)
        return {
            user.id: f"{user.first_name or ''} {user.last_name or ''}".strip() or str(user.email)
            for user in users
        }

    def connect_bucket(self, project: int, fields: Mapping[str, Any]) -> None:
        """Let the project show pictures of an S3 bucket, proxied by the server, with the credentials in `fields`."""
        storages = self._sdk.import_storage.s3
        with explained(self.address):
            known = storages.list(project=project, request_options=READ)
            ours = next((storage for storage in known if storage.bucket == fields["bucket"]), None)
            if ours is None:
                storages.create(project=project, **fields, request_options=WRITE)
            else:  # those it has may have expired
                storages.update(ours.id, project=project, **fields, request_options=WRITE)


def hush() -> None:
    """Keep httpx from logging one line per request."""
    logging.getLogger("httpx").setLevel(logging.WARNING)


def checked_address(address: str) -> str:
    """Return the address without a slash at its end.

    Raises InputError for anything but a plain http(s) address.
    """
    try:
        parts = urlsplit(address.strip())
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("LABEL_STUDIO_URL: expected an address such as https://labels.example.org")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "LABEL_STUDIO_URL: expected a plain address; the token belongs into LABEL_STUDIO_API_KEY"
        )
    return address.strip().rstrip("/")


def _project(found: Any) -> Project:
    return Project(
        id=int(found.id),
        title=str(found.title or ""),
        description=str(found.description or ""),
        config=str(found.label_config or ""),
        overlap=int(found.maximum_annotations or 0),
    )


def _task(found: Any) -> Task:
    meta = found.meta if isinstance(found.meta, dict) else {}
    key, digest = (
        value if isinstance(value := meta.get(name), str) else None for name in ("sample_key", "digest")
    )
    return Task(
        id=int(found.id),
        key=key,
        digest=digest,
        overlap=int(found.overlap or 0),
        labeled=bool(found.is_labeled),
        annotations=tuple(_annotation(one) for one in found.annotations or ()),
        data=found.data,
    )


def _annotation(found: Any) -> Annotation:
    fields = found if isinstance(found, dict) else found.model_dump()
    person = fields.get("completed_by")
    return Annotation(
        id=int(fields["id"]),
        person=person.get("id") if isinstance(person, dict) else person,
        result=fields.get("result"),
        cancelled=bool(fields.get("was_cancelled")),
        created=_seconds(fields["created_at"]),
        updated=_seconds(fields["updated_at"]),
    )


def _seconds(moment: str | datetime) -> float:
    return (datetime.fromisoformat(moment) if isinstance(moment, str) else moment).timestamp()
