"""Which answers CROWDLAB saves, and what that costs: simulated annotators on the galleries of finished runs.

    python tests/bench/crowdlab.py runs/demo [RUN ...] [--seeds 10] [--certainty 0.8 0.85 0.9]

The truth of an image is what the run's judges see in it. Five annotators each give another class, drawn evenly, at an
error rate; the same answers are labelled by the majority of five, by CROWDLAB of five, and by CROWDLAB of two where it
is sure and of five elsewhere, as in Label Studio's queue. The second table takes models that are misled together: on
every tenth scenario they are sure of a wrong class, the classifier's where that is wrong.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defuse_core.artifacts import F32, I64, Bool, Gallery, ReferenceSet, Votes
from defuse_core.config.sections import ClassifierSet
from defuse_core.review.verdicts import LEAST_ANSWERS, crowdlab_consensus, majority, tally
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import load_reference_models, mean_probabilities

ANSWERS, ERRORS = 5, (0.0, 0.1, 0.2, 0.3)


@dataclass(frozen=True, eq=False)
class Reviewed:
    """What is known of a gallery of S scenarios of R images, with C classes."""

    truth: I64  # (S, R)
    models: F32  # (S, R, C) mean probabilities of the reference models
    predicted: I64  # (S, R) by the classifier

    @property
    def shape(self) -> tuple[int, int]:
        """S and R."""
        return len(self.truth), self.truth.shape[1]

    @classmethod
    def of_run(cls, folder: Path) -> Reviewed:
        run = Run.open(FolderStore(folder.parent), folder.name)
        gallery = run.require(Gallery)
        references = mean_answers(run, run.spec.review.reference, "references", gallery)
        judges = mean_answers(run, run.spec.judges, "judges", gallery)
        return cls(judges.argmax(axis=2), references, gallery.predicted)

    def misled(self) -> Reviewed:
        """Return the same gallery with models that are sure of a wrong class on every tenth scenario."""
        classes, models = self.models.shape[2], self.models.copy()
        wrong = np.where(self.predicted == self.truth, (self.truth + 1) % classes, self.predicted)[::10]
        models[::10] = 0.01 / (classes - 1)
        np.put_along_axis(models[::10], wrong[..., None], np.float32(0.99), axis=2)
        return Reviewed(self.truth, models, self.predicted)


def mean_answers(run: Run, section: ClassifierSet, key: str, gallery: Gallery) -> F32:
    """Return the mean class probabilities of a set of models on the gallery, (S, R, C)."""
    shown = gallery.images.reshape(-1, *gallery.images.shape[2:])
    models = load_reference_models(run.spec, section, run.require(ReferenceSet, key), len(gallery.classes))
    return mean_probabilities(models, shown).reshape(*gallery.predicted.shape, -1)


def all_answers(truth: I64, classes: int, error: float, rng: np.random.Generator) -> I64:
    """Return what each annotator would answer, (ANSWERS, S, R)."""
    shape = (ANSWERS, *truth.shape)
    wrong = (truth + rng.integers(1, classes, shape)) % classes
    return np.where(rng.random(shape) < error, wrong, truth)


def votes_of(answers: I64, asked: Bool) -> Votes:
    """Return those answers that were `asked` for, both (ANSWERS, S, R)."""
    annotator, scenario, image = np.nonzero(asked)
    names = tuple(str(number) for number in range(ANSWERS))
    return Votes(scenario, image, annotator, answers[asked], np.zeros(len(image)), names, "people", {})


def where_unsure(
    reviewed: Reviewed, answers: I64, certainty: float, rng: np.random.Generator
) -> tuple[I64, float]:
    """Return the labels, (S, R), and the answers per image, where sure images are not asked about any more."""
    turn = rng.random(answers.shape).argsort(axis=0)  # in which round each annotator would answer
    given = np.full(reviewed.truth.shape, LEAST_ANSWERS)
    while True:
        consensus = crowdlab_consensus(votes_of(answers, turn < given), reviewed.models[None])
        wanted = ~consensus.sure(certainty) & (given < ANSWERS)
        if not wanted.any():
            return consensus.labels, float(given.mean())
        given[wanted] = ANSWERS


def row(reviewed: Reviewed, error: float, certainties: list[float], seeds: int) -> str:
    """Return a row of the table: the means over the seeds."""
    found: list[list[float]] = []
    for seed in range(seeds):
        rng, classes = np.random.default_rng(seed), reviewed.models.shape[2]
        answers = all_answers(reviewed.truth, classes, error, rng)
        votes = votes_of(answers, np.ones(answers.shape, bool))
        labels = [
            majority(tally(votes, reviewed.shape, classes)),
            crowdlab_consensus(votes, reviewed.models[None]).labels,
        ]
        counts = []
        for certainty in certainties:
            made, count = where_unsure(reviewed, answers, certainty, np.random.default_rng(seed))
            labels.append(made)
            counts.append(count)
        found.append([*(100 * (made == reviewed.truth).mean() for made in labels), *counts])
    means = np.mean(found, axis=0)
    right, asked = means[: 2 + len(certainties)], means[2 + len(certainties) :]
    cells = [f"{share:.1f} %" for share in right[:2]]
    cells += [f"{count:.1f}; {share:.1f} %" for count, share in zip(asked, right[2:], strict=True)]
    return f"| {error:.0%} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--certainty", nargs="+", type=float, default=[0.8, 0.85, 0.9])
    given = parser.parse_args()
    for folder in given.runs:
        reviewed = Reviewed.of_run(folder)
        right = (reviewed.models.argmax(axis=2) == reviewed.truth).mean()
        print(f"\n{folder.name}: {reviewed.truth.size} images, the reference models are right on {right:.0%}")
        for title, each in (("models as they are", reviewed), ("models misled", reviewed.misled())):
            ways = [f"asked until {certainty:g}" for certainty in given.certainty]
            print(f"\n| error ({title}) | majority of 5 | CROWDLAB of 5 | {' | '.join(ways)} |")
            print("|---" * (3 + len(ways)) + "|")
            for error in ERRORS:
                print(row(each, error, given.certainty, given.seeds), flush=True)


if __name__ == "__main__":
    main()
