"""What `defuse_core.open` returns, against the artefacts of runs that nothing had to compute."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from defuse_core import results
from defuse_core.artifacts import Gallery, Models, Scenarios, Sweep, SweepRow
from defuse_core.codec import encode
from defuse_core.data import open_splits
from defuse_core.device import device
from defuse_core.errors import InputError, ModelError
from defuse_core.evaluation import Findings
from defuse_core.models import (
    build_classifier,
    encode_images,
    load_classifier,
    load_vae,
    predict,
    weights_of,
)
from defuse_core.report import Report
from defuse_core.results import COLUMNS, RunResult, ScenarioList
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.conftest import tiny
from tests.sample_findings import finished_run, report_of, sample_findings, sample_run
from tests.services.serving.synthetic_runs import make_run


@pytest.fixture
def sample(tmp_path: Path) -> tuple[RunResult, Findings, Report]:
    """Four scenarios, of which two were accepted."""
    findings = sample_findings(4, 2)
    result, report = RunResult(sample_run(tmp_path)), report_of(findings, tmp_path)
    result.__dict__ |= {"report": report, "_finished": finished_run(*findings)}  # as if they had been read
    return result, findings[0], report


def test_a_scenario_has_the_images_codes_and_answers_of_its_number(sample):
    result, found, _ = sample
    codes = np.random.default_rng(0).normal(size=found.gallery.codes.shape).astype(np.float32)
    gallery, support = replace(found.gallery, codes=codes), np.array([4, 3, 2, 1])
    found = replace(found, gallery=gallery, scenarios=replace(found.scenarios, support=support))
    result.__dict__["_finished"] = finished_run(found, None)
    for number, scenario in enumerate(result.scenarios):
        assert scenario.number == number
        np.testing.assert_array_equal(scenario.images, gallery.images[number])
        np.testing.assert_array_equal(scenario.codes, codes[number])
        scenario.images[:], scenario.codes[:] = 7, 7  # as code that normalises in place
        assert not (scenario.images == 7).any() and not (scenario.codes == 7).any()
        assert scenario.answers == tuple(str(answer) for answer in gallery.predicted[number])
        assert scenario.support == support[number]


def test_figures_are_those_of_the_report_before_and_after_the_correction(sample):
    result, found, report = sample
    accepted = found.verdicts.accepted.tolist()
    assert [scenario.number for scenario in result.scenarios.accepted] == accepted
    assert repr(result.scenarios) == f"<4 scenarios, {len(accepted)} of them failure scenarios>"
    for row, scenario in zip(report.scenarios.list, result.scenarios, strict=True):
        assert (scenario.label, scenario.mistaken_for) == (row.label, row.mistaken_for)
        assert (scenario.purity, scenario.before, scenario.after) == (row.purity, row.before, row.defuse)
        assert scenario.confirmed is scenario.worse is None  # without judges
        assert scenario.accepted == (row.number in accepted)
        named = f"{row.label} read as {row.mistaken_for}" if scenario.accepted else row.reason
        assert scenario.name == named
        assert repr(scenario) == f"<scenario {row.number}: {named}>"
    after = [result.scenarios[number].after for number in accepted]
    assert after != [result.scenarios[number].before for number in accepted]


def test_the_table_has_a_row_for_each_scenario_by_its_number(sample):
    result, _, _ = sample
    chosen = ScenarioList(result, [result.scenarios[3], result.scenarios[1]])
    table = chosen.to_frame()
    assert table.index.tolist() == [3, 1] and tuple(table.columns) == COLUMNS
    for name in COLUMNS:
        expected = [getattr(scenario, name) for scenario in chosen]
        assert table[name].astype(object).where(table[name].notna(), None).tolist() == expected
    assert len(ScenarioList(result, []).to_frame()) == 0
    assert tuple(ScenarioList(result, []).to_frame().columns) == COLUMNS


def test_what_judges_found_is_told_of_each_scenario(sample):
    result, _, report = sample
    evidence = SimpleNamespace(name="thin", confirmed=True, worse=False)
    rows = [
        row.model_copy(update={"evidence": evidence if row.number == 0 else None})
        for row in report.scenarios.list
    ]
    scenarios = report.scenarios.model_copy(update={"list": rows})
    result.__dict__["report"] = report.model_copy(update={"scenarios": scenarios})
    first = result.scenarios[0]
    assert (first.name, first.confirmed, first.worse) == ("thin", True, False)
    assert (result.scenarios[1].confirmed, result.scenarios[1].worse) == (None, None)


@pytest.fixture
def with_models(tmp_path: Path, tiny_spec, tiny_models: Models) -> RunResult:
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    run = make_run(FolderStore(tmp_path), "a", tiny_spec, tiny_models, splits, tiny_models.classifier)
    found, _ = sample_findings(3, 2)
    object.__setattr__(found, "scenarios", run.require(Scenarios))
    object.__setattr__(found, "gallery", run.require(Gallery))
    result = RunResult(run)
    result.__dict__ |= {
        "report": report_of(sample_findings(3, 2), tmp_path),
        "_finished": finished_run(found, None),
    }
    return result


@pytest.mark.parametrize("part", ["train", "validation"])
def test_the_nearest_real_images_are_those_of_the_part_by_distance_to_the_component(
    part, with_models, tiny_spec
):
    models, scenarios = with_models.run.require(Models), with_models.run.require(Scenarios)
    images = open_splits(tiny_spec.data, tiny_spec.seed).parts()[part]
    codes = encode_images(load_vae(tiny_spec, models.vae), images).astype(np.float64)
    answers = predict(load_classifier(tiny_spec, models.classifier, 10), images)
    for number, scenario in enumerate(with_models.scenarios):
        found = scenario.nearest_training(6) if part == "train" else scenario.nearest_validation(6)
        away = codes - scenarios.means[number]
        square = (away @ np.linalg.inv(scenarios.covariances[number]) * away).sum(axis=1)
        nearest = np.argsort(square)[:6]
        assert found.rows.tolist() == nearest.tolist()
        np.testing.assert_allclose(found.distances, np.sqrt(square[nearest]), rtol=1e-4)
        np.testing.assert_allclose(found.images, images.batch(nearest))
        assert found.labels == tuple(str(label) for label in images.labels[nearest])
        assert found.answers == tuple(str(answer) for answer in answers[nearest])
        assert (found.files, found.part, len(found)) == (None, part, 6)
        name = {"train": "training", "validation": "validation"}[part]
        assert repr(found) == f"<6 {name} images, the nearest first, of {', '.join(found.labels)}>"
        assert f"Nearest {name} images" in found._repr_html_()
    assert len(with_models.scenarios[0].nearest_training()) == 10
    for count in (0, -1):  # no slice that leaves out the last
        with pytest.raises(InputError, match=f"count: expected at least 1, found {count}"):
            with_models.scenarios[0].nearest_training(count)


def test_the_results_of_a_run_without_gpus_are_shown_on_the_cpu(with_models, monkeypatch):
    places = []
    for name in ("encode_images", "predict"):
        computed = getattr(results, name)

        def noted(*given, computed=computed):
            places.append(device().type)
            return computed(*given)

        monkeypatch.setattr(results, name, noted)
    run = with_models.run
    monkeypatch.setattr(run, "spec", run.spec.with_fields("resources", gpus_per_worker=0))
    monkeypatch.setattr("defuse_core.device.can_use_gpu", lambda: True)
    assert len(with_models.scenarios[0].nearest_training(3)) == 3
    assert places == ["cpu", "cpu"]


def test_the_modes_of_the_program_change_nothing(with_models, request):
    scenario, images = with_models.scenarios[0], torch.rand(2, 1, 16, 16)
    expected = scenario.nearest_training(3)
    with torch.no_grad():
        answers = with_models.corrected()(images)
    with_models._codes.clear()
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    torch.set_default_dtype(torch.float64)
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        found, net = scenario.nearest_training(3), with_models.corrected()
    assert (found.rows.tolist(), found.answers) == (expected.rows.tolist(), expected.answers)
    np.testing.assert_array_equal(found.distances, expected.distances)
    logits = net(images)  # outside the modes, to be tuned further
    torch.testing.assert_close(logits.detach(), answers, rtol=0, atol=0)
    logits.sum().backward()


@pytest.mark.parametrize(
    "fields", [{"architecture": "resnet18"}, {"input_range": "imagenet", "outputs": "probabilities"}]
)
def test_a_module_with_the_corrected_weights_answers_as_the_stored_network(fields, tmp_path, tiny_models):
    spec = tiny(classifier={**fields, "class_order": [*range(1, 10), 0]})
    weights = weights_of(build_classifier(spec, 10))
    run = Run.start(FolderStore(tmp_path), "a", spec)
    run.store.write("models.safetensors", encode(replace(tiny_models, classifier=weights)))
    run.store.write("sweep.safetensors", encode(Sweep((), SweepRow(1.0, 1, 0.0), weights, ())))
    is_resnet = spec.classifier.architecture == "resnet18"
    like = resnet18(num_classes=10) if is_resnet else build_classifier(tiny(), 10)
    result, images = RunResult(run), torch.rand(5, 1, 16, 16)
    found = result.corrected(like)
    shown = images.expand(-1, 3, -1, -1) if is_resnet else images
    with torch.no_grad():
        torch.testing.assert_close(found(shown), result.corrected()(images))
    with pytest.raises(
        ModelError, match="like: expected the network itself, found one whose images or answers"
    ):
        result.corrected(found)
    assert result.corrected(like) is not like  # which is as it was
    if not is_resnet:
        scripted = result.corrected(torch.jit.script(like))
        with torch.no_grad():
            torch.testing.assert_close(scripted(shown), found(shown))


def test_images_that_the_data_set_lacks_are_said(with_models):
    with pytest.raises(InputError, match="run a: its data set has no folds images"):
        with_models._part("folds")


def test_addresses_are_shown_from_the_working_directory(tmp_path, tiny_spec, monkeypatch):
    run = Run.start(FolderStore(tmp_path / "runs"), "a", tiny_spec)
    assert repr(RunResult(run)) == f"<run {tmp_path}/runs/a: not finished>"
    monkeypatch.chdir(tmp_path)
    assert repr(RunResult(run)) == "<run runs/a: not finished>"
    assert RunResult(run).page == f"{tmp_path}/runs/a/report.html"
    with pytest.raises(InputError, match="run a has no models yet"):
        RunResult(run).health()


def test_a_run_that_was_deleted_after_it_was_opened_is_said_to_be_gone(tmp_path, tiny_spec):
    result = RunResult(Run.start(FolderStore(tmp_path), "a", tiny_spec))
    shutil.rmtree(tmp_path / "a")
    for ask in (lambda: result.report, lambda: result.scenarios, result.health, lambda: result._finished):
        with pytest.raises(InputError, match=f"{tmp_path}/a: this run is gone; was its folder moved"):
            ask()
    assert "this run is gone" in repr(result)
