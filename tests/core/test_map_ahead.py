"""Reads of a store that run ahead of their use."""

from __future__ import annotations

import threading

import pytest

from defuse_core.files import map_ahead
from tests.waiting import WAIT_S


def test_results_come_in_order_although_they_are_made_side_by_side() -> None:
    both = threading.Barrier(2, timeout=WAIT_S)

    def meet(item: int) -> int:
        both.wait()  # passes only while two items are worked on at once
        return 10 * item

    assert list(map_ahead(meet, range(6), ahead=2)) == [0, 10, 20, 30, 40, 50]


def test_no_more_results_are_held_than_asked_for() -> None:
    started: list[int] = []
    results = map_ahead(lambda item: started.append(item) or item, range(1000), ahead=3)
    assert next(results) == 0
    assert len(started) <= 4
    results.close()


def test_an_error_comes_with_its_item_and_not_before() -> None:
    results = map_ahead(lambda item: 1 // (2 - item), range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
