"""Making a run's project and filling it: cut off at any point and run again, every image is in it once.

A write may have happened although its reply was lost. So the project bears a mark that was noted before it
was made, and tasks bear keys: list them, import what is missing, list again, and drop copies that nobody has
answered.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defuse_core.artifacts import I64, Bool, Gallery
from defuse_core.errors import InputError, ServiceError
from defuse_core.runs import Run
from services.labeling.client import Project, Server, Task
from services.labeling.config import difference, instructions, label_config
from services.labeling.record import Record, new_mark, read_record, update_record, write_record
from services.labeling.tasks import MODEL, Samples, Suggestion, digest

log = logging.getLogger("defuse")

BATCH_TASKS = 250
BATCH_BYTES = 8_000_000  # bodies of some 250 MB make the server fail
TRIES = 4
PAUSE_S = 1.0


@dataclass(frozen=True)
class Wanted:
    """What is to be in the project of a run."""

    run: Run
    gallery: Gallery
    samples: Samples
    # by task, in the order of asking; empty without review.prelabel
    suggestions: Mapping[int, Suggestion]

    @property
    def config(self) -> str:
        return label_config(self.run.spec.review.form, self.gallery.classes)

    @property
    def order(self) -> Iterable[int]:
        """The numbers of all tasks, in the order in which people get them."""
        return self.suggestions or range(len(self.samples))

    @property
    def repair(self) -> str:
        return f"`defuse review push {self.run.name} --repair`"

    def fields(self, mark: str) -> dict[str, Any]:
        """Return the project as Label Studio makes it."""
        review = self.run.spec.review
        return {
            "title": f"Defuse {self.run.name}"[:50],
            "description": f"Made by Defuse for its run {self.run.name}. Leave this mark: {mark}",
            "label_config": self.config,
            "expert_instruction": instructions(review.form, self.gallery.classes),
            "show_instruction": True,
            "maximum_annotations": review.answers_per_task,
            "sampling": "Sequential sampling",
            "show_collab_predictions": review.prelabel,
            "model_version": MODEL if review.prelabel else "",
        }


def push(server: Server, wanted: Wanted, repair: bool = False) -> Record:
    """Make the run's project if there is none, add the images that it lacks, return what to remember.

    Raises InputError where someone deleted or edited what was pushed; `repair` puts it back instead.
    """
    store = wanted.run.store
    record = read_record(store, wanted.gallery)
    write_record(store, record)  # the mark, before a project bears it
    project = _find(server, wanted, record, repair)
    if project is None:
        if record.project is not None:  # another in the place of a lost one needs a mark of its own
            record = Record(new_mark(), record.gallery, people=record.people)
            write_record(store, record)
        project = _make(server, wanted, record)
    number = project.id
    record = update_record(
        store, record, lambda known: replace(known, project=number, address=server.address)
    )
    _note_changes(server, wanted, record, project, repair)
    _fill(server, wanted, record, repair)
    return update_record(store, record, lambda known: replace(known, pushed=True))


def check_project(server: Server, wanted: Wanted, record: Record) -> None:
    """Raise InputError where the project was deleted, or edited so that answers could be misread."""
    project = _find(server, wanted, record, repair=False)
    if project is not None:
        _note_changes(server, wanted, record, project, repair=False)


def _find(server: Server, wanted: Wanted, record: Record, repair: bool) -> Project | None:
    """Return the run's project; None where there is none yet, or it is lost and to be replaced."""
    if record.project is None:
        return next(iter(server.find_projects(record.mark)), None)
    project = server.project(record.project)
    if project is not None and record.mark in project.description:
        return project
    if repair:
        log.warning("project %d is gone from %s; making another", record.project, server.address)
        return None
    if project is None:
        raise InputError(
            f"project {record.project} was deleted from {server.address}, its answers with it; "
            f"{wanted.repair} makes another"
        )
    raise InputError(
        f"project {record.project} at {server.address} is not this run's, which was pushed to "
        f"{record.address}: its description lacks the mark {record.mark}; "
        f"correct LABEL_STUDIO_URL or the description, or let {wanted.repair} make another"
    )


def _make(server: Server, wanted: Wanted, record: Record) -> Project:
    for attempt in range(TRIES):
        known = server.find_projects(record.mark)
        if known:
            return known[0]
        try:
            made = server.create_project(wanted.fields(record.mark))
        except ServiceError:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE_S * 2**attempt)
        else:
            log.info("review: made project %d at %s", made.id, server.page_of(made.id))
            return made
    raise AssertionError("unreachable: the last attempt returns or raises")


def _note_changes(server: Server, wanted: Wanted, record: Record, project: Project, repair: bool) -> None:
    """Say once what someone changed about the project. Raises InputError where its answers would be misread."""
    config = _checked_config(server, wanted, project, repair)
    if record.config and config not in (record.config, _sha(wanted.config)):
        log.warning(
            "project %d: the layout of its labelling interface was edited; answers stay readable", project.id
        )
    if record.title and project.title != record.title:
        log.warning(
            "project %d was renamed from %r to %r; going on with it", project.id, record.title, project.title
        )
    asked = wanted.run.spec.review.answers_per_task
    if project.overlap != asked:
        server.update_project(project.id, {"maximum_annotations": asked})
        log.warning(
            "project %d asked for %d answers per task; put back to %d", project.id, project.overlap, asked
        )
    update_record(wanted.run.store, record, lambda known: replace(known, title=project.title, config=config))


