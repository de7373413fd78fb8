"""`defuse promote`: from a run's corrected classifier to a version that answers."""

from __future__ import annotations

from dataclasses import dataclass

from defuse_core.errors import CheckFailed, DefuseError, InputError
from services.serving.candidate import Candidate
from services.serving.registry import Registry, Standing
from services.serving.rollout import to_canary, to_production, to_shadow


@dataclass(frozen=True)
class How:
    """How a version comes in, by whose hand and why."""

    by: str
    why: str
    force: str | None = None  # the reason to let it in although checks failed
    canary: float | None = None  # its share of the requests, 0 to 1
    shadow: bool = False


def promote(registry: Registry, candidate: Candidate, how: How) -> Standing:
    """Return the standing after `candidate` came in. Raises CheckFailed if it may not, naming the first reason."""
    failed = obstacles(registry, candidate)
    if failed and how.force is None:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise CheckFailed(f"run {candidate.run} is not promoted: {failed[0]}{more}; --force REASON overrides")
    why = f"{how.why}; forced: {how.force}".lstrip("; ") if how.force else how.why
    number = registry.add(candidate, how.by, why, forced=bool(failed))
    if how.shadow:
        return to_shadow(registry, number, how.by, why)
    if how.canary is not None:
        return to_canary(registry, number, how.canary, how.by, why)
    return to_production(registry, number, how.by, why)


def obstacles(registry: Registry, candidate: Candidate) -> list[str]:
    """Return what speaks against promoting `candidate`, one line each."""
    failed = candidate.failed()
    production = registry.standing().production
    if production is None:
        return failed
    try:
        present = _interface(registry.load(production))
    except DefuseError as error:
        return [
            *failed,
            f"interface: version {production} in production cannot be read to compare with ({error})",
        ]
    ours = _interface(candidate)
    if ours == present:
        return failed
    return [*failed, f"interface: expected {_told(*present)} as in production, found {_told(*ours)}"]


def _interface(candidate: Candidate) -> tuple[int, int, tuple[str, ...]]:
    data = candidate.run_file().data
    return data.channels, data.image_size, tuple(candidate.classes)


def _told(channels: int, size: int, classes: tuple[str, ...]) -> str:
    return f"{channels}x{size}x{size} pixels and {len(classes)} classes ({', '.join(classes)})"


def share_of(text: str) -> float:
    """Return 0.05 for `5%` or `0.05`. Raises InputError for anything but a share above 0 and below 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InputError(f"--canary {text}: expected a share such as 5%")
    return share
