"""correct.unreviewed: failures that nobody reviews and that are tuned on beside the scenarios. Ours."""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import F32, I64, Bool, Failures, Models, Psi, ReferenceSet, Scenarios, Verdicts
from defuse_core.config import RunFile
from defuse_core.data import reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import in_region
from defuse_core.identify import subsample_psi
from defuse_core.models import Decoder, Vae, decode_codes, load_classifier, load_vae, predict
from defuse_core.progress import Progress
from defuse_core.protocols import Compute
from defuse_core.review.examiner import in_tasks
from defuse_core.runs import Run
from defuse_core.seeds import generator
from defuse_core.store import Store
from defuse_core.training.reference_models import (
    load_reference_models,
    model_probabilities,
    unanimous_labels,
)

CODES_AT_ONCE = 1024  # that one task examines; with vae.decode: anchored, so many images are read at once
EXAMINED = 2  # times as many codes are examined as are wanted, since not all are clear


def choose_unreviewed(
    run: Run,
    compute: Compute,
    models: Models,
    references: ReferenceSet,
    psi: Psi,
    scenarios: Scenarios,
    verdicts: Verdicts,
) -> Failures:
    """Return codes of Ψ to tune on beside the scenarios, in random order: as many as images of these, or fewer.

    Each is tuned on under the class of its source image. So every reference model is sure of it in the decoding, which
    the classifier gets wrong; and neither reviewers nor held-out images speak against it (`allowed`).
    """
    spec = run.spec
    wanted = len(verdicts.accepted) * spec.correct.tune_images
    found = compute.task("correct", _draw_allowed, spec, psi, run.store, scenarios, verdicts)
    found = found.take(np.arange(min(len(found), EXAMINED * wanted)))
    of_all = spec, models, references, found
    clear = in_tasks(compute, "correct", len(found), _are_clear, *of_all, at_once=CODES_AT_ONCE)
    return found.take(np.flatnonzero(np.array(clear, np.bool_))[:wanted])


def _draw_allowed(
    spec: RunFile, psi: Psi, store: Store, scenarios: Scenarios, verdicts: Verdicts, *, progress: Progress
) -> Failures:
    """Return the allowed codes of a sample of Ψ, in an order that the seed gives."""
    progress("choosing failures to tune on", 0, 1, "sets")
    codes = subsample_psi(spec, psi, store)
    rows = np.flatnonzero(allowed(codes, scenarios, verdicts))
    return codes.take(generator(spec.seed, "corrections", "unreviewed").permutation(rows))


def allowed(codes: Failures, scenarios: Scenarios, verdicts: Verdicts) -> Bool:
    """Return which of (n,) failures neither reviewers nor held-out images speak against, (n,).

    Those in the region of a component that reviewers rejected or gave another label do not count, nor do those of a
    cell, a source class and an answer, in which they gave no component the class of the source; nor, with vae.decode:
    anchored, those of the photographs, or tracks, at which held-out images of accepted components are anchored.
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
    anchors = scenarios.failures.take(accepted).anchors
    units: I64 = np.unique(anchors.unit[anchors.held_out])
    return units


def _are_clear(
    spec: RunFile,
    models: Models,
    references: ReferenceSet,
    found: Failures,
    rows: range,
    *,
    progress: Progress,
) -> list[bool]:
    """Return for each of `rows` whether every reference model is sure of the source's class, and f answers another."""
    progress("examining failures to tune on", 0, 1, "sets")
    failures, classes = found.take(np.array(rows)), len(models.classes)
    with cpu_threads(1):
        images = decode_failures(spec, models, load_vae(spec, models.vae), failures)
        answers = predict(load_classifier(spec, models.classifier, classes), images)
        judged = load_reference_models(spec, spec.review.reference, references, classes)
        labels = unanimous_labels(model_probabilities(judged, images), spec.identify.min_probability)
    clear: list[bool] = ((labels == failures.truth) & (answers != failures.truth)).tolist()
    return clear


def decode_failures(spec: RunFile, models: Models, vae: Vae, failures: Failures) -> F32:
    """Return the decodings of (n,) failures as Ψ has them: plain, or each anchored at its source image.

    Shape (n, channels, H, W), in [0, 1]. Raises RunMismatchError for images other than those trained on.
    """
    if spec.vae.decode == "plain":
        return decode_codes(vae, failures.codes)
    train = reopen_splits(spec.data, spec.seed, models.data_fingerprint).train
    parts = []
    for first in range(0, max(1, len(failures)), CODES_AT_ONCE):  # a single, empty part where there are none
        some = failures.take(np.arange(first, min(first + CODES_AT_ONCE, len(failures))))
        used, anchor = np.unique(some.source, return_inverse=True)
        parts.append(Decoder(vae, train.take(used.astype(np.int64))).decode(some.codes, anchor))
    return np.concatenate(parts)
