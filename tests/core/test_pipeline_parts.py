"""Parts of the pipeline: artefacts that are made together, and a report that cannot be written."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import Psi, ReferenceSet
from defuse_core.errors import VaeHealthError
from defuse_core.local import LocalCompute
from defuse_core.pipeline import EVALUATION, _healthy_models, _once_each, rewrite_report
from defuse_core.runs import REPORT_FILES, Run
from defuse_core.store import FolderStore
from tests.conftest import FIGURES, recommended, tiny, trained_run


def psi(total: int) -> Psi:
    return Psi(np.array([total]), 10, 40, 2, 1, 0.5)


def test_artefacts_of_one_step_that_are_missing_are_made_together_and_the_others_are_not_made_again(tmp_path):
    run, asked = Run.start(FolderStore(tmp_path), "a", tiny()), []
    kinds, totals = dict.fromkeys(("one", "two", "three"), Psi), {"one": 1, "two": 2, "three": 3}

    def make(names):
        asked.append(tuple(names))
        return [psi(totals[name]) for name in names]

    run.once("correct", Psi, lambda: psi(20), "two")
    for _ in range(2):
        found = _once_each(run, "correct", kinds, make)
        assert {name: each.total for name, each in found.items()} == {"one": 1, "two": 20, "three": 3}
    assert asked == [("one", "three")]
    assert set(run.manifest()["artefacts"]) == set(kinds)


@pytest.mark.parametrize("meanwhile", ["deleted", "made again", "run deleted", "other settings"])
def test_a_report_of_results_that_are_deleted_or_changed_while_it_is_drawn_is_not_written(
    finished_run, tmp_path, monkeypatch, caplog, meanwhile
):
    shutil.copytree(finished_run / "runs/tiny", tmp_path / "tiny")
    run = Run.open(FolderStore(tmp_path), "tiny")

    def draw(*_: object) -> dict[str, str]:
        evaluation = run.store.read(EVALUATION)
        if meanwhile == "run deleted":  # in a bucket, where the folder is none
            for key in run.store.list():
                run.store.delete(key)
        elif meanwhile == "other settings":
            spec = run.spec.with_fields("serve", failure_threshold=0.5)
            Run.start(FolderStore(tmp_path), "tiny", spec)
        else:
            run.delete(["evaluation"])
        if meanwhile == "made again":
            run.store.write(EVALUATION, evaluation)
        return {}

    monkeypatch.setattr(FIGURES, draw)
    assert rewrite_report(run).run.name == "tiny"
    assert not any(run.store.exists(key) for key in REPORT_FILES)
    assert "not written again, since results or settings of the run were deleted or changed" in caplog.text


def test_reference_models_that_are_worse_than_the_classifier_are_told_before_identification(
    tmp_path, tiny_models, references, caplog
):
    worse = replace(references, test=references.test - 0.5)
    for name, models, told in (("good", references, 0), ("worse", worse, 1)):
        run = trained_run(FolderStore(tmp_path), name, recommended(), tiny_models, models)
        _healthy_models(run, LocalCompute())
        assert caplog.text.count("train: the reference models, which tell failures from unclear") == told
    assert "review.reference.architecture: custom, import_path" in caplog.text
    caplog.clear()
    run.once("identify", Psi, lambda: psi(20))
    _healthy_models(run, LocalCompute())
    assert "the reference models" not in caplog.text


def test_a_run_ends_with_what_mends_reference_models_that_are_worse_and_call_the_beta_vae_blind(
    tmp_path, tiny_models, references
):
    spec = recommended(vae={"decode": "anchored"}).with_fields("identify", scale=300.0)
    worse = replace(references, test=references.test - 0.5)
    for name, models, remedy in (
        ("good", references, "lower identify.scale"),
        ("worse", worse, "train better"),
    ):
        run = trained_run(FolderStore(tmp_path), name, spec, tiny_models, models)
        with pytest.raises(
            VaeHealthError, match=f"the β-VAE is blind: the reference models get .*; {remedy}"
        ):
            _healthy_models(run, LocalCompute())
        run.until = "train"  # which ends here anyway, with the models
        assert _healthy_models(run, LocalCompute())[0].health.verdict == "blind"


def test_a_blind_beta_vae_ends_a_run_before_reference_models_are_trained_unless_it_ends_then_anyway(
    tmp_path, tiny_models, references
):
    blind = replace(tiny_models, health=replace(tiny_models.health, verdict="blind"))
    run = trained_run(FolderStore(tmp_path), "blind", recommended(), blind)
    with pytest.raises(VaeHealthError, match="the β-VAE is blind"):
        _healthy_models(run, LocalCompute())
    assert not run.store.exists("references.safetensors")
    run.once("train", ReferenceSet, lambda: references, "references")
    run.until = "train"
    assert _healthy_models(run, LocalCompute())[0].health.verdict == "blind"
