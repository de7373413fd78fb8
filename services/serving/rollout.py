"""Moving production from one version to another: at once, as a canary, in the shadow, and back again."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from services.serving.registry import Registry, Standing

SURE = 2.576  # standard normal quantile: a canary is judged by the bounds of a 99 % interval
NOBODY = {"canary": None, "share": 0.0, "shadow": None}


def to_production(registry: Registry, number: int, by: str, why: str) -> Standing:
    """Let version `number` answer everything."""

    def changed(standing: Standing) -> dict[str, Any]:
        if standing.production in (None, number):
            return {"production": number, **NOBODY}
        return {"production": number, "previous": (*standing.previous, standing.production), **NOBODY}

    return registry.change(f"version {number} to production", by, why, changed)


def to_canary(registry: Registry, number: int, share: float, by: str, why: str) -> Standing:
    """Let version `number` answer a share of the requests. Raises InputError without another one in production."""

    def changed(standing: Standing) -> dict[str, Any]:
        _expect_other(standing, number, "--canary")
        return NOBODY | {"canary": number, "share": share}

    return registry.change(f"version {number} as canary for {share:.1%}", by, why, changed)


def to_shadow(registry: Registry, number: int, by: str, why: str) -> Standing:
    """Ask version `number` too and compare. Raises InputError without another one in production."""

    def changed(standing: Standing) -> dict[str, Any]:
        _expect_other(standing, number, "--shadow")
        return NOBODY | {"shadow": number}

    return registry.change(f"version {number} in the shadow", by, why, changed)


def _expect_other(standing: Standing, number: int, option: str) -> None:
    if standing.production is None:
        raise InputError(
            f"{option} goes beside a version in production, and there is none; promote without it first"
        )
    if standing.production == number:
        raise InputError(f"{option}: version {number} is in production already")


def roll_back(registry: Registry, by: str, why: str) -> Standing:
    """End the canary or the shadow if there is one, else put the version before back into production."""
    present = registry.standing()
    beside = present.canary or present.shadow
    if beside:
        ended = end_trial(registry, beside, by, why)
        if ended is None:
            raise InputError(
                f"the trial of version {beside} ended just now; look again with `defuse promote`"
            )
        return ended
    if not present.previous:
        raise InputError("there is no version before this one to roll back to")

    def changed(standing: Standing) -> dict[str, Any]:
        if standing.production != present.production or not standing.previous:
            raise InputError("somebody else changed production just now; look again with `defuse promote`")
        return {"production": standing.previous[-1], "previous": standing.previous[:-1], **NOBODY}

    return registry.change(f"rolled back from version {present.production}", by, why, changed)


class _AlreadyEnded(Exception):  # noqa: N818 - not an error: there is nothing to do
    """The trial that should end is not on any more."""


def end_trial(registry: Registry, number: int, by: str, why: str) -> Standing | None:
    """End the canary or shadow of version `number`; None if it is not on any more."""

    def changed(standing: Standing) -> dict[str, Any]:
        if number not in (standing.canary, standing.shadow):
            raise _AlreadyEnded
        return NOBODY

    try:
        return registry.change(f"ended the trial of version {number}", by, why, changed)
    except _AlreadyEnded:
        return None


def takes_part(key: bytes, number: int, share: float) -> bool:
    """Return whether the request with this key goes to canary `number`: always the same answer for the same key."""
    drawn = hashlib.blake2b(key, digest_size=8, salt=number.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn, "little") < share * 2**64


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 99 % interval of a share of which `hits` of `total` were seen (Wilson, 1927)."""
    if not total:
        return 0.0, 1.0
    share, z2 = hits / total, SURE**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = SURE * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return middle - half, middle + half


@dataclass
class Tally:
    """How a canary or shadow does on one replica. Agreement counts images outside the known scenarios only:
    inside them, to disagree is what the correction was for."""

    answered: int = 0  # images, errors included
    errors: int = 0
    compared: int = 0
    agreed: int = 0

    def verdict(self, limits: ServeSection) -> str | None:
        """Return why the version must go, or None while it may stay."""
        if self.answered < limits.min_compared:
            return None
        if wilson(self.errors, self.answered)[0] > limits.max_errors:
            return f"{self.errors} of {self.answered} images failed, at most {limits.max_errors:.1%} may"
        if (
            self.compared >= limits.min_compared
            and wilson(self.agreed, self.compared)[1] < limits.min_agreement
        ):
            return (
                f"{self.agreed} of {self.compared} answers agreed, at least {limits.min_agreement:.1%} must"
            )
        return None
