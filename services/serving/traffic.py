"""A bounded sample, in the store, of served inputs that probably fail or are inside a failure scenario.

    traffic/<run>/<components>/003/0007.safetensors     one SampledInput, in slot 7 of scenario 3
    traffic/<run>/<components>/none/0002.safetensors    flagged, and inside no scenario

<components> distinguishes a run from another of the same name, as after one was deleted. Every replica samples the
inputs that it receives into the same slots. So the store holds at most `serve.reservoir` inputs per scenario, for any
number of replicas and restarts. Within a scenario, inputs are drawn without replacement with weights that are their
failure probabilities (Efraimidis and Spirakis, 2006), from those that one replica received since its start; without
failure probabilities the sample is uniform. Replicas with little and much traffic write with equal weight. The slot of
a write that failed takes the next input. A replica does not notice that its files were deleted.

People review the inputs that were in a failure scenario of their run in reviews of their own:

    <run>/traffic-1/     run.yaml, the Gallery of inputs, the state of the project, votes and verdicts
"""

from __future__ import annotations

import heapq
import logging
import math
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32, NO_SCENARIO, Gallery, Verdicts, Votes
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile, apply_override, parse_run_file
from defuse_core.errors import DefuseError, InputError, RunFileError, StoreError
from defuse_core.export.finished import components_digest
from defuse_core.runs import Run
from defuse_core.store import FolderStore, Store

log = logging.getLogger("defuse")
MAX_PENDING_WRITES = 64  # inputs above this are dropped: answers have priority over samples
MIN_WEIGHT = 1e-6  # weight of an input whose failure probability is about 0
# What a review of traffic can set apart from its run, until its votes are stored.
OWN_FIELDS = ("review.answers_per_task", "review.real_names")


@dataclass(frozen=True, eq=False)
class SampledInput:
    """One input that is flagged or inside a failure scenario."""

    image: F32  # (channels, H, W) in [0, 1]
    scenario: int  # index among the run's components, or NO_SCENARIO
    predicted: int
    version: str
    when: float  # seconds since 1970
    classes: tuple[str, ...]
    components_digest: str  # of the run that `scenario` counts in
    failure: float | None  # probability that the answer is wrong; None where the version cannot tell


def read_traffic(store: Store, run: str, drawn: Gallery) -> list[SampledInput]:
    """Return the sampled inputs of `run`, oldest first.

    `store` holds the runs, `drawn` are the run's own images. Leaves out, with a warning, inputs that another
    run of this name received. Raises InputError where none are left.
    """
    folder = store.within("traffic").within(run)
    found = list[SampledInput]()
    remedy = f"delete {folder.address} and restart the server to start a new sample"
    for key in folder.list():
        try:
            found.append(decode(SampledInput, folder.read(key), f"{folder.address}/{key}", remedy))
        except FileNotFoundError:
            continue  # replaced while this was reading
    if not found:
        raise InputError(
            f"no inputs of run {run} are stored; serve it with `--set serve.reservoir=50`, and wait for traffic"
        )
    components = components_digest(drawn)
    own = [sampled for sampled in found if sampled.components_digest == components]
    if not own:
        raise InputError(
            f"{folder.address}: all {len(found)} inputs were received by another run of this name; wait for this one's"
        )
    if left_out := len(found) - len(own):
        text = "%s: left out %d of %d inputs, which another run of this name received"
        log.warning(text, folder.address, left_out, len(found))
    return sorted(own, key=lambda sampled: sampled.when)


def new_inputs(traffic: Iterable[SampledInput], shown: Collection[bytes]) -> dict[int, list[SampledInput]]:
    """Return the inputs of each scenario whose pixels are not in `shown`, without duplicates, in the given order."""
    known, new = set(shown), dict[int, list[SampledInput]]()
    for sampled in traffic:
        pixels = sampled.image.tobytes()
        if pixels not in known:
            known.add(pixels)
            new.setdefault(sampled.scenario, []).append(sampled)
    return new


def traffic_gallery(inputs: Mapping[int, Sequence[SampledInput]], classes: tuple[str, ...]) -> Gallery:
    """Return a gallery of as many inputs of each scenario, in the scenarios' order.

    Its codes are empty, (S, R, 0): its images were not drawn from a component.
    """
    numbers = tuple(sorted(inputs))
    rows = [inputs[number] for number in numbers]
    predicted = np.array([[sampled.predicted for sampled in row] for row in rows], np.int64)  # (S, R)
    return Gallery(
        images=np.array([[sampled.image for sampled in row] for row in rows]),
        codes=np.zeros((*predicted.shape, 0), np.float32),
        predicted=predicted,
        classes=classes,
        numbers=numbers,
        failure=np.array([[sampled.failure for sampled in row] for row in rows], np.float64),  # nan for None
    )


