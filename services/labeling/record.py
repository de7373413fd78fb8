"""What a run remembers about its Label Studio project: `labeling.json` in the run's store.

No secrets, no e-mails.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

from defuse_core.artifacts import Gallery
from defuse_core.errors import InputError
from defuse_core.store import Store

KEY = "labeling.json"


@dataclass(frozen=True)
class Record:
    """Which project belongs to the run, and who its annotators are."""

    mark: str  # stands in the project's description: how it is recognised, also after a lost reply
    gallery: str  # digest of the images that were pushed
    address: str = ""
    project: int | None = None  # None until the server answered
    title: str = ""
    config: str = ""  # SHA-256 of the labelling interface as pushed
    pushed: bool = False  # every image was there once, so one that is missing was deleted
    people: dict[str, int] = field(default_factory=dict)  # user id -> n of the pseudonym annotator-n
    simulated: bool = False  # reference models answered through the accounts of simulated people

    @property
    def number(self) -> int:
        """The project's number. Only for a record whose project was made."""
        assert self.project is not None
        return self.project

    def with_people(self, seen: Iterable[int]) -> Record:
        """Return the record with a number for everyone in `seen`, in order of appearance.

        Numbers never change.
        """
        people = dict(self.people)
        for person in seen:
            people.setdefault(str(person), len(people) + 1)
        return replace(self, people=people)

    def pseudonym(self, person: int) -> str:
        return f"annotator-{self.people[str(person)]}"


def new_mark() -> str:
    return f"defuse-{secrets.token_hex(8)}"


def read_record(store: Store, gallery: Gallery) -> Record:
    """Return the run's record, or a new one.

    Raises InputError where other images were pushed than `gallery`'s.
    """
    digest = gallery_digest(gallery)
    record = _stored(store)
    if record is None:
        return Record(mark=new_mark(), gallery=digest)
    if record.gallery != digest:
        raise InputError(
            f"project {record.project} shows other images than this run's gallery now holds; take another "
            f"--name, or delete {store.address}/{KEY} to push the new images to a new project"
        )
    return record


def update_record(store: Store, record: Record, change: Callable[[Record], Record]) -> Record:
    """Apply `change` to the record that was read before, with what other commands noted since; return the new one."""
    known = _stored(store)
    changed = change(known or record)
    if changed != known:
        write_record(store, changed)
    return changed


def _stored(store: Store) -> Record | None:
    try:
        return Record(**json.loads(store.read(KEY)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{store.address}/{KEY}: expected what Defuse wrote there, found something else"
        ) from error


def write_record(store: Store, record: Record) -> None:
    store.write(KEY, json.dumps(asdict(record), indent=1).encode())


def gallery_digest(gallery: Gallery) -> str:
    """Return what tells one gallery from another: its images as people see them, its answers and classes."""
    sha = hashlib.sha256(repr((gallery.classes, gallery.images.shape)).encode())
    sha.update(gallery.predicted.tobytes())
    for scenario in gallery.images:  # one after the other, so that a large gallery is not copied
        sha.update((scenario * 255).round().astype("uint8").tobytes())
    return sha.hexdigest()
