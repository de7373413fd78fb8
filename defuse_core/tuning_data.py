"""What fine-tuning reads: the training images D, and the images of the scenarios D_f (§3.2.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import F32, I64, Corrections, Failures, Gallery, Models, Verdicts
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.data.splits import mixed_order, track_mates
from defuse_core.device import cpu_threads
from defuse_core.models import Vae, decoder_of, load_vae
from defuse_core.progress import Progress
from defuse_core.review.unreviewed import decode_failures
from defuse_core.review.verdicts import is_misclassified
from defuse_core.seeds import generator

REPEATS = 4  # times that an image of an unreviewed failure is in D_f at most


@dataclass(frozen=True, eq=False)
class ScenarioImages:
    """The images of the scenarios; as many as there are scenarios, whatever the number of training images."""

    d_f: Images  # scenario after scenario, and then those of failures that nobody reviewed
    of_scenarios: int  # how many of these images are of the scenarios
    held_out: Images  # plays no part in the choice

    @property
    def tune(self) -> Images:
        """The images of the scenarios in D_f."""
        return self.d_f.take(slice(self.of_scenarios))


@dataclass(frozen=True, eq=False)
class FineTuningData:
    """Everything that a trial reads."""

    clean: Splits  # in memory
    scenario: ScenarioImages
    # another number is the same fine-tuning with other random numbers: order of the minibatches, augmentation, dropout
    repetition: int = 0


def reviewed_failures(gallery: Gallery, verdicts: Verdicts) -> Images:
    """Return the reviewed images that f gets wrong, each under its own majority label: the baseline's D_f."""
    wrong = is_misclassified(gallery.predicted, verdicts.image_labels)
    return Images(gallery.images[wrong], verdicts.image_labels[wrong])


def load_fine_tuning_data(
    spec: RunFile,
    models: Models,
    fixes: Corrections,
    reviewed: Images | None,
    all_fixes: Corrections | None = None,
    *,
    progress: Progress,
) -> FineTuningData:
    """Return the input of the trials. D_f is decoded from `fixes`, or is `reviewed`; D is that of `all_fixes`."""
    clean = load_clean_images(spec, models, *(all_fixes or fixes).sources(), progress=progress)
    return FineTuningData(clean, decode_scenario_images(spec, models, fixes, reviewed, progress=progress))


def load_clean_images(
    spec: RunFile, models: Models, left_out: I64, tuned: I64, *, progress: Progress
) -> Splits:
    """Return the data set in memory, with the training images that correct.train_images asks for.

    D has no training image of `left_out`, at which only held-out scenario images are anchored: the classifier would
    learn what it is measured on. Nor has it one of their tracks, unless the track has an image of `tuned` or D would
    lose its class.
    """
    progress("loading images to fine-tune on", 0, 1, "sets")
    splits = reopen_splits(spec.data, spec.seed, models.data_fingerprint)
    train, wanted = splits.train, spec.correct.train_images
    if len(left_out):
        left_out = np.union1d(left_out, track_mates(train, left_out, tuned))
    if wanted is not None and wanted < len(train):
        order = mixed_order(train.labels, generator(spec.seed, "correct", "sample"))
        rows = np.sort(order[:wanted])
        train, left_out = train.take(rows), np.flatnonzero(np.isin(rows, left_out)).astype(np.int64)
    if len(left_out):
        train = train.take(np.delete(np.arange(len(train)), left_out))
    return replace(splits, train=train).loaded()


def decode_scenario_images(
    spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, *, progress: Progress
) -> ScenarioImages:
    """Return D_f, decoded from `fixes` or `reviewed` if that is given, and the held-out images of the scenarios."""
    progress("drawing images to fine-tune on", 0, 1, "sets")
    vae = load_vae(spec, models.vae)
    with cpu_threads(1):
        tune = tuning_images(vae, fixes) if reviewed is None else reviewed
        d_f = tune
        if reviewed is None and fixes.unreviewed is not None:
            d_f = tune.joined(_unreviewed_images(spec, models, vae, fixes.unreviewed, len(tune)))
        return ScenarioImages(d_f, len(tune), held_out_images(vae, fixes))


def _unreviewed_images(spec: RunFile, models: Models, vae: Vae, failures: Failures, wanted: int) -> Images:
    """Return `wanted` images of failures under the class of their source image: the first ones, or all again and again.

    They are fewer where each would be there more than REPEATS times.
    """
    failures = failures.take(np.arange(min(len(failures), wanted)))
    images = Images(decode_failures(spec, models, vae, failures), failures.truth)
    return images.take(np.resize(np.arange(len(images)), min(wanted, REPEATS * len(images))))


def tuning_images(vae: Vae, fixes: Corrections) -> Images:
    """Return the images of D_f, scenario after scenario."""
    return _decoded(vae, fixes, fixes.tune, fixes.tune_anchor)


def held_out_images(vae: Vae, fixes: Corrections) -> Images:
    """Return the scenario images that accuracy on failure scenarios is measured on, scenario after scenario."""
    return _decoded(vae, fixes, fixes.test, fixes.test_anchor)


def _decoded(vae: Vae, fixes: Corrections, codes: F32, anchor: I64 | None) -> Images:
    """Return the A·n images of (A, n, Z) codes, under the labels of their scenarios."""
    decoder = decoder_of(vae, fixes.anchors)
    return Images(decoder.decode(codes, anchor), np.repeat(fixes.labels, codes.shape[1]))
