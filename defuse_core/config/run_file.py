"""RunFile: the settings of one run as a frozen model, with the sections for machines, checks and serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from defuse_core.config.base import GpuShare, Section
from defuse_core.config.sections import (
    WITHOUT_ROOT,
    ClassifierSection,
    ClassifierSet,
    CorrectSection,
    DataSection,
    DistillSection,
    IdentifySection,
    JudgesSection,
    ReviewSection,
    VaeSection,
)
from defuse_core.errors import RunFileError
from defuse_core.formatting import has_control_characters

Arithmetic = Literal["f32", "bf16"]
MOST_CHANNELS = 16_384  # of the last stage of the convolutional β-VAE
MOST_DECODINGS = 2**24  # of a block, whose noise is in memory: 16 million take 3 GB with 10 latent dimensions


class PrecisionSection(Section):
    """The number format of each kind of computation. `resources.precision: auto` is replaced by what it measured."""

    classifier: Arithmetic = "f32"
    """Training and fine-tuning of the classifier."""
    vae: Arithmetic = "f32"
    """Training of the β-VAE."""
    reference: Arithmetic = "f32"
    """Training of the reference models."""
    judges: Arithmetic = "f32"
    """Training of the judges."""
    answers: Arithmetic = "f32"
    """Decoding and classifying, in identification and for accuracies. Answers whose margin is small are computed again
    in f32, so that they equal those of f32."""


class ResourcesSection(Section):
    """Machines. Only train_threads, train_workers and precision change results; the other fields may differ when a run
    is resumed."""

    workers: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = "auto"
    """Identification workers and parallel λ trials; auto is one per GPU, or per cpus_per_worker CPUs where
    there is no GPU."""
    gpus_per_worker: GpuShare | Literal["auto"] = "auto"
    """GPUs per worker, which computes on one at most; fractions are allowed; auto is 1 where the cluster has any GPU,
    else 0. With 0, `--on local` computes on the CPU, too; otherwise on the machine's GPU."""
    cpus_per_worker: float = Field(1.0, ge=0.01, le=1024)
    """CPUs per worker."""
    train_threads: int = Field(2, ge=1, le=256)
    """CPU threads of a training task; with 1, models are trained side by side on the CPUs of one machine. Another
    number changes rounding errors, so a resumed run must keep it."""
    readers: int = Field(0, ge=0, le=64)
    """Processes (of a torch DataLoader) that read ahead images which are not kept in memory, in each worker that trains
    or scores classifiers; 0: one thread."""
    train_workers: int = Field(1, ge=1, le=1024)
    """Workers of one training of the classifier or the β-VAE (Ray Train; one GPU or train_threads CPUs each). They
    share each minibatch, so the result is that of one worker up to rounding and the masks of dropout. A resumed run
    must keep it."""
    precision: Literal["auto", "f32", "bf16"] | PrecisionSection = "f32"
    """bf16 computes under torch's autocast; auto measures, once per run, where bf16 is faster; a section with fields
    classifier, vae, reference, judges and answers (decoding and classifying) sets f32 or bf16 for each. f32 is without
    TF32, on GPUs too. A resumed run must keep it. Paper: f32."""

    def arithmetic(self, kind: str) -> Arithmetic:
        """Return the number format of a kind of computation, a field of PrecisionSection; f32 before auto measured."""
        if isinstance(self.precision, PrecisionSection):
            found: Arithmetic = getattr(self.precision, kind)
            return found
        return "bf16" if self.precision == "bf16" else "f32"


class ReportSection(Section):
    """The figures of the report."""

    tsne_images: int = Field(10_000, ge=10)
    """Training codes in the t-SNE figure (Figure 2). Paper: 10,000."""
    tsne_failures: int = Field(516, ge=1)
    """Codes of Ψ in the t-SNE figure. Paper: 516."""
    perplexity: float = Field(30.0, gt=1)
    """Of t-SNE. Paper: 30."""


class CheckSection(Section):
    """Thresholds of `defuse check`, which a corrected classifier must reach to be promoted. Fractions of 1. Ours."""

    min_scenario_accuracy: float = Field(0.9, ge=0, le=1)
    """Least accuracy on the held-out images of all failure scenarios, by their labels; one that reaches it counts as
    fixed."""
    min_each_scenario: float = Field(0.5, ge=0, le=1)
    """Least accuracy on the held-out images of any one failure scenario, by its label."""
    max_loss: float = Field(0.005, ge=0, le=1)
    """Clean accuracy that may be lost (on test images; on validation or training images where there are none)."""
    max_class_loss: float = Field(0.05, ge=0, le=1)
    """Clean accuracy that any one class may lose; with over 20 classes, that it certainly lost, by a one-sided bound as
    in correct.max_class_loss: some of so many lose much by chance."""
    max_regressions: float = Field(0.02, ge=0, le=1)
    """Largest share of clean images that were classified correctly before and are not now."""


