"""The registry: immutable versions, which of them is in production, the changes of that, and promotion.

    registry/versions/000002.safetensors   a Candidate, written once, and again only where it is damaged
    registry/changes/000007.json           the RegistryState after the seventh change; the highest number is current

Every change is a new file that only one writer can create. So concurrent promotions cannot overwrite each other, and
the author, time and reason of every change stay on record.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from typing import Any

from defuse_core.codec import decode, encode
from defuse_core.errors import (
    CheckFailed,
    DamagedError,
    DefuseError,
    InputError,
    NoAnswerError,
    RunFileError,
    StoreError,
)
from defuse_core.runs import utc_now
from defuse_core.store import Store
from services.serving.candidate import Candidate
from services.serving.registry_state import (
    EMPTY,
    ChangeInfo,
    GoneError,
    PromotionRequest,
    RegistryState,
    VersionInfo,
    change_key,
    changed_error,
    parse_state,
    registry_command,
    version_key,
)

log = logging.getLogger("defuse")
AUTHOR = "defuse serve"  # author of changes that a replica makes
POLL_S = 2.0  # interval at which a server reads the registry
MAX_CONFLICTS = 20  # concurrent changes after which a change gives up
NO_CANARY = {"canary": None, "share": 0.0, "shadow": None}
PROMOTE_AGAIN = "promote its run again, or restore the file"
OF_ANOTHER_DEFUSE = "use the version of Defuse that wrote it, or promote another run with --force REASON"
CHANGED = "production changed meanwhile"
ENDED = "the canary or shadow of version {} ended just now"


class DamagedVersionError(DamagedError):
    """The file of a version is missing, damaged, or that of another version: to read it again does not help."""


class Registry:
    def __init__(self, store: Store) -> None:
        self.store = store.within("registry")
        self._last_read: tuple[RegistryState, str | None] | None = None  # with the version of its file

    def state(self) -> RegistryState:
        """Return the current state. Raises DamagedError for a registry of another format."""
        sequences = self._sequences()
        return self._read(sequences[-1], is_last=True) if sequences else EMPTY

    def state_after(self, known: RegistryState) -> RegistryState | None:
        """Return the current state; None, after two lookups, where it is `known`. Raises as `changes_after`.

        It reads no change in between, so a damaged one keeps no server from what is in production.
        """
        if self._has(known) and not self.store.exists(change_key(known.sequence + 1)):
            return None
        return self._state_of_existing()

    def changes_after(self, known: RegistryState) -> list[RegistryState]:
        """Return the state after each change since `known`, oldest first.

        Only the current one where `known` is no change any more, as after the registry was restored from a backup.
        Raises StoreError where it had changes and has none now.
        """
        if not self._has(known):
            return [self._state_of_existing()]
        found: list[RegistryState] = []
        while self.store.exists(change_key(known.sequence + len(found) + 1)):
            found.append(self._read(known.sequence + len(found) + 1))
        return found

    def _has(self, known: RegistryState) -> bool:
        """Return whether `known` is still the state after the change of its number; reads it where its file changed."""
        if not known.sequence:
            return True
        version = self.store.version(change_key(known.sequence))
        if self._last_read != (known, version):
            with contextlib.suppress(GoneError, DamagedError):
                self._last_read = self._read(known.sequence), version
        return self._last_read == (known, version)

    def _state_of_existing(self) -> RegistryState:
        state = self.state()
        if not state.sequence:
            raise GoneError(self.store)
        return state

    def file_version(self, number: int) -> str | None:
        """Return what changes where the file of version `number` does; None where it is missing."""
        return self.store.version(version_key(number))

    def load(self, number: int) -> Candidate:
        """Return version `number`. Raises InputError for an unknown one, and DamagedVersionError."""
        key = version_key(number)
        where = f"{self.store.address}/{key}"
        try:
            data = self.store.read(key)
        except FileNotFoundError as error:
            versions = self.state().versions
            if number in versions:
                missing = f"the file of version {number} is missing"
                raise DamagedVersionError(f"{where}: {missing}; {PROMOTE_AGAIN}") from error
            known = ", ".join(str(n) for n in versions) or "none"
            raise InputError(
                f"unknown version {number} in {self.store.address}; known versions: {known}"
            ) from error
        try:
            candidate = decode(Candidate, data, where, PROMOTE_AGAIN, OF_ANOTHER_DEFUSE)
            candidate.run_file()
        except StoreError as error:
            raise DamagedVersionError(str(error)) from error
        except RunFileError as error:
            raise DamagedVersionError(f"{where}: {error}; {OF_ANOTHER_DEFUSE}") from error
        info = self.state().versions.get(number)
        if info is not None and candidate.digest != info.digest:
            other = f"expected version {number} of run {info.run}, found another (run {candidate.run})"
            raise DamagedVersionError(f"{where}: {other}; {PROMOTE_AGAIN}")
        return candidate

    def add(self, candidate: Candidate, by: str, why: str, forced: bool) -> int:
        """Return the number of this candidate's version, a new one unless an equal one exists.

        The file of an equal one is written again where it is damaged or missing.
        """
        self.store.remove_unfinished()  # nobody locks a registry
        state = self.state()
        if known := state.versions_with(candidate.digest):
            self._repair(max(known), candidate)
            return max(known)
        number = max(state.versions, default=0) + 1
        data = encode(candidate)
        while not self.store.create(version_key(number), data) and not self._holds(number, data):
            number += 1
        info = VersionInfo(
            run=candidate.run, digest=candidate.digest, by=by, when=utc_now(), why=why, forced=forced,
            annotators=candidate.summary.annotators, components_digest=candidate.components_digest,
            watch=candidate.watch_figures(candidate.run_file().serve))  # fmt: skip

        def updates(state: RegistryState) -> dict[str, Any] | None:
            known = state.versions_with(candidate.digest)
            return None if known else {"versions": {**state.versions, number: info}}

        if self.change(f"added version {number}", by, why, updates):
            return number
        equal = self.add(candidate, by, why, forced)  # that a concurrent promotion has added
        if equal != number:
            self.store.delete(version_key(number))
        return equal

    def _holds(self, number: int, data: bytes) -> bool:
        """Whether the file of version `number` is `data`, as of a promotion that was killed."""
        with contextlib.suppress(FileNotFoundError):
            return self.store.read(version_key(number)) == data
        return False

    def _repair(self, number: int, candidate: Candidate) -> None:
        """Write version `number` again, which equals `candidate`, where its file is damaged or missing."""
        try:
            self.load(number)
        except DamagedVersionError:
            self.store.write(version_key(number), encode(candidate))
            log.warning(
                "version %d was damaged or missing; it is written again from run %s", number, candidate.run
            )

    def change(
        self, action: str, by: str, why: str, updates: Callable[[RegistryState], dict[str, Any] | None]
    ) -> RegistryState | None:
        """Store and return a new state: the current one updated with what `updates` returns for it.

        None, with nothing stored, where `updates` returns None: the change is done already. `updates` is called again
        after a concurrent change. It may replace `action`. An error that it raises leaves the registry unchanged.
        """
        for _ in range(MAX_CONFLICTS):
            current = self.state()
            if (updated := updates(current)) is None:
                return None
            sequence, author = current.sequence + 1, {"by": by, "when": utc_now(), "why": why}
            changes = {"action": action, "failed_checks": None, **updated, "sequence": sequence, **author}
            if "production" in changes:
                failed, since = changes["failed_checks"], current.since
                if since is None or failed or changes["production"] != current.production:
                    since = ChangeInfo(change=sequence, failed_checks=failed, **author)
                # another number where it is promoted again: a server of another run answers with it then
                changes["since"] = since.model_copy(update={"change": sequence})
            state = current.model_copy(update=changes)
            try:
                if self.store.create(change_key(sequence), state.model_dump_json(indent=1).encode()):
                    return state
            except NoAnswerError as error:
                see = f"see `{registry_command('promote', self.store)}` before you run the command again"
                raise NoAnswerError(f"this change may be stored: {see} ({error})") from error
        raise StoreError(
            f"{self.store.address}: {MAX_CONFLICTS} concurrent changes came first; run the command again"
        )

    def assign(
        self, number: int, request: PromotionRequest, failed_checks: tuple[str, ...], checked: RegistryState
    ) -> RegistryState:
        """Give version `number` the role of the request; an earlier canary or shadow ends, as the action says.

        `failed_checks` are what it was forced over in the state `checked`. Raises InputError for a canary or shadow
        without another version in production, where another version than in `checked` is, and for production where the
        version was canary or shadow in `checked` and has no role now.
        """
        action = f"version {number} {request.role}"

        def updates(state: RegistryState) -> dict[str, Any]:
            if state.production not in (checked.production, number):
                raise changed_error(CHANGED, self.store)
            was_compared = checked.canary_or_shadow == number
            has_role = number in (state.production, state.canary, state.shadow)
            if was_compared and not has_role and not request.is_canary_or_shadow:
                raise changed_error(ENDED.format(number), self.store)
            request.require_other_in_production(state, number)
            role: dict[str, Any] = {"production": number, "previous": state.rollback_targets(number)}
            if request.shadow:
                role = {"shadow": number}
            elif request.canary is not None:
                role = {"canary": number, "share": request.canary}
            text = action + state.also_ended_text(number)
            return {**NO_CANARY, **role, "failed_checks": failed_checks, "action": text}

        state = self.change(action, request.by, request.reason, updates)
        assert state is not None  # `updates` returns something always
        return state

    def end_canary(self, number: int, by: str, why: str) -> RegistryState | None:
        """End the canary or shadow of version `number`; None if it already ended."""

        def updates(state: RegistryState) -> dict[str, Any] | None:
            if number not in (state.canary, state.shadow):
                return None
            return {"action": state.ended_text, **NO_CANARY}

        return self.change(f"ended version {number}", by, why, updates)

    def why_ended(self, digest: str) -> list[str]:
        """Return one line, why a replica just ended the canary or shadow of this digest, or may have; else none."""
        state = self.state()
        if state.by != AUTHOR:
            return []
        ended = f"{AUTHOR} {state.action}: {state.why}"
        try:
            before = self._read(state.sequence - 1)
        except GoneError:  # of the change before, whose file nothing else needs
            return []
        except DamagedError as error:
            return [f"{ended}; whether that was this model is unknown: {error}"]
        return [ended] if before.canary_or_shadow in state.versions_with(digest) else []

    def roll_back(
        self,
        by: str,
        why: str,
        verify: Callable[[Candidate], None],
        *,
        production: bool = False,
        expected: int | None = None,
    ) -> RegistryState:
        """End the canary or shadow; without one, or with `production`, put the previous version back into production.

        Raises InputError where the previous version cannot be read, or `verify` raises a DefuseError for it, and where
        another version than `expected` is in production; without `production` also where the last change ended a canary
        or shadow: this was perhaps meant for that one.
        """
        current = self.state()
        if expected not in (None, current.production):
            raise InputError(
                f"expected version {expected} in production (--from), found another: {current.change_text}"
            )
        canary_or_shadow = None if production else current.canary_or_shadow
        if canary_or_shadow:
            ended = self.end_canary(canary_or_shadow, by, why)
            if ended is None:
                raise changed_error(ENDED.format(canary_or_shadow), self.store)
            return ended
        if not production and (reason := self._may_have_ended(current)):
            back = registry_command("rollback --production", self.store)
            raise InputError(f"{reason}; to take version {current.production} out of production: `{back}`")
        if not current.previous:
            raise InputError("no previous version to roll back to")
        self._verify_target(current.previous[-1], verify)

        action = f"rolled back from version {current.production}"

        def updates(state: RegistryState) -> dict[str, Any]:
            if state.production != current.production or not state.previous:
                raise changed_error(CHANGED, self.store)
            *earlier, number = state.previous
            text = action + state.also_ended_text(number)
            return {**NO_CANARY, "production": number, "previous": tuple(earlier), "action": text}

        state = self.change(action, by, why, updates)
        assert state is not None  # `updates` returns something always
        return state

    def _may_have_ended(self, current: RegistryState) -> str | None:
        """Return why the change to `current` has, or may have, ended a canary or shadow; None where it has not."""
        try:
            before = self._read(current.sequence - 1) if current.sequence > 1 else EMPTY
        except (GoneError, DamagedError):
            where = f"{self.store.address}/{change_key(current.sequence - 1)}"
            return f"the last change may have ended a canary or shadow ({where} is missing or damaged)"
        if before.canary_or_shadow in (None, current.production):
            return None
        return f"the last change has ended a canary or shadow ({current.change_text})"

    def _verify_target(self, number: int, verify: Callable[[Candidate], None]) -> None:
        try:
            verify(self.load(number))
        except DefuseError as error:
            raise InputError(
                f"version {number} cannot go back into production: {error}; promote another run with "
                f"`{registry_command('promote RUN', self.store)}`"
            ) from error

    def _sequences(self) -> list[int]:
        """Return the numbers of all changes, ascending; other files there, such as an editor's, do not count."""
        keys = self.store.within("changes").list()
        return sorted(int(key.removesuffix(".json")) for key in keys if re.fullmatch(r"\d{6,}\.json", key))

    def _read(self, sequence: int, *, is_last: bool = False) -> RegistryState:
        key = change_key(sequence)
        try:
            return parse_state(self.store.read(key), f"{self.store.address}/{key}", is_last)
        except FileNotFoundError as error:
            raise GoneError(self.store) from error


