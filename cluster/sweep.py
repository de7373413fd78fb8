"""The sweep over λ as Ray Tune trials. The run's store holds their state; Tune's own is thrown away."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.trainable import Trainable

from cluster.connection import SHARED_STORE
from cluster.errors import as_defuse_error, cause_of, is_worker_lost, one_line
from cluster.progress import ProgressListener, reporting, set_running_trials
from cluster.ray_compat import named_trainable, quiet_tune
from cluster.resources import CapacityMonitor, WorkerResources, current_location
from defuse_core.artifacts import Models, Trial
from defuse_core.codec import decode
from defuse_core.config import RunFile
from defuse_core.correct import ScenarioImages, fine_tuning_data, is_trial_failure, run_trial, trial_key
from defuse_core.data import Splits
from defuse_core.errors import ComputeError, DefuseError, InputError
from defuse_core.progress import Progress
from defuse_core.store import Store

log = logging.getLogger("defuse")
STEP = "correct"
TRIAL = "lam-"
MAX_FAILURES = 2  # a trial is started again this often; it continues after its last finished epoch


@dataclass(eq=False)
class SweepContext:
    """What all trials of a sweep over λ share."""

    spec: RunFile
    models: Any  # ObjectRef of Models
    clean: Any  # ObjectRef of Splits: once in the object store of each node, whatever the number of trials
    scenario: Any  # ObjectRef of ScenarioImages, likewise
    store: Store
    resources: WorkerResources
    max_concurrent: int | None  # trials at once; None: as many as fit, on nodes that join later, too
    listener: ProgressListener
    progress: Progress
    name: str


def run_trials(sweep: SweepContext) -> tuple[list[Trial], dict[float, DefuseError]]:
    """Return the finished trials, and the error of each λ whose trial failed for good.

    Raises the error of a trial that the images, the store or the machines failed: the same command continues it.
    """
    with quiet_tune(), tempfile.TemporaryDirectory(prefix="defuse-tune-") as folder:
        results = _tuner(sweep, folder).fit()
    trials: list[Trial] = []
    failures: dict[float, DefuseError] = {}
    for result in (results[index] for index in range(len(results))):
        lam = float(Path(result.path).name.removeprefix(TRIAL))  # the one field that every failure leaves
        if result.error is None:
            trials.append(_stored(sweep.store, lam))
            continue
        cause = cause_of(result.error)
        if is_worker_lost(result.error) or not is_trial_failure(cause):
            raise as_defuse_error(result.error, f"correct: λ = {lam:g}")
        failures[lam] = cause if isinstance(cause, DefuseError) else ComputeError(one_line(result.error))
        log.warning("correct: the trial with λ = %g failed for good: %s", lam, failures[lam])
    return trials, failures


def _stored(store: Store, lam: float) -> Trial:
    try:
        return decode(Trial, store.read(trial_key(lam)), trial_key(lam))
    except FileNotFoundError as error:
        raise InputError(
            f"correct: the trial with λ = {lam:g} is done, and this process does not find it in {store.address}; "
            f"{SHARED_STORE}"
        ) from error


def _trial(
    config: dict[str, float],
    spec: RunFile,
    models: Models,
    clean: Splits,
    scenario: ScenarioImages,
    store: Store,
    progress_actor: Any,
) -> None:
    """One λ, in a worker. Reports how many epochs are done."""
    with reporting(progress_actor):
        location = current_location(STEP)
        log.debug("correct: λ = %g in %s", config["lam"], location)
        data = fine_tuning_data(clean, scenario)
        for trial in run_trial(spec, models, data, config["lam"], store):
            tune.report({"epochs": len(trial.rows), "visible_gpus": location.visible_gpus})


def _trainable(sweep: SweepContext) -> type[Trainable]:
    """Return a trial with its inputs, under the name that Ray shows of its actors and processes."""
    function = tune.with_parameters(
        _trial,
        spec=sweep.spec,
        models=sweep.models,
        clean=sweep.clean,
        scenario=sweep.scenario,
        store=sweep.store,
        progress_actor=sweep.listener.actor,
    )
    return named_trainable(function, STEP)


def _tuner(sweep: SweepContext, folder: str) -> tune.Tuner:
    resources = {"cpu": sweep.resources.cpus, "gpu": sweep.resources.gpus}
    return tune.Tuner(
        tune.with_resources(_trainable(sweep), resources),
        param_space={"lam": tune.grid_search(list(sweep.spec.correct.lambdas))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=sweep.max_concurrent,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_SweepProgress(sweep)],
        ),
    )


def _trial_name(trial: TuneTrial) -> str:
    return f"{TRIAL}{trial.config['lam']!r}"


class _SweepProgress(tune.Callback):
    """Shows how far the sweep is, from inside Tune's loop in the driver."""

    def __init__(self, sweep: SweepContext) -> None:
        self.sweep = sweep
        self.epochs: dict[str, int] = {}
        self.monitor = CapacityMonitor(STEP, sweep.resources)

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks beside its trials; this one holds the terminal, and is never restored."""
        return {}

    def on_step_end(self, iteration: int, trials: Sequence[TuneTrial], **info: Any) -> None:
        """Show the workers' log lines; warn where all trials wait; end the sweep if the run was taken over."""
        self.sweep.store.require_lock()
        set_running_trials(sum(trial.status == TuneTrial.RUNNING for trial in trials))
        self.sweep.listener.poll()
        self.monitor.check()

    def on_trial_result(
        self,
        iteration: int,
        trials: Sequence[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Count the finished epochs."""
        self.epochs[str(trial)] = result["epochs"]
        section = self.sweep.spec.correct
        total = len(section.lambdas) * section.epochs
        self.sweep.progress("fine-tuning over λ", sum(self.epochs.values()), total, "epochs")
