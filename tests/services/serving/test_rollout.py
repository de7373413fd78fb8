"""Which requests a canary gets, and when it must go."""

from __future__ import annotations

import numpy as np
import pytest

from defuse_core.config import ServeSection
from services.serving.rollout import Tally, takes_part, wilson

LIMITS = ServeSection(max_errors=0.02, min_agreement=0.95, min_compared=50)


def test_a_key_is_always_on_the_same_side_and_the_share_is_kept():
    keys = [f"user-{n}".encode() for n in range(20_000)]
    first = [takes_part(key, 3, 0.05) for key in keys]
    assert first == [takes_part(key, 3, 0.05) for key in keys]
    assert np.mean(first) == pytest.approx(0.05, abs=0.005)
    other = np.mean([a and takes_part(key, 4, 0.05) for key, a in zip(keys, first, strict=True)])
    assert other < 0.005  # another canary meets other users


def test_a_larger_share_keeps_those_who_had_the_canary_already():
    keys = [f"user-{n}".encode() for n in range(2_000)]
    assert all(takes_part(key, 3, 0.2) for key in keys if takes_part(key, 3, 0.05))


@pytest.mark.parametrize("total", [30, 200])
def test_the_interval_holds_the_true_share_as_often_as_it_says(total):
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.95):
        bounds = [wilson(int(hits), total) for hits in rng.binomial(total, share, 2000)]
        assert np.mean([low <= share <= high for low, high in bounds]) > 0.97


@pytest.mark.parametrize(
    ("tally", "reason"),
    [
        (Tally(), None),
        (Tally(answered=49, errors=49), None),
        (Tally(answered=50, errors=50), "50 of 50 images failed"),
        (Tally(answered=1000, errors=21), None),
        (Tally(answered=1000, errors=60), "60 of 1000 images failed"),
        (Tally(answered=1000, compared=1000, agreed=950), None),
        (Tally(answered=1000, compared=1000, agreed=900), "900 of 1000 answers agreed"),
        (Tally(answered=1000, compared=10, agreed=0), None),
    ],
)
def test_a_canary_goes_only_when_it_is_sure_to_be_worse_than_allowed(tally, reason):
    found = tally.verdict(LIMITS)
    assert (found is None) if reason is None else found.startswith(reason)
