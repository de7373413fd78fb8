"""The fields of `report.json`; those of its evidence are in evidence_schema.py."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from defuse_core.errors import OTHER_FORMAT_REMEDY, InputError
from defuse_core.formatting import NONE, digits_of
from defuse_core.report.evidence_schema import EvidenceFigures, FigureModel, ScenarioEvidence, WatchFigures

# Below this the images of the scenarios show several classes, and accuracy by the scenario's label means little.
LOW_PURITY = 0.8
FINE_TUNINGS = {  # fine-tunings that only evidence needs
    "plain": "plain further training 1",
    "plain_1": "plain further training 2",
    "plain_2": "plain further training 3",
    "left_out_0": "without half 1 of the scenarios",
    "left_out_1": "without half 2 of the scenarios",
}
VERSION: Final = 13  # version of report.json; grows when a field is renamed, removed or changed in meaning


class Accuracy(FigureModel):
    """Fractions of 1; null where the data set has no such images, or nothing was tuned."""

    validation: float | None
    test: float | None
    scenario: float | None
    """On images drawn from the accepted scenarios. No step trains on them or chooses by them."""


class Accuracies(FigureModel):
    """Figure 4."""

    before: Accuracy
    baseline: Accuracy
    """Fine-tuned on the reviewed, misclassified images: the paper's "unrestricted adversarial examples"."""
    plain: Accuracy | None
    """Further training without any scenario (λ = 0), the mean of several; null without judges."""
    defuse: Accuracy


class Scenario(FigureModel):
    """One component of the mixture, accepted as a failure scenario or not."""

    number: int
    """Index among the kept components, from 0, as in every artefact."""
    weight: float
    source_images: int
    """Training images that its codes come from."""
    source_error: float
    """Share of these that the classifier before gets wrong in the image itself."""
    source_tracks: int | None
    """Tracks that these images are of; null where images have no tracks."""
    seen_in_training_images: bool
    """Whether source_error is significantly over 20 % (lower 95 % bound), so that real images show the failures. Images
    of one track count once, as wrong if most of them are. It is of the images that the scenario's codes come from, and
    evidence.seen_in_real_data of the real images nearest to it: either can be true alone. The column Seen of the
    tables is this field; the page says "seen in training images" where this one alone is true."""
    accepted: bool
    label: str | None
    """Class, by the majority of the annotators or an override; null where rejected."""
    reason: str
    misclassified: float | None
    """Share of its labelled review images that the classifier gets wrong."""
    purity: float | None
    """Of its review images with an answer, the share whose annotators' label is the scenario's. Null without any."""
    agreement: float | None
    """Mean over its review images of the share of votes for the majority, or for one label of a tie; none-of-the-above
    and images with a single vote are left out."""
    mistaken_for: str | None
    """Most common wrong answer of the classifier on its review images; null where rejected."""
    before: float | None
    baseline: float | None
    defuse: float | None
    """Accuracy on its held-out images; null where rejected, and after a tuning without a result."""
    evidence: ScenarioEvidence | None
    """Null where rejected, and without judges."""
    tuning_agreement: float | None
    """Share of its first draws to tune on in which the reference models see its label. Null where rejected, and without
    correct.filter, which leaves out the other draws, unless they see it in none."""


class OwnLabels(FigureModel):
    """Accuracy on the reviewed images of the accepted scenarios, by the annotators' labels. Valid for mixed ones."""

    before: float | None
    defuse: float | None
    """Null, too, where nothing was corrected."""
    images: int
    tuned_on: bool
    """Whether vae.decode is anchored: then the correction is tuned on the photographs that these images show."""


