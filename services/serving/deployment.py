"""The Ray Serve deployment: a replica that batches requests, answers them, and follows the registry."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import tenacity
import torch
from starlette.exceptions import HTTPException

from defuse_core.artifacts import F32, NO_SCENARIO
from defuse_core.config import ServeSection
from defuse_core.device import compute_in_ieee_f32, is_out_of_memory
from defuse_core.errors import InputError, ModelError, NoAnswerError
from services.serving.active_versions import (
    ActiveVersions,
    Comparison,
    InitialModel,
    RegistryWatcher,
    ShadowRunner,
    reason_for_clients,
)
from services.serving.inputs import InputSpec, decode_body
from services.serving.limits import RejectedInput, RequestSlots, Unavailable, UploadLimits, answering_within
from services.serving.model import (
    Batcher,
    LoadedModel,
    ModelOutput,
    PredictionRequest,
    PredictionResponse,
    PredictionResult,
    predict_batch,
)
from services.serving.monitoring import FailureLog, ServingMetrics
from services.serving.registry import AUTHOR, POLL_S
from services.serving.registry_state import NO_VERSION
from services.serving.traffic import Reservoir, SampledInput
from services.settings import serve_token
from services.storage import is_store_failure, open_store

log = logging.getLogger("defuse")
FAILURES_BEFORE_CHECK = 20  # requests in a row that production fails on
GAUGES_S = 5.0  # interval at which the gauges are set
# images up to this are decoded faster here than in a thread
MAX_INLINE_BYTES, MAX_INLINE_PIXELS = 32_768, 65_536
MAX_INLINE_S = 0.05  # a shorter forward pass costs less in the event loop than in a thread
T = TypeVar("T")


class ClassifierDeployment:
    """One replica. Its constructor loads and warms up, so a replica that receives requests can answer them."""

    def __init__(
        self,
        store: str,
        initial: InitialModel,
        section: ServeSection,
        settings: Mapping[str, Any],
        require_token: bool,
    ) -> None:
        torch.set_num_threads(max(1, round(section.cpus_per_replica)))
        # as the checks and the watch's thresholds were computed
        compute_in_ieee_f32()
        self.section = section
        self.token = serve_token()
        if require_token and not self.token:
            raise InputError("DEFUSE_SERVE_TOKEN is required, and not set in the environment of this replica")
        opened = when_store_answers(partial(open_store, store))
        self.watcher = RegistryWatcher(opened, initial, section, settings)
        self.active = when_store_answers(self.watcher.load_initial)
        self.metrics, self.failure_log = ServingMetrics(), FailureLog()
        self.reservoir = Reservoir(opened, section.reservoir) if section.reservoir else None
        self.uploads, self.slots = UploadLimits(section), RequestSlots(section)
        self.form_parser = asyncio.Semaphore(1)
        self._forward_thread = ThreadPoolExecutor(1, "forward")
        self._canary_thread = ThreadPoolExecutor(1, "canary")
        self._decode_thread = ThreadPoolExecutor(1, "decode")
        self._batcher = Batcher(self._predict_batch, section)
        self._canary_batcher = Batcher(self._predict_canary_batch, section)
        self._shadow = ShadowRunner(section.max_canary_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: int | None = None  # the canary or shadow that this replica ended, until that is stored
        self._failures = 0  # of production, in a row, but those that the input explains

    async def check_health(self) -> None:
        """Raise where production answers nothing any more, as after an error of the GPU: Serve replaces the replica."""
        model = self.active.production
        if self._failures >= FAILURES_BEFORE_CHECK and model is not None:
            await asyncio.get_running_loop().run_in_executor(self._forward_thread, model.run_on_zeros, 1)
            self._failures = 0

    def current(self) -> ActiveVersions:
        """Return the active versions. Raises Unavailable without one in production.

        A request takes them once: another version may accept other images.
        """
        if self.active.production is None:
            raise Unavailable(self.active.error or NO_VERSION)
        return self.active

    async def decode(
        self, media_type: str, files: list[bytes], input_spec: InputSpec, held: contextlib.ExitStack
    ) -> F32:
        """Return the pixels, (n, channels, H, W). Small images are decoded here, all others by one thread, which bounds
        their memory.

        Raises RejectedInput for what is no image of the version, and Unavailable after serve.timeout_s; what the
        request holds is then released when the thread is done with it, so that a body never waits for the thread
        without being counted.
        """
        inline = replace(input_spec, max_pixels=min(input_spec.max_pixels, MAX_INLINE_PIXELS))
        if sum(len(file) for file in files) <= MAX_INLINE_BYTES:
            try:
                return decode_body(media_type, files, inline)
            except RejectedInput as rejected:
                if rejected.status_code != 413 or inline == input_spec:
                    raise
        abandoned = threading.Event()

        def decode_in_time() -> F32:
            if abandoned.is_set():
                raise TimeoutError("the request was answered before its turn")
            return decode_body(media_type, files, input_spec)

        work = asyncio.get_running_loop().run_in_executor(self._decode_thread, decode_in_time)
        try:
            async with answering_within(self.section.timeout_s):
                return await asyncio.shield(work)
        finally:
            if not work.done():
                abandoned.set()
                work.add_done_callback(partial(_release, held.pop_all()))

    async def predict(self, active: ActiveVersions, pixels: F32, key: bytes) -> PredictionResponse:
        """Return the answer of the versions for which a request was decoded. Raises HTTPException, and MemoryError.

        `key` selects the requests of a canary.
        """
        model, canary = active.in_production, canary_for(active, key)
        with contextlib.ExitStack() as ending:
            if canary is not None:
                answer = asyncio.create_task(self._canary_batcher.predict(PredictionRequest(pixels, canary)))
                ending.callback(answer.cancel)  # nothing waits for the canary once the request has ended
            async with answering_within(self.section.timeout_s):
                output: PredictionResult = await self._batcher.predict(PredictionRequest(pixels, model))
            self._count_failures(output)
            if isinstance(output, Exception) and not is_out_of_memory(output):
                self._count_error(model, len(pixels), output)  # also where the canary answers instead
            if canary is not None:
                theirs = await self._canary_output(answer)
                self._compare(active, canary, output, theirs)
                if isinstance(theirs, ModelOutput):
                    model, output = canary, theirs
        if isinstance(output, Exception):
            if is_out_of_memory(output):
                raise MemoryError(str(output)) from output
            raise HTTPException(500, "the classifier failed on this input")
        if active.shadow is not None:
            report = partial(self._compare, active, active.shadow, output)
            self._start(self._shadow.run(active.shadow, pixels, report))
        self._count(model, output, pixels)
        return PredictionResponse.model_construct(version=model.name, predictions=model.predictions(output))

    def _count_error(self, model: LoadedModel, images: int, error: Exception) -> None:
        self.metrics.errors.inc(images, {"version": model.name})
        self.failure_log.add(f"version {model.name} failed", error)

    def _count_failures(self, output: PredictionResult) -> None:
        """Count what `check_health` looks at; a ModelError is of the input and the version, whatever the replica."""
        if isinstance(output, ModelOutput):
            self._failures = 0
        elif not isinstance(output, ModelError):
            self._failures += 1

    async def _canary_output(self, answer: asyncio.Task[PredictionResult]) -> PredictionResult:
        """Return what the canary answers within serve.max_canary_s after production, a TimeoutError after that."""
        done, _ = await asyncio.wait({answer}, timeout=self.section.max_canary_s)
        if not done:
            return TimeoutError(f"no answer within {self.section.max_canary_s:g} s")
        error = answer.exception()
        return answer.result() if not isinstance(error, Exception) else error

    async def _predict_batch(self, requests: Sequence[PredictionRequest]) -> list[PredictionResult]:
        seconds = sum(request.model.seconds_per_image * len(request.pixels) for request in requests)
        if seconds <= MAX_INLINE_S:
            return predict_batch(requests)
        return await asyncio.get_running_loop().run_in_executor(self._forward_thread, predict_batch, requests)

    async def _predict_canary_batch(self, requests: Sequence[PredictionRequest]) -> list[PredictionResult]:
        """Never in the event loop: a slow canary must not delay production."""
        return await asyncio.get_running_loop().run_in_executor(self._canary_thread, predict_batch, requests)

    def _count(self, model: LoadedModel, output: ModelOutput, pixels: F32) -> None:
        version = {"version": model.name}
        self.metrics.images.inc(len(pixels), version)
        if output.failure is not None:
            self.metrics.expected_errors.inc(float(output.failure.sum()), version)
        for row in np.flatnonzero(output.flagged):
            explained = str(bool(output.inside[row].any())).lower()
            self.metrics.flagged.inc(1, {**version, "explained": explained})
        for _, j in np.argwhere(output.inside):
            scenario, fixed = str(model.candidate.scenario[j]), str(bool(model.fixed[j])).lower()
            self.metrics.scenarios.inc(1, {**version, "scenario": scenario, "fixed": fixed})
        if self.reservoir is not None:
            self._sample(self.reservoir, model, output, pixels)

    @staticmethod
    def _sample(reservoir: Reservoir, model: LoadedModel, output: ModelOutput, pixels: F32) -> None:
        """Offer the reservoir every input that is flagged or inside a scenario."""
        candidate = model.candidate
        for row in np.flatnonzero(output.flagged | output.inside.any(axis=1)):
            numbers = candidate.scenario[output.inside[row]].tolist() or [NO_SCENARIO]
            best = int(output.probabilities[row].argmax())
            failure = None if output.failure is None else float(output.failure[row])
            for number in numbers:
                sampled = SampledInput(
                    image=np.array(pixels[row]),  # a copy: a view would keep the whole batch
                    scenario=number,
                    predicted=best,
                    version=model.name,
                    when=time.time(),
                    classes=candidate.classes,
                    components_digest=candidate.components_digest,
                    failure=failure,
                )
                reservoir.offer(candidate.run, sampled)

    def _compare(
        self, active: ActiveVersions, other: LoadedModel, ours: PredictionResult, theirs: PredictionResult
    ) -> None:
        """Compare a canary or shadow with production, and end it if it exceeds its limits."""
        if not isinstance(ours, ModelOutput):
            return
        statistics = active.statistics
        if isinstance(theirs, ModelOutput):
            comparison = Comparison.of(ours, theirs)
            statistics.add_comparison(comparison)
            self._count_comparison(other, comparison)
        else:
            statistics.add_error()
            self._count_error(other, len(ours.probabilities), theirs)
        reason = statistics.reason_to_end(self.section)
        # Comparisons of earlier roles still arrive: `other` may be in production by now.
        if reason and statistics is self.active.statistics:
            self.ended = other.number
            self._activate(ActiveVersions(self.active.production, state=self.active.state))
            self._start(self._end_canary(other, reason))

    def _count_comparison(self, other: LoadedModel, comparison: Comparison) -> None:
        rows = zip(comparison.agreed.tolist(), comparison.inside.tolist(), strict=True)
        for agreed, inside in rows:
            tags = {"version": other.name, "agreed": str(agreed).lower(), "inside": str(inside).lower()}
            self.metrics.compared.inc(1, tags)

    async def _end_canary(self, model: LoadedModel, reason: str) -> None:
        """End the canary or shadow in the registry, however long the store does not answer."""
        assert model.number is not None  # only versions become canaries
        log.error("version %s is rolled back: %s", model.name, reason)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(is_store_failure),
            wait=tenacity.wait_fixed(POLL_S),
            before_sleep=lambda retry: log.error(
                "version %s: its end is not stored in the registry yet: %s",
                model.name,
                retry.outcome and retry.outcome.exception(),
            ),
        )
        await retrying(asyncio.to_thread, self.watcher.registry.end_canary, model.number, AUTHOR, reason)
        if self.ended == model.number:
            self.ended = None

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("a background task failed: %s", task.exception())

    @contextlib.asynccontextmanager
    async def following_registry(self) -> AsyncIterator[None]:
        """Poll the registry, and keep the gauges, while the block runs."""
        tasks = [asyncio.create_task(self._poll_registry()), asyncio.create_task(self._keep_gauges())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _keep_gauges(self) -> None:
        """Set the gauges again and again: Ray forgets one that is not set for 20 s."""
        while True:
            self._set_gauges(ActiveVersions())
            await asyncio.sleep(GAUGES_S)

    async def _poll_registry(self) -> None:
        """Load the versions of each change beside the current ones, then switch. Requests under way keep theirs."""
        reported = ""  # why no version could be loaded at the last poll
        while True:
            await asyncio.sleep(POLL_S)
            try:
                # `ended` as of now: its end may be stored, and forgotten, while the thread reads the registry
                versions = await asyncio.to_thread(self.watcher.load_changes, self.active, self.ended)
            except Exception as error:  # of any kind: the next poll follows
                if str(error) != reported:
                    reported = str(error)
                    self._report_load_error(error)
                continue
            reported = ""
            if versions is not None:
                self._activate(versions)

    def _report_load_error(self, error: Exception) -> None:
        if self.active.production is not None:
            log.error("the registry's version cannot be loaded, the current one stays active: %s", error)
            return
        log.error("the registry's version cannot be loaded: %s", error)
        if not is_store_failure(error):  # a registry that cannot be read has perhaps no version in production
            self._activate(replace(self.active, error=reason_for_clients(error)))

    def _activate(self, versions: ActiveVersions) -> None:
        before, self.active = self.active, versions
        self._set_gauges(before)

    def _set_gauges(self, before: ActiveVersions) -> None:
        """Show the active versions in the metrics, in place of those `before`."""
        self.metrics.set_roles(before.names(), self.active.names())
        for model in self.active.by_role().values():
            self.metrics.set_detection(model.name, model.watch_figures)


def when_store_answers(work: Callable[[], T]) -> T:
    """Return what `work` returns, called again while the store does not answer, of which one line warns.

    Serve gives up an application that fails to build, or whose replicas fail to start, and does not try again.
    """

    def warn(retry: tenacity.RetryCallState) -> None:
        if retry.attempt_number == 1 and retry.outcome is not None:
            log.warning("the store does not answer, waiting for it: %s", retry.outcome.exception())

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(NoAnswerError),
        wait=tenacity.wait_fixed(POLL_S),
        before_sleep=warn,
    )
    return retrying(work)


def canary_for(active: ActiveVersions, key: bytes) -> LoadedModel | None:
    """Return the canary if it answers the request with this key."""
    number = active.state.canary
    if active.canary is None or number is None or not is_in_canary(key, number, active.state.share):
        return None
    return active.canary


def is_in_canary(key: bytes, number: int, share: float) -> bool:
    """Return whether the request with this key goes to canary `number`: the same answer for the same key."""
    digest = hashlib.blake2b(key, digest_size=8, salt=number.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _release(held: contextlib.ExitStack, work: asyncio.Future[F32]) -> None:
    """Release what a request held whose decoding has ended after it was answered."""
    held.close()
    if not work.cancelled():
        work.exception()  # nobody else asks for it, and asyncio would log a traceback
