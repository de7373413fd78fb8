"""The sweep over λ as Ray Tune trials. Their state lies in the run's store; Tune's own is thrown away."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.trainable import Trainable, wrap_function

from cluster import metrics
from cluster.faults import as_defuse_error, cause_of, one_line
from cluster.relay import Relay, relayed, this_place
from cluster.session import SHARE_THE_STORE, Lookout, Share
from defuse_core.artifacts import Models, Trial
from defuse_core.codec import decode
from defuse_core.config import RunFile
from defuse_core.correct import FineTuningData, is_trial_failure, run_trial, trial_key
from defuse_core.errors import ComputeError, DefuseError, InputError
from defuse_core.progress import Progress
from defuse_core.store import Store

log = logging.getLogger("defuse")
STEP = "correct"
TRIAL = "lam-"
MAX_FAILURES = 2  # a trial is started again so often; it goes on at its last finished epoch


@dataclass(eq=False)
class Sweeping:
    """What a sweep over λ needs."""

    spec: RunFile
    models: Any  # ObjectRef of Models
    tuning: Any  # ObjectRef of Tuning: once in the object store of each node, whatever the number of trials
    store: Store
    share: Share
    parallel: int | None  # trials at once; None is as many as there is room for, nodes that join included
    relay: Relay
    progress: Progress
    name: str


def run_trials(sweeping: Sweeping) -> tuple[list[Trial], dict[float, DefuseError]]:
    """Return the finished trials, and why each λ that is left out failed for good.

    Raises the error of a trial that images, the store or machines failed: the same command goes on with it.
    """
    with _quiet_tune(), tempfile.TemporaryDirectory(prefix="defuse-tune-") as folder:
        results = _tuner(sweeping, folder).fit()
    trials: list[Trial] = []
    failures: dict[float, DefuseError] = {}
    for result in (results[index] for index in range(len(results))):
        lam = float(Path(result.path).name.removeprefix(TRIAL))  # the one thing that is there whatever failed
        if result.error is None:
            trials.append(_stored(sweeping.store, lam))
            continue
        if not _is_left_out(result.error):
            raise as_defuse_error(result.error, f"correct: λ = {lam:g}")
        cause = cause_of(result.error)
        failures[lam] = cause if isinstance(cause, DefuseError) else ComputeError(one_line(result.error))
        log.warning("correct: the trial with λ = %g failed for good: %s", lam, failures[lam])
    return trials, failures


def _is_left_out(error: Exception) -> bool:
    cause = cause_of(error)
    lost = isinstance(cause, RayError) and not isinstance(cause, RayTaskError)  # a process, a node, an object
    return not lost and is_trial_failure(cause)


def _stored(store: Store, lam: float) -> Trial:
    try:
        return decode(Trial, store.read(trial_key(lam)), trial_key(lam))
    except FileNotFoundError as error:
        raise InputError(
            f"correct: λ = {lam:g} is done, and is not in {store.address} for this process; {SHARE_THE_STORE}"
        ) from error


def _trial(
    config: dict[str, float],
    spec: RunFile,
    models: Models,
    tuning: FineTuningData,
    store: Store,
    mailbox: Any,
) -> None:
    """One λ, in a worker. Reports how many epochs are done."""
    with relayed(mailbox):
        place = this_place("correct")
        log.debug("correct: λ = %g in %s", config["lam"], place)
        for trial in run_trial(spec, models, tuning, config["lam"], store):
            tune.report({"epochs": len(trial.rows), "visible_gpus": place.visible})


def _trainable(sweeping: Sweeping) -> type[Trainable]:
    """Return a trial with what it needs, under the name that Ray shows of its actors and processes."""
    function = tune.with_parameters(
        _trial,
        spec=sweeping.spec,
        models=sweeping.models,
        tuning=sweeping.tuning,
        store=sweeping.store,
        mailbox=sweeping.relay.mailbox,
    )
    named = wrap_function(function, name=STEP)
    named.__name__ = named.__qualname__ = STEP
    return named


def _tuner(sweeping: Sweeping, folder: str) -> tune.Tuner:
    resources = {"cpu": sweeping.share.cpus, "gpu": sweeping.share.gpus}
    return tune.Tuner(
        tune.with_resources(_trainable(sweeping), resources),
        param_space={"lam": tune.grid_search(list(sweeping.spec.correct.lambdas))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=sweeping.parallel,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=sweeping.name,
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_Watch(sweeping)],
        ),
    )


def _trial_name(trial: TuneTrial) -> str:
    return f"{TRIAL}{trial.config['lam']!r}"


class _Watch(tune.Callback):
    """Passes on how far the sweep is, from inside Tune's loop in the driver."""

    def __init__(self, sweeping: Sweeping) -> None:
        self.sweeping = sweeping
        self.epochs: dict[str, int] = {}
        self.lookout = Lookout(STEP, sweeping.share)

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks beside its trials; this one holds the terminal, and is never restored."""
        return {}

    def on_step_end(self, iteration: int, trials: Sequence[TuneTrial], **info: Any) -> None:
        """Pass on the workers' log lines, and say where all wait."""
        metrics.trials_running(sum(trial.status == TuneTrial.RUNNING for trial in trials))
        self.sweeping.relay.pass_on()
        self.lookout.look()

    def on_trial_result(
        self,
        iteration: int,
        trials: Sequence[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Count the epochs done."""
        self.epochs[str(trial)] = result["epochs"]
        section = self.sweeping.spec.correct
        total = len(section.lambdas) * section.epochs
        self.sweeping.progress("fine-tuning over λ", sum(self.epochs.values()), total, "epochs")


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Keep Tune from logging to files, from talking, and from taking Ctrl-C for itself."""
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table whatever the verbosity
    }
    before = {name: os.environ.get(name) for name in wanted}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray._private")]
    levels = [logger.level for logger in loggers]
    os.environ.update(wanted)
    _keep_credentials_here()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _keep_credentials_here() -> None:
    """Keep Tune from describing its actors with this process's AWS_* keys, which Ray logs and its dashboard shows."""
    passed_on = class_cache.ENV_VARS_TO_PROPAGATE
    passed_on.difference_update({name for name in passed_on if name.startswith("AWS_")})
