"""Sets of independent classifiers: the reference models, which take part in the method, and the judges, which do not.

Each set is trained once per run, and kept in its store. The reference models screen failing draws, tighten components,
filter what is tuned on, and can replace annotators; votes, report and promoted versions then say that models answered.
The judges evaluate the result: of another architecture and other seeds, and unless judges.share is 0 of other images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Bool,
    Gallery,
    Models,
    ReferenceSet,
    Votes,
    Weights,
)
from defuse_core.codec import decode, encode
from defuse_core.config import ClassifierSection, ClassifierSet, RunFile
from defuse_core.data import Images, Splits, open_splits, reopen_splits
from defuse_core.data.splits import is_perturbed, split_tracks, stratified_order
from defuse_core.device import autocast, cpu_threads
from defuse_core.errors import DataError, ModelError, StoreError
from defuse_core.formatting import count_of, first_few
from defuse_core.intervals import class_accuracy
from defuse_core.models import (
    ReferenceCnn,
    ResidualNet,
    ResNet18,
    expect_full_precision,
    import_module,
    load_for_inference,
    load_pretrained,
    predict,
    predict_probabilities,
    to_device,
    weights_of,
)
from defuse_core.models.checks import ProbabilitiesError, check_outputs
from defuse_core.protocols import Call, Compute, Progress
from defuse_core.runs import Run
from defuse_core.seeds import generator, torch_seed
from defuse_core.steps import STEPS
from defuse_core.store import Store
from defuse_core.training import Losses, minibatches, train_step
from defuse_core.training.batches import DeviceImages, augment, color_jitter

log = logging.getLogger("defuse")
LEAST_CONTRAST = 0.02  # standard deviation of pixels in [0, 1], so that noise of a dark image is not blown up
SetName = Literal["reference", "judges"]
UNSEEN = ("validation", "test")
CALLED: dict[SetName, str] = {"reference": "reference models", "judges": "judges"}


class ReferenceAnnotators:
    """The protocol `Annotators`, implemented by models, which answer at once."""

    def __init__(self, run: Run, compute: Compute) -> None:
        self.run, self.compute = run, compute

    def review(self, gallery: Gallery) -> Votes:
        """Return one answer per model and image; below min_confidence a model answers none-of-the-above."""
        probabilities = ask_models(self.run, self.compute, gallery)
        return votes_of_models(probabilities, self.run.spec.review.reference.min_confidence)


def reference_models(run: Run, compute: Compute) -> ReferenceSet:
    """Return the reference models of the run, trained when they are first needed."""
    return _model_set(run, compute, "train", "reference", "references")


def references_take_part(spec: RunFile) -> bool:
    """Return whether the method itself needs the reference models, whoever annotates."""
    parts = (spec.identify.screen, spec.correct.filter)
    return "reference-models" in parts or spec.review.tau == "auto"


def judges(run: Run, compute: Compute) -> ReferenceSet | None:
    """Return the judges of the run, trained when they are first needed; None with judges.count 0."""
    return _model_set(run, compute, "report", "judges", "judges") if run.spec.judges.count else None


def _model_set(run: Run, compute: Compute, step: str, name: SetName, key: str) -> ReferenceSet:
    """Return the models of one set, trained in `step` where the run has none."""

    def make() -> ReferenceSet:
        models = run.load(Models)
        fingerprint = None if models is None else models.data_fingerprint
        return _merge(compute.tasks(step, _calls(run.spec, name, fingerprint, run.store)))

    return run.once(step, ReferenceSet, make, key)


def ask_models(run: Run, compute: Compute, gallery: Gallery) -> F32:
    """Return the reference models' class probabilities on the gallery, (W, S, R, C)."""
    if not gallery.predicted.size:
        section = run.spec.review.reference
        return np.zeros((section.count, *gallery.predicted.shape, len(gallery.classes)), np.float32)
    references = reference_models(run, compute)
    return compute.task("review", gallery_probabilities, run.spec, references, gallery)


@dataclass(frozen=True, eq=False)
class Prelabels:
    """The answers of the reference models to the gallery.

    CROWDLAB counts them beside people's. Model-assisted review (the paper's future work) preselects them: that biases a
    vote, so it is off by default, and the votes of a run state that it was on.
    """

    probabilities: F32  # (W, S, R, C)