def traffic_reviews(store: Store, run: str) -> list[str]:
    """Return the names of the run's reviews of traffic, oldest first: mnist/traffic-1, mnist/traffic-2, ..."""
    folder = store.within(run)
    found = (re.match(r"traffic-(\d+)/gallery\.safetensors$", key) for key in folder.list("traffic-"))
    return [f"{run}/traffic-{number}" for number in sorted(int(match[1]) for match in found if match)]


def open_traffic_review(run: Run, overrides: Sequence[str]) -> Run:
    """Return the review of traffic that is not finished yet, or a new one of inputs that no review has shown.

    `overrides` are values of OWN_FIELDS, such as review.answers_per_task=3. Raises InputError if no scenario has as
    many such inputs as run.spec.review.images, or if they are not of this run.
    """
    store = run.runs
    known = [Run.open(store, name) for name in traffic_reviews(store, run.name)]
    if known and known[-1].load(Votes) is None:
        return set_in_traffic_review(known[-1], overrides)
    drawn = run.require(Gallery)
    inputs = _inputs_to_review(run, drawn, known)
    # Every input is asked about, not only as many as a verdict needs: it measures the served model.
    spec = _overridden(run.spec, overrides).with_fields(
        "review",
        annotators="label-studio",
        form="image",  # inputs have no common label, least of all those inside no scenario
        prelabel=False,
        stop_early=False,
        accept="share",  # a report on the served model, not a decision about a scenario
        consensus="majority",
    )
    number = int(known[-1].name.rpartition("-")[2]) + 1 if known else 1
    review = Run.start(store, f"{run.name}/traffic-{number}", spec)
    review.once("draw", Gallery, lambda: traffic_gallery(inputs, drawn.classes))
    return review


def _inputs_to_review(run: Run, drawn: Gallery, known: Sequence[Run]) -> dict[int, list[SampledInput]]:
    """Return the newest inputs of each scenario that no review in `known` has shown, of those that have enough."""
    shown = {
        image.tobytes()
        for review in known
        for scenario in review.require(Gallery).images
        for image in scenario
    }
    wanted, traffic = run.spec.review.images, read_traffic(run.runs, run.name, drawn)
    new = new_inputs(traffic, shown)
    newest = {scenario: inputs[-wanted:] for scenario, inputs in new.items() if len(inputs) >= wanted}
    if not newest:
        raise InputError(
            f"no scenario of run {run.name} has {wanted} inputs that were not reviewed yet, of {len(traffic)} kept; "
            "serve it with a larger `serve.reservoir`, or wait for more traffic"
        )
    if len(new) > len(newest):
        log.info(
            "review: left out %d of %d scenarios, which have fewer than %d inputs that no review has shown",
            len(new) - len(newest),
            len(new),
            wanted,
        )
    versions = {sampled.version for inputs in newest.values() for sampled in inputs}
    if len(versions) > 1:
        in_order = sorted(versions, key=lambda version: (len(version), version))
        log.info("review: inputs of versions %s are counted together", ", ".join(in_order))
    return newest


def set_in_traffic_review(review: Run, overrides: Sequence[str]) -> Run:
    """Return the review with other values of OWN_FIELDS, which are free until its votes are stored.

    Raises InputError after that.
    """
    if not overrides:
        return review
    spec = _overridden(review.spec, overrides)
    with review.store.lock():
        if spec != review.spec and review.store.exists("votes.safetensors"):
            raise InputError(
                f"the votes of {review.name} are stored, so --set changes nothing in it any more; "
                f"`{review.command('review reopen')}` opens it again"
            )
        return Run.start(review.runs, review.name, spec)


def _overridden(spec: RunFile, overrides: Sequence[str]) -> RunFile:
    tree = spec.model_dump(mode="json")
    for override in overrides:
        if override.partition("=")[0].strip() not in OWN_FIELDS:
            raise RunFileError(f"--set {override}: a review of traffic can set {', '.join(OWN_FIELDS)}")
        apply_override(tree, override)
    return parse_run_file(tree, "--set")


