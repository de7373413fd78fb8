"""A training step of each model in f32 and in bf16, and of several classifiers one by one and stacked.

    python tests/bench/training.py --run-file deploy/runs/demo.yaml [--compile]

With --compile it compares steps of torch.compile with plain ones instead, and prints the seconds of compilation, which
each new process pays again or reads from a cache.

CPU seconds of one thread, both ways in turns in one process, so quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from defuse_core.config import Arithmetic, RunFile, load_run_file
from defuse_core.device import cpu_threads
from defuse_core.models import build_classifier, build_vae, to_device, to_tensor
from defuse_core.training.loop import Adam, train_step
from defuse_core.training.precision import autocast
from defuse_core.training.reference_models import build_reference
from defuse_core.training.train_vae import vae_terms

CLASSES = 10
ROUNDS = 7
Step = Callable[[Arithmetic], None]


def made_up(spec: RunFile, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` random images with labels."""
    shape = (count, spec.data.channels, spec.data.image_size, spec.data.image_size)
    return to_tensor(torch.rand(shape).numpy()), torch.randint(0, CLASSES, (count,))


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
    images, _ = made_up(spec, spec.vae.batch_size)
    vae, drawn = build_vae(spec), torch.randn(spec.vae.batch_size, spec.vae.latent_dim)
    to_device(vae).train()

    def loss(arithmetic: Arithmetic) -> Tensor:
        terms = vae_terms(vae, images, drawn.to(images.device), arithmetic)
        return terms.reconstruction + terms.divergence

    return optimized(vae.parameters(), loss)


def stacked(spec: RunFile, count: int) -> Step:
    """Return a training step of `count` classifiers at once, with stacked weights (torch.func)."""
    images, labels = made_up(spec, 2 * spec.correct.batch_size)
    models = [build_classifier(spec, CLASSES) for _ in range(count)]
    parameters, _ = stack_module_state(models)
    weights: dict[str, Tensor] = {
        name: nn.Parameter(tensor.detach().clone()) for name, tensor in parameters.items()
    }

    def one(given: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(models[0], given, (images,)).float(), labels)

    def loss(arithmetic: Arithmetic) -> Tensor:
        with autocast(arithmetic):
            return vmap(one)(weights).sum()

    return optimized(weights.values(), loss)


def seconds(step: Callable[[], None]) -> float:
    """Return the CPU seconds of one call."""
    started = time.process_time()
    step()
    return time.process_time() - started


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
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    spec = load_run_file(given.run_file)
    torch.manual_seed(0)
    if given.compile:
        with cpu_threads(1):
            print(json.dumps(compiled(spec)), flush=True)
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
        alone, together = steps["fine-tuning"], stacked(spec, given.stack)
        for arithmetic in ("f32", "bf16"):
            one, all_of, ratio = in_turns(lambda a=arithmetic: alone(a), lambda a=arithmetic: together(a))
            found[f"stack of {given.stack}, {arithmetic}"] = {
                "separate_ms": round(1e3 * given.stack * one, 1),
                "stacked_ms": round(1e3 * all_of, 1),
                "ratio": round(given.stack * ratio, 2),
            }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
