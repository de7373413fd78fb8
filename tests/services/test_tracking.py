"""`--track mlflow` with a store of files in place of a server: what is sent, once, and what happens without one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from defuse_core.artifacts import Models, Sweep, SweepRow
from defuse_core.codec import encode
from defuse_core.data import open_splits
from defuse_core.errors import InputError
from defuse_core.report.build import build_report
from defuse_core.runs import ReachedStep, Run
from defuse_core.store import FolderStore
from services.settings import read_settings
from services.tracking import MlflowTracking, expect_mlflow
from tests.conftest import ROOT, TINY
from tests.e2e.test_cli import call, one_line
from tests.sample_findings import sample_findings
from tests.services.serving.synthetic_runs import make_run


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an empty tracking store."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    return mlflow.MlflowClient(f"file://{tmp_path}/mlruns")


@pytest.fixture
def run(tmp_path: Path, tiny_spec, tiny_models: Models) -> Run:
    """A finished run with two fine-tunings of two epochs."""
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    made = make_run(FolderStore(tmp_path), "digits", tiny_spec, tiny_models, splits, tiny_models.classifier)
    rows = tuple(
        SweepRow(lam, epoch, 0.1 * epoch, 0.9, None, 0.8, 0.7, 0.5 + 0.1 * epoch)
        for lam in (0.1, 1e10)
        for epoch in (1, 2)
    )
    sweep = Sweep(rows, rows[1], tiny_models.classifier, ())
    made.store.write("sweep.safetensors", encode(sweep))
    report = build_report(made, *sample_findings())
    made.store.write("report.json", report.model_dump_json(by_alias=True).encode())
    made.store.write("report.html", b"<html>")
    return made


def tracked(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("defuse")
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def test_settings_epochs_figures_files_and_the_model_are_sent(server, run, tiny_models):
    with MlflowTracking(run, read_settings()):
        pass
    (found,) = tracked(server)
    assert found.info.run_name == "digits"
    assert found.info.status == "FINISHED"
    assert found.data.params["vae.latent_dim"] == "4"
    assert found.data.params["correct.lambdas"] == "[0.001, 1.0, 10.0]"
    assert found.data.tags["defuse.vae"] == tiny_models.health.verdict
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


def test_a_continued_run_is_the_same_and_sends_nothing_twice(server, run):
    report = run.store.read("report.json")
    run.store.delete("report.json")
    with pytest.raises(ReachedStep), MlflowTracking(run, read_settings()):
        raise ReachedStep("correct")
    (waiting,) = tracked(server)
    assert waiting.info.status == "SCHEDULED"
    run.store.write("report.json", report)
    with MlflowTracking(run, read_settings()):
        pass
    (done,) = tracked(server)
    assert (done.info.run_id, done.info.status) == (waiting.info.run_id, "FINISHED")
    assert len(server.get_metric_history(done.info.run_id, "vae.reconstruction")) == 50


def test_a_changed_run_file_begins_a_new_run_with_its_parameters(server, tmp_path, tiny_spec):
    store, changed = FolderStore(tmp_path), tiny_spec.with_fields("vae", beta=4.0)
    for spec in (tiny_spec, changed, changed):
        begun = Run.start(store, "new", spec)
        with pytest.raises(ReachedStep), MlflowTracking(begun, read_settings()) as tracking:
            begun.spec = spec.with_fields("resources", precision="bf16")  # as where `auto` was measured
            tracking.update()
            raise ReachedStep("train")
    newest, oldest = tracked(server)
    assert (oldest.data.params["vae.beta"], newest.data.params["vae.beta"]) == ("0.3", "4.0")


CHANGES: dict[
    str, tuple[dict[str, Any], int]
] = {  # of section vae, resources, ...: the MLflow runs afterwards
    "nothing": ({}, 1),
    "more readers": ({"resources": {"readers": 3}}, 1),
    "another bound of the check": ({"check": {"max_loss": 0.5}}, 1),
    "the images elsewhere": ({"data": {"root": "/elsewhere"}}, 1),
    "a λ more": ({"correct": {"lambdas": (0.001, 1.0, 10.0, 100.0)}}, 2),
    "weights where there were none": ({"vae": {"weights": "/there/vae.safetensors"}}, 2),
}


@pytest.mark.parametrize("case", CHANGES)
def test_only_another_value_that_changes_results_begins_a_new_run(server, tmp_path, tiny_spec, case):
    begun, (change, count) = Run.start(FolderStore(tmp_path), "new", tiny_spec), CHANGES[case]
    with MlflowTracking(begun, read_settings()):
        pass
    for section, fields in change.items():
        begun.spec = begun.spec.with_fields(section, **fields)
    for _ in range(2):
        with MlflowTracking(begun, read_settings()):
            pass
    assert len(tracked(server)) == count


def test_a_field_that_another_version_lacks_begins_no_new_run(server, tmp_path, tiny_spec):
    begun = Run.start(FolderStore(tmp_path), "new", tiny_spec)
    tracking = MlflowTracking(begun, read_settings())
    del tracking._params["vae.beta"]
    for each in (tracking, MlflowTracking(begun, read_settings())):
        with each:
            pass
    assert len(tracked(server)) == 1


def overrule(run: Run, rows: tuple[SweepRow, ...], accepted: int) -> None:
    """Make what follows from the verdicts again, as `defuse run` does after `review set --redo`; without rows no λ."""
    run.store.delete("sweep.safetensors")
    run.store.delete("report.json")
    with MlflowTracking(run, read_settings()):
        pass
    sweep = Sweep(rows, rows[0] if rows else None, run.load(Models).classifier if rows else {}, ())
    run.store.write("sweep.safetensors", encode(sweep))
    report = build_report(run, *sample_findings(accepted=accepted))
    run.store.write("report.json", report.model_dump_json(by_alias=True).encode())


def test_what_follows_from_an_overruled_verdict_is_replaced(server, run):
    with MlflowTracking(run, read_settings()):
        pass
    (before,) = tracked(server)
    overrule(run, (SweepRow(0.1, 1, 0.1, 0.9, None, 0.8, 0.7, 0.55),), accepted=1)
    with MlflowTracking(run, read_settings()):
        pass
    (after,) = tracked(server)
    assert after.info.run_id == before.info.run_id
    by_epoch = server.get_metric_history(after.info.run_id, "sweep.lambda_0.1.scenario")
    newest = {point.step: point.value for point in sorted(by_epoch, key=lambda point: point.timestamp)}
    assert newest[1] == 0.55 and math.isnan(newest[2])
    assert math.isnan(after.data.metrics["sweep.lambda_1e10.tune"])
    assert before.data.metrics["report.scenarios.accepted"] == 2
    assert after.data.metrics["report.scenarios.accepted"] == 1
    assert len(server.get_metric_history(after.info.run_id, "vae.reconstruction")) == 50
    assert server.list_artifacts(after.info.run_id, "model")


def test_the_model_of_an_overruled_verdict_is_deleted_where_no_other_follows(server, run):
    with MlflowTracking(run, read_settings()):
        pass
    overrule(run, (), accepted=0)
    with MlflowTracking(run, read_settings()):
        pass
    (found,) = tracked(server)
    assert server.list_artifacts(found.info.run_id, "model") == []
    assert math.isnan(found.data.metrics["sweep.lambda_0.1.scenario"])


@pytest.mark.parametrize("password", ["sesame", "ses/ame", "sesame@home"])
def test_no_log_shows_the_password_of_the_servers_address(run, monkeypatch, caplog, password):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ana:{password}@127.0.0.1:9")
    settings = read_settings()
    with MlflowTracking(run, settings):
        pass
    lines = [record.getMessage() for record in caplog.records]
    assert any("is not tracked" in line for line in lines)
    assert not any(word in "".join(lines) + repr(settings) for word in ("sesame", "ses", "ana:"))


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame\n")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_TOKEN holds a line break") as refused:
        expect_mlflow(read_settings())
    assert "sesame" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame")
    expect_mlflow(read_settings())


def test_figures_are_sent_as_soon_as_their_step_is_done(server, tmp_path, tiny_spec, tiny_models):
    begun = Run.start(FolderStore(tmp_path), "new", tiny_spec)
    with MlflowTracking(begun, read_settings()):
        assert "vae.reconstruction" not in tracked(server)[0].data.metrics
        begun.once("train", Models, lambda: tiny_models)
        assert "vae.reconstruction" in tracked(server)[0].data.metrics


def test_a_server_that_is_down_costs_one_line_and_the_run_is_tracked_later(server, run, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with MlflowTracking(run, read_settings()) as tracking:
        tracking.update()
    lines = [record.getMessage() for record in caplog.records if "mlflow:" in record.getMessage()]
    assert len(lines) == 1
    assert "the same command later sends what is missing" in lines[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.tracking_uri)
    with MlflowTracking(run, read_settings()):
        pass
    assert tracked(server)[0].info.status == "FINISHED"


def test_a_run_that_another_server_knows_is_begun_anew(server, run, tmp_path, monkeypatch):
    import mlflow

    with MlflowTracking(run, read_settings()):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/other")
    with MlflowTracking(run, read_settings()):
        pass
    (found,) = tracked(mlflow.MlflowClient(f"file://{tmp_path}/other"))
    assert found.data.params["vae.latent_dim"] == "4"


def test_a_run_that_was_deleted_on_the_server_is_begun_anew(server, run):
    with MlflowTracking(run, read_settings()):
        pass
    (deleted,) = tracked(server)
    server.delete_run(deleted.info.run_id)
    with MlflowTracking(run, read_settings()):
        pass
    (found,) = tracked(server)
    assert found.info.run_id != deleted.info.run_id and found.data.params["vae.latent_dim"] == "4"


def test_a_deleted_experiment_is_a_warning_that_says_what_to_do(server, run, caplog):
    server.delete_experiment(server.create_experiment("defuse"))
    with MlflowTracking(run, read_settings()):
        pass
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "the experiment defuse was deleted; restore it on the server, or set MLFLOW_EXPERIMENT_NAME" in line
    )


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
    monkeypatch.setattr("services.tracking.find_spec", lambda name: None)
    code, _, err = call(monkeypatch, capsys, *command)
    assert (code, "pip install mlflow-skinny" in one_line(err)) == (2, True)
    assert not (tmp_path / "runs").exists()


REPORTS_TO_NOBODY = """
from pathlib import Path
from types import SimpleNamespace
from defuse_core.config import load_run_file
from services.settings import read_settings
from services.tracking import MlflowTracking
run = SimpleNamespace(name="digits", spec=load_run_file(Path("deploy/runs/digits.yaml")), listeners=[])
with MlflowTracking(run, read_settings()):
    from mlflow.telemetry import get_telemetry_client
    assert get_telemetry_client() is None
"""


def test_mlflow_sends_no_records_of_its_use(tmp_path):
    """In an environment without the variables of tests and CI, under which mlflow sends none by itself."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:1", "MLFLOW_TRACKING_URI": f"file://{tmp_path}"}
    program = [sys.executable, "-c", REPORTS_TO_NOBODY]
    done = subprocess.run(
        program, env=kept | unreachable, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
