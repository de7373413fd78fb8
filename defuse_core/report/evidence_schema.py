"""The fields of `report.json` with what the judges find, and how well the watch finds failing inputs.

GET /v1/model and the registry show the latter, too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from defuse_core.formatting import NONE, digits_of, percent, range_text, with_bounds


class FigureModel(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True
    )


class Share(FigureModel):
    """A share with its 95 % interval, fractions of 1; null where it could not be measured."""

    value: float | None
    low: float | None
    high: float | None

    def text(self, digits: int = 1) -> str:
        """Return the share with its interval: 98.5 % (97.2–99.1); alone where it is no measurement."""
        value, ends = self.parts(digits)
        return f"{value} ({ends})" if ends else value

    def parts(self, digits: int = 1) -> tuple[str, str]:
        """Return the share and the ends of its interval, which are empty where it is no measurement.

        All three have the digits that keep each of them from being rounded to 0 or 100 %.
        """
        if self.value is None or self.low is None or self.high is None:
            return percent(self.value, digits), ""
        digits = digits_of(digits, self.value, self.low, self.high)
        return percent(self.value, digits), range_text(self.low, self.high, digits)

    def as_decimal(self) -> str:
        """Return it with its interval, not as a percentage: 0.970 (0.951–0.982)."""
        if self.value is None or self.low is None or self.high is None:
            return NONE
        return with_bounds(self.value, self.low, self.high, 3)


class FourShares(FigureModel):
    """One figure for each classifier."""

    before: Share
    baseline: Share
    plain: Share
    """Further training without the scenarios: λ = 0, for as many epochs. The mean of several, see `plain_each`."""
    defuse: Share
    """(null, null, null) where nothing was corrected."""
    plain_each: tuple[float | None, ...]
    """After each plain training; they differ in their random numbers alone."""


class BeforeAfter(FigureModel):
    before: Share
    defuse: Share


class WiderDraws(BeforeAfter):
    factor: float
    """On τ."""
    plain: Share
    """Plain further training, the mean."""


class LeftOutShares(BeforeAfter):
    plain: Share
    """Plain further training, which is not tuned on them either, on the same pictures; the mean."""
    plain_each: tuple[float | None, ...]
    """As of FourShares."""


class Judges(FigureModel):
    """Models that took no part in the run."""

    count: int
    accuracy: tuple[float | None, ...]
    """Of each judge, on test images, or on validation images where there are none."""
    reference_models: tuple[float | None, ...]
    """Of each reference model, likewise; empty where none took part."""
    classifier: float | None
    """Of the classifier before, on the same images. Null where it may have been trained on them
    (run.validation_from_training), since they compare nothing then."""
    worse: bool
    """Whether the best judge gets fewer of these images right than the classifier before, all in all or on average over
    the classes, significantly and by over two points: then figures by the judges' labels are not to be relied on."""
    worse_by_class: str | None = None
    """What the best judge and the classifier are right on, where it is worse on average over the classes; else null."""
    labelled: float | None
    """Share of the held-out images on which most judges agree. Only these have a judges' label."""


class Pairs(FigureModel):
    """The correction against plain further training, the baseline or the classifier before, pair by pair."""

    pair: Literal["scenario", "draw", "image", "track"]
    """What one pair is: a track in the place of draws or images where the test images have tracks."""
    better: int
    """Pairs in which the correction is more often right."""
    worse: int
    """Pairs in which the other one is. All others are equal."""
    p_value: float
    """Of the exact sign test, two-sided."""
    worse_than_each: bool
    """Whether the correction is significantly more often worse than each plain training, the baseline or the classifier
    before; the other numbers are against the strongest plain training, the one that it does least against."""


class LeftOutScenarios(FigureModel):
    """Some of the scenarios that were left out of the tuning. Accuracies are means over them, by the judges' labels."""

    count: int
    before: float | None = None
    plain: float | None = None
    defuse: float | None = None
    """Of corrections that were not tuned on the scenario."""
    against_plain: Pairs | None = None
    """A pair is a scenario. Null without scenarios, and where nothing was corrected."""


class AgainstPlain(FigureModel):
    """By the judges' labels, against the strongest plain training, the one that the correction does least against. Null
    where nothing was corrected, and where it was not measured."""

    scenarios: Pairs | None
    """A pair is an accepted scenario, on its held-out images."""
    left_out: Pairs | None
    """The same for corrections that were not tuned on the scenario."""
    real_failures: Pairs | None
    """A pair is a failing draw from a test image, as of real_failures, or those of a track."""
    test: Pairs | None
    """A pair is a test image, or those of one track, by its own class."""


class AgainstBaseline(FigureModel):
    """Likewise, against fine-tuning on the reviewed failures alone. Null, too, where that has no result."""

    scenarios: Pairs | None
    real_failures: Pairs | None


