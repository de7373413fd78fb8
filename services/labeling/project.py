"""The Label Studio project of a run: created once and filled with each task once, wherever a push is interrupted.

A write may have taken effect although its reply was lost. So the project bears a mark that is stored in the run before
the project exists, and tasks bear keys: a push lists them, imports the missing ones, lists again, and drops duplicates
that nobody has answered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from defuse_core.artifacts import I64, Bool, Gallery
from defuse_core.errors import InputError, ServiceError
from defuse_core.runs import Run
from defuse_core.store import Store
from services.labeling.client import LabelStudioClient, Project, ProjectSettings, Task
from services.labeling.interface import difference, instructions, label_config
from services.labeling.pictures import bucket_storage
from services.labeling.tasks import PRELABEL_MODEL, Prelabel, ReviewTasks, batches, digest

log = logging.getLogger("defuse")

STATE_KEY = "labeling.json"  # in the run's store; holds no secrets and no e-mail addresses
ATTEMPTS = 4
PAUSE_S = 1.0


@dataclass(frozen=True)
class ProjectState:
    """What a run stores about its Label Studio project: which one it is, and the pseudonyms of its annotators."""

    mark: str  # part of the project's description, which identifies it, also after a lost reply
    gallery: str  # digest of the images that were pushed
    address: str = ""
    project: int | None = None  # None until the server has replied
    title: str = ""
    config: str = ""  # SHA-256 of the labelling interface as pushed
    pushed: bool = False  # every task existed once, so one that is missing was deleted
    people: dict[str, int] = field(default_factory=dict)  # user id -> n of the pseudonym annotator-n
    simulated: bool = False  # reference models answered through the accounts of simulated annotators

    @property
    def number(self) -> int:
        """The project's id in Label Studio. Only for a state whose project exists."""
        assert self.project is not None
        return self.project

    def with_annotators(self, seen: Iterable[int]) -> ProjectState:
        """Return the state with a number for each user id in `seen`, in order of appearance.

        Numbers never change.
        """
        people = dict(self.people)
        for annotator in seen:
            people.setdefault(str(annotator), len(people) + 1)
        return replace(self, people=people)

    def pseudonym(self, annotator: int) -> str:
        return f"annotator-{self.people[str(annotator)]}"


def new_mark() -> str:
    return f"defuse-{secrets.token_hex(8)}"


def read_state(store: Store, gallery: Gallery) -> ProjectState:
    """Return the state of the run's project, or a new one.

    Raises InputError if other images were pushed than those of `gallery`.
    """
    digest_now = gallery_digest(gallery)
    state = _stored_state(store)
    if state is None:
        return ProjectState(mark=new_mark(), gallery=digest_now)
    if state.gallery != digest_now:
        raise InputError(
            f"project {state.project} shows other images than this run's gallery now contains; use another "
            f"--name, or delete {store.address}/{STATE_KEY} to push the new images to a new project"
        )
    return state


def update_state(
    store: Store, state: ProjectState, change: Callable[[ProjectState], ProjectState]
) -> ProjectState:
    """Apply `change` to the stored state, which other commands may have changed since `state` was read; return it."""
    known = _stored_state(store)
    changed = change(known or state)
    if changed != known:
        write_state(store, changed)
    return changed


def write_state(store: Store, state: ProjectState) -> None:
    store.write(STATE_KEY, json.dumps(asdict(state), indent=1).encode())


