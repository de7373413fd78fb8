"""How each model of a set is trained, stored on its way, and found again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from defuse_core.artifacts import Gallery, Models, ReferenceSet
from defuse_core.config import RunFile
from defuse_core.data import open_splits
from defuse_core.errors import ModelError, NoAnswerError, RunMismatchError
from defuse_core.local import LocalCompute
from defuse_core.models import accuracy
from defuse_core.protocols import silent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training import reference_models as module
from defuse_core.training.reference_models import (
    answers_of_models,
    ask_models,
    build_reference,
    judges,
    load_reference_models,
    sees_class,
    trained_classifier,
    training_calls,
    votes_of_models,
)
from tests.conftest import recommended, tiny

SMALL = {"count": 2, "channels": 4, "epochs": 2, "batch_size": 32}
SPEC = recommended(review={"reference": SMALL}, judges=SMALL, data={"train_images": 100})
KEY = "training/judges-0.safetensors"


def calls_of(run: Run) -> list[tuple[object, ...]]:
    return [call.args[1:3] for call in training_calls(run)]


def test_models_that_are_yet_to_be_trained_are_those_that_the_run_needs_and_has_not_made(
    tmp_path, references
):
    both = [("reference", 0), ("judges", 0), ("reference", 1), ("judges", 1)]
    run = Run.start(FolderStore(tmp_path), "a", SPEC)
    assert calls_of(run) == both
    assert calls_of(Run(FolderStore(tmp_path), "a", SPEC, until="review")) == both[::2]
    papers = tiny(review={"reference": SMALL}, judges=SMALL)
    assert calls_of(Run(FolderStore(tmp_path), "a", papers)) == both[1::2]
    for name, left in (("references", both[1::2]), ("judges", [])):
        run.once("train", ReferenceSet, lambda: references, name)
        assert calls_of(run) == left


def test_each_vote_of_a_model_is_its_answer_on_the_image_of_the_scenario():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 3, 5)).astype(np.float32)
    votes = votes_of_models(probabilities, 0.0)
    assert votes.answer.size == len({*zip(votes.annotator, votes.scenario, votes.image, strict=True)}) == 30
    for place, answer in enumerate(votes.answer):
        own = probabilities[votes.annotator[place], votes.scenario[place], votes.image[place]]
        assert own[answer] == own.max()
    assert votes.annotators == ("reference model 1", "reference model 2")
    assert answers_of_models(np.array([[0.5, 0.5]], np.float32), 0.5).tolist() == [0]


def test_a_class_is_seen_where_none_is_likelier_and_it_is_as_likely_as_asked():
    probabilities = np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], np.float32)
    truth = np.array([0, 0, 0, 1])
    assert sees_class(probabilities, truth, 0.5).tolist() == [True, False, True, False]
    assert sees_class(probabilities, truth, 0.75).tolist() == [True, False, False, False]


def test_models_are_not_trained_to_be_asked_about_no_scenario(tmp_path):
    run = Run.start(FolderStore(tmp_path), "a", SPEC)
    nothing = Gallery(
        np.zeros((0, 5, 1, 16, 16), np.float32),
        np.zeros((0, 5, 4), np.float32),
        np.zeros((0, 5), np.int64),
        tuple("0123456789"),
    )
    assert ask_models(run, LocalCompute(), nothing).shape == (2, 0, 5, 10)
    assert run.load(ReferenceSet, "references") is None


def train_first_judge(store: FolderStore, spec: RunFile = SPEC, progress=silent):
    return trained_classifier(spec, "judges", 0, None, store, progress=progress)


def nothing_to_train(*_: object) -> None:
    raise AssertionError("it is trained again")


def test_a_model_that_is_stored_is_not_trained_again_unless_its_images_changed_or_it_is_damaged(
    tmp_path, caplog
):
    store = FolderStore(tmp_path)
    made = train_first_judge(store)
    again = train_first_judge(store, progress=nothing_to_train)
    assert (again.validation, again.test) == (made.validation, made.test)
    assert all(np.array_equal(made.weights[name], again.weights[name]) for name in made.weights)
    data = store.read(KEY)
    other = SPEC.with_fields("data", train_images=90)
    assert train_first_judge(store, other).data_fingerprint != made.data_fingerprint
    store.write(KEY, data[:-7])
    trained = []
    train_first_judge(store, progress=lambda *report: trained.append(report))
    assert trained and "judges-0.safetensors: expected a TrainedClassifier artefact" in caplog.text
    assert "it is trained again" in caplog.text
    assert store.read(KEY) == data


def test_a_store_that_does_not_answer_is_no_reason_to_train_again(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    train_first_judge(store, SPEC.with_fields("judges", epochs=0))

    def silent_store(key: str) -> bytes:
        raise NoAnswerError(f"{key}: the bucket does not answer")

    monkeypatch.setattr(store, "read", silent_store)
    with pytest.raises(NoAnswerError, match=KEY):
        train_first_judge(store, progress=nothing_to_train)


def test_a_training_reports_how_many_images_it_has_seen(tmp_path):
    reports = []
    train_first_judge(FolderStore(tmp_path), progress=lambda *report: reports.append(report))
    made = train_first_judge(FolderStore(tmp_path))
    assert {what for what, *_ in reports} == {"training judge 1 of 2"}
    total = 2 * made.train_images
    ends = [*range(32, made.train_images, 32), made.train_images]  # of minibatches
    assert [done for _, done, *_ in reports] == [*ends, *(made.train_images + end for end in ends)]
    assert {(of, unit) for *_, of, unit in reports} == {(total, "images")}


def test_a_model_is_trained_on_augmented_images_at_a_rate_that_rises_and_falls(tmp_path, monkeypatch):
    rates, shown = [], []
    step, augment = module.train_step, module.augment

    def noting(loss, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(loss, optimizer)

    def black(images, rng):
        shown.append(augment(images, rng))
        return torch.zeros_like(shown[-1])

    monkeypatch.setattr(module, "train_step", noting)
    monkeypatch.setattr(module, "augment", black)
    spec = SPEC.with_fields("judges", epochs=10, share=0.0)
    made = train_first_judge(FolderStore(tmp_path), spec)
    assert made.train_images == 100 and len(rates) == len(shown) == 10 * 4
    assert rates[0] < 1e-3 and max(rates) == pytest.approx(1e-2, rel=0.05) and rates[-1] < 1e-4
    peak = int(np.argmax(rates))
    assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
    assert made.test < 0.3  # it has seen what `augment` returned: black images


def test_a_model_has_the_accuracy_that_it_has_on_all_images_of_each_part(tmp_path):
    made = [
        trained_classifier(SPEC, "reference", number, None, FolderStore(tmp_path), progress=silent)
        for number in (0, 1)
    ]
    found = module._merge(made)
    splits = open_splits(SPEC.data, SPEC.seed)
    models = load_reference_models(SPEC, SPEC.review.reference, found, 10)
    assert found.validation.tolist() == [accuracy(model, splits.validation) for model in models]
    assert found.test.tolist() == [accuracy(model, splits.test) for model in models]
    assert found.validation.tolist() != found.test.tolist()
    counts = np.bincount(splits.test.labels)
    np.testing.assert_allclose(found.class_accuracy["test"] @ counts / counts.sum(), found.test)
    assert found.class_accuracy["validation"].shape == (2, 10)
    without = [dataclasses.replace(one, validation=None, class_accuracy={}) for one in made]
    assert np.isnan(module._merge(without).validation).all() and not module._merge(without).class_accuracy
    assert not module._merge([made[0], without[1]]).class_accuracy


def test_models_of_a_set_begin_from_different_weights():
    spec = SPEC.with_fields("judges", epochs=0)
    train = open_splits(spec.data, spec.seed).train
    first, second = (module.train_reference(spec, "judges", train, 10, number, silent) for number in (0, 1))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_a_set_is_trained_on_a_sample_of_all_classes_where_fewer_images_are_asked_for():
    spec = SPEC.with_fields("judges", train_images=20, share=0.0)
    train = open_splits(spec.data, spec.seed).train
    part = module._training_images(spec, spec.judges, "judges", train)
    assert len(part) == 20 and len(np.unique(part.labels)) == 10
    all_of_them = spec.judges.model_copy(update={"train_images": 100})
    assert module._training_images(spec, all_of_them, "judges", train) is train


def weights_file(folder: Path, spec: RunFile) -> Path:
    torch.manual_seed(3)
    torch.save(build_reference(spec, spec.judges, 10).state_dict(), folder / "judge.pt")
    return folder / "judge.pt"


def test_pretrained_weights_are_those_of_the_model_whose_missing_classes_are_its_own_affair(tmp_path, caplog):
    path = weights_file(tmp_path, SPEC)
    spec = SPEC.with_fields("judges", count=1, epochs=0, weights=path, share=0.001)
    made = train_first_judge(FolderStore(tmp_path), spec)
    stored = torch.load(path, weights_only=True)
    assert made.weights.keys() == stored.keys()
    assert all(np.array_equal(made.weights[name], stored[name].numpy()) for name in stored)
    assert "no training images of" not in caplog.text


def test_a_model_whose_training_diverges_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "augment", lambda images, rng: images * torch.nan)
    with pytest.raises(ModelError, match="^training judge 1 of 2 diverged: its loss became nan; lower"):
        train_first_judge(FolderStore(tmp_path))
    assert FolderStore(tmp_path).list("training/") == []


def test_missing_classes_are_told_once_of_a_set(tmp_path, caplog):
    spec = SPEC.with_fields("judges", train_images=5, share=0.0)
    for number in (0, 1):
        trained_classifier(spec, "judges", number, None, FolderStore(tmp_path), progress=silent)
        assert caplog.text.count("the judges have no training images of") == 1  # a set may be a single one


def test_models_are_trained_on_the_images_of_the_classifier(tmp_path, tiny_models: Models):
    run = Run.start(FolderStore(tmp_path), "a", SPEC)
    run.once("train", Models, lambda: dataclasses.replace(tiny_models, data_fingerprint="of others"))
    with pytest.raises(RunMismatchError, match="images differ"):
        judges(run, LocalCompute())
