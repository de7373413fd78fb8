"""`--track mlflow`: `defuse run` sends a run's settings, figures, report and model to an MLflow server at its end.

The run does not depend on it: a server that does not answer costs one line of the log at the start and one at the end,
and the same command sends it later. `mlflow.json` in the run holds the id of the MLflow run, its parameters, and when
the artefacts of its figures were made. If the run has others by then, as after `defuse review set --redo`, it is
another MLflow run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defuse_core.artifacts import Models, Sweep
from defuse_core.config import flat_fields
from defuse_core.errors import InputError, LabelsPending, RunMismatchError
from defuse_core.evaluation.health import STRIP_KEY
from defuse_core.files import temporary_folder
from defuse_core.formatting import one_line, without_credentials
from defuse_core.optional_packages import expect_packages
from defuse_core.runs import RECORDED_FIELDS, ReachedStep, Run
from services.settings import Environment, fits_a_header

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("defuse")
KEY = "mlflow.json"
EXPERIMENT = "defuse"
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # the limits of MLflow's server
PARAM_LENGTH = 500  # characters
ERROR_LENGTH = 600  # characters: MLflow's own errors name the cause, or what to set, at their end
SWEEPS = ("baseline", "sweep")
FILES = ("report.html", "report.json", "run.yaml", STRIP_KEY)
NO_FIGURES = ("epoch", "lam", "least_kept", "most_common_answer")  # numbers that are no figures
REPORT_FIGURES = ("accuracy", "scenarios", "evidence", "psi", "vae", "chosen")  # fields of the report
DEFAULTS = {  # environment variables, some of which are read when mlflow is imported
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # else a server under maintenance holds a run up for hours
    "MLFLOW_DISABLE_TELEMETRY": "true",  # else it sends records of its use to an address of its own
}
FIRST_REQUEST = {  # replaces DEFAULTS for the question at the start, which holds up the run
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",  # 301 and 302 pass this question and then lose what is sent
}

Figures = dict[str, float]
Rows = list[tuple[int, Figures]]  # figures with their step


def expect_mlflow(environment: Environment) -> None:
    """Warn of a server that does not answer: now, not after an hour of training.

    Raises InputError where mlflow is not installed, no server is named, or its token cannot be sent.
    """
    expect_packages("--track mlflow", "mlflow-skinny")
    if environment.mlflow_uri is None:
        raise InputError("--track mlflow: set MLFLOW_TRACKING_URI to the address of your MLflow server")
    if environment.mlflow_token and not fits_a_header(environment.mlflow_token):
        raise InputError(
            "--track mlflow: MLFLOW_TRACKING_TOKEN holds a line break or another sign that no HTTP header can hold; "
            "set it to the token alone"
        )
    remedy = (
        "no figure is logged unless it answers at the end; check MLFLOW_TRACKING_TOKEN and MLFLOW_TRACKING_URI, which "
        "must not redirect"
    )
    log.info("mlflow: asking the server")
    with _warning(environment, "the server cannot be used", remedy), _environment(FIRST_REQUEST):
        _ask(environment)


def _ask(environment: Environment) -> None:
    """Ask the server something. Raises an error where it does not answer, or redirects such that a POST is lost."""
    try:
        _client(environment).get_experiment_by_name(environment.mlflow_experiment or EXPERIMENT)
    except Exception as error:  # of mlflow, which has one kind for all answers
        if not re.search("error code 30[78] ", str(error)):
            raise


@contextlib.contextmanager
def tracking(run: Run, environment: Environment) -> Iterator[None]:
    """Send what the run has stored when the block ends, whatever ended it. A failure to send is logged."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (ReachedStep, LabelsPending):
        status = "SCHEDULED"
        raise
    finally:
        log.info("mlflow: sending what %s has made", run.name)
        with _warning(environment, f"{run.name} is not tracked", "the same command sends it later"):
            _send(run, environment, status)


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set the variables of `defaults` that have no value, for the block alone."""
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextlib.contextmanager
def _warning(environment: Environment, what: str, remedy: str) -> Iterator[None]:
    """Log any error of the block in one line, without the password of the server's address."""
    try:
        yield
    except Exception as error:  # mlflow and its transports raise many kinds of errors
        text = without_credentials(f"{type(error).__name__}: {error}", environment.mlflow_uri)
        log.warning("mlflow: %s (%s); %s", what, one_line(text, ERROR_LENGTH), remedy)


def _client(environment: Environment) -> MlflowClient:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # else it logs each retry beside the line of `_warning`
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    return MlflowClient(environment.mlflow_uri)


