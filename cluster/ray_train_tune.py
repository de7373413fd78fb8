"""What uses Ray Train and Ray Tune: training by several workers, and the sweep over λ as trials.

Checkpoints and the state of trials are the run's, in its store; Ray Train keeps none, and Tune's are thrown away.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import train, tune
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.trainable import Trainable

from cluster.connection import as_defuse_error, cause_of, explained_line, is_worker_lost
from cluster.progress import ProgressListener, reporting, running_trials
from cluster.ray_compat import fit, kept_working_dir, named_trainable, quiet_tune
from cluster.resources import CapacityMonitor, Resources, claim_devices, hide_other_gpus
from defuse_core.artifacts import Bool, Models, Trial
from defuse_core.config import RunFile
from defuse_core.correct import FineTuning
from defuse_core.errors import ComputeError, DefuseError, ModelError
from defuse_core.files import temporary_folder
from defuse_core.local import Profile
from defuse_core.protocols import Progress, SweepRequest, silent
from defuse_core.store import Store
from defuse_core.training.batches import training_together
from defuse_core.trials import (
    finished_trials,
    is_trial_failure,
    names_of,
    run_stack,
    stacks_of,
    stored_trial,
    without_weights,
)
from defuse_core.tuning_data import FineTuningData

log = logging.getLogger("defuse")
STEP = "correct"
TRIAL = "stack-"
DIVERGED = "diverged"  # key in a trial's last result: each λ that is left out, and why
TRIAL_RETRIES = 2  # a trial is started again this often; it continues after its last finished epoch
WORKER_RESTARTS = 3  # the workers are started again this often; they continue from the last checkpoint
TIMEOUT_S = 600  # longest wait of a worker for another one


# Finished trials without their weights, and the error of each λ that failed for good.
Outcome = tuple[list[Trial], dict[float, DefuseError]]
TrialId = tuple[int, int]  # a Tune trial: number of the request, and of the stack among those of the request


class TrialImages(NamedTuple):
    """What the trials of one request read; the images are in the object store of each node once."""

    clean: Any  # ObjectRef of Splits
    scenario: Any  # ObjectRef of ScenarioImages
    right_before: dict[str, Bool]  # as `score_before` returns it


@dataclass(eq=False)
class SweepContext:
    """What all trials of some sweeps over λ share. They run together, so that no worker waits at the end of each."""

    requests: Sequence[SweepRequest]
    models: Any  # ObjectRef of Models
    images: list[TrialImages]  # per request
    resources: Resources
    max_concurrent: int | None  # trials at once; None: as many as fit, on nodes that join later, too
    listener: ProgressListener
    name: str
    profile: Profile

    def unfinished(self, finished: Sequence[Mapping[float, Trial]]) -> list[TrialId]:
        """Return the trials that are yet to be run, request after request."""
        return [
            (number, index)
            for number, (request, done) in enumerate(zip(self.requests, finished, strict=True))
            for index, lams in enumerate(stacks_of(request.spec.correct))
            if not done.keys() >= set(lams)
        ]


def run_trials(sweep: SweepContext, finished: Sequence[Mapping[float, Trial]]) -> list[Outcome]:
    """Return for each request its trials, without weights, and the error of each λ whose trial failed for good.

    `finished` are those of each request that were done before, by λ. Raises the error of a trial that the images, the
    store or the machines failed: the same command continues it.
    """
    trials = sweep.unfinished(finished)
    with quiet_tune(), temporary_folder("defuse-tune-") as folder:
        results = fit(_tuner(sweep, trials, folder))
    failures: list[dict[float, DefuseError]] = [{} for _ in sweep.requests]
    for result in (results[index] for index in range(len(results))):
        # its folder is named by _trial_name: this is all that Tune is sure to return of one that failed
        number, index = map(int, Path(result.path).name.removeprefix(TRIAL).split("-"))
        request = sweep.requests[number]
        lams, failed = stacks_of(request.spec.correct)[index], failures[number]
        failed |= {lam: ModelError(why) for lam, why in (result.metrics or {}).get(DIVERGED, [])}
        if result.error is not None:
            error, done = _failure(result.error, lams), finished_trials(request.spec, request.store)
            failed |= {lam: error for lam in lams if lam not in done and lam not in failed}
    return [
        (
            [
                done.get(lam) or without_weights(stored_trial(each.store, lam))
                for lam in each.spec.correct.lambdas
                if lam not in failed
            ],
            failed,
        )
        for each, done, failed in zip(sweep.requests, finished, failures, strict=True)
    ]


def _failure(error: Exception, lams: Sequence[float]) -> DefuseError:
    """Return the error of a trial that is left out; raises one that ends the sweep."""
    cause = cause_of(error)
    if is_worker_lost(error) or not is_trial_failure(cause):
        raise as_defuse_error(error, f"correct: λ = {names_of(lams)}")
    return cause if isinstance(cause, DefuseError) else ComputeError(explained_line(error))


def _trial(
    config: dict[str, TrialId],
    requests: Sequence[tuple[RunFile, Store, int]],
    models: Models,
    images: list[TrialImages],
    progress_actor: Any,
    profile: Profile,
) -> None:
    """Run one trial of Tune in a worker: one stack of λ of one request. It reports the epochs done, of all λ together.

    `requests` are the run file, the store and the repetition of each request.
    """
    number, index = config["trial"]
    spec, store, repetition = requests[number]
    lams, all_epochs = stacks_of(spec.correct)[index], spec.correct.epochs
    with reporting(progress_actor):
        location = claim_devices(STEP)
        log.debug("correct: λ = %s in %s", names_of(lams), location)
        own = images[number]
        clean, scenario = ray.get([own.clean, own.scenario])
        data = FineTuningData(clean, scenario, own.right_before, repetition)
        made = run_stack(FineTuning(spec, models, data), lams, store)
        epochs, diverged = dict.fromkeys(lams, 0), list[tuple[float, str]]()
        for lam, outcome in profile.first(STEP, f"lambda-{names_of(lams)}-{number}", made):
            if isinstance(outcome, Trial):  # one that is given up counts as all of its epochs
                epochs[lam] = all_epochs if outcome.done else len(outcome.rows)
            else:  # the same in every attempt, so that Tune is not to make another
                diverged.append((lam, str(outcome)))
            report = {"epochs": sum(epochs.values()), DIVERGED: diverged}
            tune.report(report | {"visible_gpus": location.visible_gpus})


def _trainable(sweep: SweepContext) -> type[Trainable]:
    """Return a trial with its inputs, under the name that Ray shows of its actors and processes."""
    function = tune.with_parameters(
        _trial,
        requests=[(each.spec, each.store, each.repetition) for each in sweep.requests],
        models=sweep.models,
        images=sweep.images,
        progress_actor=sweep.listener.actor,
        profile=sweep.profile,
    )
    return named_trainable(function, STEP)


def _tuner(sweep: SweepContext, trials: list[TrialId], folder: str) -> tune.Tuner:
    resources = {"cpu": sweep.resources.cpus, "gpu": sweep.resources.gpus}
    return tune.Tuner(
        tune.with_resources(_trainable(sweep), resources),
        param_space={"trial": tune.grid_search(trials)},
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
            failure_config=tune.FailureConfig(max_failures=TRIAL_RETRIES),
            callbacks=[_SweepProgress(sweep, trials)],
        ),
    )


def _trial_name(trial: TuneTrial) -> str:
    number, index = trial.config["trial"]
    return f"{TRIAL}{number}-{index}"


class _SweepProgress(tune.Callback):
    """Shows how far the sweep is, from inside Tune's loop in the driver."""

    def __init__(self, sweep: SweepContext, trials: list[TrialId]) -> None:
        self.sweep = sweep
        self.total = 0
        for number, index in trials:
            section = sweep.requests[number].spec.correct
            self.total += section.epochs * len(stacks_of(section)[index])
        self.epochs: dict[str, int] = {}
        self.monitor = CapacityMonitor(STEP, sweep.resources)

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks beside its trials; this one holds the terminal, and is never restored."""
        return {}

    def on_step_end(self, iteration: int, trials: Sequence[TuneTrial], **info: Any) -> None:
        """Show the workers' log lines; warn where all trials wait; end the sweep if the run was taken over."""
        for request in self.sweep.requests:
            request.store.require_lock()
        running = sum(trial.status == TuneTrial.RUNNING for trial in trials)
        running_trials().set(running)
        self.sweep.listener.poll()
        self.monitor.check(running > 0)

    def on_trial_result(
        self,
        iteration: int,
        trials: Sequence[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        # a trial that is started again first reports fewer
        self.epochs[str(trial)] = max(result["epochs"], self.epochs.get(str(trial), 0))
        done = sum(self.epochs.values())
        self.sweep.listener.progress("fine-tuning over λ", done, self.total, "epochs")


def run_together(
    function: Callable[..., None],
    args: tuple[object, ...],
    workers: int,
    resources: Resources,
    progress_actor: Any,
    *,
    progress: Progress,
) -> None:
    """Run function(*args, progress=...) in `workers` processes of one torch process group: NCCL on GPUs, else gloo.

    When one of them is lost, all are started again; lost while they start, ComputeError is raised. Raises the error of
    the function.
    """
    config = {"function": function, "args": args, "progress_actor": progress_actor}
    with temporary_folder("defuse-train-") as folder:
        try:
            with kept_working_dir():
                result = _trainer(config, workers, resources, folder).fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
    outcome: ModelError | None = result.return_value  # type: ignore[attr-defined]
    if outcome is not None:
        raise outcome


def _trainer(config: dict[str, Any], workers: int, resources: Resources, folder: str) -> TorchTrainer:
    return TorchTrainer(
        _worker,  # type: ignore[arg-type]  # Ray's annotation says that a result is None, and returns it
        train_loop_config=config,
        torch_config=_TorchConfig(timeout_s=TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]  # of its second version
        ),
    )


class _TorchConfig(TorchConfig):
    """Ray's, whose context around each worker looks for GPUs: what was not granted is hidden before that."""

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        return partial(_with_own_gpus, super().train_func_context)


@contextlib.contextmanager
def _with_own_gpus(ray_context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    hide_other_gpus()
    with ray_context():
        yield


def _worker(config: dict[str, Any]) -> ModelError | None:
    """One of the workers; the first one reports. A training that diverges does so in all, and is not retried."""
    rank = train.get_context().get_world_rank()
    actor = config["progress_actor"]
    with reporting(actor) if rank == 0 else contextlib.nullcontext(silent) as progress:
        log.debug("train: worker %d in %s", rank, claim_devices("train"))
        try:
            with training_together():
                config["function"](*config["args"], progress=progress)
        except ModelError as error:
            return error
        except DefuseError as error:  # as an error of a task, which names its node
            failed = RayTaskError("train", traceback.format_exc(), error)  # type: ignore[no-untyped-call]
            raise failed from error
    return None


def _cause(error: TrainingFailedError) -> DefuseError:
    """Return the error of the first worker that has one of the tree, else a ComputeError of the first that failed."""
    failures = [getattr(each, "_base_exc", each) for each in getattr(error, "worker_failures", {}).values()]
    own = (each for each in failures if isinstance(cause_of(each), DefuseError))
    return as_defuse_error(next(own, next(iter(failures), error)), "train")
