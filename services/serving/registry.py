"""The registry: immutable versions, and which of them answers in production.

    registry/versions/000002.safetensors   a Candidate, written once
    registry/standing/000007.json          who answers since the seventh change; the highest number holds

Every change is a new file that only one writer can create, so two people promoting at once cannot lose each other's
change, and who did what, when and why stays readable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from defuse_core.codec import decode, encode
from defuse_core.errors import InputError, StoreError
from defuse_core.store import Store
from services.serving.candidate import Candidate

TRIES = 20  # of a change that others keep overtaking


class Note(BaseModel):
    """Where a version comes from, and who let it in."""

    model_config = ConfigDict(frozen=True)

    run: str
    digest: str
    by: str
    when: str
    why: str
    forced: bool  # in spite of checks that failed
    annotators: str  # who labelled its scenarios: people, or reference models


class Stamp(BaseModel):
    """The number of a change, by whose hand it was, when and why."""

    model_config = ConfigDict(frozen=True)

    change: int
    by: str
    when: str
    why: str


class Standing(BaseModel):
    """Who answers."""

    model_config = ConfigDict(frozen=True)

    sequence: int = 0
    """How many changes there have been."""
    production: int | None = None
    """The version that answers."""
    since: Stamp | None = None
    """How that version came to answer."""
    previous: tuple[int, ...] = ()
    """Versions that answered before it, oldest first: what rollback returns to."""
    canary: int | None = None
    """A version that answers a share of the requests."""
    share: float = 0.0
    """That share, 0 to 1."""
    shadow: int | None = None
    """A version that is asked too, and whose answers are only compared."""
    action: str = "nothing was promoted yet"
    by: str = ""
    when: str = ""
    why: str = ""
    versions: dict[int, Note] = {}
    """All versions there are."""


class Registry:
    """The registry of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store.within("registry")

    def standing(self) -> Standing:
        """Return who answers now."""
        keys = self.store.within("standing").list()
        return self._read(int(keys[-1].removesuffix(".json"))) if keys else Standing()

    def history(self) -> list[Standing]:
        """Return every change, oldest first."""
        return [self._read(int(key.removesuffix(".json"))) for key in self.store.within("standing").list()]

    def newer(self, sequence: int) -> Standing | None:
        """Return who answers now if that changed after `sequence`. One look at one key where it did not."""
        return self.standing() if self.store.exists(_standing_key(sequence + 1)) else None

    def load(self, number: int) -> Candidate:
        """Return version `number`. Raises InputError if there is none."""
        try:
            return decode(Candidate, self.store.read(_version_key(number)), _version_key(number))
        except FileNotFoundError as error:
            known = ", ".join(str(n) for n in self.standing().versions) or "none"
            raise InputError(
                f"there is no version {number} in {self.store.address}; there are: {known}"
            ) from error

    def add(self, candidate: Candidate, by: str, why: str, forced: bool) -> int:
        """Return the number of this candidate's version, a new one unless an equal one is a version already."""
        known = [n for n, note in self.standing().versions.items() if note.digest == candidate.digest]
        if known:
            return known[-1]
        number = max(self.standing().versions, default=0) + 1
        data = encode(candidate)
        while not self.store.create(_version_key(number), data):
            number += 1
        note = Note(
            run=candidate.run,
            digest=candidate.digest,
            by=by,
            when=now(),
            why=why,
            forced=forced,
            annotators=candidate.facts["annotators"],
        )

        def noted(standing: Standing) -> dict[str, Any]:
            return {"versions": {**standing.versions, number: note}}

        self.change(f"added version {number}", by, why, noted)
        return number

    def change(
        self, action: str, by: str, why: str, changed: Callable[[Standing], dict[str, Any]]
    ) -> Standing:
        """Put down a new standing: the present one updated with what `changed` returns for it.

        `changed` is called again where somebody else came first. Its errors leave everything as it was.
        """
        for _ in range(TRIES):
            present = self.standing()
            sequence, when, changes = present.sequence + 1, now(), changed(present)
            if "production" in changes:
                changes["since"] = Stamp(change=sequence, by=by, when=when, why=why)
            changes |= {"sequence": sequence, "action": action, "by": by, "when": when, "why": why}
            standing = present.model_copy(update=changes)
            if self.store.create(
                _standing_key(standing.sequence), standing.model_dump_json(indent=1).encode()
            ):
                return standing
        raise StoreError(f"{self.store.address}: others kept changing the registry; run the command again")

    def _read(self, sequence: int) -> Standing:
        key = _standing_key(sequence)
        try:
            return Standing.model_validate_json(self.store.read(key))
        except ValidationError as error:
            raise StoreError(
                f"{self.store.address}/{key}: expected a standing, found {error.errors()[0]['msg']}"
            ) from error


def _version_key(number: int) -> str:
    return f"versions/{number:06d}.safetensors"


def _standing_key(sequence: int) -> str:
    return f"standing/{sequence:06d}.json"


def now() -> str:
    """Return the time as it is written down: 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
