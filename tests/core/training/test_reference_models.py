import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from defuse_core.artifacts import Gallery, ReferenceSet
from defuse_core.data import Images, Splits, open_splits
from defuse_core.data.splits import is_perturbed
from defuse_core.errors import DataError, ModelError
from defuse_core.local import LocalCompute
from defuse_core.models import ReferenceCnn, ResidualNet, ResNet18, predict_probabilities
from defuse_core.protocols import silent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import (
    _fit,
    _training_images,
    _warn_of_missing_classes,
    _with_normalized_contrast,
    ask_models,
    gallery_probabilities,
    judges,
    load_reference_models,
    mean_probabilities,
    model_probabilities,
    reference_models,
    references_take_part,
    votes_of_models,
)
from tests.conftest import TINY, made_in_a_run, recommended, tiny
from tests.own_classifiers import Standardising


@pytest.fixture(scope="module")
def gallery(tiny_spec) -> Gallery:
    train = open_splits(tiny_spec.data, 0).train
    images = train.batch(slice(0, 10)).reshape(2, 5, 1, 16, 16)
    codes, predicted = np.zeros((2, 5, 4), np.float32), train.labels[:10].reshape(2, 5)
    return Gallery(images, codes, predicted, tuple("0123456789"))


@pytest.fixture(scope="module")
def trained_on_all(tiny_spec) -> ReferenceSet:
    return made_in_a_run(reference_models, tiny_spec)


def test_reference_models_refuse_below_their_confidence_and_say_they_are_models():
    probabilities = np.array([[[[0.6, 0.4], [0.5, 0.5]]]], np.float32)
    votes = votes_of_models(probabilities, min_confidence=0.55)
    assert votes.answer.tolist() == [0, -1]
    assert votes.answered_by == "reference models"


def test_reference_models_answer_for_every_image_and_differ_from_each_other(
    gallery, tiny_spec, trained_on_all
):
    probabilities = gallery_probabilities(tiny_spec, trained_on_all, gallery, progress=silent)
    assert probabilities.shape == (3, 2, 5, 10)
    np.testing.assert_allclose(probabilities.sum(3), 1, atol=1e-5)
    assert not np.array_equal(probabilities[0], probabilities[1])


def test_the_set_records_how_good_each_model_is(trained_on_all):
    assert len(trained_on_all.models) == 3
    assert trained_on_all.train_images == 300
    assert trained_on_all.test.shape == trained_on_all.validation.shape == (3,)
    assert trained_on_all.test.min() > 0.4


def test_models_are_measured_on_all_images_however_they_are_sorted(tiny_spec, monkeypatch):
    part = Images(np.zeros((6000, 1, 4, 4), np.uint8), np.repeat([0, 1], 3000))
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([0.0, 1.0])
    monkeypatch.setattr("defuse_core.training.reference_models.train_reference", lambda *_: constant)
    found = _fit(tiny_spec, "reference", 0, Splits(part, None, part, ("a", "b")), silent)
    assert (found.validation, found.test) == (None, 0.5)
    assert {part: shares.tolist() for part, shares in found.class_accuracy.items()} == {"test": [0.0, 1.0]}


def test_the_error_of_a_model_that_returns_nan_for_an_unseen_image_names_its_set(tiny_spec, monkeypatch):
    monkeypatch.setattr("defuse_core.training.reference_models.train_reference", lambda *_: Standardising())
    blank = Images(np.zeros((6, 1, 4, 4), np.uint8), np.arange(6) % 3)
    for name, called in (("judges", "judges"), ("reference", "reference models")):
        with pytest.raises(ModelError, match=f"^{called}: a classifier returns nan for 6 of 6 images"):
            _fit(tiny_spec, name, 0, Splits(blank, None, blank, ("a", "b", "c")), silent)


def test_models_come_back_from_the_run_as_they_were_trained(tiny_spec, trained_on_all, gallery):
    flat = gallery.images.reshape(-1, 1, 16, 16)
    models = load_reference_models(tiny_spec, tiny_spec.review.reference, trained_on_all, 10)
    each = np.stack([predict_probabilities(model, flat) for model in models])
    np.testing.assert_array_equal(model_probabilities(models, flat), each)
    np.testing.assert_allclose(mean_probabilities(models, flat), each.mean(axis=0), atol=1e-6)


