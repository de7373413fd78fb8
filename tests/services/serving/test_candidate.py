"""Which candidate of a run is stored, which of them are one version, and why a run has none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_evidence import sample_evidence
from sample_findings import sample_findings, sample_spec, sample_watch

from defuse_core.artifacts import DroppedComponent, Health, Sweep
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile, ServeSection
from defuse_core.device import device
from defuse_core.errors import CheckFailed, DamagedError, InputError, StoreError
from defuse_core.evaluation import Findings
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.runs import expect_not_promoted
from services.serving import candidate as candidate_module
from services.serving.candidate import (
    Candidate,
    CorrectionSummary,
    NothingCorrected,
    _digest,
    _key,
    prepare_candidate,
    require_corrected,
    with_settings,
)
from services.serving.checks import Check
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest

WEIGHTS = {"layer.weight": np.ones((2, 2), np.float32)}


def corrected() -> Findings:
    found = sample_findings()[0]
    return dataclasses.replace(found, sweep=dataclasses.replace(found.sweep, weights=WEIGHTS))


def spec_with(section: str, **fields: object) -> RunFile:
    return sample_spec().with_fields(section, **fields)


def test_a_candidate_is_kept_for_the_artefacts_limits_and_settings_that_it_was_made_of(monkeypatch):
    made = corrected()
    key = _key(sample_spec(), made, None)
    assert key == _key(sample_spec(), corrected(), None)
    others = [
        _key(spec_with("check", max_loss=0.3), made, None),
        *(
            _key(spec_with("serve", **{name: value}), made, None)
            for name, value in {
                "resize": True,
                "watch": False,
                "watch_share": 0.2,
                "failure_threshold": 0.4,
                "failure_recall": 0.4,
                "precision": "bfloat16",
            }.items()
        ),
        *(
            _key(sample_spec(), dataclasses.replace(made, **{name: value}), None)
            for name, value in {
                "sweep": dataclasses.replace(
                    made.sweep, weights={"layer.weight": WEIGHTS["layer.weight"] + 1}
                ),
                "fixes": dataclasses.replace(made.fixes, labels=made.fixes.labels + 1),
                "verdicts": dataclasses.replace(made.verdicts, ties=7),
            }.items()
        ),
        _key(sample_spec(), made, sample_evidence(np.full((2, 4), 0.5))),
    ]
    for section, field in {"serve": {"timeout_s": 9.0}, "resources": {"workers": 3}}.items():
        assert _key(spec_with(section, **field), made, None) == key  # of the server, or of the machines
    monkeypatch.setattr(candidate_module, "FORMAT", candidate_module.FORMAT + 1)
    others.append(_key(sample_spec(), made, None))
    assert len({key, *others}) == 1 + len(others) == 13


def candidate_of(spec: RunFile) -> Candidate:
    two, per_level = np.ones(2), np.ones((2, 3))
    return Candidate(
        run="parts",
        spec=spec.model_dump(mode="json"),
        classes=("a", "b"),
        classifier=WEIGHTS,
        vae=WEIGHTS,
        summary=CorrectionSummary(1.0, 2, "test", 0.9, 0.9, 0.1, 0.9, "people", "now", ""),
        checks=(Check("finite", True, "all"), Check("improvement", False, "none")),
        digest="",
        scenario=np.array([0, 3]),
        labels=np.array([0, 1]),
        most_common_error=np.array([1, 1]),
        means=np.ones((2, 4)),
        covariances=np.stack([np.eye(4)] * 2),
        before=two,
        after=two,
        levels=np.ones(3),
        distances=per_level,
        recall=per_level,
        failures=sample_watch(images=40),
        components_digest="c",
        judged=np.zeros(2, bool),
    )


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, np.ndarray):
        return value + 1
    if isinstance(value, dict):
        return {name: changed(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return value[:1]
    return None if dataclasses.is_dataclass(value) else f"{value}, another"


def test_candidates_are_one_version_where_all_that_is_served_is_equal():
    one = candidate_of(sample_spec())
    digest = _digest(one)
    told = {
        "run",
        "summary",
        "checks",
        "digest",
        "before",
        "components_digest",
    }  # and the run file, of which a part counts
    served = {field.name for field in dataclasses.fields(Candidate)} - told - {"spec"}
    for name in served:
        assert _digest(dataclasses.replace(one, **{name: changed(getattr(one, name))})) != digest, name
    for name in told:
        assert _digest(dataclasses.replace(one, **{name: changed(getattr(one, name))})) == digest, name
    other_specs = (
        spec_with("correct", epochs=9),
        spec_with("serve", resize=True),
        spec_with("check", max_loss=0.3),
        spec_with("classifier", architecture="custom", import_path="mine:net"),
        spec_with("classifier", architecture="custom", import_path="moved.mine:net"),
        spec_with("classifier", architecture="custom", import_path="mine:net", input_range="-1..1"),
        spec_with("vae", architecture="custom", import_path="mine:vae"),
    )
    same, *others = [
        _digest(dataclasses.replace(one, spec=spec.model_dump(mode="json"))) for spec in other_specs
    ]
    assert same == digest and len({digest, *others}) == len(other_specs)


def test_equal_weights_of_code_that_was_moved_are_another_version(tmp_path):
    registry = Registry(FolderStore(tmp_path))
    for number, module in enumerate(("mine", "moved.mine"), start=1):
        spec = spec_with("classifier", architecture="custom", import_path=f"{module}:net")
        one = candidate_of(spec)
        assert registry.add(dataclasses.replace(one, digest=_digest(one)), "ana", "", forced=False) == number


def test_a_candidate_of_another_format_is_no_equal_version(monkeypatch):
    digest = _digest(candidate_of(sample_spec()))
    monkeypatch.setattr(candidate_module, "FORMAT", candidate_module.FORMAT + 1)
    assert _digest(candidate_of(sample_spec())) != digest


def test_only_checks_that_failed_are_told():
    assert candidate_of(sample_spec()).failed_checks() == ["none"]


def test_a_setting_that_is_none_is_an_error_that_names_the_field():
    assert with_settings(ServeSection(timeout_s=3.0), {"max_images": 5}) == ServeSection(
        timeout_s=3.0, max_images=5
    )
    with pytest.raises(InputError, match=r"^serve\.timeout_s: expected greater than 0, found -1"):
        with_settings(ServeSection(), {"timeout_s": -1})


def finished(folder: Path, dropped: tuple[DroppedComponent, ...] = ()) -> Run:
    """A run that accepted nothing, without a component left to review."""
    found = sample_findings(0, 0)[0]
    models = dataclasses.replace(found.models, health=Health(1000, 1.0, 1.0, 1.0, 3, 0.6, 0, 3, "fit"))
    run = Run.start(FolderStore(folder), "parts", sample_spec())
    for artefact in (
        models,
        found.psi,
        found.gallery,
        found.votes,
        found.verdicts,
        found.fixes,
        Sweep((), None, {}, ()),
        dataclasses.replace(found.scenarios, dropped=dropped, all_weights=np.array([0.4])),
    ):
        run.store.write(f"{type(artefact).__name__.lower()}.safetensors", encode(artefact))
    run.store.write("baseline.safetensors", encode(found.baseline))
    return run


def test_a_run_that_accepted_nothing_could_not_tell_where_its_cells_weigh_little(tmp_path):
    with pytest.raises(NothingCorrected, match="no failure scenario was accepted"):
        prepare_candidate(finished(tmp_path / "nothing"))
    cells = (DroppedComponent(0.006, 8, 3, 8, "few codes", "its codes"),) * 100
    with pytest.raises(CheckFailed, match=r"could not tell .* 60 % of the codes of Ψ are in 100 cells"):
        prepare_candidate(finished(tmp_path / "cells", cells))
    unclear = (DroppedComponent(0.1, 8, 3, 2, "unclear", "its draws"),)
    with pytest.raises(CheckFailed, match=r"could not tell .* Ψ has 516 codes, but no component was left"):
        prepare_candidate(finished(tmp_path / "unclear", unclear))


def test_a_candidate_that_cannot_be_stored_is_an_error_unless_it_need_not_be(own_store, tmp_path):
    (tmp_path / "first" / "candidates").mkdir(exist_ok=True)
    for made in (tmp_path / "first" / "candidates").iterdir():
        made.unlink()
    (tmp_path / "first" / "candidates").rmdir()
    (tmp_path / "first" / "candidates").symlink_to("nowhere")  # no folder can be made here
    run = Run.open(own_store, "first")
    with pytest.raises(StoreError):
        prepare_candidate(run)
    assert prepare_candidate(run, must_store=False)[1].run == "first"


def test_a_damaged_candidate_is_named_with_its_run_and_made_again_once_it_is_deleted(own_store):
    run = Run.open(own_store, "first")
    key, candidate = prepare_candidate(run)
    run.store.write(key, b"cut")
    with pytest.raises(DamagedError, match=rf"/first/{key}: .*; delete it, and give the command again"):
        prepare_candidate(run)
    run.store.delete(key)
    assert prepare_candidate(run)[1].digest == candidate.digest


def test_a_run_that_is_renamed_after_its_checks_is_promoted_under_its_new_name(own_store: FolderStore):
    before = prepare_candidate(Run.open(own_store, "first"))[1]
    (own_store.folder / "first").rename(own_store.folder / "january")
    run = Run.open(own_store, "january")
    key, candidate = prepare_candidate(run)
    assert (candidate.run, candidate.digest) == ("january", before.digest)
    assert decode(Candidate, run.store.read(key), key).run == "january"
    promote(Registry(own_store), candidate, PromotionRequest("ana", ""))
    with pytest.raises(InputError, match="run january: version 1 in the registry was made from it"):
        expect_not_promoted(own_store, "january", "keep it")


def test_a_run_with_judges_is_served_only_once_what_they_say_is_stored(own_store: FolderStore):
    run = Run.open(own_store, "first")
    require_corrected(run)
    run.spec = run.spec.with_fields("judges", count=2)
    with pytest.raises(InputError, match="^run first is not finished; "):
        require_corrected(run)


@pytest.mark.parametrize(("gpus", "kind"), [(0, "cpu"), ("auto", "cuda")])
def test_a_candidate_is_checked_on_the_cpu_if_its_run_has_no_gpus(own_store, gpus, kind, monkeypatch):
    run = Run.open(own_store, "first")
    for key in run.store.list("candidates/"):
        run.store.delete(key)
    monkeypatch.setattr(run, "spec", run.spec.with_fields("resources", gpus_per_worker=gpus))
    monkeypatch.setattr("defuse_core.device.can_use_gpu", lambda: True)

    def evaluate(*_: object) -> None:
        raise InputError(f"checked on {device().type}")

    monkeypatch.setattr(candidate_module, "evaluate_candidate", evaluate)
    with pytest.raises(InputError, match=f"checked on {kind}"):
        prepare_candidate(run)
