"""A training step of each model in f32 and in bf16, and fine-tuning with several λ one by one and stacked.

    python tests/bench/training.py --run-file deploy/runs/demo.yaml [--stack 4] [--only-stack] [--compile]

With --compile it compares steps of torch.compile with plain ones instead, and prints the seconds of compilation, which
each new process pays again or reads from a cache.

Both ways in turns in one process, so quote the ratios: CPU seconds of one thread, or seconds of the clock on a GPU. Of
a stack it prints the largest difference of any weight, too, after one epoch with made-up images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import Models, Trial
from defuse_core.config import Arithmetic, RunFile, load_run_file
from defuse_core.correct import FineTuning
from defuse_core.data import Images, Splits
from defuse_core.device import autocast, cpu_threads, device
from defuse_core.models import build_classifier, build_vae, to_device, to_tensor, weights_of
from defuse_core.store import FolderStore
from defuse_core.training import Adam, train_step
from defuse_core.training.reference_models import build_reference
from defuse_core.training.train_vae import vae_loss
from defuse_core.trials import run_stack
from defuse_core.tuning_data import FineTuningData, ScenarioImages
from tests.sample_components import FIT

CLASSES = 10
ROUNDS = 7
TUNED_ON = 512  # images of D, and of D_f
Step = Callable[[Arithmetic], None]


def made_up(spec: RunFile, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` random images with labels."""
    shape = (count, spec.data.channels, spec.data.image_size, spec.data.image_size)
    return to_tensor(torch.rand(shape).numpy()), torch.randint(0, CLASSES, (count,)).to(device())


def optimized(parameters: Iterable[Tensor], loss_of: Callable[[Arithmetic], Tensor]) -> Step:
    """Return a training step with Adam."""
    optimizer = Adam(parameters, lr=1e-4)

    def step(arithmetic: Arithmetic) -> None:
        train_step(loss_of(arithmetic), optimizer)

    return step


def classifying(model: nn.Module, spec: RunFile, batch_size: int) -> Step:
    """Return a training step of a classifier."""
    images, labels = made_up(spec, batch_size)
    model = to_device(model).train()

    def loss(arithmetic: Arithmetic) -> Tensor:
        with autocast(arithmetic):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    return optimized(model.parameters(), loss)


def reconstructing(spec: RunFile) -> Step:
    """Return a training step of the β-VAE."""
    images, labels = made_up(spec, spec.vae.batch_size)
    vae, drawn = build_vae(spec), torch.randn(spec.vae.batch_size, spec.vae.latent_dim)
    to_device(vae).train()
    specs = {each: spec.with_fields("resources", precision=each) for each in get_args(Arithmetic)}

    def loss(arithmetic: Arithmetic) -> Tensor:
        return vae_loss(specs[arithmetic], vae, None, images, labels, drawn.to(images.device), 1.0).total

    return optimized(vae.parameters(), loss)


def learnable(spec: RunFile, count: int, seed: int) -> Images:
    """Return `count` noisy images of CLASSES made-up patterns, with their labels."""
    rng = np.random.default_rng(seed)
    shape = spec.data.channels, spec.data.image_size, spec.data.image_size
    patterns = np.random.default_rng(0).random((CLASSES, *shape), np.float32)
    labels = rng.integers(0, CLASSES, count)
    noise = rng.random((count, *shape), np.float32)
    return Images((0.5 * (patterns[labels] + noise)).astype(np.float32), labels)


