"""How fast this machine does each kind of work of a run, measured in a few seconds."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.data.images import evenly_spaced
from defuse_core.device import device, usable_cpus
from defuse_core.models import ReferenceCnn, build_vae, decode_codes, predict, to_device, to_tensor
from defuse_core.protocols import Progress

TRIAL_S = 0.5  # each speed is measured for so long
TRIAL_BATCH = 64
READ_FILES = 64  # files whose reading is timed
IMAGES_AHEAD = 2 * 256  # most images that a process of resources.readers reads ahead: two batches


@dataclass(frozen=True)
class Speeds:
    """Images per second of each kind of work, on this machine."""

    vae: float  # training the β-VAE
    decode: float  # decoding a code and classifying the decoding
    classifier: float  # training the classifier
    reference: float  # training one reference model
    read: float = math.inf  # reading image files that stay on disk

    def up_to(self, read: float) -> Speeds:
        """Return the speeds where so many training images per second are read; a decoding needs few of them."""
        vae, classifier, reference = (min(read, own) for own in (self.vae, self.classifier, self.reference))
        return replace(self, vae=vae, classifier=classifier, reference=reference)


def measure_speeds(
    spec: RunFile, classifier: nn.Module, sample: Images, channels: int, progress: Progress
) -> Speeds:
    """Measure each kind of work for a moment, with reference models of so many channels."""
    to_device(vae := build_vae(spec))
    reference = to_device(ReferenceCnn(spec.data.image_size, spec.data.channels, channels, 100))
    batch = to_tensor(sample.batch(np.arange(TRIAL_BATCH) % len(sample)))
    labels = torch.zeros(TRIAL_BATCH, dtype=torch.long, device=device())
    codes = np.zeros((TRIAL_BATCH, spec.vae.latent_dim), np.float32)
    works: dict[str, Callable[[], object]] = {
        "vae": _step(vae, lambda: vae.decode(vae.encode(batch)[0]).sum()),
        "decode": lambda: predict(classifier.eval(), decode_codes(vae, codes)),
        "classifier": _step(classifier, lambda: F.cross_entropy(classifier.train()(batch), labels)),
        "reference": _step(reference, lambda: F.cross_entropy(reference(batch), labels)),
    }
    rates = {}
    for done, (name, work) in enumerate(works.items(), start=1):
        rates[name] = _rate(work)
        progress("measuring speeds", done, len(works), "speeds")
    return Speeds(**rates)


def _step(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return one training step with a learning rate of 0, which changes no weight."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _rate(work: Callable[[], object]) -> float:
    """Return images per second of work on batches of TRIAL_BATCH; the first batch does not count."""
    work()
    started, batches = time.monotonic(), 0
    while time.monotonic() - started < TRIAL_S:
        work()
        batches += 1
    if device().type == "cuda":
        torch.cuda.synchronize()
    return batches * TRIAL_BATCH / (time.monotonic() - started)


def plan_reading(images: Images, needed: float) -> tuple[int, float]:
    """Return the resources.readers of these images, and how many images per second they read.

    0 and inf of images that are kept in memory. `needed` images per second are used at most.
    """
    if not images.stays_on_disk:
        return 0, math.inf
    some = images.take(evenly_spaced(len(images), READ_FILES))
    started = time.monotonic()
    some.batch()
    rate = len(some) / (time.monotonic() - started)
    readers = min(math.ceil(needed / rate), usable_cpus() - 1, _room_for_readers(images))
    return readers, rate * max(1, readers)


def _room_for_readers(images: Images) -> int:
    """Return for how many processes' batches half of the shared memory suffices: of a container it may be 64 MiB."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.exists() else sys.maxsize
    return free // (2 * 4 * IMAGES_AHEAD * math.prod(images.pixels.shape[1:]))
