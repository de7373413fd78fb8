"""Who answers on this replica, and following the registry without losing a request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from defuse_core.codec import decode
from defuse_core.config import ServeSection
from defuse_core.errors import StoreError
from defuse_core.store import Store
from services.serving.candidate import OF_THE_VERSION, Candidate
from services.serving.predict import Served
from services.serving.registry import Registry, Standing
from services.serving.rollout import Tally, end_trial, takes_part

log = logging.getLogger("defuse")


@dataclass(frozen=True)
class Source:
    """What a server answers with: the candidate at `key`, until another one comes to production than `begun` says."""

    key: str | None = None  # in the store; None: only what the registry says
    begun: Standing = field(default_factory=Standing)  # when the server was started
    pin: bool = False  # never follow the registry


@dataclass(frozen=True, eq=False)
class Lineup:
    """The versions loaded at one time. It never changes: a request keeps the one that it began with."""

    production: Served | None = None
    canary: Served | None = None
    share: float = 0.0
    shadow: Served | None = None
    standing: Standing = field(default_factory=Standing)
    tally: Tally = field(default_factory=Tally)  # of the canary or the shadow

    def canary_for(self, key: bytes) -> Served | None:
        """Return the canary if the request with this key is one of its share."""
        number = self.standing.canary
        if self.canary is None or number is None or not takes_part(key, number, self.share):
            return None
        return self.canary

    def roles(self) -> dict[str, Served]:
        roles = {"production": self.production, "canary": self.canary, "shadow": self.shadow}
        return {role: served for role, served in roles.items() if served is not None}


class Follower:
    """Loads what the registry says, beside what is loaded already."""

    def __init__(
        self, store: Store, source: Source, settings: ServeSection, changes: Mapping[str, Any]
    ) -> None:
        """`changes` are the fields of section `serve` that stand above every version's run file."""
        self.store, self.source, self.settings, self.changes = store, source, settings, changes
        self.registry = Registry(store)
        self.seen = source.begun.sequence

    def first(self) -> Lineup:
        """Return the lineup to begin with; without production where nothing was promoted yet. Raises DefuseError."""
        own = Lineup() if self.source.key is None else Lineup(self._candidate(self.source.key))
        return self.next(own) or own

    def next(self, present: Lineup) -> Lineup | None:
        """Return the lineup after a change of the registry, loaded and warm; None where nothing changed."""
        if self.source.pin:
            return None
        standing = self.registry.newer(self.seen)
        if standing is None:
            return None
        lineup = self._lineup(standing, present)
        self.seen = standing.sequence
        log.info(
            "change %d: %s; production is version %s", standing.sequence, standing.action, standing.production
        )
        return lineup

    def _lineup(self, standing: Standing, present: Lineup) -> Lineup:
        loaded = {served.number: served for served in present.roles().values()}
        production = present.production
        if self.source.key is None or standing.since != self.source.begun.since:
            production = self._version(standing.production, loaded) or production
        same_trial = (standing.canary, standing.shadow) == (present.standing.canary, present.standing.shadow)
        return Lineup(
            production=production,
            canary=self._trial(standing.canary, loaded),
            share=standing.share,
            shadow=self._trial(standing.shadow, loaded),
            standing=standing,
            tally=present.tally if same_trial else Tally(),
        )

    def _trial(self, number: int | None, loaded: Mapping[int | None, Served]) -> Served | None:
        """Return a canary or shadow. One that cannot be loaded is ended: production must not suffer for it."""
        try:
            return self._version(number, loaded)
        except StoreError:
            raise  # the next look may find the store well again
        except Exception as error:  # out of a GPU's memory, say
            assert number is not None
            log.error("version %d cannot be tried: %s", number, error)
            end_trial(self.registry, number, "defuse serve", str(error))
            return None

    def _version(self, number: int | None, loaded: Mapping[int | None, Served]) -> Served | None:
        if number is None:
            return None
        return loaded.get(number) or self._ready(self.registry.load(number), number)

    def _candidate(self, key: str) -> Served:
        candidate = decode(Candidate, self.store.read(key), f"{self.store.address}/{key}")
        return self._ready(candidate)

    def _ready(self, candidate: Candidate, number: int | None = None) -> Served:
        own = candidate.serve_section(self.changes)
        settings = self.settings.model_copy(update={field: getattr(own, field) for field in OF_THE_VERSION})
        served = Served(candidate, settings, number)
        served.warm_up(self.settings.batch_size)
        return served
