"""What fine-tuning reads: the training images D, and D_f, the images of the scenarios (§3.2.3) and, with
correct.unreviewed, of failures that nobody reviews. The latter are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import (
    F32,
    I64,
    Bool,
    Corrections,
    Failures,
    Gallery,
    Models,
    Psi,
    Scenarios,
    Verdicts,
)
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.data.splits import stratified_order, track_mates
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import in_region
from defuse_core.identify import subsample_psi
from defuse_core.models import Decodings, StoredVae, images_of, load_classifier
from defuse_core.models.decoding import fits_in_memory
from defuse_core.protocols import Compute, Progress, SweepRequest, map_in_tasks, silent
from defuse_core.review.sample import Examiner
from defuse_core.review.verdicts import is_misclassified
from defuse_core.seeds import generator
from defuse_core.store import Store
from defuse_core.training.precision import right_by_part

REPEATS = 4  # times that an image of an unreviewed failure is in D_f at most
EXAMINED = 2  # times as many unreviewed codes are examined as are wanted, since not all are clear
# codes that one task examines, or that are decoded together; with vae.decode: anchored, so many images are read at once
CODES_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class ScenarioImages:
    """The images of the scenarios. Their number does not depend on that of the training images."""

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
    right_before: Mapping[str, Bool]  # as `score_before` returns it
    # another number is the same fine-tuning with other random numbers: order of the minibatches, augmentation, dropout
    repetition: int = 0


def reviewed_failures(gallery: Gallery, verdicts: Verdicts) -> Images:
    """Return the reviewed images that f gets wrong, each under its own majority label: the baseline's D_f."""
    wrong = is_misclassified(gallery.predicted, verdicts.image_labels)
    return Images(gallery.images[wrong], verdicts.image_labels[wrong])


def load_fine_tuning_data(models: Models, request: SweepRequest, *, progress: Progress) -> FineTuningData:
    """Return the input of the trials of a request."""
    spec, fixes, reviewed = request.spec, request.fixes, request.reviewed
    clean = load_clean_images(spec, models, *request.sources(), progress=progress)
    scenario = decode_scenario_images(spec, models, fixes, reviewed, progress=progress)
    right = score_before(spec, models, clean, progress=progress)
    return FineTuningData(clean, scenario, right, request.repetition)


def expect_training_images(spec: RunFile, models: Models, *, progress: Progress) -> None:
    """Raise DataError or RunMismatchError where the images that the run was trained on are missing or have changed."""
    reopen_splits(spec, models.data_fingerprint)


def load_clean_images(
    spec: RunFile, models: Models, left_out: I64, tuned: I64, *, progress: Progress
) -> Splits:
    """Return the data set in memory, with the training images that correct.train_images asks for.

    D has no training image of `left_out`, at which only held-out scenario images are anchored: the classifier would
    learn what it is measured on. Nor has it one of their tracks, unless the track has an image of `tuned` or D would
    lose its class.
    """
    progress("loading images to fine-tune on")
    splits = reopen_splits(spec, models.data_fingerprint)
    train, wanted = splits.train, spec.correct.train_images
    if len(left_out):
        left_out = np.union1d(left_out, track_mates(train, left_out, tuned))
    if wanted is not None and wanted < len(train):
        order = stratified_order(train.labels, generator(spec.seed, "correct", "sample"))
        rows = np.sort(order[:wanted])
        train, left_out = train.take(rows), np.flatnonzero(np.isin(rows, left_out)).astype(np.int64)
    if len(left_out):
        train = train.take(np.delete(np.arange(len(train)), left_out))
    return replace(splits, train=train).loaded()


def score_before(spec: RunFile, models: Models, clean: Splits, *, progress: Progress) -> dict[str, Bool]:
    """Return which images f gets right before, (N,), of each part on which the loss of a class counts.

    Validation images alone with vae.decode: anchored: D lacks images at which held-out failures are anchored.
    """
    progress("scoring the classifier before")
    counted = {"validation"} if spec.vae.decode == "anchored" else {"train", "validation"}
    parts = {part: images for part, images in clean.parts().items() if part in counted}
    classifier = load_classifier(spec, models.classifier, len(models.classes))
    with cpu_threads(1):
        return right_by_part(classifier, parts, spec.resources)


