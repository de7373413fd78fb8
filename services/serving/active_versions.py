"""The versions that a replica has loaded: which of them answers, how they compare, and which ones come next.

A canary or shadow is compared with production, and ended where it fails or disagrees too often.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import special

from defuse_core.artifacts import F32, Bool
from defuse_core.codec import decode
from defuse_core.config import ServeSection
from defuse_core.errors import DefuseError, NoAnswerError, StoreError
from defuse_core.formatting import count_of, percent
from defuse_core.store import Store
from services.serving.candidate import VERSION_FIELDS, Candidate, with_settings
from services.serving.model import LoadedModel, ModelOutput, PredictionResult, select_device
from services.serving.registry import AUTHOR, POLL_S, PROMOTE_AGAIN, DamagedVersionError, Registry
from services.serving.registry_state import EMPTY, RegistryState, registry_command
from services.storage import is_store_failure

log = logging.getLogger("defuse")
MAX_PAUSE_S = 60.0  # longest pause before a failed load is tried again, where nothing changed
MAX_PENDING_SHADOWS = 4  # requests above this are dropped: answers have priority over comparisons
SHADOW_TIME_SHARE = 0.2  # largest share of the time in which a shadow computes
ERROR_WINDOW_S = 1.0  # errors within it count once, as a share of its requests
MIN_SECONDS = 4  # seconds with requests before errors are judged: a stall fills two, and ends no good version
WRONGLY_ENDED = 0.01  # highest probability that one of its two counts ever ends a canary within the limits


@dataclass(frozen=True)
class InitialModel:
    """The model that a server starts with: the candidate at `key`, until the registry's production changes."""

    key: str | None = None  # in the store; None: what the registry has in production
    state: RegistryState = EMPTY  # of the registry when the server was started
    pin: bool = False  # ignore the registry


@dataclass(frozen=True, eq=False)
class Comparison:
    """The answers of production and of a canary or shadow to the same n images."""

    agreed: Bool  # (n,) same class
    inside: Bool  # (n,) inside a failure scenario of either version

    @classmethod
    def of(cls, production: ModelOutput, other: ModelOutput) -> Comparison:
        agreed = np.equal(production.probabilities.argmax(axis=1), other.probabilities.argmax(axis=1))
        inside = np.logical_or(production.inside.any(axis=1), other.inside.any(axis=1))
        return cls(agreed, inside)


@dataclass
class CanaryStatistics:
    """Counts of a canary or shadow on one replica.

    What happens together counts once, since `is_above` takes its counts as independent: requests that a stall delays
    fail within a second or two, and the images of one request may be much alike. So errors are counted by second, and
    agreement by request: as the share of the requests, or of the images outside the known scenarios (inside them, the
    correction is meant to disagree).
    """

    answered: int = 0  # requests, those with errors included
    failed: int = 0  # of them: without an answer within serve.max_canary_s
    seconds: int = 0  # that are over, and had requests
    errors: float = 0.0  # sum of their shares of requests that failed
    compared: int = 0  # requests with images outside the known scenarios
    agreed: float = 0.0  # sum of the shares of these images that both answer alike
    _second: list[bool] = field(default_factory=list)  # whether each request since _started is an error
    _started: float = 0.0  # of time.monotonic

    def add_error(self) -> None:
        self._add_request(True)

    def add_comparison(self, comparison: Comparison) -> None:
        self._add_request(False)
        outside = comparison.agreed[~comparison.inside]
        if len(outside):
            self.compared += 1
            self.agreed += float(outside.mean())

    def _add_request(self, is_error: bool) -> None:
        if self._second and time.monotonic() >= self._started + ERROR_WINDOW_S:
            self.seconds += 1
            self.errors += sum(self._second) / len(self._second)
            self._second = []
        if not self._second:
            self._started = time.monotonic()
        self._second.append(is_error)
        self.answered += 1
        self.failed += is_error

    def reason_to_end(self, limits: ServeSection) -> str | None:
        is_judged = self.answered >= limits.min_compared and self.seconds >= MIN_SECONDS
        is_over = self.failed > limits.max_errors * self.answered  # a second may have a single request
        if is_judged and is_over and is_above(limits.max_errors, self.errors, self.seconds):
            return (
                f"{self.failed} of {count_of(self.answered, 'request')} failed or took longer than "
                f"{limits.max_canary_s:g} s, the limit is {percent(limits.max_errors)}"
            )
        differed = self.compared - self.agreed
        if self.compared >= limits.min_compared and is_above(
            1 - limits.min_agreement, differed, self.compared
        ):
            return (
                f"{percent(self.agreed / self.compared)} of the answers to {count_of(self.compared, 'request')} agreed "
                f"with production, expected at least {percent(limits.min_agreement)}"
            )
        return None


