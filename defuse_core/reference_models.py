"""Reference models in the place of annotators: independently seeded, stronger classifiers trained with augmentation.

They let the whole method run unattended and its figures be compared. They are models, not people: the votes, the
report, and a version that comes of them say so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import F32, NONE_OF_THE_ABOVE, Gallery, Models, Votes
from defuse_core.checkpoint import labels_of, minibatches, train_step
from defuse_core.config import RunFile
from defuse_core.data import Images, open_splits, reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.models import ReferenceCnn, ResNet18, predict_probabilities, to_device, to_tensor
from defuse_core.progress import Progress
from defuse_core.seeds import generator, torch_seed

if TYPE_CHECKING:
    from defuse_core.pipeline import Compute
    from defuse_core.runs import Run


class ReferenceAnnotators:
    """The protocol `Annotators`, answered by models at once."""

    def __init__(self, run: Run, compute: Compute) -> None:
        self.run, self.compute = run, compute

    def review(self, gallery: Gallery) -> Votes:
        """Return one answer per model and image; below min_confidence a model answers none-of-the-above."""
        probabilities = ask_models(self.run, self.compute, gallery)
        return votes_of_models(probabilities, self.run.spec.review.reference.min_confidence)


def ask_models(run: Run, compute: Compute, gallery: Gallery) -> F32:
    """Return the reference models' class probabilities, (W, S, R, C), trained on the images that the run was."""
    models = run.load(Models)
    fingerprint = None if models is None else models.data_fingerprint
    return compute.task("review", reference_probabilities, run.spec, gallery, fingerprint)


def votes_of_models(probabilities: F32, min_confidence: float) -> Votes:
    """Return the votes that (W, S, R, C) class probabilities amount to."""
    annotators, scenarios, images = probabilities.shape[:3]
    sure = probabilities.max(axis=3) >= min_confidence
    answer = np.where(sure, probabilities.argmax(axis=3), NONE_OF_THE_ABOVE)
    annotator, scenario, image = (axis.ravel() for axis in np.indices((annotators, scenarios, images)))
    return Votes(
        scenario=scenario,
        image=image,
        annotator=annotator,
        answer=answer.ravel().astype(np.int64),
        when=np.zeros(answer.size),
        annotators=tuple(f"reference model {number + 1}" for number in range(annotators)),
        answered_by="reference models",
        notes={},
    )


def reference_probabilities(
    spec: RunFile, gallery: Gallery, fingerprint: str | None, *, progress: Progress
) -> F32:
    """Train the reference models and return their class probabilities on the gallery, (W, S, R, C).

    Raises RunMismatchError if the images are not those of `fingerprint`, where one is given.
    """
    splits = (
        reopen_splits(spec.data, spec.seed, fingerprint) if fingerprint else open_splits(spec.data, spec.seed)
    )
    section, train = spec.review.reference, splits.train
    shown = gallery.images.reshape(-1, *gallery.images.shape[2:])
    answers = np.zeros((section.count, *gallery.predicted.shape, len(splits.classes)), np.float32)
    if not len(shown):
        return answers
    if section.train_images is not None and section.train_images < len(train):
        rows = generator(spec.seed, "reference", "sample").choice(
            len(train), section.train_images, replace=False
        )
        train = train.take(np.sort(rows))
    train = train.loaded()
    with cpu_threads(spec.resources.train_threads):
        for number in range(section.count):
            model = train_reference(spec, train, len(splits.classes), number, progress)
            answers[number] = predict_probabilities(model, shown).reshape(answers.shape[1:])
    return answers


def train_reference(spec: RunFile, train: Images, classes: int, number: int, progress: Progress) -> nn.Module:
    """Return reference model `number`, trained with Adam under a one-cycle schedule on augmented images."""
    section = spec.review.reference
    torch.manual_seed(torch_seed(spec.seed, "reference", number))
    model = to_device(_build(spec, classes))
    steps = section.epochs * math.ceil(len(train) / section.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps + 1)
    done, total = number * section.epochs * len(train), section.count * section.epochs * len(train)
    for epoch in range(section.epochs):
        rng = generator(spec.seed, "reference", number, epoch)
        for rows in minibatches(len(train), section.batch_size, rng):
            images = augment(to_tensor(train.batch(rows)), rng)
            train_step(F.cross_entropy(model(images), labels_of(train, rows)), optimizer, "a reference model")
            schedule.step()
            done += len(rows)
            progress("training the reference models", done, total, "images")
    return model.eval()


def _build(spec: RunFile, classes: int) -> nn.Module:
    section = spec.review.reference
    if section.architecture == "resnet18":
        return ResNet18(classes, imagenet=False, stem="small")
    return ReferenceCnn(spec.data.image_size, spec.data.channels, section.channels, classes)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image turned, scaled, shifted and brightened a little of its own, and every second one blurred.

    Blur matters: reviewers look at decodings, which are smoother than photographs. Nothing is mirrored, since that
    changes what digits and signs say.
    """
    count = len(images)
    angle = rng.uniform(-0.2, 0.2, count)  # radians
    scale, shift = rng.uniform(0.85, 1.15, count), rng.uniform(-0.12, 0.12, (count, 2))
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = np.cos(angle) * scale
    theta[:, 0, 1], theta[:, 1, 0] = -np.sin(angle) * scale, np.sin(angle) * scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    moved = torch.where(_column(rng.random(count) < 0.5, images), blurred, moved)
    bright = _column(rng.uniform(0.8, 1.2, count).astype(np.float32), images)
    return (moved * bright).clamp(0, 1)


def _column(values: np.ndarray, like: Tensor) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(values).to(like.device).view(-1, 1, 1, 1)