def decode_scenario_images(
    spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, *, progress: Progress
) -> ScenarioImages:
    """Return D_f, decoded from `fixes` or `reviewed` if that is given, and the held-out images of the scenarios."""
    progress("drawing images to fine-tune on")
    vae = StoredVae(spec, models.vae)
    with cpu_threads(1):
        held_out = held_out_images(vae, fixes)
        if reviewed is not None:
            return ScenarioImages(reviewed, len(reviewed), held_out)
        return ScenarioImages(_tuned_on(models, vae, fixes), fixes.tune[..., 0].size, held_out)


def _tuned_on(models: Models, vae: StoredVae, fixes: Corrections) -> Images:
    """Return the images of the scenarios, and as many of unreviewed failures under the class of their source image.

    Where there are fewer failures they are repeated, each at most REPEATS times.
    """
    if fixes.unreviewed is None:
        return tuning_images(vae, fixes)
    codes = fixes.tune.reshape(-1, fixes.tune.shape[-1])
    failures = fixes.unreviewed.take(slice(len(codes)))
    rows = np.resize(np.arange(len(failures)), min(len(codes), REPEATS * len(failures)))
    labels = np.concatenate([np.repeat(fixes.labels, fixes.tune.shape[1]), failures.truth[rows]])
    if fits_in_memory((len(labels), *Decodings(vae, codes).shape[1:])):
        shown = decode_failures(vae.spec, models, failures)
        return Images(np.concatenate([tuning_images(vae, fixes).pixels[:], shown[rows]]), labels)
    source = failures.source[rows]
    if fixes.anchors is not None and fixes.tune_anchor is not None:
        source = np.concatenate([fixes.anchors.source[fixes.tune_anchor.reshape(-1)], source])
    images, anchors = _source_images(vae.spec, models, source)
    images = None if images is None else images.loaded()
    return Images(Decodings(vae, np.concatenate([codes, failures.codes[rows]]), images, anchors), labels)


def decode_failures(spec: RunFile, models: Models, failures: Failures) -> F32:
    """Return the decodings of (n,) failures as Ψ has them, (n, channels, H, W) in [0, 1]."""
    images = _decodings_of(spec, models, failures, progress=silent)
    firsts = range(0, max(1, len(failures)), CODES_AT_ONCE)  # a single, empty part where there are none
    return np.concatenate([images.batch(slice(first, first + CODES_AT_ONCE)) for first in firsts])


def tuning_images(vae: StoredVae, fixes: Corrections) -> Images:
    """Return the images of D_f, scenario after scenario."""
    return _decoded(vae, fixes, fixes.tune, fixes.tune_anchor)


def held_out_images(vae: StoredVae, fixes: Corrections) -> Images:
    """Return the scenario images that accuracy on failure scenarios is measured on, scenario after scenario."""
    return _decoded(vae, fixes, fixes.test, fixes.test_anchor)


def by_scenario(images: Images, scenarios: int) -> list[Images]:
    """Return the images of each scenario, from those of all, one scenario after the other with equally many each."""
    size = len(images) // max(1, scenarios)
    return [images.take(slice(row * size, (row + 1) * size)) for row in range(scenarios)]


def _decoded(vae: StoredVae, fixes: Corrections, codes: F32, anchor: I64 | None) -> Images:
    """Return the A·n images of (A, n, Z) codes, under the labels of their scenarios."""
    pixels = Decodings(vae, codes, images_of(fixes.anchors), anchor).loaded()
    return Images(pixels, np.repeat(fixes.labels, codes.shape[1]))


