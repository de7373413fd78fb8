"""§3.2.3: fine-tune f on L(D) + λ·CE(D_f), once per λ, and choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from defuse_core.artifacts import (
    I64,
    Corrections,
    FailedTrial,
    Gallery,
    Models,
    Sweep,
    SweepRow,
    Trial,
    Verdicts,
)
from defuse_core.checkpoint import (
    labels_of,
    load_optimizer_state,
    minibatches,
    optimizer_state,
    train_step,
)
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile
from defuse_core.data import Images, reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.errors import ComputeError, DefuseError, ModelError
from defuse_core.judge import is_misclassified
from defuse_core.models import accuracy, decode_codes, load_classifier, load_vae, to_tensor, weights_of
from defuse_core.progress import Progress
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store


@dataclass(frozen=True, eq=False)
class FineTuningData:
    """Everything that a trial reads: the data set in memory, D_f, and the scenario images held out."""

    train: Images
    validation: Images | None
    test: Images | None
    tune: Images  # D_f
    held_out: Images  # never chosen by


def reviewed_failures(gallery: Gallery, verdicts: Verdicts) -> Images:
    """Return the reviewed images that f gets wrong, each under its own majority label: the baseline's D_f."""
    wrong = is_misclassified(gallery.predicted, verdicts.image_labels)
    return Images(gallery.images[wrong], verdicts.image_labels[wrong])


def load_fine_tuning_data(
    spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, *, progress: Progress
) -> FineTuningData:
    """Return what the trials read. D_f is decoded from `fixes`, or is `reviewed` where that is given."""
    progress("loading images to fine-tune on", 0, 1, "sets")
    splits = reopen_splits(spec.data, spec.seed, models.data_fingerprint)
    train, wanted = splits.train, spec.correct.train_images
    if wanted is not None and wanted < len(train):
        train = train.take(
            np.sort(generator(spec.seed, "correct", "sample").choice(len(train), wanted, replace=False))
        )
    vae = load_vae(spec, models.vae)
    with cpu_threads(1):
        return FineTuningData(
            train=train.loaded(),
            validation=splits.validation and splits.validation.loaded(),
            test=splits.test and splits.test.loaded(),
            tune=reviewed if reviewed is not None else _decoded(vae, fixes.tune, fixes.labels),
            held_out=_decoded(vae, fixes.test, fixes.labels),
        )


def held_out_images(vae: nn.Module, fixes: Corrections) -> Images:
    """Return the scenario images that accuracy on failure scenarios is measured on, scenario after scenario."""
    return _decoded(vae, fixes.test, fixes.labels)


def _decoded(vae: Any, codes: Any, labels: I64) -> Images:
    """(A, n, Z) codes and (A,) labels -> A·n images with labels."""
    return Images(decode_codes(vae, codes.reshape(-1, codes.shape[2])), np.repeat(labels, codes.shape[1]))


def cycle(count: int, size: int, rng: np.random.Generator) -> Iterator[I64]:
    """Yield `size` of `count` rows again and again, going through a fresh shuffle each pass."""
    rows: I64 = np.zeros(0, np.int64)
    while True:
        while len(rows) < size:
            rows = np.concatenate([rows, rng.permutation(count)])
        yield rows[:size]
        rows = rows[size:]


def fine_tune(
    spec: RunFile, models: Models, tuning: FineTuningData, lam: float, trial: Trial | None
) -> Iterator[Trial]:
    """Yield the trial of one λ after each epoch, going on from `trial`. On one CPU thread, or this process's GPU."""
    section = spec.correct
    start = models.classifier if trial is None else trial.weights
    rows = () if trial is None else trial.rows
    best, best_epoch = (start, 0) if trial is None else (trial.best, trial.best_epoch)
    classifier = load_classifier(spec, start, len(models.classes))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=section.learning_rate, fused=True)
    if trial is not None:
        load_optimizer_state(optimizer, trial.moments)
    for epoch in range(len(rows) + 1, section.epochs + 1):
        with cpu_threads(1):
            loss = _epoch(spec, classifier, optimizer, tuning, lam, epoch)
            rows = (*rows, _score(classifier, tuning, lam, epoch, loss))
        weights = weights_of(classifier)
        if best_epoch == 0 or _rank(spec, models, rows[-1]) > _rank(spec, models, rows[best_epoch - 1]):
            best, best_epoch = weights, epoch
        done = epoch == section.epochs
        yield Trial(
            lam,
            rows,
            {} if done else weights,
            {} if done else optimizer_state(optimizer),
            best,
            best_epoch,
            done,
        )