def ask_models_once(run: Run, compute: Compute, gallery: Gallery) -> F32:
    """Return what `ask_models` does, (W, S, R, C), from the run's store once it is there."""
    return run.once("review", Prelabels, lambda: Prelabels(ask_models(run, compute, gallery))).probabilities


def votes_of_models(probabilities: F32, min_confidence: float) -> Votes:
    """Return the votes of models with (W, S, R, C) class probabilities."""
    annotators, scenarios, images = probabilities.shape[:3]
    annotator, scenario, image = (axis.ravel() for axis in np.indices((annotators, scenarios, images)))
    return Votes(
        scenario=scenario,
        image=image,
        annotator=annotator,
        answer=answers_of_models(probabilities, min_confidence).ravel(),
        when=np.zeros(annotator.size),
        annotators=tuple(f"reference model {number + 1}" for number in range(annotators)),
        answered_by="reference models",
        notes={},
    )


def answers_of_models(probabilities: F32, min_confidence: float = 0.0) -> I64:
    """Return the answer of each model, (W, ...), from (W, ..., C); none-of-the-above below min_confidence or of nan."""
    sure = probabilities.max(axis=-1) >= min_confidence
    return np.where(sure, probabilities.argmax(axis=-1), NONE_OF_THE_ABOVE).astype(np.int64)


def unanimous_labels(probabilities: F32, min_probability: float) -> I64:
    """Return the class of which every model is sure, (n,), from (W, n, C); none-of-the-above where there is none."""
    return answers_of_models(probabilities.min(axis=0), min_probability)


def sees_class(probabilities: F32, truth: I64, min_probability: float) -> Bool:
    """Return where (n, C) mean probabilities are highest for `truth`, (n,), and at least `min_probability`, (n,)."""
    highest = probabilities.argmax(axis=1) == truth
    seen: Bool = highest & (probabilities[np.arange(len(truth)), truth] >= min_probability)
    return seen


def gallery_probabilities(
    spec: RunFile, references: ReferenceSet, gallery: Gallery, *, progress: Progress
) -> F32:
    """Return the reference models' class probabilities on the gallery, (W, S, R, C)."""
    progress("reviewing with the reference models")
    shown = gallery.images.reshape(-1, *gallery.images.shape[2:])
    with cpu_threads(spec.resources.train_threads):
        models = load_reference_models(spec, spec.review.reference, references, len(gallery.classes))
        probabilities = model_probabilities(models, shown)
    return probabilities.reshape(len(models), *gallery.predicted.shape, -1)


def training_calls(run: Run) -> list[Call[TrainedClassifier]]:
    """Return the trainings that are yet to be made: of reference models, if the method needs them, and of judges.

    They depend on no other model, so they fill the workers beside the classifier's and the β-VAE's. Both kinds
    alternate, so that the last trainings are not all of the longer kind.
    """
    wanted: dict[SetName, bool] = {
        "reference": references_take_part(run.spec) and run.load(ReferenceSet, "references") is None,
        "judges": run.until == STEPS[-1] and run.load(ReferenceSet, "judges") is None,
    }
    sets = [_calls(run.spec, name, None, run.store) for name, yes in wanted.items() if yes]
    return [call for turn in zip_longest(*sets) for call in turn if call is not None]


def _calls(
    spec: RunFile, name: SetName, fingerprint: str | None, store: Store
) -> list[Call[TrainedClassifier]]:
    """Return the trainings of a set: independent, one call each, which makes what `store` does not hold yet."""
    count = set_section(spec, name).count
    return [Call(trained_classifier, spec, name, number, fingerprint, store) for number in range(count)]


def _merge(trained: Sequence[TrainedClassifier]) -> ReferenceSet:
    known = [part for part in trained[0].class_accuracy if all(part in one.class_accuracy for one in trained)]
    return ReferenceSet(
        tuple(model.weights for model in trained),
        trained[0].train_images,
        np.array([model.validation for model in trained], np.float64),  # None becomes nan
        np.array([model.test for model in trained], np.float64),
        {part: np.stack([one.class_accuracy[part] for one in trained]) for part in known},
    )