def test_each_set_is_trained_once_per_run(tmp_path, gallery):
    reference = {**TINY["review"]["reference"], "epochs": 1}
    spec = recommended(review={"reference": reference}, judges={"epochs": 1})
    run, compute = Run.start(FolderStore(tmp_path), "a", spec), LocalCompute()
    first, jury = reference_models(run, compute), judges(run, compute)
    ask_models(run, compute, gallery)
    again = {name: run.store.read(f"{name}.safetensors") for name in ("references", "judges")}
    assert reference_models(run, compute).train_images == first.train_images
    assert judges(run, compute).train_images == jury.train_images
    assert again == {name: run.store.read(f"{name}.safetensors") for name in again}


def test_judges_have_another_architecture_and_no_training_image_in_common_with_the_reference_models(
    references,
):
    spec = recommended()
    parts = [references, made_in_a_run(judges, spec)]
    assert sum(part.train_images for part in parts) == 300
    assert parts[1].train_images == pytest.approx(90, abs=5)  # 0.3 of each class, rounded
    kinds = [
        type(load_reference_models(spec, section, part, 10)[0])
        for section, part in zip((spec.review.reference, spec.judges), parts, strict=True)
    ]
    assert kinds == [ReferenceCnn, ResidualNet]


def test_without_a_share_of_their_own_both_are_trained_on_all_images():
    spec = recommended(judges={"share": 0.0, "epochs": 1})
    assert made_in_a_run(judges, spec).train_images == 300


def test_no_model_is_trained_on_an_image_that_is_perturbed_or_on_another_one_of_its_track():
    spec = recommended(identify={"share": 0.3}, judges={"share": 0.5})
    tracks = np.repeat(np.arange(100), 3).astype(np.int64)
    images = Images(np.zeros((300, 1, 4, 4), np.uint8), tracks % 10, tracks=tracks)
    parts = [
        _training_images(spec, spec.review.reference, "reference", images),
        _training_images(spec, spec.judges, "judges", images),
        images.take(np.flatnonzero(is_perturbed(images, 0.3, spec.seed))),
    ]
    assert [len(np.unique(part.tracks)) for part in parts] == [35, 35, 30]
    assert len(np.unique(np.concatenate([np.unique(part.tracks) for part in parts]))) == 100


@pytest.mark.parametrize(
    ("share", "images", "left", "train", "who"),
    [
        (0.001, 20, "none", judges, "judges"),
        (0.999, 20, "none", reference_models, "reference models"),
        (0.3, 4, "1", judges, "judges"),
        (0.7, 4, "1", reference_models, "reference models"),
    ],
)
def test_a_share_that_leaves_a_set_fewer_than_two_images_is_refused_in_one_line(
    share, images, left, train, who
):
    spec = recommended(judges={"share": share}, data={"train_images": images})
    words = f"judges.share: {share} of {images} training images leaves {left} for the {who}, which need two; "
    with pytest.raises(DataError, match=f"^{words}.*both"):
        made_in_a_run(train, spec)


def test_a_share_of_perturbed_images_that_leaves_a_set_none_is_refused_in_one_line():
    spec = recommended(identify={"share": 0.9999999})
    with pytest.raises(
        DataError, match=r"^judges.share: 0.3 of 0 training images leaves none .*lower identify.share"
    ):
        made_in_a_run(reference_models, spec)


def test_classes_that_a_set_learns_nothing_of_are_named(tiny_spec, caplog):
    labels = np.array([3, *[5] * 9])
    splits = Splits(Images(np.zeros((10, 1, 4, 4), np.uint8), labels), None, None, tuple("0123456789"))
    with caplog.at_level("WARNING", "defuse"):
        _warn_of_missing_classes(tiny_spec, "judges", splits, labels)
        assert not caplog.text
        _warn_of_missing_classes(tiny_spec, "reference", splits, labels[1:])
    words = "the reference models have no training images of 3 (judges.share, identify.share, train_images) and see"
    assert words in caplog.text
    many = Splits(Images(splits.train.pixels, np.arange(10)), None, None, splits.classes)
    with caplog.at_level("WARNING", "defuse"):
        _warn_of_missing_classes(tiny_spec, "reference", many, labels[:0])
    assert "no training images of 0, 1, 2, 3, 4 and 5 more (" in caplog.text


def test_a_run_may_have_no_judges(tmp_path, tiny_spec):
    run = Run.start(FolderStore(tmp_path), "a", tiny_spec)
    assert judges(run, LocalCompute()) is None
    assert run.load(ReferenceSet, "judges") is None


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, False),
        ({"identify": {"screen": "reference-models"}}, True),
        ({"review": {"tau": "auto"}}, True),
        ({"correct": {"filter": "reference-models"}}, True),
    ],
)
def test_the_papers_way_needs_no_reference_models(sections, expected):
    assert references_take_part(tiny(**sections)) is expected