def _checked_config(server: Server, wanted: Wanted, project: Project, repair: bool) -> str:
    """Return the digest of the labelling interface, once it asks what was pushed."""
    edit = difference(wanted.config, project.config)
    if edit is None:
        return _sha(project.config)
    if not repair:
        raise InputError(
            f"project {project.id}: its labelling interface was edited in Label Studio ({edit}), so that "
            f"answers could be misread; undo that there, or let {wanted.repair} do it"
        )
    server.update_project(project.id, {"label_config": wanted.config})
    log.warning("project %d: put the labelling interface back (%s)", project.id, edit)
    return _sha(wanted.config)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fill(server: Server, wanted: Wanted, record: Record, repair: bool) -> None:
    """Import what is missing, as often as replies are lost, and drop unanswered copies."""
    for attempt in range(TRIES):
        present = _present(server, wanted, record.number, repair)
        missing = [number for number in wanted.order if not present.ids[number]]
        if not missing:
            return _connect_bucket(server, wanted, record.number) if present.in_bucket else None
        if record.pushed and not repair:
            raise InputError(
                f"project {record.project}: {len(missing)} of {len(wanted.samples)} tasks were deleted "
                f"in Label Studio (first {wanted.samples.place(missing[0]).key}); {wanted.repair} puts them back"
            )
        try:
            _import(server, wanted, record.number, missing)
        except ServiceError:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE_S * 2**attempt)
    raise ServiceError(f"project {record.project} lacks tasks even after {TRIES} imports; run again to go on")


def _import(server: Server, wanted: Wanted, project: int, numbers: Iterable[int]) -> None:
    done = 0
    for batch in batches(wanted.samples.task(n, wanted.suggestions.get(n)) for n in numbers):
        server.import_tasks(project, batch)
        done += len(batch)
    log.info("review: pushed %d tasks to project %d", done, project)


def batches(tasks: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Return the tasks in lists that are bounded in number and bytes."""
    batch: list[Mapping[str, Any]] = []
    size = 0
    for task in tasks:
        grown = size + len(str(task))
        if batch and (len(batch) == BATCH_TASKS or grown > BATCH_BYTES):
            yield batch
            batch, grown = [], len(str(task))
        batch.append(task)
        size = grown
    if batch:
        yield batch


@dataclass(eq=False)
class Present:
    """What is in the project already, of T tasks."""

    ids: I64  # (T,) Label Studio's numbers; 0 where there is none yet
    answered: Bool  # (T,)
    in_bucket: bool = False  # some pictures lie in the run's S3 store

    def add(self, number: int, task: Task) -> int:
        """Note a task. Of two that are the same return the id of the one to drop: none that somebody answered."""
        first = int(self.ids[number])
        if first and not task.annotations:
            return task.id
        if first and self.answered[number]:
            return 0  # answers.py reads two with answers as one
        self.ids[number], self.answered[number] = task.id, bool(task.annotations)
        return first


def _present(server: Server, wanted: Wanted, project: int, repair: bool) -> Present:
    """Return what is in the project, once copies are dropped. Raises InputError where a task shows something else."""
    tasks = len(wanted.samples)
    present = Present(np.zeros(tasks, np.int64), np.zeros(tasks, bool))
    dropped: dict[int, str] = {}  # later: deleting while listing would shift the pages
    strangers = 0
    for task in server.tasks(project, with_data=True):
        number = wanted.samples.number(task.key)
        if number is None:
            strangers += 1
        elif task.data is None or digest(task.data) != task.digest:
            dropped[_edited(wanted, project, task, repair)] = str(task.key)
        else:
            present.in_bucket = present.in_bucket or "s3://" in str(task.data)
            if copy := present.add(number, task):
                dropped[copy] = str(task.key)
    for copy, key in dropped.items():
        server.delete_task(copy)
        log.info("review: dropped task %d, a copy or an edited one of %s", copy, key)
    if strangers:
        log.warning("project %d also holds %d tasks of somebody else; left alone", project, strangers)
    return present


def _edited(wanted: Wanted, project: int, task: Task, repair: bool) -> int:
    """Return the id of an edited task, which is to be replaced. Raises InputError without `repair`."""
    if not repair:
        raise InputError(
            f"project {project}: task {task.id} ({task.key}) was edited in Label Studio and no longer shows "
            f"what was pushed; {wanted.repair} replaces it, with its answers"
        )
    return task.id


def _connect_bucket(server: Server, wanted: Wanted, project: int) -> None:
    """Let Label Studio show the pictures in the run's bucket, with the credentials that this process has."""
    import boto3

    from services.storage.s3 import S3Store

    store = wanted.run.store
    if not isinstance(store, S3Store):
        log.warning("project %d shows pictures of the bucket that the run lay in; they stay there", project)
        return
    fields = {
        "title": f"Pictures of {wanted.run.name}",
        "bucket": store.bucket,
        "prefix": f"{store.prefix}pictures",
        "s3endpoint": store.endpoint,
        "region_name": store.region,
        "presign": False,  # Label Studio passes the pictures on, so the bucket needs no CORS
        "use_blob_urls": True,
    }
    credentials = boto3.Session().get_credentials()
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        fields |= {"aws_access_key_id": frozen.access_key, "aws_secret_access_key": frozen.secret_key}
        fields |= {"aws_session_token": frozen.token or ""}  # none takes the place of an old one
    server.connect_bucket(project, {name: value for name, value in fields.items() if value is not None})