def set_section(spec: RunFile, name: SetName) -> ClassifierSet:
    """Return the section of the run file that describes a set."""
    return spec.review.reference if name == "reference" else spec.judges


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """One model of a set."""

    weights: Weights
    train_images: int
    validation: float | None  # accuracy; None without validation images
    test: float | None
    data_fingerprint: str  # of the images trained on
    class_accuracy: dict[str, F64] = field(default_factory=dict)  # validation, test -> (C,) as of Models


def trained_classifier(
    spec: RunFile, name: SetName, number: int, fingerprint: str | None, store: Store, *, progress: Progress
) -> TrainedClassifier:
    """Return model `number` of a set, which depends on no other model of it; the one in `store` if it is there.

    Raises RunMismatchError if the images are not those of `fingerprint`, if given.
    """
    splits = reopen_splits(spec, fingerprint) if fingerprint else open_splits(spec.data, spec.seed)
    key = f"training/{name}-{number}.safetensors"
    found = _stored(store, key, splits.fingerprint())
    if found is None:
        found = _fit(spec, name, number, splits, progress)
        store.write(key, encode(found))
    return found


def _stored(store: Store, key: str, fingerprint: str) -> TrainedClassifier | None:
    """Return the model under `key`; None where there is none, and where it is damaged or of other images."""
    if not store.exists(key):
        return None
    data = store.read(key)  # not in the block: a store that does not answer may hold it
    try:
        found = decode(TrainedClassifier, data, f"{store.address}/{key}", "it is trained again")
    except StoreError as error:
        log.warning("train: %s", error)
        return None
    return found if found.data_fingerprint == fingerprint else None


def _fit(spec: RunFile, name: SetName, number: int, splits: Splits, progress: Progress) -> TrainedClassifier:
    """Return model `number` of a set, trained on the set's part of the training images, with its accuracies."""
    train = _training_images(spec, set_section(spec, name), name, splits.train).loaded()
    if number == 0:
        _warn_of_missing_classes(spec, name, splits, train.labels)
    classes, readers = len(splits.classes), spec.resources.readers
    # all images of each part, those that the classifier's own accuracy is measured on
    unseen = {part: images for part, images in splits.parts().items() if part != "train"}
    with cpu_threads(spec.resources.train_threads):
        model = train_reference(spec, name, train, classes, number, progress)
        try:
            right = {part: predict(model, one, readers=readers) == one.labels for part, one in unseen.items()}
        except ModelError as error:
            raise ModelError(f"{CALLED[name]}: {error}") from error
    by_class = {part: class_accuracy(hits, unseen[part].labels, classes) for part, hits in right.items()}
    validation, test = (float(right[part].mean()) if part in right else None for part in UNSEEN)
    return TrainedClassifier(weights_of(model), len(train), validation, test, splits.fingerprint(), by_class)


def _warn_of_missing_classes(spec: RunFile, name: SetName, splits: Splits, labels: I64) -> None:
    """Log the classes that have training images, but none among those with `labels` that a set is trained on."""
    missing = [splits.classes[label] for label in np.setdiff1d(splits.train.labels, labels)]
    text = "train: the %s have no training images of %s (%s) and see no failure of these"
    if set_section(spec, name).epochs and missing:
        log.warning(text, CALLED[name], first_few(missing), "judges.share, identify.share, train_images")


def _training_images(spec: RunFile, section: ClassifierSet, name: SetName, train: Images) -> Images:
    """Return the part of the training images that the set `name` is trained on. DataError if it has fewer than two."""
    if spec.identify.share < 1:
        train = train.take(np.flatnonzero(~is_perturbed(train, spec.identify.share, spec.seed)))
    part = train
    if len(train) > 1 and spec.judges.count and spec.judges.share:
        for_judges, others = split_tracks(train, spec.judges.share, generator(spec.seed, "judges", "split"))
        part = train.take(for_judges if name == "judges" else others)
    if len(part) < 2 and section.epochs:
        raise DataError(
            f"judges.share: {spec.judges.share} of {count_of(len(train), 'training image')} leaves "
            f"{len(part) or 'none'} for the {CALLED[name]}, which need two; change the share, set it to 0 to train "
            "both on all, lower identify.share, or give more images"
        )
    if section.train_images is not None and section.train_images < len(part):
        order = stratified_order(part.labels, generator(spec.seed, name, "sample"))
        part = part.take(np.sort(order[: section.train_images]))
    return part


