"""What a run stores about its Label Studio project: `labeling.json`, without credentials or e-mail addresses."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

from pydantic import ConfigDict, TypeAdapter, ValidationError

from defuse_core.artifacts import Gallery
from defuse_core.errors import ANOTHER_NAME, InputError
from defuse_core.store import GONE, Store

VERSION = 4  # of the stored state
STATE_KEY = "labeling.json"


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
    pushed: bool = False  # every task existed once, so one that is missing was deleted
    people: dict[str, int] = field(default_factory=dict)  # user id -> n of the pseudonym annotator-n
    simulated: bool = False  # reference models answered through the accounts of simulated annotators
    version: int = VERSION

    @property
    def number(self) -> int:
        """The project's id in Label Studio, once it was pushed. Raises InputError where the run has lost it."""
        if self.project is None:
            raise InputError(f"{STATE_KEY} is missing: {GONE}")
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


@dataclass(frozen=True)
class StoredVersion:
    version: int = 1


STORED_VERSION, STORED_STATE = TypeAdapter(StoredVersion), TypeAdapter(ProjectState)


def new_mark() -> str:
    return f"defuse-{secrets.token_hex(8)}"


def new_secret() -> str:
    return secrets.token_hex(16)


def read_state(store: Store, gallery: Gallery) -> ProjectState:
    """Return the state of the run's project, or a new one.

    Raises InputError if other images were pushed than those of `gallery`.
    """
    digest_now = gallery_digest(gallery)
    state = _stored_state(store)
    if state is None:
        return ProjectState(mark=new_mark(), gallery=digest_now, secret=new_secret())
    if state.gallery != digest_now:
        raise InputError(
            f"project {state.project} shows other images than this run's gallery now contains; use "
            f"{ANOTHER_NAME}, or delete {store.address}/{STATE_KEY} to push the new images to a new project"
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
        data = store.read(STATE_KEY)
        version = STORED_VERSION.validate_json(data).version
        if version == VERSION:
            return STORED_STATE.validate_json(data)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InputError(
            f"{store.address}/{STATE_KEY}: expected what Defuse wrote there, found something else; restore it, or "
            f"delete it to push the images to a new project"
        ) from error
    raise InputError(
        f"{store.address}/{STATE_KEY} has version {version}, this Defuse reads version {VERSION}: finish the review "
        f"with the version that began it, or delete the file to push the images to a new project"
    )


def gallery_digest(gallery: Gallery) -> str:
    """Return a digest of a gallery: of its images as annotators see them, of its predictions and classes."""
    sha = hashlib.sha256(repr((gallery.classes, gallery.images.shape)).encode())
    sha.update(gallery.predicted.tobytes())
    for scenario in gallery.images:  # one after the other, so that a large gallery is not copied
        sha.update((scenario * 255).round().astype("uint8").tobytes())
    return sha.hexdigest()