def _stored_state(store: Store) -> ProjectState | None:
    try:
        return ProjectState(**json.loads(store.read(STATE_KEY)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{store.address}/{STATE_KEY}: expected what Defuse wrote there, found something else"
        ) from error


def gallery_digest(gallery: Gallery) -> str:
    """Return a digest of a gallery: of its images as annotators see them, of its predictions and classes."""
    sha = hashlib.sha256(repr((gallery.classes, gallery.images.shape)).encode())
    sha.update(gallery.predicted.tobytes())
    for scenario in gallery.images:  # one after the other, so that a large gallery is not copied
        sha.update((scenario * 255).round().astype("uint8").tobytes())
    return sha.hexdigest()


class ReviewProject:
    """The project of one run on one server, as it should be and as it is.

    Where someone deleted or edited what was pushed, InputError is raised, or with `repair` it is put back.
    """

    def __init__(
        self,
        client: LabelStudioClient,
        run: Run,
        tasks: ReviewTasks,
        prelabels: Mapping[int, Prelabel] | None = None,
        repair: bool = False,
    ) -> None:
        """`prelabels` are in the order in which annotators get the tasks; without them that is by scenario."""
        self.client, self.run, self.tasks, self.repair = client, run, tasks, repair
        self.prelabels = prelabels or {}
        self.state = read_state(run.store, tasks.gallery)
        self.repair_command = f"`defuse review push {run.name} --repair`"

    def push(self) -> ProjectState:
        """Create the project if it does not exist, import the tasks that it lacks, and return the new state."""
        write_state(self.run.store, self.state)  # the mark, before a project bears it
        project = self.find()
        if project is None:
            if self.state.project is not None:  # a replacement of a lost project needs a mark of its own
                self.state = ProjectState(new_mark(), self.state.gallery, people=self.state.people)
                write_state(self.run.store, self.state)
            project = self.create()
        number = project.id
        self._update_state(lambda known: replace(known, project=number, address=self.client.address))
        self._check_settings(project)
        self.import_missing()
        self._update_state(lambda known: replace(known, pushed=True))
        return self.state

    def check(self) -> None:
        """Raise InputError if the project was deleted, or edited so that answers could be misread."""
        project = self.find()
        if project is not None:
            self._check_settings(project)

    def settings(self) -> ProjectSettings:
        """Return the settings that the project should have."""
        review, classes = self.run.spec.review, self.tasks.gallery.classes
        return ProjectSettings(
            title=f"Defuse {self.run.name}"[:50],
            description=f"Made by Defuse for its run {self.run.name}. Leave this mark: {self.state.mark}",
            label_config=label_config(review.form, classes),
            expert_instruction=instructions(review.form, classes),
            show_instruction=True,
            maximum_annotations=review.answers_per_task,
            sampling="Sequential sampling",
            show_collab_predictions=review.prelabel,
            model_version=PRELABEL_MODEL if review.prelabel else "",
        )

    def find(self) -> Project | None:
        """Return the run's project; None if there is none yet, or if it is lost and to be replaced."""
        state = self.state
        if state.project is None:
            return next(iter(self.client.find_projects(state.mark)), None)
        project = self.client.project(state.project)
        if project is not None and state.mark in project.settings.description:
            return project
        if self.repair:
            log.warning("project %d is gone from %s; creating another", state.project, self.client.address)
            return None
        if project is None:
            raise InputError(
                f"project {state.project} was deleted from {self.client.address}, its answers with it; "
                f"{self.repair_command} creates another"
            )
        raise InputError(
            f"project {state.project} at {self.client.address} is not this run's, which was pushed to "
            f"{state.address}: its description lacks the mark {state.mark}; "
            f"correct LABEL_STUDIO_URL or the description, or let {self.repair_command} create another"
        )

    def create(self) -> Project:
        """Create the project, unless an earlier attempt whose reply was lost did."""
        for attempt in _attempts():
            with attempt:
                known = self.client.find_projects(self.state.mark)
                if known:
                    return known[0]
                created = self.client.create_project(self.settings())
        log.info("review: created project %d at %s", created.id, self.client.project_url(created.id))
        return created

    def import_missing(self) -> None:
        """Import the tasks that the project lacks, and drop unanswered duplicates."""
        for attempt in _attempts():
            with attempt:
                present = self.drop_duplicates()
                missing = [index for index in self._order() if not present.ids[index]]
                if missing:
                    self._import(missing)
                    present = self.drop_duplicates()
                if not present.ids.all():
                    raise ServiceError(f"project {self.state.project} lacks tasks after an import; run again")
        if present.in_bucket:
            self._connect_bucket()

    def drop_duplicates(self) -> PresentTasks:
        """Return the tasks in the project, after duplicates that nobody answered are deleted."""
        present = PresentTasks.none(len(self.tasks))
        dropped: dict[int, str] = {}  # deleted later: a deletion while listing would shift the pages
        unknown = 0
        for task in self.client.tasks(self.state.number, with_data=True):
            index = self.tasks.index_of(task.key)
            if index is None:
                unknown += 1
            elif task.data is None or digest(task.data) != task.digest:
                self._expect_repair(task)
                dropped[task.id] = str(task.key)
            else:
                present.in_bucket = present.in_bucket or "s3://" in str(task.data)
                if duplicate := present.add(index, task):
                    dropped[duplicate] = str(task.key)
        for duplicate, key in dropped.items():
            self.client.delete_task(duplicate)
            log.info("review: deleted task %d, a duplicate or an edited version of %s", duplicate, key)
        if unknown:
            log.warning(
                "project %d also contains %d tasks that Defuse did not import; they stay as they are",
                self.state.number,
                unknown,
            )
        return present

    def _order(self) -> Iterable[int]:
        """The indices of all tasks, in the order in which annotators get them."""
        return self.prelabels or range(len(self.tasks))

    def _import(self, missing: list[int]) -> None:
        if self.state.pushed and not self.repair:
            raise InputError(
                f"project {self.state.project}: {len(missing)} of {len(self.tasks)} tasks were deleted "
                f"in Label Studio (first {self.tasks.subject(missing[0]).key}); {self.repair_command} puts them back"
            )
        imported = 0
        for batch in batches(self.tasks.task(index, self.prelabels.get(index)) for index in missing):
            self.client.import_tasks(self.state.number, batch)
            imported += len(batch)
        log.info("review: pushed %d tasks to project %d", imported, self.state.number)

    def _expect_repair(self, task: Task) -> None:
        """Raise InputError for an edited task, unless it may be replaced."""
        if not self.repair:
            raise InputError(
                f"project {self.state.number}: task {task.id} ({task.key}) was edited in Label Studio and no longer "
                f"shows what was pushed; {self.repair_command} replaces it, with its answers"
            )

    def _check_settings(self, project: Project) -> None:
        """Log once what someone changed in the project. Raises InputError where its answers would be misread."""
        state, found, wanted = self.state, project.settings, self.settings()
        config = self._checked_config(project)
        if state.config and config not in (state.config, _sha(wanted.label_config)):
            log.warning(
                "project %d: the layout of its labelling interface was edited; answers stay readable",
                project.id,
            )
        if state.title and found.title != state.title:
            log.warning(
                "project %d was renamed from %r to %r; it is still used", project.id, state.title, found.title
            )
        if found.maximum_annotations != wanted.maximum_annotations:
            self.client.update_project(project.id, maximum_annotations=wanted.maximum_annotations)
            log.warning(
                "project %d requested %d answers per task; put back to %d",
                project.id,
                found.maximum_annotations,
                wanted.maximum_annotations,
            )
        self._update_state(lambda known: replace(known, title=found.title, config=config))

    def _checked_config(self, project: Project) -> str:
        """Return the digest of the labelling interface, once answers under it mean what they did when it was pushed."""
        wanted, found = self.settings().label_config, project.settings.label_config
        edit = difference(wanted, found)
        if edit is None:
            return _sha(found)
        if not self.repair:
            raise InputError(
                f"project {project.id}: its labelling interface was edited in Label Studio ({edit}), so that "
                f"answers could be misread; undo the edit there, or let {self.repair_command} do it"
            )
        self.client.update_project(project.id, label_config=wanted)
        log.warning("project %d: put the labelling interface back (%s)", project.id, edit)
        return _sha(wanted)

    def _connect_bucket(self) -> None:
        """Let Label Studio show the pictures in the run's bucket."""
        from services.storage.s3 import S3Store

        store = self.run.store
        if not isinstance(store, S3Store):
            log.warning(
                "project %d shows pictures from the bucket that the run was pushed from", self.state.number
            )
            return
        fields = bucket_storage(store, f"Pictures of {self.run.name}")
        self.client.connect_bucket(self.state.number, fields)

    def _update_state(self, change: Callable[[ProjectState], ProjectState]) -> None:
        self.state = update_state(self.run.store, self.state, change)


@dataclass(eq=False)
class PresentTasks:
    """The tasks that are in the project already, of T."""

    ids: I64  # (T,) ids in Label Studio; 0 for a task that is missing
    answered: Bool  # (T,)
    in_bucket: bool = False  # whether some pictures are in the run's S3 store

    @classmethod
    def none(cls, count: int) -> PresentTasks:
        return cls(np.zeros(count, np.int64), np.zeros(count, bool))

    def add(self, index: int, task: Task) -> int:
        """Add a task. Of two equal ones return the id of the one to delete: never one that somebody answered."""
        first = int(self.ids[index])
        if first and not task.annotations:
            return task.id
        if first and self.answered[index]:
            return 0  # annotations.py reads two answered ones as one
        self.ids[index], self.answered[index] = task.id, bool(task.annotations)
        return first


def _attempts() -> Retrying:
    """Retry after lost replies and server failures, with growing pauses; the last failure is raised."""
    return Retrying(
        retry=retry_if_exception_type(ServiceError),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=PAUSE_S),
        reraise=True,
    )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