class ServeSection(Section):
    """How a corrected classifier is served (`defuse serve`). Nothing here changes a result of the run but what its
    report says of the watch. Ours."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU of the replica if torch supports it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes; bfloat16 through torch's autocast."""
    min_replicas: int = Field(1, ge=1, le=1000)
    """Replicas at least, at any load."""
    max_replicas: int = Field(1, ge=1, le=1000)
    """Replicas at most; the number scales with the load."""
    gpus_per_replica: GpuShare | Literal["auto"] = "auto"
    """GPUs, or a fraction of one, per replica; auto is 1 where the cluster has any GPU and device allows it, else 0."""
    cpus_per_replica: float = Field(1.0, ge=0.01, le=1024)
    """CPUs reserved per replica, and its number of threads."""
    max_ongoing: int = Field(64, ge=1)
    """Requests that a replica works on at once."""
    max_queued: int = Field(64, ge=0)
    """Requests that wait for a replica to work on them, per replica; more are answered 503 at once."""
    batch_size: int = Field(64, ge=1)
    """Requests answered by one forward pass at most: those that arrived during the previous one. 1 turns batching
    off."""
    max_body_mb: float = Field(8.0, gt=0, le=1024)
    """Largest request body, in MB."""
    max_images: int = Field(64, ge=1)
    """Images in one request at most."""
    max_pixels: int = Field(16_000_000, ge=1)
    """Width times height of all pictures of a request together, read from their headers before they are decoded."""
    timeout_s: float = Field(10.0, gt=0, le=3600)
    """Seconds for a request's body to arrive (408 after), for its pictures to be decoded, and for its answer (503 after
    each)."""
    resize: bool = False
    """Convert images of other sizes and colours to those of the classifier; false refuses them."""
    watch: bool = True
    """Report for each input whether it belongs to a known failure scenario. Without it the failure probability follows
    from the classifier's outputs alone."""
    watch_share: float = Field(0.001, gt=0, le=0.5)
    """An input belongs to a scenario if it is nearer to it than all but this share of the training images."""
    failure_threshold: float | None = Field(None, gt=0, lt=1)
    """Failure probability from which on an input is flagged. null: the largest at which failure_recall of the wrong
    answers on validation images are flagged."""
    failure_recall: float = Field(0.8, gt=0, le=1)
    """Share of the wrong answers on validation images to flag, where failure_threshold is null."""
    reservoir: int = Field(0, ge=0, le=1000)
    """Inputs stored per scenario, and of flagged ones outside all: a random sample of those that replicas received
    since their start, in which an input is the more likely the higher its failure probability. 0: none."""
    max_errors: float = Field(0.02, ge=0, le=1)
    """A canary or shadow is ended once its share of failed requests is significantly larger."""
    min_agreement: float = Field(0.95, ge=0, le=1)
    """A canary or shadow is ended once it agrees with production significantly less often, outside the scenarios."""
    min_compared: int = Field(50, ge=1)
    """Requests that a canary or shadow answers before it is judged."""
    max_canary_s: float = Field(1.0, gt=0, le=3600)
    """Most seconds that a canary may take after production has answered, and most processor time of a shadow, for a
    request. A later answer counts as a failure, and is not used."""

    @model_validator(mode="after")
    def _replicas_ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas = {self.min_replicas} exceeds max_replicas = {self.max_replicas}")
        return self