def test_models_with_normalized_contrast_see_the_same_in_dim_images_and_dark_ones_stay_finite():
    spec = tiny(review={"reference": {"count": 1, "normalize_contrast": True, "epochs": 8}})
    made = made_in_a_run(reference_models, spec)
    bright = open_splits(spec.data, 0).train.batch(slice(0, 50))
    images = np.concatenate([bright, bright * 0.5 + 0.1, np.zeros_like(bright)])
    seen = model_probabilities(load_reference_models(spec, spec.review.reference, made, 10), images)[0]
    np.testing.assert_allclose(seen[:50], seen[50:100], atol=0.15)
    assert np.isfinite(seen).all()
    as_it_is = spec.review.reference.model_copy(update={"normalize_contrast": False})
    seen = model_probabilities(load_reference_models(spec, as_it_is, made, 10), images)[0]
    assert np.abs(seen[:50] - seen[50:100]).max() > 0.3


def test_the_noise_of_an_image_with_hardly_any_contrast_stays_small():
    noise = torch.randn(4, 1, 16, 16)
    noise = (noise - noise.mean(dim=(1, 2, 3), keepdim=True)) / noise.std(dim=(1, 2, 3), keepdim=True)
    contrast = torch.tensor([0.98, 0.02, 0.001, 0.0])
    (found,) = _with_normalized_contrast(nn.Identity(), (0.5 + contrast[:, None, None, None] * noise,))
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    deviation = torch.tensor([0.98, 0.5, 1 / 21, 0.0])
    torch.testing.assert_close(found.std(dim=(1, 2, 3)), deviation, atol=1e-3, rtol=0)


def test_models_are_trained_with_smoothed_labels_and_colour_jitter_where_these_are_asked_for():
    images = open_splits(tiny().data, 0).train.batch(slice(0, 200))

    def seen(**fields):
        spec = tiny(review={"reference": {"count": 1, "epochs": 8, **fields}})
        models = load_reference_models(spec, spec.review.reference, made_in_a_run(reference_models, spec), 10)
        return model_probabilities(models, images)[0]

    plain = seen()
    assert seen(label_smoothing=0.3).max(axis=1).mean() < plain.max(axis=1).mean() - 0.1
    assert not np.array_equal(seen(color_jitter=True), plain)


class Dark(nn.Module):
    """Sees class 1 in dark images, else class 0."""

    def forward(self, images):
        dark = (images.mean(dim=(1, 2, 3)) < 0.5).float()
        return torch.stack([1 - dark, dark, *[torch.zeros_like(dark) - 9] * 8], dim=1)


def test_a_single_pretrained_model_can_be_the_reference_set(gallery):
    path = "tests.core.training.test_reference_models:Dark"
    one = {"count": 1, "architecture": "custom", "import_path": path, "epochs": 0}
    spec = tiny(review={"reference": one})
    references = made_in_a_run(reference_models, spec)
    seen = gallery_probabilities(spec, references, gallery, progress=silent)
    dark = gallery.images.mean(axis=(2, 3, 4)) < 0.5
    np.testing.assert_array_equal(seen[0].argmax(axis=2), dark.astype(int))


class TooFew(Dark):
    def forward(self, images):
        return super().forward(images)[:, :9]


class Probabilities(Dark):
    def forward(self, images):
        return super().forward(images).softmax(dim=1)


@pytest.mark.parametrize(
    ("name", "said"), [("TooFew", "let it return 10 logits"), ("Probabilities", "probabilities")]
)
@pytest.mark.parametrize("where", ["review.reference", "judges"])
def test_a_model_of_ones_own_that_returns_no_logit_per_class_is_refused(name, said, where):
    one = {"count": 1, "architecture": "custom", "import_path": f"{__name__}:{name}", "epochs": 0}
    spec = tiny(review={"reference": one}, judges=one)
    made = reference_models if where == "review.reference" else judges
    with pytest.raises(ModelError, match=rf"{where}.import_path: .*{said}") as caught:
        made_in_a_run(made, spec)
    assert "classifier.outputs" not in str(caught.value)


def test_a_pretrained_resnet_is_read_under_the_names_of_torchvision_as_well(tmp_path):
    torch.manual_seed(0)
    net = ResNet18(10, imagenet=False, stem="small").eval()
    file = tmp_path / "exported.safetensors"
    save_file({name.removeprefix("net."): tensor for name, tensor in net.state_dict().items()}, file)
    one = {"count": 1, "architecture": "resnet18", "weights": str(file), "epochs": 0}
    spec = tiny(data={"channels": 3}, review={"reference": one})
    made = made_in_a_run(reference_models, spec)
    (loaded,) = load_reference_models(spec, spec.review.reference, made, 10)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), net(images))