def _send(run: Run, environment: Environment, status: str) -> None:
    client = _client(environment)
    from mlflow.entities import Metric, Param  # after DEFAULTS are set

    fields = flat_fields(json.loads(run.store.read(RECORDED_FIELDS)))
    # in one line: some servers keep only the first
    params = {name: one_line(str(value), PARAM_LENGTH).rstrip() for name, value in fields.items()}
    artefacts = run.manifest()["artefacts"]
    made = {key: artefacts[key]["made"] for key in ("models", *SWEEPS) if key in artefacts}
    state = _known_run(run, client, params, made)
    if state is None:
        run_id = _new_run(run, client, environment.mlflow_experiment or EXPERIMENT)
        state = {"run_id": run_id, "params": params, "made": {}}
        try:
            run.store.write(KEY, json.dumps(state, indent=1).encode())
        except BaseException:  # the next attempt would make another one, and this one would never end
            with contextlib.suppress(Exception):
                client.delete_run(run_id)
            raise
    run_id = state["run_id"]
    entries = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(entries), PARAMS_AT_ONCE):  # a server accepts a value that it has
        client.log_batch(run_id, params=entries[start : start + PARAMS_AT_ONCE])
    now, rows = int(time.time() * 1000), _rows(run, made.keys() - state["made"].keys())
    metrics = [Metric(name, value, now, step) for step, figures in rows for name, value in figures.items()]
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_AT_ONCE])
    if run.store.exists("report.json"):
        _send_files(run, client, run_id)
    run.store.write(KEY, json.dumps(state | {"made": made}, indent=1).encode())
    client.update_run(run_id, status=status)


def _known_run(
    run: Run, client: MlflowClient, params: dict[str, str], made: dict[str, str]
) -> dict[str, Any] | None:
    """Return what mlflow.json holds; None if its MLflow run is gone, or has settings or figures of an earlier state."""
    from mlflow.exceptions import MlflowException

    if not run.store.exists(KEY):
        return None
    state: dict[str, Any] = json.loads(run.store.read(KEY))
    if state["params"] != params or not state["made"].items() <= made.items():
        return None
    try:
        found = client.get_run(state["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return state if found.info.lifecycle_stage == "active" else None  # not one that was deleted there


def _new_run(run: Run, client: MlflowClient, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    number = client.create_experiment(experiment) if found is None else found.experiment_id
    begun = client.create_run(number, run_name=run.name, tags={"defuse.store": run.store.address})
    return str(begun.info.run_id)


def _rows(run: Run, artefacts: Set[str]) -> Rows:
    """Return the figures of these artefacts by epoch, as `sweep.lambda_0.1.tune`, and those of the report, if any."""
    rows: Rows = []
    if "models" in artefacts:
        models = run.require(Models)
        rows += [(row.epoch, _figures("classifier", asdict(row))) for row in models.classifier_history]
        rows += [(row.epoch, _figures("vae", asdict(row))) for row in models.vae_history]
        rows.append((0, _figures("vae.health", asdict(models.health))))
        rows.append((0, _figures("classifier.accuracy", models.accuracy)))
    for key in artefacts & {*SWEEPS}:
        for row in run.require(Sweep, key).rows:
            rows.append((row.epoch, _figures(f"{key}.lambda_{row.lam:g}".replace("+", ""), asdict(row))))
    if run.store.exists("report.json"):
        report = json.loads(run.store.read("report.json"))
        rows.append((0, _figures("report", {field: report.get(field) for field in REPORT_FIGURES})))
    return rows


def _send_files(run: Run, client: MlflowClient, run_id: str) -> None:
    """Send the report's files and the corrected classifier, if there is one."""
    from defuse_core.export import export_model

    with temporary_folder("defuse-mlflow-") as folder:
        for name in FILES:
            if run.store.exists(name):
                Path(folder, name).write_bytes(run.store.read(name))
        try:
            export_model(run, Path(folder, "model", "model.safetensors"))
        except RunMismatchError as error:
            log.warning("mlflow: no model is sent: %s", error)
        except InputError as error:
            log.info("mlflow: no model is sent: %s", error)
        client.log_artifacts(run_id, folder)


def _figures(name: str, tree: Mapping[str, Any]) -> Figures:
    """Return the finite figures in a tree by their dotted names: no flag, class, epoch, λ, list or text."""
    return {
        field: float(value)
        for field, value in flat_fields(tree, f"{name}.").items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and field.rpartition(".")[2] not in NO_FIGURES
    }
