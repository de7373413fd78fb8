"""Whether the β-VAE's images are of use: measured after training, and checked before identification.

The verdict, on training images that the classifier gets right:

    fit    it gets at least 90 % of their reconstructions right too, and fewer than half of the dimensions collapsed
    blind  it gets fewer than half of their reconstructions right, or every dimension collapsed
    poor   anything between

With vae.decode: anchored a reconstruction is the image itself. So the verdict is on images as the noise of
identification perturbs them, and the reference models take the place of the classifier: where the classifier alone
fails, a failure is found; where the reference models fail too, the noise has destroyed the picture.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image
from torch import nn

from defuse_core.artifacts import F32, F64, I64, NONE_OF_THE_ABOVE, U8, Health, Models, ReferenceSet
from defuse_core.config import RunFile
from defuse_core.data import Images, reopen_splits
from defuse_core.data.images import evenly_spaced, to_levels
from defuse_core.data.splits import is_perturbed
from defuse_core.device import cpu_threads
from defuse_core.errors import ANOTHER_NAME, VaeHealthError
from defuse_core.evaluation.undecided import CHECK_CLASSIFIER, why_guessing
from defuse_core.formatting import count_of, percent
from defuse_core.identify import draw_noise, encode_posterior
from defuse_core.intervals import class_accuracy, highest_mean, wilson
from defuse_core.models import (
    Vae,
    decode_codes,
    decoder_at,
    encode_images,
    kl_to_prior,
    load_vae,
    map_batches,
    predict,
    to_tensor,
)
from defuse_core.protocols import Progress
from defuse_core.runs import Run
from defuse_core.seeds import generator
from defuse_core.training.reference_models import answers_of_models, load_reference_models, mean_probabilities

log = logging.getLogger("defuse")
REFERENCES = "reference models"  # Health.judged_by
PROBE_IMAGES = 10_000  # training images that the β-VAE is measured on
PROBE_BATCH = 256
COLLAPSED_BELOW = 0.1  # nats: a latent dimension with less KL than this says next to nothing about the image
FIT_FROM, BLIND_BELOW = 0.9, 0.5  # share of reconstructions that the classifier still gets right
CERTAIN = 0.99  # confidence of the bound by which the mean over the classes decides
VERDICTS = ("blind", "poor", "fit")  # the worst first
STRIP_KEY = "reconstructions.png"
STRIP_IMAGES, STRIP_SIDE = 16, 64  # columns; least width of each image in pixels


def reconstruction_errors(classifier: nn.Module, vae: Vae, images: Images) -> tuple[F64, I64]:
    """Return per image the mean squared error of its reconstruction p(mu(x)), and f's answer on it, each (n,)."""
    errors, answers = [], []
    for start in range(0, len(images), PROBE_BATCH):  # so that memory does not grow with the images' size
        shown = images.take(slice(start, start + PROBE_BATCH))
        decoded = decode_codes(vae, encode_images(vae, shown))
        squares = (decoded - shown.batch()) ** 2
        errors.append(squares.mean(axis=(1, 2, 3), dtype=np.float64))
        answers.append(predict(classifier, decoded))
    return np.concatenate(errors), np.concatenate(answers)


def mean_kl(vae: Vae, images: Images) -> F64:
    """Return the mean KL to the prior of each latent dimension, (Z,), in nats."""
    per_image = map_batches(
        lambda rows: kl_to_prior(*vae.encode(to_tensor(images.batch(rows)))), len(images), PROBE_BATCH
    )
    per_dimension: F64 = per_image.mean(axis=0, dtype=np.float64)
    return per_dimension


def perturbed_images(spec: RunFile, vae: Vae, images: Images, rng: np.random.Generator) -> F32:
    """Return each image as one draw of the noise of identification perturbs it, (n, channels, H, W)."""
    mu, sigma = encode_posterior(vae, images, PROBE_BATCH)
    one = spec.identify.model_copy(update={"draws": 1})
    codes = mu + draw_noise(one, sigma, rng)[:, 0]
    return decoder_at(spec, vae, images, PROBE_BATCH).decode(codes, np.arange(len(images)))