def train_reference(
    spec: RunFile, name: SetName, train: Images, classes: int, number: int, progress: Progress
) -> nn.Module:
    """Return model `number` of a set, trained with AdamW under a one-cycle schedule on augmented images."""
    section, arithmetic = set_section(spec, name), spec.resources.arithmetic(name)
    torch.manual_seed(torch_seed(spec.seed, name, number))
    model = build_reference(spec, section, classes)
    load_pretrained(model, section.weights, section.epochs > 0)
    to_device(model)
    if section.import_path is not None:
        _check_own_model(model, name, section, train, classes)
    if section.epochs == 0:
        return model.eval()
    model.train()
    steps = section.epochs * math.ceil(len(train) / section.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps + 1)
    done, total = 0, section.epochs * len(train)
    what = f"{'judge' if name == 'judges' else 'reference model'} {number + 1} of {section.count}"
    images = DeviceImages(train, spec.resources.readers)
    for epoch in range(section.epochs):
        rng, losses = generator(spec.seed, name, number, epoch), Losses(what)
        for rows, batch, labels in images.batches(minibatches(len(train), section.batch_size, rng)):
            augmented = augment(batch, rng)
            if section.color_jitter:
                augmented = color_jitter(augmented, rng)
            with autocast(arithmetic):
                logits = model(augmented)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=section.label_smoothing)
            train_step(loss, optimizer)
            losses.add(loss)
            schedule.step()
            done += len(rows)
            progress(f"training {what}", done, total, "images")
        losses.mean()  # raises where the training diverged
    return model.eval()


def _check_own_model(
    model: nn.Module, name: SetName, section: ClassifierSet, images: Images, classes: int
) -> None:
    """Raise ModelError for a user's model that does not return one logit per class, or has weights of 16 bits."""
    own = ClassifierSection(architecture="custom", import_path=section.import_path)
    where = "judges.import_path" if name == "judges" else "review.reference.import_path"
    try:
        expect_full_precision(model, "the model", trained=section.epochs > 0)
        check_outputs(model, own, images, classes)
    except ModelError as error:
        reason = str(error)
        if isinstance(error, ProbabilitiesError):  # its own text names a field of the classifier
            reason = "expected logits, found probabilities; return what the softmax is given"
        raise ModelError(f"{where}: {reason}") from error


def build_reference(spec: RunFile, section: ClassifierSet, classes: int) -> nn.Module:
    """Return an untrained model of the set that `section` describes."""
    if section.import_path is not None:
        model = import_module("import_path", section.import_path)
    elif section.architecture == "resnet18":
        model = ResNet18(classes, imagenet=False, stem="small")
    elif section.architecture == "residual":
        model = ResidualNet(spec.data.channels, section.channels, classes)
    else:
        model = ReferenceCnn(spec.data.image_size, spec.data.channels, section.channels, classes)
    if section.normalize_contrast:
        model.register_forward_pre_hook(_with_normalized_contrast)
    return model


def _with_normalized_contrast(_model: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return images (n, channels, H, W) with mean 0 and standard deviation 1 each; one of a single colour is all 0."""
    images, *others = arguments
    sd, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return ((images - mean) / (sd + LEAST_CONTRAST), *others)


def load_reference_models(
    spec: RunFile, section: ClassifierSet, found: ReferenceSet, classes: int
) -> list[nn.Module]:
    """Return the models of a set, on this process's device, ready to predict."""
    return [
        load_for_inference(build_reference(spec, section, classes), spec, weights, f"model {number} of a set")
        for number, weights in enumerate(found.models, start=1)
    ]


def model_probabilities(models: Sequence[nn.Module], images: F32 | Images, batch_size: int = 256) -> F32:
    """Return the class probabilities of each model, (W, n, C)."""
    return np.stack([predict_probabilities(model, images, batch_size) for model in models])


def mean_probabilities(models: Sequence[nn.Module], images: F32, batch_size: int = 256) -> F32:
    """Return the class probabilities averaged over the models, (n, C)."""
    return model_probabilities(models, images, batch_size).mean(axis=0)  # type: ignore[no-any-return]
