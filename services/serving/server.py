"""One replica: batches requests, answers them with the version in production, and watches a canary beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve

from defuse_core.artifacts import F32
from defuse_core.config import ServeSection
from defuse_core.errors import InputError, StoreError
from services.serving.body import decoded
from services.serving.inputs import Expected, Refused
from services.serving.lineup import Follower, Lineup, Source
from services.serving.metrics import Meters
from services.serving.predict import Answers, Job, Outcome, Served, run_jobs
from services.serving.reservoir import Reservoir, seen_now
from services.serving.rollout import Tally, end_trial
from services.settings import read_settings
from services.storage import open_store

log = logging.getLogger("defuse")
QUICK_S = 0.05  # a forward pass up to here costs less where the requests are than in a thread of its own
SHADOWS = 4  # shadow questions that may wait; more are left out, since answers go before comparisons


class Server:
    """The Serve deployment. Its constructor loads and warms up, so a replica that takes requests can answer them."""

    def __init__(
        self,
        store: str,
        source: Source,
        settings: ServeSection,
        changes: Mapping[str, Any],
        require_token: bool,
    ) -> None:
        torch.set_num_threads(max(1, round(settings.cpus_per_replica)))
        self.settings = settings
        self.token = read_settings().serve_token
        if require_token and not self.token:
            raise InputError("DEFUSE_SERVE_TOKEN is not set where this replica runs, and a token is required")
        opened = open_store(store)
        self.follower = Follower(opened, source, settings, changes)
        self.lineup = self.follower.first()
        self.meters = Meters()
        self.reservoir = Reservoir(opened, settings.reservoir) if settings.reservoir else None
        self._passes = ThreadPoolExecutor(1, "forward")
        self._decoding = ThreadPoolExecutor(1, "decode")
        self._batched = serve.batch(
            max_batch_size=settings.batch_size, batch_wait_timeout_s=settings.batch_wait_s
        )(self._run)
        self._shadows = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> FastAPI:
        from services.serving.api import build_api

        return build_api(self)

    def expected(self) -> Expected:
        """Return what images must be like now. Raises Refused while there is no version in production."""
        return self._production().expected

    def _production(self) -> Served:
        if self.lineup.production is None:
            raise Refused(503, "no version is in production yet", self.settings.retry_after_s)
        return self.lineup.production

    async def decode(self, kind: str, files: list[bytes], expected: Expected) -> F32:
        """Return the pixels, from the one thread that decodes: so few large pictures are open at a time."""
        loop = asyncio.get_running_loop()
        async with self._in_time():
            return await loop.run_in_executor(self._decoding, decoded, kind, files, expected)

    async def predict(self, pixels: F32, key: bytes) -> dict[str, Any]:
        """Return the answer to one request: its version, and a prediction per image. Raises Refused."""
        production, lineup = self._production(), self.lineup
        canary = lineup.canary_for(key)
        asked = (production,) if canary is None else (production, canary)
        async with self._in_time():
            outcome: Outcome = await self._batched(Job(pixels, asked))
        answering, answers = production, outcome[production]
        if canary is not None:
            self._compare(lineup, canary, outcome)
            if isinstance(outcome[canary], Answers):
                answering, answers = canary, outcome[canary]
        if isinstance(answers, Exception):
            self.meters.errors.inc(len(pixels), {"version": answering.name})
            log.error("version %s failed: %s", answering.name, answers)
            raise Refused(500, "the classifier failed on this input")
        if lineup.shadow is not None and self._shadows < SHADOWS:
            self._start(self._ask_shadow(lineup, lineup.shadow, Job(pixels, (lineup.shadow,)), answers))
        self._count(answering, answers, pixels)
        return {"version": answering.name, "predictions": answering.described(answers)}

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Raise Refused where what is inside takes longer than serve.timeout_s."""
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                yield
        except TimeoutError:
            raise Refused(503, "no answer in time", self.settings.retry_after_s) from None

    async def _run(self, jobs: Sequence[Job]) -> list[Outcome]:
        if sum(served.image_s * len(job.pixels) for job in jobs for served in job.asked) <= QUICK_S:
            return run_jobs(jobs)
        return await asyncio.get_running_loop().run_in_executor(self._passes, run_jobs, jobs)

    def _count(self, served: Served, answers: Answers, pixels: F32) -> None:
        self.meters.images.inc(len(pixels), {"version": served.name})
        for row, j in np.argwhere(answers.inside):
            candidate = served.candidate
            scenario, fixed = str(candidate.scenario[j]), str(bool(served.fixed[j])).lower()
            self.meters.scenarios.inc(1, {"version": served.name, "scenario": scenario, "fixed": fixed})
            if self.reservoir is not None:
                best = int(answers.probabilities[row].argmax())
                seen = seen_now(pixels[row], int(candidate.scenario[j]), best, served.name, candidate.classes)
                self.reservoir.offer(candidate.run, seen)

    async def _ask_shadow(self, lineup: Lineup, shadow: Served, job: Job, answers: Answers) -> None:
        self._shadows += 1
        try:
            outcome: Outcome = await self._batched(job)
        finally:
            self._shadows -= 1
        production = lineup.production
        if production is not None:
            self._compare(lineup, shadow, {production: answers, **outcome})

    def _compare(self, lineup: Lineup, trial: Served, outcome: Outcome) -> None:
        """Note how the canary or shadow did beside production, and end its trial if it must go."""
        ours = outcome[lineup.production] if lineup.production else None
        theirs, tally = outcome[trial], lineup.tally
        if not isinstance(ours, Answers):
            return
        tally.answered += len(ours.probabilities)
        if isinstance(theirs, Answers):
            self._note_agreement(tally, trial, ours, theirs)
        else:
            tally.errors += len(ours.probabilities)
            self.meters.errors.inc(len(ours.probabilities), {"version": trial.name})
            log.error("version %s failed: %s", trial.name, theirs)
        reason = tally.verdict(self.settings)
        if reason and trial in self.lineup.roles().values():
            self._switch(Lineup(self.lineup.production, standing=self.lineup.standing))
            self._start(self._end_trial(trial, reason))

    def _note_agreement(self, tally: Tally, trial: Served, ours: Answers, theirs: Answers) -> None:
        same = np.equal(ours.probabilities.argmax(axis=1), theirs.probabilities.argmax(axis=1))
        inside = np.logical_or(ours.inside.any(axis=1), theirs.inside.any(axis=1))
        tally.compared += int((~inside).sum())
        tally.agreed += int((same & ~inside).sum())
        for agreed, within in zip(same.tolist(), inside.tolist(), strict=True):
            tags = {"version": trial.name, "agreed": str(agreed).lower(), "inside": str(within).lower()}
            self.meters.compared.inc(1, tags)

    async def _end_trial(self, trial: Served, reason: str) -> None:
        assert trial.number is not None  # only versions are tried
        log.error("version %s is rolled back: %s", trial.name, reason)
        while True:
            try:
                await asyncio.to_thread(
                    end_trial, self.follower.registry, trial.number, "defuse serve", reason
                )
                return
            except StoreError as error:
                log.error("version %s: its end is not in the registry yet: %s", trial.name, error)
                await asyncio.sleep(self.settings.poll_s)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("background work failed: %s", task.exception())

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the registry inside the block."""
        task = asyncio.get_running_loop().create_task(self._follow())
        yield
        task.cancel()

    async def _follow(self) -> None:
        """Load each new lineup beside the present one, then let it take over. Requests under way keep theirs."""
        self._show_roles({})
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                lineup = await asyncio.to_thread(self.follower.next, self.lineup)
            except Exception as error:  # whatever it is, the next look comes
                log.error(
                    "the version in the registry could not be loaded, going on with the present: %s", error
                )
                continue
            if lineup is not None:
                self._switch(lineup)

    def _switch(self, lineup: Lineup) -> None:
        """Let `lineup` take over, and say so in the metrics."""
        before, self.lineup = self.lineup, lineup
        self._show_roles(before.roles())

    def _show_roles(self, before: dict[str, Served]) -> None:
        for role, served in before.items():
            self.meters.serving.set(0, {"version": served.name, "role": role})
        for role, served in self.lineup.roles().items():
            self.meters.serving.set(1, {"version": served.name, "role": role})