class RunFile(Section):
    """All settings of one run."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the run derives from it."""
    data: DataSection
    classifier: ClassifierSection = ClassifierSection()
    vae: VaeSection = VaeSection()
    identify: IdentifySection = IdentifySection()
    distill: DistillSection = DistillSection()
    review: ReviewSection = ReviewSection()
    judges: JudgesSection = JudgesSection()
    correct: CorrectSection = CorrectSection()
    report: ReportSection = ReportSection()
    resources: ResourcesSection = ResourcesSection()
    check: CheckSection = CheckSection()
    serve: ServeSection = ServeSection()

    def with_fields(self, section: str, **fields: Any) -> RunFile:
        """Return the run file with other values, which are not validated, of some fields of a section."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=fields)})

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        self._expect_stages_that_fit()
        self._expect_blocks_that_fit()
        for name, field, architecture in (
            ("classifier", "import_path", "custom"),
            ("classifier", "timm_model", "timm"),
            ("vae", "import_path", "custom"),
        ):
            section = getattr(self, name)
            if (section.architecture == architecture) != (getattr(section, field) is not None):
                raise ValueError(
                    f"{name}.{field} goes with {name}.architecture: {architecture}, and only with it"
                )
        if self.classifier.architecture in {"program", "transformers"} and self.classifier.weights is None:
            raise ValueError(
                f"classifier.architecture: {self.classifier.architecture} needs classifier.weights, its file or folder"
            )
        if self.classifier.imagenet and self.classifier.architecture != "resnet18":
            raise ValueError(
                "classifier.imagenet goes with classifier.architecture: resnet18, and only with it"
            )
        if self.classifier.epochs == 0 and self.classifier.weights is None:
            raise ValueError(
                "classifier.epochs = 0 uses a pretrained classifier, so classifier.weights must name its file"
            )
        if self.vae.epochs == 0 and self.vae.weights is None and self.vae.architecture != "custom":
            raise ValueError("vae.epochs = 0 uses a pretrained β-VAE, so vae.weights must name its file")
        if self.data.track_pattern is not None and self.data.name != "folder":
            raise ValueError("data.track_pattern goes with data.name: folder, and only with it")
        if self.data.name not in WITHOUT_ROOT and self.data.root is None:
            raise ValueError(
                f"data.root must be the path of the {self.data.name} images (--set data.root=PATH)"
            )
        return self

    def _expect_stages_that_fit(self) -> None:
        """Raise ValueError where a stride-2 stage would halve an odd number of pixels."""
        size, vae = self.data.image_size, self.vae
        stages = {"classifier.stages": self.classifier.stages if self.classifier.architecture == "cnn" else 0}
        if vae.architecture != "custom":
            stages["vae.encoder_stages"] = vae.encoder_stages
        if vae.architecture == "paper":
            stages["vae.decoder_stages"] = vae.decoder_stages
        for field, count in stages.items():
            if size % 2**count or size < 2**count:
                raise ValueError(
                    f"{field} = {count} halves {size} pixels (data.image_size) to a fraction of a pixel"
                )
        side = size >> vae.decoder_stages
        if vae.architecture == "paper" and vae.hidden % side**2:
            raise ValueError(
                f"vae.hidden = {vae.hidden} must be a multiple of {side}x{side}, the pixels that the decoder "
                f"starts from (data.image_size {size} halved vae.decoder_stages = {vae.decoder_stages} times)"
            )

        last = vae.channels << (vae.encoder_stages - 1)
        if vae.architecture == "convolutional" and last > MOST_CHANNELS:
            raise ValueError(
                f"vae.channels = {vae.channels} are {last} after vae.encoder_stages = {vae.encoder_stages}, "
                f"which double them; expected at most {MOST_CHANNELS}"
            )

    def _expect_blocks_that_fit(self) -> None:
        size, draws = self.identify.block_images, self.identify.draws
        if size * draws > MOST_DECODINGS:
            raise ValueError(
                f"identify.draws = {draws} of each of identify.block_images = {size} are in memory at once; "
                f"expected at most {MOST_DECODINGS:,} together: "
                f"set identify.block_images: {max(1, MOST_DECODINGS // draws)}"
            )


def model_sections(spec: RunFile) -> dict[str, ClassifierSection | VaeSection | ClassifierSet]:
    """Return the sections whose `weights` and `import_path` name files and code of the user, by their dotted names."""
    return {
        "classifier": spec.classifier,
        "vae": spec.vae,
        "review.reference": spec.review.reference,
        "judges": spec.judges,
    }


def with_absolute_root(spec: RunFile) -> RunFile:
    """Return the run file with data.root as it is in this process; later commands on the run have other folders.

    Raises RunFileError where the path has bytes that `run.yaml` cannot hold.
    """
    root = spec.data.root
    if root is None:
        return spec
    if has_control_characters(str(root.absolute())):
        raise RunFileError(
            f"data.root {root}: expected a path that is text without control characters, found "
            f"{str(root.absolute())!a}; rename that folder, or give data.root as an absolute path through a link to it"
        )
    return spec.with_fields("data", root=root.absolute())


def with_weights(spec: RunFile, paths: Mapping[str, Path]) -> RunFile:
    """Return the run file with the weights of some model_sections at other paths."""
    tree = spec.model_dump()
    for name, path in paths.items():
        section = tree
        for part in name.split("."):
            section = section[part]
        section["weights"] = path
    return RunFile.model_validate(tree)
