"""What the registry stores of a change, the versions and their roles after it, and what a promotion asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from defuse_core.errors import DamagedError, InputError, StoreError
from defuse_core.formatting import percent
from defuse_core.report.evidence_schema import WatchFigures
from defuse_core.store import Store, command_text

FORMAT: Final = 6  # format of the files of the registry, and of the versions


class VersionInfo(BaseModel):
    """The origin of a version, and who added it."""

    model_config = ConfigDict(frozen=True)

    run: str
    digest: str
    by: str
    when: str
    why: str
    forced: bool  # added although checks failed
    annotators: str  # who labelled its scenarios: people, or reference models
    watch: WatchFigures  # how well its failing inputs are found
    components_digest: str  # distinguishes the run from others of its name


class ChangeInfo(BaseModel):
    """The author, time and reason of the change that put a version into production."""

    model_config = ConfigDict(frozen=True)

    change: int  # its number, or that of the last promotion of the version while it was in production
    by: str
    when: str
    why: str
    failed_checks: tuple[str, ...] | None = None  # what it was forced over; None of a rollback


NO_VERSION = "no version is in production"


class RegistryState(BaseModel):
    """Which versions exist, and which of them answer requests."""

    model_config = ConfigDict(frozen=True)

    format: Literal[6]  # FORMAT
    sequence: int = 0  # number of changes so far
    production: int | None = None  # the version that answers
    since: ChangeInfo | None = None  # the change that put this version into production
    previous: tuple[int, ...] = ()  # versions in production before it, oldest first: the targets of rollback
    canary: int | None = None  # a version that answers a share of the requests
    share: float = 0.0  # that share, 0 to 1
    shadow: int | None = None  # a version that receives a copy of the requests, to compare its answers
    action: str = ""  # what the last change did, and its author, time and reason
    by: str = ""
    when: str = ""
    why: str = ""
    # what spoke against this promotion, which was forced if there is any; None for another change
    failed_checks: tuple[str, ...] | None = None
    versions: dict[int, VersionInfo] = {}  # all versions by number

    def versions_with(self, digest: str) -> list[int]:
        return [number for number, info in self.versions.items() if info.digest == digest]

    def digest_of(self, number: int) -> str | int:
        """Return the digest of a version; its number where this state lacks the version, which equals no other then."""
        return self.versions[number].digest if number in self.versions else number

    @property
    def canary_or_shadow(self) -> int | None:
        return self.canary or self.shadow

    @property
    def ended_text(self) -> str:
        """What the end of the canary or shadow is called: `ended the canary of version 2`."""
        return f"ended the {'canary' if self.canary else 'shadow'} of version {self.canary_or_shadow}"

    def also_ended_text(self, number: int) -> str:
        """Return, with a semicolon, that a change for version `number` ends that of another version, if any."""
        return "" if self.canary_or_shadow in (None, number) else f"; {self.ended_text}"

    def rollback_targets(self, promoted: int) -> tuple[int, ...]:
        """Return `previous` once version `promoted` is in production: each differs from the version after it."""
        found = [promoted]
        for number in (self.production, *reversed(self.previous)):
            if number and self.digest_of(number) != self.digest_of(found[-1]):
                found.append(number)
        return tuple(reversed(found[1:]))

    @property
    def production_text(self) -> str:
        """What is in production, as a sentence: `version 3 is in production`."""
        return NO_VERSION if self.production is None else f"version {self.production} is in production"

    @property
    def change_text(self) -> str:
        """The change that led here, as one line: its time, author and reason, and what is in production."""
        reason = f" ({self.why})" if self.why else ""
        return f"{self.when} {self.by}: {self.action}{reason}; {self.production_text}"

    def replaced_text(self, known: RegistryState) -> str:
        """Say that this state, later than `known`, has no higher number; empty where it has.

        So it is after the registry was made again, or restored from a backup.
        """
        if self.sequence > known.sequence:
            return ""
        return (
            "the registry was restored from a backup or made again: the last change was number "
            f"{known.sequence}, and is number {self.sequence} now"
        )


@dataclass(frozen=True)
class PromotionRequest:
    """The role that a version gets, with author and reason."""

    by: str
    why: str
    force: str | None = None  # the reason to promote although checks fail, or production speaks against it
    canary: float | None = None  # its share of the requests, 0 to 1
    shadow: bool = False

    @property
    def reason(self) -> str:
        """Why, and for which reason it was forced."""
        return f"{self.why}; forced: {self.force}".lstrip("; ") if self.force else self.why

    @property
    def is_canary_or_shadow(self) -> bool:
        return self.shadow or self.canary is not None

    @property
    def role(self) -> str:
        """The role, in the words of a change's action."""
        if self.shadow:
            return "as shadow"
        return "to production" if self.canary is None else f"as canary for {percent(self.canary, None)}"

    def require_other_in_production(self, state: RegistryState, number: int | None) -> None:
        """Raise InputError for a canary or shadow unless production is another version than `number`.

        `number` is None for a version that is still to be added.
        """
        if not self.is_canary_or_shadow:
            return
        option = "--shadow" if self.shadow else "--canary"
        if state.production is None:
            raise InputError(
                f"{option} needs another version in production, and there is none; promote without it first"
            )
        if state.production == number:
            run = state.versions[state.production].run
            raise InputError(
                f"{option}: this model is already in production, as version {number} of run {run}"
            )


EMPTY = RegistryState(format=FORMAT)
# where the last change is damaged; the files of all versions stay, and no number is given again
DELETE_IT = "or delete it: the change before it counts then, also for servers that run; then repeat this one"


def registry_command(words: str, registry: Store) -> str:
    """Return `defuse WORDS`, with --store unless the folder `registry` is in the default store."""
    return command_text(words.split(), registry.address.removesuffix("/registry"))


def changed_error(what: str, registry: Store) -> InputError:
    """Return the error of a command that another change has overtaken: `what` says how."""
    return InputError(f"{what}; see `{registry_command('promote', registry)}` for the new state")


class GoneError(StoreError):
    """A registry that had changes has them no more."""

    def __init__(self, store: Store) -> None:
        promotion = registry_command("promote RUN", store)
        super().__init__(
            f"{store.address}: the registry is gone; restore it, or promote a run with `{promotion}`"
        )


def version_key(number: int) -> str:
    return f"versions/{number:06d}.safetensors"


def change_key(sequence: int) -> str:
    return f"changes/{sequence:06d}.json"


def parse_state(text: bytes, where: str, is_last: bool) -> RegistryState:
    """Return the state in the JSON `text`. Raises DamagedError, naming `where`, for another format or other text.

    The last change may be deleted then.
    """
    try:
        return RegistryState.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        found, remedy = first["msg"], "restore the file" + (f", {DELETE_IT}" if is_last else "")
        if first["loc"] == ("format",):
            found = f"format {first['input']}" if first["type"] == "literal_error" else "none"
            remedy = "use the version of Defuse that wrote it, or rename its folder and promote a run of this version"
        raise DamagedError(
            f"{where}: expected a registry state of format {FORMAT}, found {found}; {remedy}"
        ) from error