def store_traffic_verdicts(review: Run, votes: Votes) -> Verdicts:
    """Store the votes of a review of traffic, once all answers are in, and the verdicts that follow from them."""
    from defuse_core.review.verdicts import decide_verdicts  # imports scipy

    section, gallery = review.spec.review, review.require(Gallery)
    with review.store.lock():
        stored = review.once("review", Votes, lambda: votes)
        return review.once("review", Verdicts, lambda: decide_verdicts(section, gallery, stored))


def delete_traffic(store: Store, run: str) -> int:
    """Delete the sampled inputs of `run`, and return how many there were; `store` is the one that holds the runs."""
    folder = store.within("traffic").within(run)
    count = len(folder.list())
    if count:
        folder.delete_all()
    return count


class Reservoir:
    """The sampler of one replica. It writes in a thread of its own and never delays an answer."""

    def __init__(self, store: Store, capacity: int) -> None:
        self.store = store.within("traffic")
        if isinstance(self.store, FolderStore):
            self.store.existing = None  # whoever deletes the inputs may; _expect_store looks after the store
        self.capacity = capacity
        self._kept: dict[str, list[tuple[float, int]]] = {}  # folder -> heap of (key, slot)
        self._bounded: set[str] = set()  # folders without slots above the capacity
        self._random = np.random.default_rng()
        self._pending = 0
        self._failing = False  # the last write
        self._lock = threading.Lock()  # of _kept and _pending
        self._thread = ThreadPoolExecutor(1, "reservoir")

    def offer(self, run: str, sampled: SampledInput) -> None:
        """Store the input, or not: the higher its failure probability, the likelier it is in the sample."""
        folder = _folder(run, sampled)
        weight = 1.0 if sampled.failure is None else max(sampled.failure, MIN_WEIGHT)
        key = math.log(1 - self._random.random()) / weight  # the largest keys of all inputs are the sample
        with self._lock:
            kept = self._kept.setdefault(folder, [])
            is_full = len(kept) == self.capacity
            if self._pending >= MAX_PENDING_WRITES or (is_full and key <= kept[0][0]):
                return
            slot = heapq.heappop(kept)[1] if is_full else len(kept)
            heapq.heappush(kept, (key, slot))
            self._pending += 1
        self._thread.submit(self._write, folder, (key, slot), sampled)

    def _write(self, folder: str, drawn: tuple[float, int], sampled: SampledInput) -> None:
        """Store the input that was drawn with this key into this slot of the folder."""
        try:
            self._expect_store()
            if folder not in self._bounded:
                self._delete_slots_above(folder)
                self.store.within(folder).remove_unfinished()  # nobody locks a sample
                self._bounded.add(folder)
            self.store.write(f"{folder}/{drawn[1]:04d}.safetensors", encode(sampled))
            self._failing = False
        except DefuseError as error:
            self._free(folder, drawn)
            if not self._failing:
                log.warning(
                    "an input was not stored: %s (further failures are not logged until one is stored)", error
                )
            self._failing = True
        finally:
            with self._lock:
                self._pending -= 1

    def _free(self, folder: str, drawn: tuple[float, int]) -> None:
        """Let the next input have the slot, unless another one was drawn into it meanwhile."""
        with self._lock:
            kept = self._kept[folder]
            if drawn in kept:
                kept[kept.index(drawn)] = (-math.inf, drawn[1])
                heapq.heapify(kept)

    def _expect_store(self) -> None:
        """Raise StoreError for a folder that was moved or unmounted: a write would make another one in its place."""
        if not isinstance(self.store, FolderStore):
            return
        root = self.store.folder.parent
        try:
            is_there = any(at.name != self.store.folder.name for at in root.iterdir())
        except OSError as error:
            raise StoreError(f"{root}: {error.strerror}; was the store moved?") from error
        if not is_there:
            raise StoreError(f"{root}: no store is there any more; was its disk unmounted?")

    def _delete_slots_above(self, folder: str) -> None:
        """Delete the inputs that a larger serve.reservoir stored: no replica would replace them."""
        slots = self.store.within(folder)
        for key in slots.list():
            number = key.removesuffix(".safetensors")
            if number.isdecimal() and int(number) >= self.capacity:
                slots.delete(key)


def _folder(run: str, sampled: SampledInput) -> str:
    scenario = "none" if sampled.scenario == NO_SCENARIO else f"{sampled.scenario:03d}"
    return f"{run}/{sampled.components_digest[:16]}/{scenario}"
