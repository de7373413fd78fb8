"""Shares with a known error: confidence bounds and tests of proportions."""

from __future__ import annotations

import numpy as np
from scipy import stats

from defuse_core.artifacts import F64, I64


def wilson(hits: I64, total: I64, confidence: float = 0.95) -> tuple[F64, F64]:
    """Return Wilson's bounds of the shares hits/total, low and high, two-sided; 0 and 1 where total is 0."""
    z = stats.norm.ppf(0.5 + confidence / 2)
    counts = np.maximum(total, 1)
    share, square = hits / counts, z**2 / counts
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    nothing = np.asarray(total) == 0
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    return np.where(nothing, 0.0, low), np.where(nothing, 1.0, high)


def lower_bound(hits: I64, total: I64, confidence: float = 0.95) -> F64:
    """Return the one-sided lower bound of Wilson's of the shares hits/total."""
    return wilson(hits, total, 2 * confidence - 1)[0]


def significantly_over(hits: I64, total: I64, share: float, false_discovery_rate: float) -> np.ndarray:  # type: ignore[type-arg]
    """Return which of the shares hits/total are over `share`, (S,): exact binomial tests, Benjamini and Hochberg."""
    if not len(hits):
        return np.zeros(0, np.bool_)
    tests = np.where(total > 0, stats.binom.sf(hits - 1, total, share), 1.0)
    over: np.ndarray = stats.false_discovery_control(tests) <= false_discovery_rate  # type: ignore[type-arg]
    return over


def probability_not_over(hits: I64, total: I64, share: float) -> F64:
    """Return the posterior probability, under a uniform prior, that the true shares are at most `share`."""
    probability: F64 = stats.beta.cdf(share, hits + 1, total - hits + 1)
    return probability
