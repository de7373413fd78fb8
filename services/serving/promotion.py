"""Promotion: whether a candidate may get a role, by its checks and in comparison with the version in production."""

from __future__ import annotations

import logging

from defuse_core.errors import CheckFailed, DefuseError, InputError
from services.serving.candidate import Candidate
from services.serving.registry import CHANGED, PromotionRequest, Registry
from services.serving.registry_state import RegistryState

log = logging.getLogger("defuse")


def promote(
    registry: Registry, candidate: Candidate, request: PromotionRequest, checked: RegistryState | None = None
) -> RegistryState:
    """Return the state after `candidate` got its role; `checked` is the state before its checks were made, else now.

    Raises CheckFailed naming the first reason against it, and InputError for a canary or shadow without another version
    in production, or where another version than in `checked` is; all leave the roles unchanged.
    """
    checked = registry.state() if checked is None else checked
    failed, warning = _compare(registry, checked, candidate, request)
    if failed and request.force is None:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise CheckFailed(f"run {candidate.run} is not promoted: {failed[0]}{more}; --force REASON overrides")
    # before the version is added, since a run with a version cannot be deleted
    state = registry.state()
    known = max(state.versions_with(candidate.digest), default=None)
    if state.production not in (checked.production, known):
        raise InputError(CHANGED)
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
    if worse and (request.shadow or request.canary is not None):
        return failed, f"{worse}; it needs --force to replace version {production}"
    return ([*failed, worse] if worse else failed), None