def choose_unreviewed(
    examiner: Examiner, psi: Psi, store: Store, verdicts: Verdicts, compute: Compute
) -> Failures:
    """Return codes of Ψ to tune on beside the scenarios, in random order: as many as images of these, or fewer.

    Each is tuned on under the class of its source image. So every reference model is sure of it in the decoding, which
    the classifier gets wrong; and neither reviewers nor held-out images speak against it (`allowed`).
    """
    spec = examiner.spec
    wanted = len(verdicts.accepted) * spec.correct.tune_images
    found = compute.task("correct", _draw_allowed, spec, psi, store, examiner.scenarios, verdicts)
    found = found.take(slice(EXAMINED * wanted))
    # the folders of the training images are listed once, not by each task
    images = compute.task("correct", _decodings_of, spec, examiner.models, found)
    clear = map_in_tasks(
        compute, "correct", len(found), _are_clear, examiner, images, rows_per_task=CODES_AT_ONCE
    )
    return found.take(np.flatnonzero(np.array(clear, np.bool_))[:wanted])


def _draw_allowed(
    spec: RunFile, psi: Psi, store: Store, scenarios: Scenarios, verdicts: Verdicts, *, progress: Progress
) -> Failures:
    """Return the allowed codes of a sample of Ψ, in an order that the seed gives."""
    progress("choosing failures to tune on")
    codes = subsample_psi(spec, psi, store)
    rows = np.flatnonzero(allowed(codes, scenarios, verdicts))
    return codes.take(generator(spec.seed, "corrections", "unreviewed").permutation(rows))


@cpu_threads(1)
def allowed(codes: Failures, scenarios: Scenarios, verdicts: Verdicts) -> Bool:
    """Return which of (n,) failures may be tuned on, (n,). Not allowed are those

    - in the region of a component that reviewers rejected or gave another label than the failure's source class;
    - of a cell (source class, answer) in which reviewers gave no component the source class;
    - with vae.decode: anchored, of the photographs or tracks at which held-out images of accepted components are
      anchored.
    """
    found = ~np.isin(codes.unit, _held_out_units(scenarios, verdicts.accepted))
    for component, label in enumerate(verdicts.labels.tolist()):
        found &= (codes.truth == label) | ~in_region(scenarios, component, codes.codes)
    cells = scenarios.cells
    for source, answer in np.unique(cells, axis=0):
        if source not in verdicts.labels[(cells == (source, answer)).all(axis=1)]:
            found &= (codes.truth != source) | (codes.predicted != answer)
    return found


def _held_out_units(scenarios: Scenarios, accepted: I64) -> I64:
    """Return the Anchors.unit of the images that held-out draws of some components may be anchored at."""
    if scenarios.failures is None:
        return np.zeros(0, np.int64)
    units: I64 = np.unique(scenarios.failures.held_out_anchors(accepted).unit)
    return units


def _decodings_of(spec: RunFile, models: Models, failures: Failures, *, progress: Progress) -> Images:
    """Return the decodings of failures as Ψ has them, under the classes of their source images; decodes none yet."""
    progress("opening the images of failures")
    images, anchors = _source_images(spec, models, failures.source)
    return Images(Decodings(StoredVae(spec, models.vae), failures.codes, images, anchors), failures.truth)


def _source_images(spec: RunFile, models: Models, source: I64) -> tuple[Images | None, I64 | None]:
    """Return the training images that `source` (n,) names, each once, and the row of each source among them, (n,).

    None with plain decoding. Raises RunMismatchError for images other than those trained on.
    """
    if spec.vae.decode == "plain":
        return None, None
    used, rows = np.unique(source, return_inverse=True)
    return reopen_splits(spec, models.data_fingerprint).train.take(used), rows


def _are_clear(examiner: Examiner, found: Images, rows: range, *, progress: Progress) -> list[bool]:
    """Return for each of `rows` whether every reference model is sure of the source's class, and f answers another."""
    progress("examining failures to tune on")
    failures = found.take(slice(rows.start, rows.stop))
    with cpu_threads(1):
        answers, labels = examiner.unanimous_on(failures.batch())
    clear: list[bool] = ((labels == failures.labels) & (answers != failures.labels)).tolist()
    return clear