class EvidenceFigures(FigureModel):
    """What the judges find. The judges' label of an image is the one that most judges give it."""

    judges: Judges
    purity: Share
    """Share of held-out images of accepted scenarios that show the scenario's label; one that judges disagree on shows
    none."""
    own_label: FourShares
    """Accuracy on held-out images of accepted scenarios by the judges' labels."""
    one_label: FourShares
    """Accuracy on the same images by the scenario's label, the paper's figure."""
    left_out: LeftOutShares
    """Accuracy by the judges' labels on scenarios that were left out of the tuning (two folds), with the λ of the run,
    which was chosen with them; no draw in their regions is tuned on."""
    left_out_known_confusion: LeftOutScenarios
    """Of these, the scenarios whose label and most common wrong answer are those of one that was tuned on."""
    left_out_new_confusion: LeftOutScenarios
    """The other ones."""
    wider: tuple[WiderDraws, ...]
    """Accuracy by the judges' labels on draws at 2 and 4 times the reviewed τ."""
    real_failures: FourShares
    """Accuracy on failing draws from test images in which the judges still see the image's class. The classifier
    before is wrong on them by definition, so that its 0 has no interval."""
    real_failure_images: int
    screen_recall: Share
    """Of these failing draws, the share in which the reference models see the class, too: those that identify.screen
    would keep. (null, null, null) without a screen."""
    against_plain: AgainstPlain
    against_baseline: AgainstBaseline
    plain_against_before: Pairs | None
    """The first plain training in the place of the correction; a pair is a test image, or those of one track. Null
    without test images or a plain training."""
    defuse_against_before: Pairs | None
    """A pair is a test image, or those of one track. Null without test images, and where nothing was corrected."""
    krippendorff: float | None
    """α of the reviewers' answers (nominal)."""


class ScenarioEvidence(FigureModel):
    """What the judges find on the held-out images of one accepted scenario."""

    name: str
    """What sets its pictures apart from its class: `7 read as 2: thin, slanted to the right`."""
    purity: float | None
    before: float | None
    baseline: float | None
    plain: float | None
    defuse: float | None
    """Accuracy by the judges' labels; `plain` is the mean over the plain trainings, `defuse` null where nothing was
    corrected."""
    left_out: float | None
    """The same for a classifier that was not tuned on this scenario, with the λ of the run."""
    confirmed: bool | None
    """Whether, by the judges' labels, the correction is right on over half of the images; significantly more often than
    each plain training (sign tests over `independent_images`, one-sided, at a false discovery rate of 5 % over the
    scenarios, which counts pictures, for these trainings); and beyond what 95 of 100 further plain trainings would
    reach (Student's t bound over `plain_each`). Of the scenarios that further training alone may fix, one in twenty is
    confirmed by chance, and up to one in ten if it fixes a scenario wholly or not at all. Null where nothing was
    corrected, and where there are too few images to tell."""
    worse: bool | None
    """Whether each plain training is right significantly more often than the correction, and 95 of 100 further ones
    would be, likewise."""
    worse_than_before: bool | None
    """Whether the classifier before is right significantly more often than the correction, by sign tests alone."""
    plain_each: tuple[float | None, ...]
    """As of FourShares."""
    independent_images: int | None
    """Held-out images with a judges' label, of which those that are anchored at one image, or at images of one track,
    count once; 0 where no plain training finished. Null where nothing was corrected."""
    at_fault: Literal["classifier", "β-VAE", "unclear"]
    """The β-VAE where most held-out images do not show the label; the classifier where at least 90 % show it, and it is
    wrong on over review.rho of them by the judges' labels. Unclear where the judges label none."""
    support: int
    """Training images that its codes come from."""
    real_error: float | None
    """Error of the classifier before on the 50 real images nearest to it; on a quarter of its class's below 200.
    Images of one track count once, as wrong if most of them are."""
    real_error_of_class: float | None
    """Its error on all real images of the same class, likewise."""
    real_error_of_all: float | None
    """Its error on all real images."""
    seen_in_real_data: bool | None
    """Whether real_error is significantly larger than real_error_of_class, or than 20 %, at a false discovery rate of
    5 % over the accepted scenarios. False does not say that the errors are equal. Null where no error of the nearest
    ones could be: the class has no errors, or too few of them or of images; or where only images that the classifier
    was trained on show none. It is of the real images nearest to the scenario, and seen_in_training_images of those
    that its codes come from: either can be true alone. The page says "seen in real images" where this one is true, else
    "seen in training images" where that one is."""


class DetectionFigures(FigureModel):
    """How well failing inputs are found among the real images of one part of the data.

    Intervals count the images of one track once.
    """

    images: int
    errors: int
    """Images that the classifier gets wrong."""
    auroc: Share
    """Chance that a wrong answer gets a higher failure probability than a right one; 0.5 is chance."""
    average_precision: float | None
    flagged: int | None
    """Images whose failure probability reaches the threshold."""
    precision: Share
    """Share of the flagged images that are wrong."""
    recall: Share
    """Share of the wrong images that are flagged."""
    calibration_error: float | None
    """Expected calibration error of the failure probability, in up to 15 bins of equally many images.

    Few images have fewer bins: a bin holds 10 wrong and 10 right answers on average, or 600 images. None where that is
    a single bin, which compares the means alone: calibration makes these equal, whatever the detector is worth.
    """


class MethodFigures(FigureModel):
    """One way to find failing inputs, for comparison."""

    method: str
    log_loss: float
    """Cross-validated on validation images, nats; the choice goes by it."""
    validation: Share
    """AUROC."""
    test: Share
    """AUROC; chooses nothing."""


class WatchFigures(FigureModel):
    """The detector of failing inputs, chosen and calibrated on validation images."""

    method: str | None = Field(description="the chosen one; null if none gives a failure probability")
    verdict: str
    """One sentence: how well failing inputs are found, or that and why they are not."""
    threshold: float | None
    """Failure probability from which on an input is flagged."""
    validation: DetectionFigures | None
    """Each image is measured by a detector that was not fitted on it. Null without such images, or without a method.
    Precision and recall are null where the threshold was chosen on these images (serve.failure_threshold null)."""
    test: DetectionFigures | None
    methods: tuple[MethodFigures, ...]
    """Empty where none can be fitted."""
