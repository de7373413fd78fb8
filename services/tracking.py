"""`--track mlflow`: a run's settings, figures and files on an MLflow server, read from what the run has stored.

Nothing of the run depends on it: a server that does not answer costs one line of the log, and the same command later
adds what is missing. `mlflow.json` in the run records what was sent, with the SHA-256 of the file that it came from:
nothing is sent twice, and what is made again, as after `defuse review set --redo`, is sent again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from defuse_core.artifacts import Models, Sweep
from defuse_core.config import changed_value, flat_fields
from defuse_core.errors import InputError, LabelsPending, without_credentials
from defuse_core.evaluation.health import STRIP_KEY
from defuse_core.runs import ReachedStep, Run
from services.settings import Settings, fits_a_header

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("defuse")
KEY = "mlflow.json"
EXPERIMENT = "defuse"
DELETED = "deleted"  # MLflow's lifecycle stage of what can be restored, and not written
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # the limits of MLflow's server
PARAM_LENGTH = 500  # characters
FILES = ("report.html", "report.json", "run.yaml", STRIP_KEY)
REPORT_FIGURES = ("accuracy", "scenarios", "evidence", "psi", "vae", "chosen")  # fields of the report
TIMEOUT_S, RETRIES = "20", "1"  # of MLflow's requests, unless the environment says otherwise

SOURCES = {  # part -> the file of the run that it is read from, and the prefixes of its figures' names
    "models": ("models.safetensors", ("classifier.", "vae.")),
    "baseline": ("baseline.safetensors", ("baseline.",)),
    "sweep": ("sweep.safetensors", ("sweep.",)),
    "report": ("report.json", ("report.",)),
}

Figures = dict[str, float]
Rows = list[tuple[int, Figures]]  # figures with their step


def expect_mlflow(settings: Settings) -> None:
    """Raise InputError where mlflow is not installed, no server is named, or its token cannot be sent."""
    if find_spec("mlflow") is None:
        raise InputError("--track mlflow needs mlflow; pip install mlflow-skinny")
    if settings.mlflow_uri is None:
        raise InputError("--track mlflow: set MLFLOW_TRACKING_URI to the address of your MLflow server")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if token and not fits_a_header(token):
        raise InputError(
            "--track mlflow: MLFLOW_TRACKING_TOKEN holds a line break or another sign that no HTTP header can hold; "
            "set it to the token alone"
        )


class MlflowTracking:
    """One MLflow run for one run of Defuse, which is the same when that is continued. A context manager.

    A run that goes on with another value of a field that changes results, such as an added λ, is another one in MLflow,
    whose parameters cannot be changed.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.uri = run, settings.mlflow_uri
        self.experiment = settings.mlflow_experiment or EXPERIMENT
        self.failed = False
        fields = flat_fields(run.spec.model_dump(mode="json"))  # before the run settles `auto`
        self._params = {name: _as_param(value) for name, value in fields.items()}
        self._digests: dict[str, str] = {}  # of files that do not change while this process has the run

    def __enter__(self) -> Self:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", TIMEOUT_S)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        # mlflow sends records of its use to an address of its own, unless this is set before it is imported
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
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
                "mlflow: %s is not tracked (%s); the run goes on, and the same command later sends what is missing",
                self.run.name,
                self._redacted(error),
            )

    def _send(self, status: str | None) -> None:
        from mlflow import MlflowClient

        client, state = MlflowClient(self.uri), self._state()
        run_id = self._run_id(client, state)
        sent = state["sent"]
        if "params" not in sent:  # a server changes no parameter, so they are sent once
            self._send_params(client, run_id)
            sent["params"] = ""  # they come from no file
            self._store(state)
        for part, (key, _) in SOURCES.items():
            digest = self._digest(key)
            if digest is not None and sent.get(part) != digest:
                self._send_part(client, run_id, part, again=part in sent)
                sent[part] = digest
                self._store(state)
        if status is not None:
            client.update_run(run_id, status=status)

    def _digest(self, key: str) -> str | None:
        """Return the SHA-256 of a file of the run; None where it does not exist."""
        if key not in self._digests:
            try:
                digest = hashlib.sha256(self.run.store.read(key)).hexdigest()
            except FileNotFoundError:
                return None
            if key == "report.json":  # which `defuse run` writes again at its end; it makes no artefact twice
                return digest
            self._digests[key] = digest
        return self._digests[key]

    def _redacted(self, error: Exception) -> str:
        """Return an error in one line, without the password that the server's address may hold."""
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return without_credentials(line, self.uri)[:300]

    def _state(self) -> dict[str, Any]:
        if not self.run.store.exists(KEY):
            return {"run_id": None, "sent": {}}
        state: dict[str, Any] = json.loads(self.run.store.read(KEY))
        return state

    def _store(self, state: Mapping[str, Any]) -> None:
        self.run.store.write(KEY, json.dumps(state, indent=1).encode())

    def _run_id(self, client: MlflowClient, state: dict[str, Any]) -> str:
        """Return the MLflow run that was begun for this run, or a new one where the server has none.

        Also a new one where it was deleted there, or its parameters differ in a field that changes results.
        """
        from mlflow.exceptions import MlflowException

        if state["run_id"] is not None:
            try:
                found = client.get_run(state["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("mlflow: run %s is not on this server; a new one is begun", state["run_id"])
            else:
                deleted = found.info.lifecycle_stage == DELETED
                changed = (
                    f"run {state['run_id']} was deleted" if deleted else self._changed(found.data.params)
                )
                if changed is None:
                    return str(found.info.run_id)
                log.info("mlflow: %s; a new MLflow run is begun", changed)
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is not None and experiment.lifecycle_stage == DELETED:
            raise InputError(
                f"the experiment {self.experiment} was deleted; restore it on the server, or set MLFLOW_EXPERIMENT_NAME"
            )
        number = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        begun = client.create_run(
            number, run_name=self.run.name, tags={"defuse.store": self.run.store.address}
        )
        state["run_id"], state["sent"] = begun.info.run_id, {}
        self._store(state)
        return str(state["run_id"])

    def _changed(self, known: Mapping[str, str]) -> str | None:
        """Return the first parameter that differs and changes results; one that a side lacks is of another version."""
        shared = sorted(known.keys() & self._params.keys())
        before, now = (
            {name: None if params[name] == "None" else params[name] for name in shared}
            for params in (known, self._params)
        )
        return changed_value(before, now)

    def _send_params(self, client: MlflowClient, run_id: str) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in self._params.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(run_id, params=params[start : start + PARAMS_AT_ONCE])

    def _send_part(self, client: MlflowClient, run_id: str, part: str, again: bool) -> None:
        """Send the figures and files of one part; `again` where an earlier state of it was sent."""
        if part == "models":
            rows = self._model_figures(client, run_id)
        elif part == "report":
            rows = self._report_figures()
            self._send_files(client, run_id, again)
        else:
            rows = self._trial_figures(part)
        _log(client, run_id, rows)
        if again:
            _log(client, run_id, _withdrawn(client, run_id, SOURCES[part][1], rows))

    def _model_figures(self, client: MlflowClient, run_id: str) -> Rows:
        models = self.run.load(Models)
        assert models is not None  # its file was just read
        rows = [
            *((row.epoch, _figures("classifier", asdict(row))) for row in models.classifier_history),
            *((row.epoch, _figures("vae", asdict(row))) for row in models.vae_history),
        ]
        rows.append((0, _figures("vae.health", asdict(models.health))))
        client.set_tag(run_id, "defuse.vae", models.health.verdict)
        return [*rows, (0, _figures("classifier.accuracy", models.accuracy))]

    def _trial_figures(self, key: str) -> Rows:
        """Return one row per λ and epoch, as `sweep.lambda_0.1.tune` by epoch."""
        sweep = self.run.load(Sweep, key)
        assert sweep is not None
        return [
            (row.epoch, _figures(f"{key}.lambda_{row.lam:g}".replace("+", ""), asdict(row)))
            for row in sweep.rows
        ]

    def _report_figures(self) -> Rows:
        report = json.loads(self.run.store.read("report.json"))
        return [
            (0, _figures(f"report.{field}", report[field]))
            for field in REPORT_FIGURES
            if report.get(field) is not None
        ]

    def _send_files(self, client: MlflowClient, run_id: str, again: bool) -> None:
        """Send the report's files and the corrected classifier; without one, delete the one that was sent before."""
        with tempfile.TemporaryDirectory(prefix="defuse-mlflow-") as folder:
            for name in FILES:
                if self.run.store.exists(name):
                    Path(folder, name).write_bytes(self.run.store.read(name))
            model = Path(folder, "model", "model.safetensors")
            self._write_model(model)
            client.log_artifacts(run_id, folder)
            if again and not model.exists():
                self._delete_model(client, run_id)

    def _delete_model(self, client: MlflowClient, run_id: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        artifacts = client.get_run(run_id).info.artifact_uri
        try:
            store: Any = get_artifact_repository(artifacts, tracking_uri=self.uri)
            store.delete_artifacts("model")
        except Exception as error:  # not every store of artifacts can delete
            log.warning(
                "mlflow: delete the folder model of run %s yourself, its verdict was overruled: %s",
                run_id,
                self._redacted(error),
            )

    def _write_model(self, path: Path) -> None:
        from defuse_core.export import export_model

        try:
            export_model(self.run, path)
        except InputError as error:
            log.info("mlflow: no model is sent: %s", error)


def _as_param(value: object) -> str:
    """Return a value in one line, since some servers keep only the first."""
    return " ".join(str(value).split())[:PARAM_LENGTH].rstrip()


def _log(client: MlflowClient, run_id: str, rows: Rows) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for step, figures in rows for name, value in figures.items()]
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_AT_ONCE])


def _withdrawn(client: MlflowClient, run_id: str, prefixes: tuple[str, ...], rows: Rows) -> Rows:
    """Return nan for every figure and step that MLflow has and `rows` do not: MLflow deletes no figure."""
    kept = {(name, step) for step, figures in rows for name in figures}
    known = [name for name in client.get_run(run_id).data.metrics if name.startswith(prefixes)]
    steps = {(name, point.step) for name in known for point in client.get_metric_history(run_id, name)}
    return [(step, {name: math.nan}) for name, step in sorted(steps - kept)]


def _figures(name: str, tree: Mapping[str, Any]) -> Figures:
    """Return the finite numbers in a tree by their dotted names; lists, texts, epochs and λ are left out."""
    return {
        field: float(value)
        for field, value in flat_fields(tree, f"{name}.").items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and field.rpartition(".")[2] not in ("epoch", "lam")
    }