def is_above(limit: float, hits: float, total: int) -> bool:
    """Return whether a rate of which `hits` of `total` were observed is above `limit`; to be asked at any time.

    Where the rate is `limit` or below, the answer is yes at any time with a probability of WRONGLY_ENDED at most. The
    likelihood of all higher rates, uniformly mixed, over that of the limit is a supermartingale there, and such a ratio
    seldom ever exceeds 1 / WRONGLY_ENDED (Ville, 1939; Robbins, 1970, "Statistical methods related to the law of the
    iterated logarithm"). `hits` may be a sum of shares: a share makes the ratio smaller than chance with that rate.
    """
    if hits <= limit * total:
        return False
    misses = total - hits
    mixed = special.betaln(hits + 1, misses + 1) + np.log(special.betaincc(hits + 1, misses + 1, limit))
    at_limit = special.xlogy(hits, limit) + special.xlog1py(misses, -limit)
    return bool(mixed - np.log1p(-limit) - at_limit > -np.log(WRONGLY_ENDED))


class ShadowRunner:
    """Runs a shadow in a thread of its own, with pauses, so that production keeps its speed.

    A low priority of the thread would not help: it could lose the processor while it holds Python's interpreter lock.
    """

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._pending: list[tuple[LoadedModel, F32, Callable[[PredictionResult], None]]] = []
        self._thread = ThreadPoolExecutor(1, "shadow")

    async def run(self, shadow: LoadedModel, pixels: F32, report: Callable[[PredictionResult], None]) -> None:
        """Report what the shadow answers to a request that production has answered, for pixels (n, channels, H, W).

        Returns after this request and those that arrive meanwhile are reported; drops requests above the limit. Raises
        what `report` raises, and drops the requests that are left.
        """
        if len(self._pending) >= MAX_PENDING_SHADOWS:
            return
        self._pending.append((shadow, pixels, report))
        if len(self._pending) > 1:
            return  # another call runs it
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                started = loop.time()
                shadow, pixels, report = self._pending[0]
                report(await loop.run_in_executor(self._thread, self._predict, shadow, pixels))
                await asyncio.sleep((loop.time() - started) * (1 / SHADOW_TIME_SHARE - 1))
                self._pending.pop(0)
        finally:
            self._pending.clear()  # after an error too: what is left would keep later calls from running

    def _predict(self, shadow: LoadedModel, pixels: F32) -> PredictionResult:
        started = time.thread_time()  # of the processor: the time that other threads take is not the shadow's
        try:
            output = shadow.predict(pixels)
        except Exception as error:
            return error
        seconds = time.thread_time() - started
        return output if seconds <= self._max_seconds else TimeoutError(f"it took {seconds:.2f} s")


@dataclass(frozen=True, eq=False)
class ActiveVersions:
    """The loaded versions by role. Immutable: a request keeps the versions that it started with."""

    production: LoadedModel | None = None
    canary: LoadedModel | None = None
    shadow: LoadedModel | None = None
    state: RegistryState = EMPTY
    is_complete: bool = True  # False: the canary or shadow of `state` is still to be loaded, or to be ended
    statistics: CanaryStatistics = field(default_factory=CanaryStatistics)  # of the canary or the shadow
    error: str | None = None  # why the registry's versions could not be loaded
    is_outage: bool = False  # whether that is a store that does not answer now

    @property
    def in_production(self) -> LoadedModel:
        assert self.production is not None
        return self.production

    def by_role(self) -> dict[str, LoadedModel]:
        roles = {"production": self.production, "canary": self.canary, "shadow": self.shadow}
        return {role: model for role, model in roles.items() if model is not None}

    def names(self) -> dict[str, str]:
        return {role: model.name for role, model in self.by_role().items()}


