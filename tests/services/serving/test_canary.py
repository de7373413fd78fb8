"""Which requests a canary gets, when it must go, and how a shadow goes on after an error."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from defuse_core.config import ServeSection
from defuse_core.runs import Run
from services.serving.active_versions import (
    CanaryStatistics,
    Comparison,
    ShadowRunner,
    is_above,
)
from services.serving.candidate import prepare_candidate
from services.serving.deployment import is_in_canary
from services.serving.model import LoadedModel, ModelOutput, PredictionResult
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest
from tests.services.serving.replicas import new_replica, post, put

LIMITS = ServeSection(max_errors=0.02, min_agreement=0.95, min_compared=50)


def test_a_key_is_always_on_the_same_side_and_the_share_is_met():
    keys = [f"user-{n}".encode() for n in range(20_000)]
    first = [is_in_canary(key, 3, 0.05) for key in keys]
    assert first == [is_in_canary(key, 3, 0.05) for key in keys]
    assert np.mean(first) == pytest.approx(0.05, abs=0.005)
    other = np.mean([a and is_in_canary(key, 4, 0.05) for key, a in zip(keys, first, strict=True)])
    assert other < 0.005  # another canary meets other users


def test_a_larger_share_contains_the_keys_of_a_smaller_one():
    keys = [f"user-{n}".encode() for n in range(2_000)]
    assert all(is_in_canary(key, 3, 0.2) for key in keys if is_in_canary(key, 3, 0.05))


def ever_above(limit: float, rate: float, images: int) -> float:
    """Return the share of 200 versions with this rate of errors that are ended, asked after every seventh image."""
    hits = np.cumsum(np.random.default_rng(int(rate * 1e6) + images).random((200, images)) < rate, axis=1)
    rows = range(50, images, 7)
    return sum(any(is_above(limit, int(row[n - 1]), n) for n in rows) for row in hits) / len(hits)


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.5])
def test_a_version_at_its_limit_is_seldom_ended_however_often_one_looks(limit):
    assert (
        ever_above(limit, limit, 2000) <= 0.02
    )  # 1 % and chance; the bounds of a fixed number of images: 5 to 10 %


def test_a_version_over_its_limit_is_ended_within_some_hundred_images():
    assert ever_above(0.02, 0.06, 600) >= 0.95
    assert ever_above(0.05, 0.12, 600) >= 0.95
    assert is_above(0.05, 50, 50)


def test_limits_that_allow_no_error_or_every_error():
    assert is_above(0.0, 1, 50) and not is_above(0.0, 0, 50)
    assert not is_above(1.0, 50, 50)


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.5])
@pytest.mark.parametrize("total", [50, 300])
def test_a_version_is_ended_from_the_count_on_at_which_the_mean_likelihood_of_higher_rates_is_100_fold(
    limit, total
):
    rates = limit + (1 - limit) * (np.arange(200_000) + 0.5) / 200_000  # evenly above the limit

    def ratio(hits: int) -> float:
        logs = hits * np.log(rates / limit) + (total - hits) * np.log((1 - rates) / (1 - limit))
        return float(np.exp(logs).mean())

    first = next(hits for hits in range(total) if hits > limit * total and ratio(hits) > 100)
    assert is_above(limit, first, total) and not is_above(limit, first - 1, total)


def output(classes: list[int], inside: list[list[bool]]) -> ModelOutput:
    """An output of three classes with these answers."""
    rows, scenarios = len(classes), np.array(inside)
    return ModelOutput(
        np.eye(3, dtype=np.float32)[classes],
        np.zeros(scenarios.shape, np.float32),
        scenarios,
        None,
        np.zeros(rows, np.bool_),
    )


def test_images_inside_a_scenario_of_either_version_are_answered_and_not_compared():
    outside = [False, False]
    production = output([0, 0, 0, 0, 1], [outside, [False, True], outside, outside, outside])
    other = output([0, 0, 2, 2, 1], [outside, outside, [True, False], outside, outside])
    comparison = Comparison.of(production, other)
    assert comparison.agreed.tolist() == [True, True, False, False, True]
    assert comparison.inside.tolist() == [False, True, True, False, False]
    statistics = CanaryStatistics()
    for each in (comparison, Comparison(np.array([True]), np.array([True])), comparison):
        statistics.add_comparison(each)
    statistics.add_error()
    assert (statistics.answered, statistics.compared) == (4, 2)
    assert statistics.agreed == pytest.approx(2 * 2 / 3)


class Requests:
    """Counts the requests of a canary at times of a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.counts = 0.0, CanaryStatistics()
        monkeypatch.setattr("services.serving.active_versions.time.monotonic", lambda: self.now)

    def add(self, number: int, per_second: float, images: int = 1, agreed: int | None = None) -> None:
        """Add so many requests; with `agreed`, each with so many of its images alike, and without, errors."""
        for _ in range(number):
            if agreed is None:
                self.counts.add_error()
            else:
                self.counts.add_comparison(Comparison(np.arange(images) < agreed, np.zeros(images, np.bool_)))
            self.now += 1 / per_second


