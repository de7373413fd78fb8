"""Training by several workers through Ray Train. Checkpoints are the run's, in its store; Ray Train keeps none."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from ray import train
from ray.exceptions import RayTaskError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.connection import as_defuse_error, cause_of
from cluster.progress import reporting
from cluster.ray_compat import kept_working_dir
from cluster.resources import Resources, claim_devices, hide_other_gpus
from defuse_core.errors import DefuseError, ModelError
from defuse_core.protocols import Progress, silent
from defuse_core.training.batches import training_together

log = logging.getLogger("defuse")
WORKER_RESTARTS = 3  # the workers are started again this often; they continue from the last checkpoint
TIMEOUT_S = 600  # longest wait of a worker for another one


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
    with tempfile.TemporaryDirectory(prefix="defuse-train-") as folder:
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
