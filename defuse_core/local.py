"""LocalCompute: every step in this process, one after the other. The reference that the cluster must equal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from defuse_core.artifacts import Corrections, Models, Psi, Sweep
from defuse_core.config import RunFile
from defuse_core.correct import collect, is_pointless, load_tuning, run_trial
from defuse_core.data import Images
from defuse_core.errors import ComputeError, ModelError
from defuse_core.identify import Identifier, finished_shards, gather, save_shard, shard_count
from defuse_core.progress import Progress, silent
from defuse_core.runs import Store

log = logging.getLogger("defuse")
T = TypeVar("T")


class LocalCompute:
    """The protocol `Compute`, without a cluster."""

    def __init__(self, progress: Progress = silent) -> None:
        self.progress = progress

    def task(self, step: str, function: Callable[..., T], *args: object) -> T:
        """Return function(*args, progress=...)."""
        return function(*args, progress=self.progress)

    def identify(self, spec: RunFile, models: Models, store: Store) -> Psi:
        """Algorithm 1, shard after shard."""
        count = shard_count(models.images["train"], spec.identify.block_images)
        records = finished_shards(store)
        identifier = Identifier(spec, models)
        for index in range(count):
            if index not in records:
                records[index] = save_shard(store, index, identifier.shard(index))
            self.progress("perturbing training images", index + 1, count, "shards")
        return gather(records)

    def sweep(
        self, spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, store: Store
    ) -> Sweep:
        """Fine-tune, λ after λ. Raises ComputeError if every trial failed."""
        if is_pointless(fixes, reviewed):
            return collect(spec, models, [])
        tuning = load_tuning(spec, models, fixes, reviewed, progress=self.progress)
        trials, failed = [], []
        for index, lam in enumerate(spec.correct.lambdas):
            try:
                *_, trial = run_trial(spec, models, tuning, lam, store)
                trials.append(trial)
            except (ModelError, RuntimeError) as error:  # it diverged, or memory was short
                failed.append({"lam": lam, "cause": " ".join(str(error).split())})
                log.warning("correct: the trial with λ = %g failed: %s", lam, error)
            self.progress("fine-tuning over λ", index + 1, len(spec.correct.lambdas), "trials")
        if not trials:
            raise ComputeError(f"correct: every trial failed; λ = {failed[0]['lam']:g}: {failed[0]['cause']}")
        return collect(spec, models, trials, failed)