def _epoch(
    spec: RunFile,
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    tuning: FineTuningData,
    lam: float,
    epoch: int,
) -> float:
    """One pass over D, with as many images of D_f in every step. Returns the mean loss.

    Both go through the network together, so that batch normalisation sees in training the mixture it is scored with.
    """
    torch.manual_seed(torch_seed(spec.seed, "correct", epoch))  # for dropout, whatever ran here before
    classifier.train()
    train, tune, size = tuning.train, tuning.tune, spec.correct.batch_size
    scenario_rows = cycle(
        len(tune), min(size, len(train)), generator(spec.seed, "correct", "scenarios", epoch)
    )
    losses = []
    for rows in minibatches(len(train), size, generator(spec.seed, "correct", epoch)):
        wrong = next(scenario_rows)[: len(rows)]  # the last step of an epoch may be shorter
        images = np.concatenate([train.batch(rows), tune.batch(wrong)])
        logits = classifier(to_tensor(images))
        clean = F.cross_entropy(logits[: len(rows)], labels_of(train, rows))
        scenario = F.cross_entropy(logits[len(rows) :], labels_of(tune, wrong))
        losses.append(train_step(clean + lam * scenario, optimizer, f"with λ = {lam:g}"))
    classifier.eval()
    return float(np.mean(losses))


def _score(classifier: nn.Module, tuning: FineTuningData, lam: float, epoch: int, loss: float) -> SweepRow:
    parts = {
        "train": tuning.train,
        "validation": tuning.validation,
        "test": tuning.test,
        "tune": tuning.tune,
        "scenario": tuning.held_out,
    }
    scores = {
        name: None if images is None else accuracy(classifier, images) for name, images in parts.items()
    }
    return SweepRow(lam, epoch, loss, **scores)  # type: ignore[arg-type]  # train, tune and scenario exist


def _rank(spec: RunFile, models: Models, row: SweepRow) -> tuple[float, ...]:
    """Return what the rule of choice maximises. The held-out scenario and test images play no part."""
    section = spec.correct
    if section.choose_by != "tune":
        return (getattr(row, section.choose_by),)
    split, clean = ("train", row.train) if row.validation is None else ("validation", row.validation)
    allowed = clean >= models.accuracy[split] - section.max_loss
    return (1.0, row.tune, clean) if allowed else (0.0, clean, row.tune)


def trial_key(lam: float) -> str:
    """Return where a trial lies in the store of its sweep."""
    return f"lam-{lam!r}.safetensors"


def run_trial(
    spec: RunFile, models: Models, tuning: FineTuningData, lam: float, store: Store
) -> Iterator[Trial]:
    """Yield the trial of one λ after each epoch, once it lies in `store`; goes on from what lies there already."""
    key = trial_key(lam)
    stored = decode(Trial, store.read(key), key) if store.exists(key) else None
    if stored is not None and stored.done:
        yield stored
        return
    for trial in fine_tune(spec, models, tuning, lam, stored):
        store.write(key, encode(trial))
        yield trial


def nothing_to_tune(fixes: Corrections, reviewed: Images | None) -> bool:
    """Whether there is nothing to tune on: no scenario was accepted, or no reviewed image is wrong."""
    return len(fixes.labels) == 0 or (reviewed is not None and len(reviewed) == 0)


def is_trial_failure(error: BaseException) -> bool:
    """Whether a trial that failed so is left out, and the others count: not where images, store or machines failed."""
    return isinstance(error, ModelError) or not isinstance(error, DefuseError | OSError)


def collect_sweep(
    spec: RunFile,
    models: Models,
    trials: Sequence[Trial],
    failures: Mapping[float, DefuseError] | None = None,
) -> Sweep:
    """Return the sweep with the weights that the rule of choice picks over all λ; ties go to the smaller λ.

    `failures` holds what each λ that is left out failed by. Raises ModelError or ComputeError where none is left.
    """
    failed = tuple(FailedTrial(lam, str(error)) for lam, error in sorted((failures or {}).items()))
    if failures and not trials:
        kind = ModelError if all(isinstance(e, ModelError) for e in failures.values()) else ComputeError
        raise kind(f"correct: every trial failed; λ = {failed[0].lam:g}: {failed[0].cause}")
    ordered = sorted(trials, key=lambda trial: trial.lam)
    rows = tuple(row for trial in ordered for row in trial.rows)
    if not ordered:
        return Sweep(rows, None, {}, failed)
    best = max(ordered, key=lambda trial: _rank(spec, models, trial.rows[trial.best_epoch - 1]))
    return Sweep(rows, best.rows[best.best_epoch - 1], best.best, failed)


def best_rows(spec: RunFile, models: Models, rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Return for each λ, ascending, the row of the epoch that the rule of choice picks; the earlier of equals."""
    by_lam: dict[float, list[SweepRow]] = {}
    for row in rows:
        by_lam.setdefault(row.lam, []).append(row)
    return [max(by_lam[lam], key=lambda row: _rank(spec, models, row)) for lam in sorted(by_lam)]