def perturbed_answers(
    spec: RunFile, vae: Vae, images: Images, answer: Callable[[F32], I64]
) -> tuple[I64, I64]:
    """Return the answers to n images, and to the same images perturbed by noise, each (n,)."""
    originals, perturbed = [], []
    rng = generator(spec.seed, "health")
    for start in range(0, len(images), PROBE_BATCH):
        batch = images.take(slice(start, start + PROBE_BATCH))
        originals.append(answer(batch.batch()))
        perturbed.append(answer(perturbed_images(spec, vae, batch, rng)))
    return np.concatenate(originals), np.concatenate(perturbed)


def probe_images(train: Images) -> Images:
    """Return at most PROBE_IMAGES of the training images, evenly spaced: image files are often sorted by class."""
    return train.take(evenly_spaced(len(train), PROBE_IMAGES))


def measure_perturbed(
    spec: RunFile, models: Models, references: ReferenceSet, *, progress: Progress
) -> Health:
    """Return the health of an anchored β-VAE by the reference models' answers on training images that are perturbed."""
    progress("perturbing training images")
    train = reopen_splits(spec, models.data_fingerprint).train
    rows = np.flatnonzero(is_perturbed(train, spec.identify.share, spec.seed))
    train = train.take(rows[evenly_spaced(len(rows), PROBE_IMAGES)])
    nets = load_reference_models(spec, spec.review.reference, references, len(models.classes))

    def answer(images: F32) -> I64:
        return answers_of_models(mean_probabilities(nets, images))

    with cpu_threads(spec.resources.train_threads):
        originals, perturbed = perturbed_answers(spec, load_vae(spec, models.vae), train, answer)
    health = measure_health(train.labels, originals, perturbed, models.kl_per_dimension, anchored=True)
    health = replace(health, judged_by=REFERENCES)
    log_health(health, models.classes)
    return health


def health_after_training(
    spec: RunFile, classifier: nn.Module, vae: Vae, images: Images, answers: I64, kl: F64
) -> Health:
    """Return the β-VAE's health by the classifier's answers, of which `answers` (n,) are those on reconstructions.

    An anchored one is measured on perturbed images, and not called blind for the answers to them: failures there are
    what is searched for. Reference models decide on that later (`measure_perturbed`).
    """
    if spec.vae.decode == "plain":
        return measure_health(images.labels, predict(classifier, images), answers, kl)
    originals, perturbed = perturbed_answers(spec, vae, images, lambda batch: predict(classifier, batch))
    health = measure_health(images.labels, originals, perturbed, kl, anchored=True)
    blind = health.verdict == "blind" and health.collapsed < health.dimensions
    return replace(health, verdict="poor") if blind else health


def with_measured_health(run: Run, models: Models) -> Models:
    """Return the models with the health that reference models measured, where they did."""
    measured = run.load(Health)
    return models if measured is None else replace(models, health=measured)


def measure_health(
    labels: I64, original: I64, reconstructed: I64, kl: F64, *, anchored: bool = False
) -> Health:
    """Return the β-VAE's health from the answers on n images and on their reconstructions, and the KL of (Z,)."""
    right = original == labels
    kept = float((reconstructed[right] == labels[right]).mean()) if right.any() else 0.0
    collapsed = int((kl < COLLAPSED_BELOW).sum())
    counts = np.bincount(reconstructed[reconstructed != NONE_OF_THE_ABOVE], minlength=1)
    health = Health(
        images=len(labels),
        originals_right=float(right.mean()),
        reconstructions_right=float((reconstructed == labels).mean()),
        kept_right=kept,
        most_common_answer=int(counts.argmax()),
        most_common_share=float(counts.max() / len(labels)),
        collapsed=collapsed,
        dimensions=len(kl),
        verdict=_fitness(kept, collapsed / len(kl)),
        anchored=anchored,
    )
    return _by_the_class(health, labels[right], reconstructed[right]) if right.any() else health


def _by_the_class(health: Health, labels: I64, reconstructed: I64) -> Health:
    """Return the health with the verdict by the mean over the classes, where this is certainly a worse one.

    Where nearly all images are of one class, a β-VAE that erases what shows the others keeps nearly all answers.
    """
    counts = np.bincount(labels)
    kept = class_accuracy(reconstructed == labels, labels, len(counts))
    possible = highest_mean(kept, counts, CERTAIN)  # the only image of a class decides nothing
    verdict = _fitness(possible, health.collapsed / health.dimensions)
    if VERDICTS.index(verdict) >= VERDICTS.index(health.verdict):
        return health
    least = int(wilson(kept * counts, counts)[1].argmin())
    return replace(health, verdict=verdict, kept_on_average=float(np.nanmean(kept)), least_kept=least)


