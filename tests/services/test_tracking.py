"""`--track mlflow` with a store of files in place of a server: what is sent, once, and what happens without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from defuse_core.artifacts import ClassifierEpoch, Models, Sweep, SweepRow
from defuse_core.data import open_splits
from defuse_core.errors import InputError, LabelsPending, StoreError
from defuse_core.report.build import build_report
from defuse_core.runs import FROM_SWEEP, ReachedStep, Run
from defuse_core.store import FolderStore
from services.settings import read_environment
from services.tracking import DEFAULTS, FIRST_REQUEST, _figures, expect_mlflow, tracking
from tests.command_line import call, one_line
from tests.conftest import ROOT, TINY
from tests.sample_components import FIT
from tests.sample_findings import finished_run, sample_findings
from tests.services.serving.synthetic_runs import make_run


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an empty tracking store."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    return mlflow.MlflowClient(f"file://{tmp_path}/mlruns")


def finish(run: Run, rows: tuple[SweepRow, ...], accepted: int) -> None:
    """Store a sweep, whose corrected classifier is the one at its start, and the report."""
    models = run.require(Models)
    sweep = Sweep(rows, rows[-1] if rows else None, models.classifier if rows else {}, ())
    run.once("correct", Sweep, lambda: sweep)
    report = build_report(run, finished_run(*sample_findings(accepted=accepted)))
    run.store.write("report.json", report.model_dump_json(by_alias=True).encode())
    run.store.write("report.html", b"<html>")


@pytest.fixture
def run(tmp_path: Path, tiny_spec, tiny_models: Models) -> Run:
    """A finished run with two fine-tunings of two epochs."""
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    made = make_run(FolderStore(tmp_path), "digits", tiny_spec, tiny_models, splits, tiny_models.classifier)
    for key in ("models", "sweep"):  # made again with their entries in the manifest
        made.store.delete(f"{key}.safetensors")
    made.once("train", Models, lambda: tiny_models)
    rows = tuple(
        SweepRow(lam, epoch, 0.1 * epoch, 0.9, None, 0.8, 0.7, 0.5 + 0.1 * epoch)
        for lam in (0.1, 1e10)
        for epoch in (1, 2)
    )
    finish(made, rows, accepted=2)
    return made


def send(run: Run, end: type[BaseException] | None = None) -> None:
    """Track a command that only ends, by this exception if one is given."""
    with pytest.raises(end) if end else contextlib.nullcontext(), tracking(run, read_environment()):
        if end is not None:
            raise end("train")


def tracked(client: Any) -> list[Any]:
    """Return the MLflow runs, the newest first."""
    experiment = client.get_experiment_by_name("defuse")
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def test_settings_epochs_figures_files_and_the_model_are_sent(server, run, tiny_models):
    send(run)
    (found,) = tracked(server)
    assert found.info.run_name == "digits"
    assert found.info.status == "FINISHED"
    assert found.data.params["vae.latent_dim"] == "4"
    assert found.data.params["correct.lambdas"] == "[0.001, 1.0, 10.0]"
    history = server.get_metric_history(found.info.run_id, "vae.reconstruction")
    assert [point.step for point in history] == list(range(1, 51))
    assert history[-1].value == tiny_models.vae_history[-1].reconstruction
    by_epoch = server.get_metric_history(found.info.run_id, "sweep.lambda_0.1.scenario")
    assert [(point.step, point.value) for point in by_epoch] == [(1, 0.6), (2, 0.7)]
    assert "sweep.lambda_1e10.tune" in found.data.metrics
    report = json.loads(run.store.read("report.json"))
    assert found.data.metrics["report.accuracy.defuse.test"] == report["accuracy"]["defuse"]["test"]
    files = {file.path for file in server.list_artifacts(found.info.run_id)}
    assert {"report.html", "report.json", "run.yaml", "model"} <= files
    (model,) = server.list_artifacts(found.info.run_id, "model")
    assert model.path == "model/model.safetensors"


def test_flags_and_the_numbers_of_classes_are_no_figures():
    health = dataclasses.asdict(dataclasses.replace(FIT, kept_on_average=0.8, least_kept=1))
    found = {name.removeprefix("health.") for name in _figures("health", health)}
    assert health.keys() - found == {"most_common_answer", "least_kept", "anchored", "verdict", "judged_by"}
    epoch = dataclasses.asdict(ClassifierEpoch(1, 0.5, 0.9, guesses=True))
    assert _figures("classifier", epoch) == {"classifier.loss": 0.5, "classifier.validation": 0.9}


def test_a_classifier_whose_code_has_changed_is_not_sent_and_warned_of(server, run, monkeypatch, caplog):
    architectures = (run.spec.classifier.architecture,)  # as if its code were the user's
    monkeypatch.setattr("defuse_core.export.CODE_ELSEWHERE", architectures)
    monkeypatch.setattr("torch.nn.ReLU", torch.nn.Sigmoid)  # the weights fit as before
    send(run)
    (found,) = tracked(server)
    assert server.list_artifacts(found.info.run_id, "model") == []
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned.startswith("mlflow: no model is sent: the classifier answers ")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (ReachedStep, "SCHEDULED"),
        (LabelsPending, "SCHEDULED"),
        (InputError, "FAILED"),
        (KeyboardInterrupt, "FAILED"),
    ],
)
def test_whatever_ends_the_command_what_there_is_is_sent_and_nothing_twice(
    server, tmp_path, tiny_spec, tiny_models, end, status
):
    begun = Run.start(FolderStore(tmp_path), "new", tiny_spec)
    send(begun, end)
    begun.once("train", Models, lambda: tiny_models)
    for _ in range(2):
        send(begun, end)
    (found,) = tracked(server)
    assert found.info.status == status
    assert len(server.get_metric_history(found.info.run_id, "vae.reconstruction")) == 50
    assert server.list_artifacts(found.info.run_id) == []
    begun.spec = begun.spec.with_fields("resources", precision="bf16")  # as where `auto` was measured
    finish(begun, (), accepted=0)
    send(begun)
    (done,) = tracked(server)
    assert (done.info.run_id, done.info.status) == (found.info.run_id, "FINISHED")
    assert "report.scenarios.accepted" in done.data.metrics
    assert server.list_artifacts(done.info.run_id, "model") == []  # nothing was corrected


def test_an_mlflow_run_that_the_store_cannot_note_is_deleted_and_the_next_attempt_begins_another(
    server, run, monkeypatch
):
    def full(store: FolderStore, key: str, *_: object) -> None:
        raise StoreError(f"{store.address}/{key}: no space left on device")

    with monkeypatch.context() as on_full_disk:
        on_full_disk.setattr(FolderStore, "write", full)
        for _ in range(2):
            send(run)
    assert tracked(server) == []
    send(run)
    (found,) = tracked(server)
    assert found.info.status == "FINISHED"


def test_other_parameters_are_another_mlflow_run(server, tmp_path, tiny_spec):
    for spec in (tiny_spec, tiny_spec.with_fields("vae", beta=4.0)):
        begun = Run.start(FolderStore(tmp_path), "new", spec)
        for _ in range(2):
            send(begun, ReachedStep)
    newest, oldest = tracked(server)
    assert (oldest.data.params["vae.beta"], newest.data.params["vae.beta"]) == ("0.3", "4.0")


def test_what_follows_from_an_overruled_verdict_is_another_mlflow_run(server, run):
    send(run)
    run.delete(FROM_SWEEP)  # as `defuse review set --redo` does
    send(run, LabelsPending)
    finish(run, (SweepRow(0.1, 1, 0.1, 0.9, None, 0.8, 0.7, 0.55),), accepted=1)
    send(run)
    after, before = tracked(server)
    assert (before.data.metrics["report.scenarios.accepted"], before.info.status) == (2, "FINISHED")
    assert (after.data.metrics["report.scenarios.accepted"], after.info.status) == (1, "FINISHED")
    assert after.data.metrics["sweep.lambda_0.1.scenario"] == 0.55
    assert "sweep.lambda_1e10.tune" not in after.data.metrics
    assert len(server.get_metric_history(after.info.run_id, "vae.reconstruction")) == 50


@pytest.mark.parametrize("password", ["sesame", "ses/ame", "sesame@home"])
def test_no_log_shows_the_password_of_the_servers_address(run, monkeypatch, caplog, password):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ana:{password}@127.0.0.1:9")
    expect_mlflow(read_environment())
    send(run)
    lines = [record.getMessage() for record in caplog.records]
    assert "the server cannot be used" in lines[0]
    assert any("is not tracked" in line for line in lines)
    assert not any(word in "".join(lines) + repr(read_environment()) for word in ("sesame", "ses", "ana:"))


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame\n")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_TOKEN holds a line break") as refused:
        expect_mlflow(read_environment())
    assert "sesame" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame")
    expect_mlflow(read_environment())


def test_a_server_that_is_down_costs_one_line_and_the_run_is_tracked_later(server, run, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    send(run)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Connection refused" in line and "the same command sends it later" in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.tracking_uri)
    send(run)
    assert tracked(server)[0].info.status == "FINISHED"


def test_a_server_that_never_answers_holds_up_the_start_for_one_short_timeout(monkeypatch, caplog):
    for name in FIRST_REQUEST:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(FIRST_REQUEST, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        expect_mlflow(read_environment())
        assert time.monotonic() - started < float(DEFAULTS["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no figure is logged unless it answers at the end" in line
    assert not FIRST_REQUEST.keys() & os.environ.keys()  # what is sent at the end has more time


class Moved(BaseHTTPRequestHandler):
    """Redirects as a proxy before HTTPS does, to where it answers, so that a GET passes and a POST becomes one."""

    def do_GET(self) -> None:
        is_final = self.path.startswith("/final")
        self.send_response(200 if is_final else self.server.status)
        self.send_header("Location", f"/final{self.path}")
        self.end_headers()
        found = b'{"experiment": {"experiment_id": "1", "name": "defuse"}}'
        self.wfile.write(found if is_final else b"<html>")

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("status", [301, 308])
def test_a_server_that_redirects_such_that_nothing_could_be_sent_is_warned_of_at_the_start(
    monkeypatch, caplog, status
):
    with ThreadingHTTPServer(("127.0.0.1", 0), Moved) as moved:
        moved.status = status
        threading.Thread(target=moved.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{moved.server_port}")
        expect_mlflow(read_environment())
        moved.shutdown()
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["301" in line and "must not redirect" in line for line in told] == [True] * (status == 301)


def test_a_run_that_another_server_knows_is_begun_anew(server, run, tmp_path, monkeypatch):
    import mlflow

    send(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/other")
    send(run)
    (found,) = tracked(mlflow.MlflowClient(f"file://{tmp_path}/other"))
    assert found.data.params["vae.latent_dim"] == "4"


def test_a_run_that_was_deleted_on_the_server_is_begun_anew(server, run):
    send(run)
    (deleted,) = tracked(server)
    server.delete_run(deleted.info.run_id)
    send(run)
    (found,) = tracked(server)
    assert found.info.run_id != deleted.info.run_id and found.data.params["vae.latent_dim"] == "4"


def test_the_command_tracks_and_continues_one_run(server, tmp_path, monkeypatch, capsys):
    tree = TINY | {"vae": TINY["vae"] | {"epochs": 1, "accept": "blind"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    command = ["run", tmp_path / "tiny.yaml", "--store", tmp_path / "runs", "--on", "local"]
    command += ["--track", "mlflow"]
    for until in ("train", "train"):
        code, _, err = call(monkeypatch, capsys, *command, "--until", until)
        assert code == 0, err
    (found,) = tracked(server)
    assert found.info.status == "SCHEDULED"
    assert len(server.get_metric_history(found.info.run_id, "classifier.loss")) == 15


def test_a_missing_package_or_address_is_one_line_before_anything_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["run", tmp_path / "tiny.yaml", "--store", tmp_path / "runs", "--track", "mlflow"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, err = call(monkeypatch, capsys, *command)
    assert (code, "set MLFLOW_TRACKING_URI" in one_line(err)) == (2, True)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, _, err = call(monkeypatch, capsys, *command)
    assert (code, "pip install 'mlflow-skinny>=3.2'" in one_line(err)) == (2, True)
    assert not (tmp_path / "runs").exists()


REPORTS_TO_NOBODY = """
import sys
from pathlib import Path
from defuse_core.config import load_run_file
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.settings import read_environment
from services.tracking import tracking
run = Run.start(FolderStore(Path(sys.argv[1])), "digits", load_run_file(Path("deploy/runs/digits.yaml")))
with tracking(run, read_environment()):
    assert "mlflow" not in sys.modules
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
"""


def test_mlflow_sends_no_records_of_its_use(tmp_path):
    """In an environment without the variables of tests and CI, under which mlflow sends none by itself."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:1", "MLFLOW_TRACKING_URI": f"file://{tmp_path}"}
    program = [sys.executable, "-c", REPORTS_TO_NOBODY, str(tmp_path)]
    done = subprocess.run(
        program, env=kept | unreachable, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