def promote(
    registry: Registry, candidate: Candidate, request: PromotionRequest, checked: RegistryState | None = None
) -> RegistryState:
    """Return the state after `candidate` got its role; `checked` is the state before its checks were made, else now.

    Raises CheckFailed naming the first reason against it, and InputError for a canary or shadow without another version
    in production, or where another version than in `checked` is; all leave the roles unchanged.
    """
    checked = registry.state() if checked is None else checked
    failed, warning = _compare(registry, checked, candidate, request)
    if not request.is_canary_or_shadow:
        failed += registry.why_ended(candidate.digest)
    if failed and request.force is None:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise CheckFailed(f"run {candidate.run} is not promoted: {failed[0]}{more}; --force REASON overrides")
    # before the version is added, since a run with a version cannot be deleted
    state = registry.state()
    known = max(state.versions_with(candidate.digest), default=None)
    if state.production not in (checked.production, known):
        raise changed_error(CHANGED, registry.store)
    request.require_other_in_production(state, known)
    number = registry.add(candidate, request.by, request.reason, forced=bool(failed))
    promoted = registry.assign(number, request, tuple(failed), checked)
    if warning:
        log.warning(warning)
    return promoted


def _compare(
    registry: Registry, state: RegistryState, candidate: Candidate, request: PromotionRequest
) -> tuple[list[str], str | None]:
    """Return the reasons against promoting `candidate`, one line each, and what to warn of once it is promoted."""
    failed, production = candidate.failed_checks(), state.production
    if production is None or candidate.digest == state.digest_of(production):
        return failed, None
    try:
        current = registry.load(production)
    except DefuseError as error:
        reason = f"interface: version {production} in production cannot be read to compare it ({error})"
        return [*failed, reason], None
    if differs := candidate.interface_error(current):
        return [*failed, differs], None
    if unknown := candidate.why_not_compared(current):
        compared = f"clean accuracy of run {candidate.run} is not compared with that of version {production}"
        return failed, f"{compared} in production: {unknown}"
    worse = candidate.accuracy_error(current, production)
    if worse and request.is_canary_or_shadow:
        return failed, f"{worse}; it needs --force to replace version {production}"
    return ([*failed, worse] if worse else failed), None