class ScenarioSummary(FigureModel):
    components: int
    accepted: int
    purity: float | None
    """Mean over the accepted."""
    own_labels: OwnLabels
    list: tuple[Scenario, ...]
    expected_false_share: float | None
    """Expected share of false ones among those that the vote accepts and that nobody decided on above it: with what
    probability, under a uniform prior, the classifier gets at most review.rho of a scenario wrong, mean over them. Null
    without any."""
    tuning_agreement: float | None
    """Mean over the accepted."""
    unreviewed_images: int
    """Codes of Ψ that nobody reviewed and that are tuned on beside the scenarios (correct.unreviewed)."""
    false_by_judges: int | None
    """Of the `judged` scenarios, those on whose held-out images, by the judges' labels, the classifier before is wrong
    on at most review.rho. Null without any."""
    undecided: str | None
    """Why the run could not tell whether the classifier has failure scenarios, and what to do. Null where it could, and
    with accepted ones."""

    @property
    def judged(self) -> int:
        """Accepted scenarios with a held-out image that the judges label."""
        return sum(row.evidence is not None and row.evidence.before is not None for row in self.list)


class Mean(FigureModel):
    mean: float | None
    standard_error: float | None
    """Over images; over scenarios with review.form scenario, where one answer is for all images of a scenario."""
    images: int

    def text(self) -> str:
        """Return the mean with its standard error: 91.2 ± 2.3 %."""
        if self.mean is None:
            return NONE
        digits = digits_of(1, self.mean)
        error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.{digits}f}"
        return f"{100 * self.mean:.{digits}f}{error} %"


class Agreement(FigureModel):
    """Figure 6: share of an image's votes for its majority label, or for one label of a tie; over images with two votes
    or more, none-of-the-above left out."""

    scenario: Mean
    other: Mean
    all: Mean


class TradeOff(FigureModel):
    """One λ at the epoch that the rule of choice picked for it (Figure 5)."""

    lam: float
    epoch: int
    train: float | None
    validation: float | None
    test: float | None
    tune: float | None
    scenario: float | None
    chosen: bool


class ChosenRow(FigureModel):
    lam: float
    epoch: int


class PsiFigures(FigureModel):
    codes: int
    images: int
    decodings: int
    images_with_any: float | None
    """Share of the images with at least one failing draw."""
    zero_noise_flip_rate: float | None
    """Share of the images that the classifier gets wrong when their own code is decoded, without noise."""
    failing_draws: int
    """Draws that the classifier gets wrong, before any is left out."""
    kept_share: float | None
    """Share of these in Ψ, after identify.screen and identify.max_per_image. Null where none fails."""
    screened: bool
    """Whether identify.screen left out draws in which the reference models do not see the class of the image."""
    wrong: int
    """Images that the classifier gets wrong themselves, without any noise or decoding."""
    wrong_decoded: int
    """Of these, those that it gets wrong when their own code is decoded, too."""
    wrong_kept: int
    """Of those that it gets wrong, the ones with a code in Ψ: a scenario can come from no other."""


class HealthFigures(FigureModel):
    """Whether the β-VAE's pictures can say anything about the classifier (thresholds in evaluation/health.py)."""

    verdict: Literal["fit", "poor", "blind"]
    originals_right: float
    """Share of training images that the classifier gets right."""
    reconstructions_right: float
    """Share whose plain reconstruction it gets right."""
    kept_right: float
    """Among images that it gets right: share whose reconstruction it gets right too."""
    kept_on_average: float | None = None
    """The mean of this over the classes, where that decides the verdict; else null."""
    anchored: bool
    """Whether vae.decode is anchored: then reconstructions here are the images as the noise moves them."""
    judged_by: str
    """Whose answers these are: the classifier's or, with vae.decode: anchored, the reference models'."""

    @property
    def kept(self) -> float:
        """The share that the verdict rests on."""
        return self.kept_right if self.kept_on_average is None else self.kept_on_average


class VaeFigures(FigureModel):
    reconstruction: float
    """Mean squared error per pixel."""
    reconstruction_flips: float
    """Share of training images whose plain reconstruction the classifier gets wrong."""
    kl_per_dimension: tuple[float, ...]
    """Nats."""
    collapsed: int
    """Dimensions with less than 0.1 nats."""
    health: HealthFigures


class Mixture(FigureModel):
    converged: bool
    iterations: int
    codes_used: int
    lower_bound: float | None
    last_change: float | None
    """Nats by which the lower bound changed in the last iteration; the largest over the cells. The fit has converged
    below distill.tolerance."""
    weights: tuple[float, ...]
    """All K weights, largest first."""