@pytest.mark.parametrize("late_s", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("before", [0, 20, 50, 300])
def test_a_stall_that_delays_all_waiting_requests_ends_no_good_canary(monkeypatch, before, late_s):
    requests = Requests(monkeypatch)
    requests.add(before, 20, agreed=1)
    for agreed, number in ((None, round(100 * late_s)), (1, 1000)):
        for _ in range(number):
            requests.add(1, 100, agreed=agreed)
            assert requests.counts.reason_to_end(LIMITS) is None
    assert requests.counts.errors > 0


def test_a_few_slow_requests_at_night_end_no_canary_that_is_right_by_day(monkeypatch):
    requests = Requests(monkeypatch)
    requests.add(6000, 100, agreed=1)
    for _ in range(9):
        requests.add(1, 0.5)
        requests.add(1, 0.5, agreed=1)
        assert requests.counts.reason_to_end(LIMITS) is None


def test_images_of_one_request_count_once(monkeypatch):
    requests = Requests(monkeypatch)
    requests.add(1000, 20, agreed=1)
    requests.add(1, 1, images=64, agreed=0)
    assert (requests.counts.compared, requests.counts.agreed) == (1001, 1000)
    assert requests.counts.reason_to_end(LIMITS) is None


@pytest.mark.parametrize(
    ("per_second", "bad", "seconds"), [(20, 20, 6), (0.5, 1, 102), (100, 50, 7), (100, 10, 90)]
)
def test_a_canary_whose_requests_fail_is_ended_within_some_seconds(monkeypatch, per_second, bad, seconds):
    """Of those of each second, `bad` fail; one always fails after min_compared requests and four seconds."""
    requests = Requests(monkeypatch)
    while requests.counts.reason_to_end(LIMITS) is None:
        requests.add(bad, per_second)
        requests.add(round(max(per_second, 1)) - bad, per_second, agreed=1)
    assert requests.now <= seconds
    counts = requests.counts
    told = f"{counts.failed} of {counts.answered:,} requests failed or took longer than 1 s, "
    assert str(counts.reason_to_end(LIMITS)).startswith(told)


@pytest.mark.parametrize(
    ("tally", "reason"),
    [
        (CanaryStatistics(), None),
        (CanaryStatistics(answered=49, failed=49, seconds=49, errors=49), None),
        (CanaryStatistics(answered=50, failed=50, seconds=3, errors=3), None),
        (CanaryStatistics(answered=50, failed=50, seconds=4, errors=4), "50 of 50 requests failed"),
        (CanaryStatistics(answered=9000, failed=190, seconds=1000, errors=21), None),
        (CanaryStatistics(answered=9000, failed=180, seconds=1000, errors=60), None),
        (
            CanaryStatistics(answered=9000, failed=540, seconds=1000, errors=60),
            "540 of 9,000 requests failed",
        ),
        (CanaryStatistics(answered=1000, compared=1000, agreed=950), None),
        (
            CanaryStatistics(answered=1000, compared=1000, agreed=900),
            "90.0 % of the answers to 1,000 requests agreed",
        ),
        (CanaryStatistics(answered=1000, compared=49, agreed=0), None),
        (
            CanaryStatistics(answered=1000, compared=50, agreed=0),
            "0.0 % of the answers to 50 requests agreed",
        ),
    ],
)
def test_a_canary_ends_only_where_it_is_surely_over_a_limit(tally, reason):
    found = tally.reason_to_end(LIMITS)
    assert (found is None) if reason is None else found.startswith(reason)


def test_each_count_ends_a_canary_from_the_number_on_that_is_above_its_limit():
    for limit, tally in (
        (0.02, lambda hits: CanaryStatistics(answered=9000, failed=9000, seconds=1000, errors=hits)),
        (0.05, lambda hits: CanaryStatistics(answered=2000, compared=1000, agreed=1000 - hits)),
    ):
        first = next(hits for hits in range(1000) if is_above(limit, hits, 1000))
        assert tally(first).reason_to_end(LIMITS) is not None
        assert tally(first - 1).reason_to_end(LIMITS) is None


async def run_failing(runner: ShadowRunner, report: Callable[[PredictionResult], None]) -> None:
    """Run a request whose prediction fails, which is reported like any other."""
    await runner.run(cast(LoadedModel, None), np.zeros((1, 1, 1, 1), np.float32), report)


def test_a_shadow_goes_on_after_a_report_that_raises():
    def fail(result: PredictionResult) -> None:
        raise RuntimeError("no statistics")

    async def runs() -> list[PredictionResult]:
        runner, reported, go_on = ShadowRunner(max_seconds=1.0), list[PredictionResult](), threading.Event()
        runner._thread.submit(go_on.wait)
        first = asyncio.create_task(run_failing(runner, fail))
        waiting = asyncio.create_task(run_failing(runner, reported.append))
        await asyncio.sleep(0)  # both have begun
        go_on.set()
        await asyncio.wait({first, waiting})
        with pytest.raises(RuntimeError, match="no statistics"):
            await first
        assert not waiting.exception() and reported == []  # dropped
        await run_failing(runner, reported.append)
        return reported

    assert len(asyncio.run(runs())) == 1


def test_a_shadow_goes_on_after_a_call_that_was_cancelled():
    async def runs() -> list[PredictionResult]:
        runner, reported = ShadowRunner(max_seconds=1.0), list[PredictionResult]()
        cancelled = asyncio.create_task(run_failing(runner, reported.append))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        reported.clear()
        await run_failing(runner, reported.append)
        return reported

    assert len(asyncio.run(runs())) == 1


class TimedModel:
    """A shadow that takes `computing` seconds of the processor and then `waiting` seconds; it answers its pixels."""

    def __init__(self, computing: float = 0.0, waiting: float = 0.0) -> None:
        self.computing, self.waiting = computing, waiting

    def predict(self, pixels: object) -> object:
        end = time.thread_time() + self.computing
        while time.thread_time() < end:
            pass
        time.sleep(self.waiting)
        return pixels


def shadowed(model: TimedModel, requests: int, max_seconds: float, at_once: bool) -> list[object]:
    """What is reported of so many requests, whose pixels are their numbers."""

    async def runs() -> list[object]:
        runner, reported = ShadowRunner(max_seconds), list[object]()
        calls = (
            runner.run(cast(Any, model), cast(Any, n), cast(Any, reported.append)) for n in range(requests)
        )
        if at_once:
            await asyncio.gather(*calls)
        else:
            for call in calls:
                await call
        return reported

    return asyncio.run(runs())


def test_a_shadow_answers_in_order_and_drops_the_requests_above_its_limit():
    assert shadowed(TimedModel(waiting=0.01), 7, 1.0, at_once=True) == [0, 1, 2, 3]
    assert shadowed(TimedModel(), 7, 1.0, at_once=False) == list(range(7))


def test_a_shadow_computes_a_fifth_of_the_time_at_most():
    began = time.monotonic()
    shadowed(TimedModel(waiting=0.05), 2, 1.0, at_once=True)
    assert time.monotonic() - began >= 2 * 0.05 / 0.2 - 0.01


def test_a_shadow_that_computes_too_long_is_an_error_and_one_that_waits_for_the_processor_is_not():
    (late,) = shadowed(TimedModel(computing=0.06), 1, 0.05, at_once=False)
    assert isinstance(late, TimeoutError)
    assert shadowed(TimedModel(waiting=0.1), 1, 0.05, at_once=False) == [0]
    assert shadowed(TimedModel(computing=0.03), 3, 0.05, at_once=False) == [
        0,
        1,
        2,
    ]  # each alone, not together


def test_an_error_of_production_counts_though_the_canary_answers(own_store, pictures, monkeypatch, caplog):
    put(own_store, "first")
    second = prepare_candidate(Run.open(own_store, "second"))[1]
    promote(Registry(own_store), second, PromotionRequest("ana", "", canary=0.999))
    replica, predict, counted = new_replica(own_store), LoadedModel.predict, []

    def fail(model: LoadedModel, pixels: Any) -> Any:
        if model.number == 1:
            raise RuntimeError("an input of production")
        return predict(model, pixels)

    monkeypatch.setattr(LoadedModel, "predict", fail)
    monkeypatch.setattr(replica.metrics.errors, "inc", lambda *count: counted.append(count))
    reply = asyncio.run(post(replica, pictures[0]))
    assert (reply.status_code, reply.json()["version"]) == (200, "2")
    assert counted == [(1, {"version": "1"})]
    assert "version 1 failed: an input of production" in caplog.text


def test_a_shadow_that_does_not_answer_delays_no_answer(own_store, pictures, monkeypatch):
    put(own_store, "first")
    second = prepare_candidate(Run.open(own_store, "second"))[1]
    promote(Registry(own_store), second, PromotionRequest("ana", "", shadow=True))
    replica, predict, end = new_replica(own_store), LoadedModel.predict, threading.Event()

    def wait(model: LoadedModel, pixels: Any) -> Any:
        if model.number == 2:
            assert end.wait(60)
        return predict(model, pixels)

    monkeypatch.setattr(LoadedModel, "predict", wait)

    async def answer():
        try:
            return await asyncio.wait_for(post(replica, pictures[0]), 20)
        finally:
            end.set()

    assert asyncio.run(answer()).json()["version"] == "1"
