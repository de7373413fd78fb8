"""Computing in bf16, and answers that equal those of f32 all the same; `resources.precision: auto` measures, once per
run, where bf16 is faster.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import F32, I64, Bool, MeasuredPrecision
from defuse_core.config import Arithmetic, PrecisionSection, ResourcesSection, RunFile
from defuse_core.data import Images, open_splits
from defuse_core.data.images import evenly_spaced
from defuse_core.device import autocast, cpu_threads, device, forked_random
from defuse_core.models import (
    answers_from,
    build_classifier,
    build_vae,
    kl_to_prior,
    logits_of,
    map_batches,
    map_images,
    predict,
    to_device,
    to_tensor,
)
from defuse_core.protocols import Compute, Progress
from defuse_core.runs import Run
from defuse_core.seeds import torch_seed
from defuse_core.training.reference_models import build_reference

log = logging.getLogger("defuse")
MEASURED_INPUTS = 512  # inputs on which the error of bf16 is measured
SAFETY = 2.0  # factor on the largest error that was seen
WORTHWHILE = 2048  # inputs from which on measuring the error pays


def margin_bound(logits: Callable[[I64], Tensor], count: int) -> float:
    """Return the margin between the two largest logits below which an answer in bf16 may differ from that in f32.

    It is SAFETY times the largest error of that margin on at most MEASURED_INPUTS of the `count` inputs, evenly spaced.
    """
    rows = evenly_spaced(count, MEASURED_INPUTS)
    with torch.no_grad():  # as in map_batches
        exact = logits(rows).float()
        with autocast("bf16"):
            fast = logits(rows).float()
    if fast.shape[1] < 2:
        return 0.0
    first, second = fast.topk(2, dim=1).indices.unbind(1)
    errors = _difference(fast, first, second) - _difference(exact, first, second)
    return SAFETY * float(errors.abs().max())


def _difference(logits: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return logits[i, first[i]] - logits[i, second[i]], (n,)."""
    return (logits.gather(1, first[:, None]) - logits.gather(1, second[:, None]))[:, 0]


def answers_as_in_f32(logits: Callable[[I64], Tensor], count: int, batch_size: int, bound: float) -> I64:
    """Return the largest logit's index for each of `count` inputs, (count,): in bf16, and again in f32 where in doubt.

    `logits(rows)` computes (n, C) for rows of the inputs, in f32 where no autocast is on. `bound` is margin_bound's.
    """
    with autocast("bf16"):
        table = map_batches(
            lambda rows: _with_margins(logits(np.arange(rows.start, rows.stop))), count, batch_size
        )
    found, doubtful = _in_doubt(table, bound)
    found[doubtful] = answers_from(lambda rows: logits(doubtful[rows]), len(doubtful), batch_size)
    return found


def _with_margins(logits: Tensor) -> Tensor:
    """(n, C) -> answers and the margins of their logits, (n, 2)."""
    found = logits.float()
    largest = found.sort(dim=1, descending=True).values[:, :2]
    margin = largest[:, 0] - largest[:, -1]  # 0 for a single class, as its bound is
    return torch.stack([found.argmax(dim=1).float(), margin], dim=1)


def _in_doubt(table: F32, bound: float) -> tuple[I64, I64]:
    """Return the answers of `_with_margins`, (n,), and the rows of those in doubt."""
    # where either is nan as well
    return table[:, 0].astype(np.int64), np.flatnonzero(~(table[:, 1] >= bound))


def right_by_part(
    classifier: nn.Module, parts: Mapping[str, Images], resources: ResourcesSection
) -> dict[str, Bool]:
    """Return which images of each part the classifier gets right, (N,): those of f32, in either arithmetic."""
    arithmetic, readers = resources.arithmetic("answers"), resources.readers
    return {
        part: predict_as_in_f32(classifier, images, arithmetic, readers) == images.labels
        for part, images in parts.items()
    }


def predict_as_in_f32(classifier: nn.Module, images: Images, arithmetic: Arithmetic, readers: int = 0) -> I64:
    """Return the classifier's answer to each image, (N,): that of f32, in either arithmetic."""
    if arithmetic == "f32" or len(images) < WORTHWHILE:
        return predict(classifier, images, readers=readers)
    bound = margin_bound(logits_of(classifier, images), len(images))
    with autocast("bf16"):
        table = map_images(lambda batch: _with_margins(classifier(batch)), images, readers=readers)
    found, doubtful = _in_doubt(table, bound)
    found[doubtful] = predict(classifier, images.take(doubtful), readers=readers)
    return found