@dataclass(frozen=True)
class _FailedLoad:
    """A version in production that could not be loaded. To try again costs its whole file and the memory of a model."""

    state: RegistryState
    file: str | None  # what changes where the file does
    why: str
    pause_s: float
    until: float  # of time.monotonic


class RegistryWatcher:
    """Loads the versions that the registry names, while the loaded ones go on answering."""

    def __init__(
        self, store: Store, initial: InitialModel, section: ServeSection, settings: Mapping[str, Any]
    ) -> None:
        """`settings` are fields of section `serve` that take precedence over every version's run file."""
        self.store, self.initial, self.section, self.settings = store, initial, section, settings
        self.registry = Registry(store)
        self._failed: _FailedLoad | None = None
        self._reported = ""  # the last error of `load_initial`
        # why the canary or shadow of a state could not be loaded, where its end is not stored in the registry yet
        self._unfit: tuple[RegistryState, str] | None = None

    def load_initial(self) -> ActiveVersions:
        """Return the versions to start with, a canary or shadow among them; none before the first promotion.

        Where the registry's versions cannot be loaded, requests are answered with the reason until they can: a
        replica that does not start has no way to say it. Raises DefuseError for the model of `initial`, unless
        another version has replaced it.
        """
        select_device(self.section.device)
        own, failure = ActiveVersions(), None
        if self.initial.key is not None:
            try:
                own = ActiveVersions(self._load_candidate(self.initial.key))
            except DefuseError as error:
                failure = error
        try:
            active = self.load_changes(own) or own
        except DefuseError as error:
            if str(error) != self._reported:
                log.error("the registry's version cannot be loaded: %s", error)
            self._reported = str(error)
            active = replace(own, error=reason_for_clients(error), is_outage=isinstance(error, NoAnswerError))
        if failure is not None and active.production is None:
            raise failure
        return active

    def load_changes(self, current: ActiveVersions, ended: int | None = None) -> ActiveVersions | None:
        """Return the versions after a change of the registry, loaded and warm; None without a change.

        `ended` is the canary or shadow that this replica ended, where the registry may still have it: it is not loaded.
        A change whose canary or shadow the store does not return is loaded without it, and again at the next call.
        A version in production that failed to load is tried again after growing pauses; its error is raised meanwhile.
        """
        if self.initial.pin:
            return None
        state = self.registry.state_after(current.state) or current.state
        if state is current.state and current.is_complete:
            return None
        self._require_no_pause(state)
        try:
            production = self._load_production(state, current)
        except Exception as error:
            if not is_store_failure(error):
                self._failed = self._failed_load(state, error)
            if not _is_canary_ended(current, state):
                raise
            return ActiveVersions(current.production, state=current.state)  # the next call raises the error
        self._failed = None
        versions = self._with_canary(production, state, current, ended)
        if state != current.state:
            if replaced := state.replaced_text(current.state):
                log.warning("%s", replaced)
            log.info("registry change %d: %s; %s", state.sequence, state.action, state.production_text)
        return versions

    def _require_no_pause(self, state: RegistryState) -> None:
        """Raise the error of the last load again during the pause after it, unless the registry or the file changed."""
        failed = self._failed
        if failed is None or failed.state != state or time.monotonic() >= failed.until:
            return
        if self._file_of_production(state) == failed.file:
            raise StoreError(failed.why)

    def _failed_load(self, state: RegistryState, error: Exception) -> _FailedLoad:
        before, pause_s = self._failed, POLL_S
        file = self._file_of_production(state)
        if before is not None and (before.state, before.file) == (state, file):
            pause_s = min(2 * before.pause_s, MAX_PAUSE_S)
        return _FailedLoad(state, file, str(error), pause_s, time.monotonic() + pause_s)

    def _file_of_production(self, state: RegistryState) -> str | None:
        return None if state.production is None else self.registry.file_version(state.production)

    def _load_production(self, state: RegistryState, current: ActiveVersions) -> LoadedModel | None:
        """Return the version in production; the current model where there is none, or none has replaced `initial`."""
        model = current.production
        follows = model is not None and model.number is not None  # a version replaced its run
        is_replaced = self.initial.key is None or follows or state.since != self.initial.state.since
        if state.production is None or not is_replaced:
            return model
        return self._load_version(state.production, state, current)

    def _with_canary(
        self, production: LoadedModel | None, state: RegistryState, current: ActiveVersions, ended: int | None
    ) -> ActiveVersions:
        """Return `production` with the canary or shadow of the state, unless that is `ended` or cannot be loaded."""
        # a canary is compared with production, and ended for all servers; no server of another run decides that
        comparable = production is not None and production.number == state.production
        wanted = state.canary_or_shadow if comparable and state.canary_or_shadow != ended else None
        model = None if wanted is None else self._load_canary(wanted, state, current)
        versions = ActiveVersions(
            production=production,
            canary=model if state.canary else None,
            shadow=model if state.shadow else None,
            state=state,
            is_complete=wanted is None or model is not None,
        )
        same = versions.by_role() == current.by_role()
        return replace(versions, statistics=current.statistics) if same else versions

    def _load_canary(self, number: int, state: RegistryState, current: ActiveVersions) -> LoadedModel | None:
        """Return the canary or shadow; None if the store does not return it now, or if it is unfit: it is ended then.

        An error does not affect production. A version is loaded once: each attempt reads its whole file, and takes
        memory of production.
        """
        if self._unfit is None or self._unfit[0] != state:
            try:
                return self._load_version(number, state, current)
            except Exception as error:  # for example out of GPU memory
                log.error("version %d cannot be loaded: %s", number, error)
                if is_store_failure(error):
                    return None
                self._unfit = state, str(error)
        try:
            self.registry.end_canary(number, AUTHOR, self._unfit[1])
        except StoreError as failure:
            log.error("version %d: its end is not stored in the registry yet: %s", number, failure)
        return None

    def _load_version(self, number: int, state: RegistryState, current: ActiveVersions) -> LoadedModel:
        """Return version `number`: the loaded one, unless a registry that was made again has another of the number."""
        loaded = current.by_role().values()
        same = (model for model in loaded if model.number == number and _equals(model, number, state))
        return next(same, None) or self._load_warm(self.registry.load(number), number)

    def _load_candidate(self, key: str) -> LoadedModel:
        """Return the model of `initial`: as the version in production where it equals that one."""
        path = f"{self.store.address}/{key}"
        try:
            data = self.store.read(key)
        except FileNotFoundError as error:
            raise DamagedVersionError(
                f"{path}: the model that this server was started with is missing, as after `defuse delete`; promote "
                f"a run with `{registry_command('promote RUN', self.registry.store)}`, or serve another one"
            ) from error
        candidate, state = decode(Candidate, data, path), self.initial.state
        is_version = not self.initial.pin and state.production in state.versions_with(candidate.digest)
        return self._load_warm(candidate, state.production if is_version else None)

    def _load_warm(self, candidate: Candidate, number: int | None) -> LoadedModel:
        own = with_settings(candidate.run_file().serve, self.settings)
        section = self.section.model_copy(update={field: getattr(own, field) for field in VERSION_FIELDS})
        model = LoadedModel(candidate, section, number)
        model.warm_up(self.section.batch_size)
        return model


def _is_canary_ended(current: ActiveVersions, state: RegistryState) -> bool:
    """Return whether there is a loaded canary or shadow that is none any more."""
    model = current.canary or current.shadow
    return model is not None and model.number not in (state.canary, state.shadow)


def _equals(model: LoadedModel, number: int, state: RegistryState) -> bool:
    """Return whether `model`, a version or that of a run, has the content of version `number`."""
    info = state.versions.get(number)
    return model.number == number if info is None else info.digest == model.candidate.digest


def reason_for_clients(error: Exception) -> str:
    """Return why no version answers, without the paths of the store: clients read it without a token."""
    if isinstance(error, DamagedVersionError):
        return f"the version in production is damaged or missing: {PROMOTE_AGAIN}"
    return "the version in production cannot be loaded; the log of the server says why"