def stacked(spec: RunFile, count: int, arithmetic: Arithmetic) -> dict[str, float]:
    """Return the seconds of fine-tuning with `count` λ one by one and stacked, and by how much their weights differ."""
    spec = spec.with_fields("resources", precision=arithmetic)
    spec = spec.with_fields("correct", lambdas=tuple(np.geomspace(0.1, 10, count).tolist()), epochs=1)
    names = tuple(map(str, range(CLASSES)))
    weights = weights_of(build_classifier(spec, CLASSES))
    accuracy, fit = {"train": 0.0}, (0.0, 0.0, np.zeros(1), FIT)
    models = Models(weights, {}, names, {}, "", accuracy, (), (), *fit, class_images={})
    clean, held_out = learnable(spec, TUNED_ON, 1), learnable(spec, CLASSES, 3)
    scenes = ScenarioImages(learnable(spec, TUNED_ON, 2), CLASSES, held_out)
    data = FineTuningData(Splits(clean, None, None, names), scenes, {})
    made: list[dict[float, Trial]] = [{}, {}]

    def run(place: int, stacks: list[tuple[float, ...]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for lams in stacks:
                for lam, trial in run_stack(FineTuning(spec, models, data), lams, FolderStore(Path(folder))):
                    assert isinstance(trial, Trial)
                    made[place][lam] = trial

    lams = spec.correct.lambdas
    alone, together, ratio = in_turns(lambda: run(0, [(lam,) for lam in lams]), lambda: run(1, [lams]))
    differences = [
        float(np.abs(made[0][lam].best[name] - array).max())
        for lam in lams
        for name, array in made[1][lam].best.items()
    ]
    return {
        "separate_s": round(alone, 2),
        "stacked_s": round(together, 2),
        "ratio": round(ratio, 2),
        "largest_difference": float(f"{max(differences):.1e}"),
    }


def seconds(step: Callable[[], None]) -> float:
    """Return the seconds of one call: of this process's CPU, or of the clock where a GPU computes."""
    on_gpu = device().type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    started = clock()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started


def in_turns(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float, float]:
    """Return the median seconds of each, and of their ratio within a round."""
    rounds = [(seconds(first), seconds(second)) for _ in range(ROUNDS + 2)][2:]
    ones, others = zip(*rounds, strict=True)
    return (
        statistics.median(ones),
        statistics.median(others),
        statistics.median(one / other for one, other in rounds),
    )


def compiled(spec: RunFile) -> dict[str, dict[str, float]]:
    """Return, for classifiers, steps of torch.compile against plain ones, and the seconds of its compilation."""
    reference = spec.review.reference
    models = {
        "classifier": (lambda: build_classifier(spec, CLASSES), spec.classifier.batch_size),
        "reference": (lambda: build_reference(spec, reference, CLASSES), reference.batch_size),
        "fine-tuning": (lambda: build_classifier(spec, CLASSES), 2 * spec.correct.batch_size),
    }
    found = {}
    for name, (build, batch_size) in models.items():
        plain = classifying(build(), spec, batch_size)
        started = time.monotonic()
        fast = classifying(torch.compile(build()), spec, batch_size)  # type: ignore[arg-type]
        fast("f32")
        spent = time.monotonic() - started
        one, other, ratio = in_turns(lambda step=plain: step("f32"), lambda step=fast: step("f32"))
        found[name] = {
            "plain_ms": round(1e3 * one, 1),
            "compiled_ms": round(1e3 * other, 1),
            "ratio": round(ratio, 2),
            "compilation_s": round(spent, 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-file", type=Path, default=Path(__file__).parents[2] / "deploy/runs/demo.yaml")
    parser.add_argument("--stack", type=int, default=4)
    parser.add_argument("--only-stack", action="store_true")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    spec = load_run_file(given.run_file)
    torch.manual_seed(0)
    if given.compile:
        with cpu_threads(1):
            print(json.dumps(compiled(spec)), flush=True)
        return
    arithmetics: tuple[Arithmetic, ...] = ("f32", "bf16")
    stacks = {f"stack of {given.stack}, {each}": stacked(spec, given.stack, each) for each in arithmetics}
    if given.only_stack:
        print(json.dumps(stacks), flush=True)
        return
    found = {}
    with cpu_threads(1):
        steps = {
            "classifier": classifying(build_classifier(spec, CLASSES), spec, spec.classifier.batch_size),
            "vae": reconstructing(spec),
            "reference": classifying(
                build_reference(spec, spec.review.reference, CLASSES), spec, spec.review.reference.batch_size
            ),
            "judges": classifying(build_reference(spec, spec.judges, CLASSES), spec, spec.judges.batch_size),
            "fine-tuning": classifying(build_classifier(spec, CLASSES), spec, 2 * spec.correct.batch_size),
        }
        for name, step in steps.items():
            f32, bf16, ratio = in_turns(lambda step=step: step("f32"), lambda step=step: step("bf16"))
            found[name] = {
                "f32_ms": round(1e3 * f32, 1),
                "bf16_ms": round(1e3 * bf16, 1),
                "ratio": round(ratio, 2),
            }
    print(json.dumps(found | stacks), flush=True)


if __name__ == "__main__":
    main()
