"""What is sent to Label Studio, what it returns, and what a run stores about its project.

What its API accepts and returns has the API's own names of fields; Task has names of its own. The run stores
`labeling.json`, without credentials or e-mail addresses.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Literal, NotRequired, TypedDict

from pydantic import ConfigDict, TypeAdapter, ValidationError

from defuse_core.artifacts import Gallery
from defuse_core.errors import ANOTHER_NAME, InputError
from defuse_core.store import GONE, Store

STATE_KEY = "labeling.json"
LOST = f"{STATE_KEY} is missing: {GONE}"


class ChoiceValue(TypedDict):
    choices: list[str]


class ChoiceResult(TypedDict):
    from_name: str  # the control
    to_name: str  # the object that it labels
    type: Literal["choices"]
    value: ChoiceValue


def choice_result(control: str, target: str, choice: str) -> ChoiceResult:
    """Return one choice in the form in which Label Studio's page submits it."""
    return {"from_name": control, "to_name": target, "type": "choices", "value": {"choices": [choice]}}


class PreselectedAnswer(TypedDict):
    """A prediction of Label Studio: the answer that a task begins with."""

    model_version: str
    score: float
    result: list[ChoiceResult]


class ImageData(TypedDict):
    """What a task of one image shows."""

    image: str  # data: address


class PageSample(TypedDict):
    image: str  # data: address
    prediction: str  # the classifier's answer, in words


class PageData(TypedDict):
    """What a task of a whole scenario shows."""

    page: str
    samples: list[PageSample]


class TaskMeta(TypedDict):
    """What Defuse stores with a task, which annotators do not see."""

    sample_key: str
    digest: str  # of the key and the data


class TaskImport(TypedDict):
    data: ImageData | PageData
    meta: TaskMeta
    predictions: NotRequired[list[PreselectedAnswer]]


@dataclass(frozen=True)
class ProjectSettings:
    """The settings of a project that Defuse sets, by their names in Label Studio's API."""

    title: str
    description: str
    label_config: str
    expert_instruction: str
    show_instruction: bool
    show_skip_button: bool
    maximum_annotations: int
    sampling: str
    show_collab_predictions: bool
    model_version: str


@dataclass(frozen=True, slots=True)
class UserRow:
    id: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotation; nobody has checked what is in its result, the server neither."""

    id: int
    created_at: datetime
    updated_at: datetime
    completed_by: UserRow | int | None = None
    result: object = None
    was_cancelled: bool | None = None  # a skip

    @property
    def annotator(self) -> int | None:
        """The user id; None where the account was deleted."""
        return self.completed_by.id if isinstance(self.completed_by, UserRow) else self.completed_by


@dataclass(frozen=True, slots=True)
class Task:
    id: int
    key: str | None  # the sample_key that tasks.py gave it; None for a task that Defuse did not import
    digest: str | None  # of its data when it was imported
    overlap: int
    labeled: bool  # whether Label Studio has taken it out of the queue
    annotations: tuple[Annotation, ...]
    data: Mapping[str, object] | None  # None unless asked for


@dataclass(frozen=True)
class Project:
    id: int
    settings: ProjectSettings


@dataclass(frozen=True, slots=True)
class ValueRow:
    choices: list[object] | None = None


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One part of an annotation: what was chosen in one control."""

    value: ValueRow
    from_name: str = ""


ANNOTATION = TypeAdapter(Annotation)
RESULT_ROW = TypeAdapter(ResultRow)


@dataclass(frozen=True)
class ProjectState:
    """What a run stores about its Label Studio project: which one it is, and the pseudonyms of its annotators."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    mark: str  # part of the project's description, which identifies it, also after a lost reply
    gallery: str  # digest of the images that were pushed
    secret: str = field(repr=False)  # of the tasks' digests
    address: str = ""
    organization: int | None = None  # that the project is in
    project: int | None = None  # None until the server has replied
    title: str = ""
    interface: str = ""  # the labelling interface as pushed
    instructions: str = ""  # for annotators, as Label Studio stored them
    reported: str = ""  # digest of an edited layout or edited instructions that were logged
    most_asked: int = 0  # the largest review.answers_per_task so far, to which answers count
    pushed: bool = False  # every task existed once, so one that is missing was deleted
    people: dict[str, int] = field(default_factory=dict)  # user id -> n of the pseudonym annotator-n
    simulated: bool = False  # reference models answered through the accounts of simulated annotators
    version: Literal[5] = 5

    @classmethod
    def new(cls, gallery: str) -> ProjectState:
        """Return the state of a project that is yet to be made, with a mark and a secret of its own."""
        return cls(f"defuse-{secrets.token_hex(8)}", gallery, secrets.token_hex(16))

    @property
    def number(self) -> int:
        """The project's id in Label Studio, once it was pushed. Raises InputError where the run has lost it."""
        if self.project is None:
            raise InputError(LOST)
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


STORED_STATE = TypeAdapter(ProjectState)


def read_state(store: Store, gallery: Gallery) -> ProjectState:
    """Return the state of the run's project, or a new one.

    Raises InputError if other images were pushed than those of `gallery`.
    """
    digest_now = gallery_digest(gallery)
    state = _stored_state(store)
    if state is None:
        return ProjectState.new(digest_now)
    if state.gallery != digest_now:
        raise InputError(
            f"project {state.project} shows other images than this run's gallery now contains; use "
            f"{ANOTHER_NAME}, or delete {store.address}/{STATE_KEY} to push the new images to a new project"
        )
    return state


def update_state(
    store: Store, state: ProjectState, change: Callable[[ProjectState], ProjectState]
) -> ProjectState:
    """Apply `change` to the stored state, which other commands may have changed since `state` was read; return it.

    Raises InputError where the state of a project is gone: the run was deleted, and a later one of its name is another.
    """
    known = _stored_state(store)
    if known is None and state.project is not None:
        raise InputError(f"{store.address}/{LOST}")
    changed = change(known or state)
    if changed != known:
        write_state(store, changed)
    return changed


def write_state(store: Store, state: ProjectState) -> None:
    store.write(STATE_KEY, json.dumps(asdict(state), indent=1).encode())


def set_aside(store: Store, state: ProjectState, *keys: str) -> str:
    """Copy these files of a lost project under names with its number, and return the first of these.

    If the project comes back, copied over the originals they are its state again.
    """
    own = {key: key.replace(".json", f"-{state.project}-{state.mark[-4:]}.json") for key in keys}
    for key in keys:
        if store.exists(key):
            store.write(own[key], store.read(key))
    return own[keys[0]]


def _stored_state(store: Store) -> ProjectState | None:
    try:
        return STORED_STATE.validate_json(store.read(STATE_KEY))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InputError(
            f"{store.address}/{STATE_KEY}: expected what this version of Defuse wrote there, found something else; "
            "finish the review with the version that began it, restore the file, or delete it to push the images to a "
            "new project"
        ) from error


def gallery_digest(gallery: Gallery) -> str:
    """Return a digest of a gallery: of its images as annotators see them, of its predictions and classes."""
    sha = hashlib.sha256(repr((gallery.classes, gallery.images.shape)).encode())
    sha.update(gallery.predicted.tobytes())
    for scenario in gallery.images:  # one after the other, so that a large gallery is not copied
        sha.update((scenario * 255).round().astype("uint8").tobytes())
    return sha.hexdigest()
