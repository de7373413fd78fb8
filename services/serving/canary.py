"""Canaries and shadows: which requests they receive, how they compare with production, and when they end."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import special

from defuse_core.artifacts import F32, Bool
from defuse_core.config import ServeSection
from services.serving.batching import PredictionResult
from services.serving.model import LoadedModel, ModelOutput

WRONGLY_ENDED = 0.01  # highest probability that one of its two counts ever ends a canary within the limits
# Requests for the shadow above this are dropped: answers have priority over comparisons.
MAX_PENDING_SHADOWS = 4
SHADOW_TIME_SHARE = 0.2  # of the time, at most, in which a shadow computes


def is_in_canary(key: bytes, number: int, share: float) -> bool:
    """Return whether the request with this key goes to canary `number`: the same answer for the same key."""
    digest = hashlib.blake2b(key, digest_size=8, salt=number.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def is_above(limit: float, hits: int, total: int) -> bool:
    """Return whether a rate of which `hits` of `total` were observed is above `limit`; to be asked at any time.

    Where the rate is `limit` or below, the answer is yes at any time with a probability of WRONGLY_ENDED at most. The
    likelihood of all higher rates, uniformly mixed, over that of the limit is a supermartingale there, and such a ratio
    seldom ever exceeds 1 / WRONGLY_ENDED (Ville, 1939; Robbins, 1970, "Statistical methods related to the law of the
    iterated logarithm").
    """
    if hits <= limit * total:
        return False
    misses = total - hits
    mixed = special.betaln(hits + 1, misses + 1) + np.log(special.betaincc(hits + 1, misses + 1, limit))
    at_limit = special.xlogy(hits, limit) + special.xlog1py(misses, -limit)
    return bool(mixed - np.log1p(-limit) - at_limit > -np.log(WRONGLY_ENDED))


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

    Agreement counts images outside the known scenarios only: inside them, the correction is meant to disagree.
    """

    answered: int = 0  # images, errors included
    errors: int = 0  # images without an answer, or with one after serve.max_canary_s
    compared: int = 0
    agreed: int = 0

    def add_errors(self, images: int) -> None:
        self.answered += images
        self.errors += images

    def add_comparison(self, comparison: Comparison) -> None:
        self.answered += len(comparison.agreed)
        self.compared += int((~comparison.inside).sum())
        self.agreed += int((comparison.agreed & ~comparison.inside).sum())

    def reason_to_end(self, limits: ServeSection) -> str | None:
        """Return why the version is ended, or None while it is within the limits."""
        if self.answered < limits.min_compared:
            return None
        if is_above(limits.max_errors, self.errors, self.answered):
            return (
                f"{self.errors} of {self.answered} images failed or took longer than {limits.max_canary_s:g} s, the "
                f"limit is {limits.max_errors:.1%}"
            )
        differed = self.compared - self.agreed
        if self.compared >= limits.min_compared and is_above(
            1 - limits.min_agreement, differed, self.compared
        ):
            return (
                f"{self.agreed} of {self.compared} answers agreed with production, expected at least "
                f"{limits.min_agreement:.1%}"
            )
        return None


@dataclass(frozen=True, eq=False)
class ShadowRequest:
    """One request that production has answered, for a shadow to answer too."""

    shadow: LoadedModel
    pixels: F32  # (n, channels, H, W)
    report: Callable[[PredictionResult], None]  # called with the shadow's


class ShadowRunner:
    """Runs a shadow in a thread of its own, with pauses, so that production keeps its speed.

    A low priority of the thread would not help: it could lose the processor while it holds Python's interpreter lock.
    """

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._pending: list[ShadowRequest] = []
        self._thread = ThreadPoolExecutor(1, "shadow")

    async def run(self, request: ShadowRequest) -> None:
        """Return after this request and those that arrive meanwhile are reported; drop requests above the limit.

        Raises what `report` raises, and drops the requests that are left.
        """
        if len(self._pending) >= MAX_PENDING_SHADOWS:
            return
        self._pending.append(request)
        if len(self._pending) > 1:
            return  # another call runs it
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                started = loop.time()
                current = self._pending[0]
                current.report(await loop.run_in_executor(self._thread, self._predict, current))
                await asyncio.sleep((loop.time() - started) * (1 / SHADOW_TIME_SHARE - 1))
                self._pending.pop(0)
        finally:
            self._pending.clear()  # after an error too: what is left would keep later calls from running

    def _predict(self, request: ShadowRequest) -> PredictionResult:
        started = time.thread_time()  # of the processor: the time that other threads take is not the shadow's
        try:
            output = request.shadow.predict(request.pixels)
        except Exception as error:
            return error
        seconds = time.thread_time() - started
        return output if seconds <= self._max_seconds else TimeoutError(f"it took {seconds:.2f} s")