class VoteFigures(FigureModel):
    annotators: int
    """Those of whom an answer is counted."""
    answers: int
    images: int
    labelled: int
    misclassified: float | None
    """Share of all labelled review images that the classifier gets wrong."""
    ties: int
    """Images without a label because several classes have the most votes."""
    more_images: int
    """Further images, labelled by reference models, that were drawn for verdicts in doubt (review.more_images): they
    count in verdicts alone, in no other figure of the review."""
    no_class_chosen: int
    """Images without a label because every answer is none-of-the-above, or because nobody answered."""
    not_majority: int
    """Images with a label by review.consensus: crowdlab that is not the majority of their votes, or that breaks a
    tie."""
    notes: dict[str, Any]


class ClassAccuracy(FigureModel):
    name: str = Field(alias="class")
    images: int
    before: float | None
    baseline: float | None
    defuse: float | None
    loses_too_much: bool
    """Whether the correction loses more than check.max_class_loss; with over 20 classes, certainly more."""


class SweepFailure(FigureModel):
    sweep: str
    """"baseline" or "defuse", or a fine-tuning that only evidence needs, such as "plain_1" or "left_out_0"."""
    lam: float
    cause: str

    @property
    def fine_tuning(self) -> str:
        """What is fine-tuned in the sweep, in words where only evidence needs it."""
        return FINE_TUNINGS.get(self.sweep, self.sweep)


class Decision(FigureModel):
    """A decision of a person on one scenario."""

    scenario: int
    """Number of the scenario."""
    label: str | None
    """Class; null rejects the scenario."""
    author: str
    reason: str
    when: str


class RunFigures(FigureModel):
    name: str
    seed: int
    dataset: str
    classes: int
    images: dict[str, int]
    validation_from_training: bool
    """Whether the validation images may be a share of the training images (data.validation_share), and the classifier,
    which the run did not train, may know them."""
    data_fingerprint: str


class Artefact(FigureModel):
    name: str
    step: str
    made: str
    seconds: float
    bytes: int


class Provenance(FigureModel):
    """How the run was made. Two equal runs differ in nothing else."""

    device: str | None
    """The models were trained on it."""
    artefacts: tuple[Artefact, ...]
    versions: dict[str, str]
    worker_seconds: float
    """Of identification, summed over workers."""
    decodings_per_second: float | None
    """Per worker."""


class Report(FigureModel):
    """The content of `report.json`. Shares and accuracies are fractions of 1; null: the figure does not exist."""

    version: Literal[13]
    headline: str
    """The result, in one or two sentences."""
    caveats: tuple[str, ...]
    """What a reader must know before the figures; the first sentence of each is its title."""
    run: RunFigures
    annotators: str
    """"reference models" or "people"."""
    accuracy: Accuracies
    scenarios: ScenarioSummary
    agreement: Agreement
    tradeoff: tuple[TradeOff, ...]
    chosen: ChosenRow | None
    baseline_chosen: ChosenRow | None
    psi: PsiFigures
    vae: VaeFigures
    mixture: Mixture
    votes: VoteFigures
    overrides: tuple[Decision, ...]
    """Decisions of people that replace the verdict of the vote."""
    evidence: EvidenceFigures | None
    """Null without judges (judges.count 0)."""
    watch: WatchFigures | None
    """How well failing inputs of the corrected classifier are found, or of the one before where nothing was corrected.
    Null without failurewatch.safetensors."""
    per_class: tuple[ClassAccuracy, ...]
    """On the test images; empty where there are none."""
    failed_trials: tuple[SweepFailure, ...]
    provenance: Provenance


def is_low(purity: float | None) -> bool:
    """Whether the images of a scenario are mixed."""
    return purity is not None and purity < LOW_PURITY


def parse_report(text: str | bytes, where: str) -> Report:
    """Return the report in the JSON `text`. Raises InputError, naming `where`, for another version or other text."""
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        written_again = "`defuse report RUN` writes the report of a run again"
        remedy = OTHER_FORMAT_REMEDY if field == "version" else written_again
        raise InputError(
            f"{where}: expected a report of version {VERSION}, found {field}: {first['msg']}; {remedy}"
        ) from error
