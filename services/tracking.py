"""`--track mlflow`: a run's settings, figures and files on an MLflow server, read from what the run has stored.

Nothing of the run depends on it: a server that does not answer costs one line of the log, and the same command later
adds what is missing. What was sent is recorded in the run as `mlflow.json`, so that nothing is sent twice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from defuse_core.artifacts import Models, Sweep
from defuse_core.errors import InputError, LabelsPending
from defuse_core.evaluation.health import STRIP_KEY
from defuse_core.runs import ReachedStep, Run
from services.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("defuse")
KEY = "mlflow.json"
EXPERIMENT = "defuse"
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # the limits of MLflow's server
PARAM_LENGTH = 500  # characters
FILES = ("report.html", "report.json", "run.yaml", STRIP_KEY)
REPORT_FIGURES = ("accuracy", "scenarios", "evidence", "psi", "vae", "chosen")  # fields of the report
TIMEOUT_S, RETRIES = "20", "1"  # of MLflow's requests, unless the environment says otherwise

Figures = dict[str, float]


def expect_mlflow(settings: Settings) -> None:
    """Raise InputError where mlflow is not installed, or no server is named."""
    if find_spec("mlflow") is None:
        raise InputError("--track mlflow needs mlflow; install it with pip install 'defuse[mlflow]'")
    if settings.mlflow_uri is None:
        raise InputError("--track mlflow: set MLFLOW_TRACKING_URI to the address of your MLflow server")


class MlflowTracking:
    """One MLflow run for one run of Defuse, which is the same when that is continued. A context manager."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.uri = run, settings.mlflow_uri
        self.experiment = settings.mlflow_experiment or EXPERIMENT
        self.failed = False

    def __enter__(self) -> Self:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", TIMEOUT_S)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        self.update("RUNNING")
        self.run.listeners.append(self.update)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.listeners.remove(self.update)
        waits = kind is not None and issubclass(kind, ReachedStep | LabelsPending)
        self.update("FINISHED" if kind is None else "SCHEDULED" if waits else "FAILED")

    def update(self, status: str | None = None) -> None:
        """Send what the run has stored since the last time. Never raises: the first failure is logged."""
        if self.failed:
            return
        try:
            self._send(status)
        except Exception as error:  # mlflow and its transports raise many kinds of errors
            self.failed = True
            log.warning(
                "mlflow: %s is not tracked (%s: %s); the run goes on, and the same command later sends what is missing",
                self.run.name,
                type(error).__name__,
                " ".join(str(error).split())[:200],
            )

    def _send(self, status: str | None) -> None:
        from mlflow import MlflowClient

        client, state = MlflowClient(self.uri), self._state()
        run_id = self._run_id(client, state)
        for part, send in {
            "params": self._send_params,
            "models": self._send_models,
            "baseline": self._send_baseline,
            "sweep": self._send_sweep,
            "report": self._send_report,
        }.items():
            if part not in state["sent"] and send(client, run_id):
                state["sent"].append(part)
                self._store(state)
        if status is not None:
            client.update_run(run_id, status=status)

    def _state(self) -> dict[str, Any]:
        if not self.run.store.exists(KEY):
            return {"run_id": None, "sent": []}
        state: dict[str, Any] = json.loads(self.run.store.read(KEY))
        return state

    def _store(self, state: Mapping[str, Any]) -> None:
        self.run.store.write(KEY, json.dumps(state, indent=1).encode())

    def _run_id(self, client: MlflowClient, state: dict[str, Any]) -> str:
        """Return the MLflow run that was begun for this run, or a new one where the server has none."""
        from mlflow.exceptions import MlflowException

        if state["run_id"] is not None:
            try:
                return str(client.get_run(state["run_id"]).info.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("mlflow: run %s is not on this server; a new one is begun", state["run_id"])
        experiment = client.get_experiment_by_name(self.experiment)
        number = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        begun = client.create_run(
            number, run_name=self.run.name, tags={"defuse.store": self.run.store.address}
        )
        state["run_id"], state["sent"] = begun.info.run_id, []
        self._store(state)
        return str(state["run_id"])

    def _send_params(self, client: MlflowClient, run_id: str) -> bool:
        from mlflow.entities import Param

        fields = _flat(self.run.spec.model_dump(mode="json"))
        params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in fields]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(run_id, params=params[start : start + PARAMS_AT_ONCE])
        return True

    def _send_models(self, client: MlflowClient, run_id: str) -> bool:
        models = self.run.load(Models)
        if models is None:
            return False
        for name, history in (("classifier", models.classifier_history), ("vae", models.vae_history)):
            _log(client, run_id, ((row.epoch, _figures(name, dataclasses.asdict(row))) for row in history))
        if models.health is not None:
            _log(client, run_id, [(0, _figures("vae.health", dataclasses.asdict(models.health)))])
            client.set_tag(run_id, "defuse.vae", models.health.verdict)
        _log(client, run_id, [(0, _figures("classifier.accuracy", models.accuracy))])
        return True

    def _send_baseline(self, client: MlflowClient, run_id: str) -> bool:
        return self._send_trials(client, run_id, "baseline")

    def _send_sweep(self, client: MlflowClient, run_id: str) -> bool:
        return self._send_trials(client, run_id, "sweep")

    def _send_trials(self, client: MlflowClient, run_id: str, key: str) -> bool:
        """Send one row per λ and epoch, as `sweep.lambda_0.1.tune` by epoch."""
        sweep = self.run.load(Sweep, key)
        if sweep is None:
            return False
        _log(
            client,
            run_id,
            (
                (row.epoch, _figures(f"{key}.lambda_{row.lam:g}".replace("+", ""), dataclasses.asdict(row)))
                for row in sweep.rows
            ),
        )
        return True

    def _send_report(self, client: MlflowClient, run_id: str) -> bool:
        """Send the figures of the report, the page and the corrected classifier."""
        if not self.run.store.exists("report.json"):
            return False
        report = json.loads(self.run.store.read("report.json"))
        for field in REPORT_FIGURES:
            if report.get(field) is not None:
                _log(client, run_id, [(0, _figures(f"report.{field}", report[field]))])
        with tempfile.TemporaryDirectory(prefix="defuse-mlflow-") as folder:
            for name in FILES:
                if self.run.store.exists(name):
                    Path(folder, name).write_bytes(self.run.store.read(name))
            self._write_model(Path(folder, "model", "model.safetensors"))
            client.log_artifacts(run_id, folder)
        return True

    def _write_model(self, path: Path) -> None:
        from defuse_core.export import export_model

        try:
            export_model(self.run, path)
        except InputError as error:
            log.info("mlflow: no model is sent: %s", error)


def _log(client: MlflowClient, run_id: str, rows: Iterable[tuple[int, Figures]]) -> None:
    """Send figures, each with its step."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for step, figures in rows for name, value in figures.items()]
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_AT_ONCE])


def _figures(name: str, tree: Mapping[str, Any]) -> Figures:
    """Return the finite numbers in a tree by their dotted names; lists, texts, epochs and λ are left out."""
    return {
        field: float(value)
        for field, value in _flat(tree, f"{name}.")
        if isinstance(value, int | float)
        and math.isfinite(value)
        and field.rpartition(".")[2] not in ("epoch", "lam")
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
