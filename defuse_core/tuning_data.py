"""What fine-tuning reads: the training images D, and the images of the scenarios D_f (§3.2.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import F32, I64, Corrections, Failures, Gallery, Models, Verdicts
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.data.splits import mixed_order, track_mates
from defuse_core.device import cpu_threads
from defuse_core.models import Decoder, Vae, decode_codes, decoder_of, load_vae
from defuse_core.progress import Progress
from defuse_core.review.verdicts import is_misclassified
from defuse_core.seeds import generator


@dataclass(frozen=True, eq=False)
class ScenarioImages:
    """The images of the scenarios; as many as there are scenarios, whatever the number of training images."""

    tune: Images  # of D_f, scenario after scenario
    held_out: Images  # plays no part in the choice
    unreviewed: Images | None = None  # of D_f, too: failures that nobody reviewed

    def all_tuned(self) -> Images:
        """Return D_f: where failures were not reviewed, as many of them, repeated, as images of the scenarios."""
        if self.unreviewed is None or not len(self.unreviewed):
            return self.tune
        repeated = np.resize(np.arange(len(self.unreviewed)), len(self.tune))
        return self.tune.joined(self.unreviewed.take(repeated))


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
    whole = all_fixes or fixes
    sources = whole.held_out_sources(), whole.tuned_sources()
    clean = load_clean_images(spec, models, *sources, progress=progress)
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
        held_out = held_out_images(vae, fixes)
        if reviewed is not None:
            return ScenarioImages(reviewed, held_out)
        codes = fixes.unreviewed
        unreviewed = None if codes is None else _unreviewed_images(spec, models, vae, codes)
        return ScenarioImages(tuning_images(vae, fixes), held_out, unreviewed)


def _unreviewed_images(spec: RunFile, models: Models, vae: Vae, failures: Failures) -> Images:
    """Return the images of codes of Ψ, each under the class of its source image, and anchored there (vae.decode)."""
    if spec.vae.decode == "plain":
        return Images(decode_codes(vae, failures.codes), failures.truth)
    train = reopen_splits(spec.data, spec.seed, models.data_fingerprint).train
    used, anchor = np.unique(failures.source, return_inverse=True)
    decoder = Decoder(vae, train.take(used.astype(np.int64)))
    return Images(decoder.decode(failures.codes, anchor), failures.truth)


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