STEP_IMAGES = 32  # images of a measured step on a CPU
MIN_STEPS, MAX_STEPS = 2, 10  # measured in each format, of which the fastest counts
FORMATS: tuple[Arithmetic, ...] = ("f32", "bf16")
ENOUGH_S = 0.3  # time to measure one format
MIN_GAIN = 1.1  # bf16 is chosen from this ratio of times on: it costs some accuracy of the weights


def resolve_precision(run: Run, compute: Compute) -> None:
    """Put what is measured in the place of resources.precision: auto in the run's settings.

    The choice is stored with the run, so that a run which is resumed on another machine keeps it.
    """
    if run.spec.resources.precision == "auto":
        measured = run.once(
            "train", MeasuredPrecision, lambda: compute.task("train", measure_precision, run.spec)
        )
        chosen = PrecisionSection.model_validate(measured.chosen)
        run.spec = run.spec.with_fields("resources", precision=chosen)


def measure_precision(spec: RunFile, *, progress: Progress) -> MeasuredPrecision:
    """Return whether f32 or bf16 is faster for each kind of computation of the run, on this device."""
    splits = open_splits(spec.data, spec.seed)  # first: an error of the images is said at once
    progress("measuring where bf16 is faster")
    with cpu_threads(spec.resources.train_threads), forked_random():
        torch.manual_seed(torch_seed(spec.seed, "precision"))
        steps = _steps(spec, len(splits.classes), len(splits.train))
        seconds = {kind: _seconds(step) for kind, step in steps.items()}
    chosen = {kind: "bf16" if f32 > MIN_GAIN * bf16 else "f32" for kind, (f32, bf16) in seconds.items()}
    ratios = ", ".join(f"{kind} {_ratio(*pair)}" for kind, pair in seconds.items())
    log.info("precision: bf16 against f32, times as fast: %s", ratios)
    return MeasuredPrecision(chosen)


def _ratio(f32: float, bf16: float) -> str:
    return "bf16 not possible" if math.isinf(bf16) else f"{f32 / bf16:.2f}"


def _steps(spec: RunFile, classes: int, count: int) -> dict[str, Callable[[Arithmetic], None]]:
    """Return a step of each kind of computation, which takes the number format; `count` is that of training images."""
    plain = spec.with_fields("classifier", imagenet=False)
    classifier, vae = to_device(build_classifier(plain, classes), spec.data), build_vae(spec)
    to_device(vae, spec.data)

    def training(model: nn.Module, batch_size: int) -> Callable[[Arithmetic], None]:
        images = _step_images(spec, min(batch_size, count))
        labels = torch.randint(0, classes, (len(images),), device=images.device)

        def step(arithmetic: Arithmetic) -> None:
            with autocast(arithmetic):
                logits = model(images)
            _backward(model, F.cross_entropy(logits.float(), labels))

        return step

    encoded = _step_images(spec, min(spec.vae.batch_size, count))

    def vae_step(arithmetic: Arithmetic) -> None:
        with autocast(arithmetic):
            mu, log_variance = vae.encode(encoded)
            logits = vae.decode_logits(mu)
        loss = F.binary_cross_entropy_with_logits(logits.float(), encoded)
        _backward(vae, loss + kl_to_prior(mu.float(), log_variance.float()).mean())

    codes = torch.zeros(_step_size(spec.identify.batch_size), spec.vae.latent_dim, device=encoded.device)

    def answers(arithmetic: Arithmetic) -> None:
        with torch.no_grad(), autocast(arithmetic):
            classifier(vae.decode(codes)).argmax(dim=1).cpu()

    steps = {
        "classifier": training(classifier, spec.classifier.batch_size),
        "vae": vae_step,
        "answers": answers,
    }
    sets = {"reference": spec.review.reference, "judges": spec.judges}
    for kind, section in sets.items():
        if section.count and section.epochs:
            model = to_device(build_reference(spec, section, classes), spec.data)
            steps[kind] = training(model, section.batch_size)
    return steps


def _step_images(spec: RunFile, batch_size: int) -> Tensor:
    """Return images of noise for a step of `batch_size`."""
    side = spec.data.image_size
    return to_tensor(torch.rand((_step_size(batch_size), spec.data.channels, side, side)).numpy())


def _step_size(batch_size: int) -> int:
    """Return how many images a measured step has: on a GPU the run's, as few take only the time to launch kernels."""
    return STEP_IMAGES if device().type == "cpu" else batch_size


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
