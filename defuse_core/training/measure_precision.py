"""`resources.precision: auto`: measure, once per run, where bf16 is faster than f32."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import MeasuredPrecision
from defuse_core.config import Arithmetic, PrecisionSection, RunFile
from defuse_core.data import open_splits
from defuse_core.device import cpu_threads, device
from defuse_core.models import build_classifier, build_vae, kl_to_prior, to_device, to_tensor
from defuse_core.progress import Progress
from defuse_core.protocols import Compute
from defuse_core.runs import Run
from defuse_core.seeds import torch_seed
from defuse_core.training.precision import autocast
from defuse_core.training.reference_models import build_reference

log = logging.getLogger("defuse")
STEP_IMAGES = 32  # of a measured step
MIN_STEPS, MAX_STEPS = 2, 10  # measured in each format, of which the fastest counts
FORMATS: tuple[Arithmetic, ...] = ("f32", "bf16")
ENOUGH_S = 0.3  # of measuring one kind
MIN_GAIN = 1.1  # bf16 is chosen from this ratio of times on: it costs some accuracy of the weights


def settle_precision(run: Run, compute: Compute) -> None:
    """Put what is measured in the place of resources.precision: auto in the run's settings.

    The choice is stored with the run, so that a run which is resumed on another machine keeps it.
    """
    if run.spec.resources.precision == "auto":
        measured = run.once(
            "train", MeasuredPrecision, lambda: compute.task("train", measure_precision, run.spec)
        )
        run.spec = with_precision(run.spec, measured)


def measure_precision(spec: RunFile, *, progress: Progress) -> MeasuredPrecision:
    """Return whether f32 or bf16 is faster for each kind of computation of the run, on this device."""
    classes = len(open_splits(spec.data, spec.seed).classes)  # first: an error of the images is said at once
    progress("measuring where bf16 is faster", 0, 1, "kinds")
    with cpu_threads(spec.resources.train_threads), torch.random.fork_rng():
        torch.manual_seed(torch_seed(spec.seed, "precision"))
        steps = _steps(spec, classes)
        seconds = {kind: _seconds(step) for kind, step in steps.items()}
    chosen = {kind: "bf16" if f32 > MIN_GAIN * bf16 else "f32" for kind, (f32, bf16) in seconds.items()}
    ratios = ", ".join(f"{kind} {_ratio(*pair)}" for kind, pair in seconds.items())
    log.info("precision: bf16 against f32, times as fast: %s", ratios)
    return MeasuredPrecision(chosen)


def _ratio(f32: float, bf16: float) -> str:
    return "bf16 not possible" if math.isinf(bf16) else f"{f32 / bf16:.2f}"


def with_precision(spec: RunFile, measured: MeasuredPrecision) -> RunFile:
    """Return the run file with what was measured in the place of resources.precision: auto."""
    return spec.with_fields("resources", precision=PrecisionSection.model_validate(measured.chosen))


def _steps(spec: RunFile, classes: int) -> dict[str, Callable[[Arithmetic], None]]:
    """Return a step of each kind of computation, which takes the number format."""
    shape = (STEP_IMAGES, spec.data.channels, spec.data.image_size, spec.data.image_size)
    images = to_tensor(torch.rand(shape).numpy())
    labels = torch.randint(0, classes, (STEP_IMAGES,), device=device())
    plain = spec.with_fields("classifier", imagenet=False)
    classifier, vae = to_device(build_classifier(plain, classes)), build_vae(spec)
    to_device(vae)

    def training(model: nn.Module) -> Callable[[Arithmetic], None]:
        def step(arithmetic: Arithmetic) -> None:
            with autocast(arithmetic):
                logits = model(images)
            _backward(model, F.cross_entropy(logits.float(), labels))

        return step

    def vae_step(arithmetic: Arithmetic) -> None:
        with autocast(arithmetic):
            mu, log_variance = vae.encode(images)
            logits = vae.decode_logits(mu)
        loss = F.binary_cross_entropy_with_logits(logits.float(), images)
        _backward(vae, loss + kl_to_prior(mu.float(), log_variance.float()).mean())

    def answers(arithmetic: Arithmetic) -> None:
        with torch.inference_mode(), autocast(arithmetic):
            codes = torch.zeros(STEP_IMAGES, spec.vae.latent_dim, device=device())
            classifier(vae.decode(codes)).argmax(dim=1).cpu()

    steps = {"classifier": training(classifier), "vae": vae_step, "answers": answers}
    sets = {"reference": spec.review.reference, "judges": spec.judges}
    for kind, section in sets.items():
        if section.count and section.epochs:
            steps[kind] = training(to_device(build_reference(spec, section, classes)))
    return steps


def _backward(model: nn.Module, loss: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def _seconds(step: Callable[[Arithmetic], None]) -> tuple[float, float]:
    """Return the least seconds of a step in f32 and in bf16; inf where a model cannot be computed with in bf16."""
    # on a CPU the time of this process, whatever else the machine computes
    clock = time.perf_counter if device().type == "cuda" else time.process_time
    least = dict.fromkeys(FORMATS, math.inf)
    possible = list(FORMATS)
    started = time.perf_counter()
    for number in range(1 + MAX_STEPS):  # in turns; the first one compiles and allocates
        for arithmetic in tuple(possible):
            begun = clock()
            try:
                step(arithmetic)
            except RuntimeError:
                if arithmetic == "f32":
                    raise
                possible.remove(arithmetic)
                least[arithmetic] = math.inf
                continue
            if device().type == "cuda":
                torch.cuda.synchronize()
            if number:
                least[arithmetic] = min(least[arithmetic], clock() - begun)
        if number >= MIN_STEPS and time.perf_counter() - started > ENOUGH_S:
            break
    return least["f32"], least["bf16"]