def _fitness(kept: float, collapsed: float) -> str:
    if kept < BLIND_BELOW or collapsed == 1:
        return "blind"
    return "fit" if kept >= FIT_FROM and collapsed < 0.5 else "poor"


def log_health(health: Health, classes: tuple[str, ...]) -> None:
    """Log the verdict with its figures in one line: a warning unless the β-VAE is fit."""
    log.log(
        logging.INFO if health.verdict == "fit" else logging.WARNING,
        "the β-VAE is %s: %s; the most frequent answer on %s is %s (%.0f %%)",
        health.verdict,
        health_figures(health, classes),
        _pictures_judged(health),
        classes[health.most_common_answer],
        100 * health.most_common_share,
    )


def health_figures(health: Health, classes: tuple[str, ...]) -> str:
    """Return the figures that the verdict rests on, as a clause."""
    get, keep = "the classifier gets", "keeps {} of its"
    if health.judged_by == REFERENCES:
        get, keep = "the reference models get", "keep {} of their"
    on_average = ""
    if health.least_kept is not None:
        on_average = f" on average over the classes, least of {classes[health.least_kept]}"
    return (
        f"{get} {percent(health.originals_right)} of {count_of(health.images, 'training image')} right and "
        f"{keep.format(percent(health.kept))} right answers on {_pictures_judged(health)}{on_average} "
        f"(fit: at least {percent(FIT_FROM, 0)}); {health.collapsed} of "
        f"{count_of(health.dimensions, 'latent dimension')} collapsed"
    )


def _pictures_judged(health: Health) -> str:
    return "images moved by the noise" if health.anchored else "reconstructions"


def expect_healthy(spec: RunFile, models: Models, worse: str | None = None) -> None:
    """Raise VaeHealthError where the verdict on its β-VAE is worse than vae.accept.

    `worse` is what `worse_references` says of reference models, whose verdict may be due to themselves.
    """
    health = models.health
    if VERDICTS.index(health.verdict) >= VERDICTS.index(spec.vae.accept):
        return
    raise VaeHealthError(
        f"the β-VAE is {health.verdict}: {health_figures(health, models.classes)} ({STRIP_KEY} in the run shows some); "
        f"{why_guessing(models) or _remedy(spec, health, worse)}; vae.accept: {health.verdict} goes on all the same"
    )


def _remedy(spec: RunFile, health: Health, worse: str | None) -> str:
    if not health.originals_right and health.judged_by != REFERENCES:
        return f"the classifier gets no training image right; {CHECK_CLASSIFIER}"
    if 2 * health.collapsed >= health.dimensions:
        return f"lower vae.beta (now {spec.vae.beta:g}) and choose {ANOTHER_NAME}"
    if worse is not None and health.judged_by == REFERENCES:
        return f"{worse}, under {ANOTHER_NAME}"
    if health.anchored:
        return f"lower identify.scale (now {spec.identify.scale:g}) and choose {ANOTHER_NAME}"
    if spec.vae.architecture == "paper":
        return f"set vae.architecture: convolutional, and choose {ANOTHER_NAME}"
    return f"raise vae.epochs or vae.latent_dim, and choose {ANOTHER_NAME}"


def reconstruction_strip(spec: RunFile, vae: Vae, images: Images) -> bytes:
    """Return a PNG with originals in its first row and their reconstructions in the second.

    With vae.decode: anchored a third row has the originals as the noise of identification perturbs them.
    """
    rows = evenly_spaced(len(images), STRIP_IMAGES)
    originals = images.batch(rows)
    shown = [originals, decode_codes(vae, encode_images(vae, originals))]
    if spec.vae.decode == "anchored":
        shown.append(perturbed_images(spec, vae, images.take(rows), generator(spec.seed, "health", "strip")))
    grid = np.stack(shown)  # (2 or 3, n, channels, H, W)
    scale = max(1, STRIP_SIDE // originals.shape[3])
    pixels = _tile(grid).repeat(scale, axis=0).repeat(scale, axis=1)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _tile(grid: F32) -> U8:
    """(rows, columns, channels, H, W) in [0, 1] -> (rows * H, columns * W, 3) as uint8."""
    rows, columns, channels, height, width = grid.shape
    pixels = to_levels(grid).transpose(0, 3, 1, 4, 2)
    return np.broadcast_to(
        pixels.reshape(rows * height, columns * width, channels), (rows * height, columns * width, 3)
    )
