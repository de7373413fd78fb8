"""correct.stack with classifiers of one's own: exported programs, and what cannot be stacked."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from defuse_core.artifacts import Models
from defuse_core.codec import encode
from defuse_core.config import RunFile
from defuse_core.local import LocalCompute
from defuse_core.models import weights_of
from defuse_core.models.programs import load_program
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore
from defuse_core.trials import write_trial
from tests.core.test_stacked import (
    LAMBDAS,
    OWN,
    assert_close_rows,
    assert_close_weights,
    separate,
    stacking,
    together,
    with_classifier,
)
from tests.own_classifiers import Branching, Checking, Detached, OtherWeights, ReplacingBuffer, trained


def with_program(spec: RunFile, path: Path, models: Models) -> tuple[RunFile, Models]:
    section = {"architecture": "program", "weights": str(path), "epochs": 0}
    weights = weights_of(load_program(path.read_bytes(), str(path)))
    return with_classifier(spec, section), replace(models, classifier=weights)


def test_a_program_of_torch_export_is_stacked_as_well(tiny_models, data, tmp_path, caplog):
    path = tmp_path / "net.pt2"
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(trained(), (torch.rand(2, 1, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    spec, models = with_program(stacking(), path, tiny_models)
    alone = separate(spec, models, data, LAMBDAS)
    made = together(spec, models, data, LAMBDAS, FolderStore(tmp_path / "run"))
    for lam, trial in made.items():
        assert_close_rows(trial.rows, alone[lam].rows)
        assert_close_weights(trial.best, alone[lam].best, atol=1e-5)
    assert encode(made[1.0]) != encode(alone[1.0])
    assert "cannot be stacked" not in caplog.text


@pytest.mark.usefixtures("trusted_torchscript")
def test_torchscript_is_not_stacked(tiny_models, data, tmp_path, caplog):
    torch.jit.script(trained()).save(tmp_path / "net.pt")
    spec, models = with_program(stacking(epochs=1), tmp_path / "net.pt", tiny_models)
    made = together(spec, models, data, LAMBDAS, FolderStore(tmp_path / "run"))
    assert "cannot be stacked (it is TorchScript" in caplog.text
    assert encode(made[1.0]) == encode(separate(spec, models, data, [1.0])[1.0])


@pytest.mark.parametrize(
    ("classifier", "why"),
    [
        (Branching, "RuntimeError: vmap"),
        (ReplacingBuffer, "its buffer seen is updated differently"),
        (OtherWeights, "its logits differ when stacked"),
        (Detached, "the gradient of head.bias is lost"),
    ],
)
def test_a_classifier_that_cannot_be_stacked_is_logged_and_its_lambdas_are_trained_one_by_one(
    classifier, why, tiny_models, data, tmp_path, caplog
):
    section = OWN | {"import_path": f"tests.own_classifiers:{classifier.__name__}"}
    spec = with_classifier(stacking(epochs=1), section)
    models = replace(tiny_models, classifier=weights_of(classifier()))
    caplog.set_level(logging.WARNING)
    made = together(spec, models, data, LAMBDAS, FolderStore(tmp_path / "run"))
    (line,) = [line for line in caplog.messages if "cannot be stacked" in line]
    assert why in line and "correct.stack: 1" in line
    alone = separate(spec, models, data, LAMBDAS)
    assert {lam: encode(trial) for lam, trial in made.items()} == {
        lam: encode(trial) for lam, trial in alone.items()
    }


def test_that_a_classifier_cannot_be_stacked_is_said_once_for_all_stacks_of_a_sweep(
    tiny_models, fixes, tmp_path, caplog
):
    section = OWN | {"import_path": "tests.own_classifiers:Branching"}
    spec = with_classifier(stacking(2, epochs=1, lambdas=(0.01, 0.1, 1.0, 10.0)), section)
    torch.manual_seed(0)
    models = replace(tiny_models, classifier=weights_of(Branching()))
    LocalCompute().sweeps(models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path))])
    assert sum("cannot be stacked" in line for line in caplog.messages) == 1


def test_an_error_of_the_classifiers_code_about_one_lambda_leaves_out_that_one_alone(
    tiny_models, fixes, tmp_path
):
    spec = stacking(epochs=1, lambdas=(1e39, 1.0, 10.0))
    spec = with_classifier(spec, OWN | {"import_path": "tests.own_classifiers:Checking"})
    torch.manual_seed(0)
    models = replace(tiny_models, classifier=weights_of(Checking()))
    request = SweepRequest(spec, fixes, None, FolderStore(tmp_path))
    (sweep,) = LocalCompute().sweeps(models, [request])
    assert [(failed.lam, failed.cause) for failed in sweep.failed] == [
        (1e39, "ValueError: the logits overflow")
    ]
    assert {row.lam for row in sweep.rows} == {1.0, 10.0}


def test_an_error_of_the_classifiers_code_leaves_out_the_lambdas_that_are_not_done(
    tiny_models, fixes, data, tmp_path, monkeypatch
):
    """Nobody can tell which λ it is about; one that was given up before is kept."""

    def failing(*asked: object) -> None:
        write_trial(store, done)
        yield 10.0, done
        raise ZeroDivisionError("of a pixel by nothing")

    store, done = FolderStore(tmp_path), separate(stacking(), tiny_models, data, [10.0])[10.0]
    monkeypatch.setattr("defuse_core.local.run_stack", failing)
    (sweep,) = LocalCompute().sweeps(tiny_models, [SweepRequest(stacking(), fixes, None, store)])
    assert [(failed.lam, failed.cause) for failed in sweep.failed] == [
        (lam, "ZeroDivisionError: of a pixel by nothing") for lam in (0.01, 1.0)
    ]
    assert sweep.rows == done.rows
