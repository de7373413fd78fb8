"""Algorithm 1: perturb training images in latent space and keep the codes whose decoding the classifier gets wrong.

The unit of work is a block of consecutive training images. Its noise is seeded by (seed, block) and its batches are cut
at fixed places, so whoever computes a block, whenever and beside whatever else, finds the same codes.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from defuse_core.artifacts import (
    F32,
    I64,
    Bool,
    Failures,
    Models,
    Psi,
    Shard,
)
from defuse_core.codec import encode
from defuse_core.config import IdentifySection, RunFile
from defuse_core.data import reopen_splits
from defuse_core.device import cpu_threads, device
from defuse_core.models import decode_codes, encode_images, load_classifier, load_vae, map_batches, predict
from defuse_core.seeds import generator
from defuse_core.store import Store

MAX_SHARDS = 512  # the store then holds so many objects at most, however many images there are


def blocks_per_shard(images: int, block_images: int) -> int:
    """Return how many consecutive blocks make a shard: one object in the store."""
    blocks = -(-images // block_images)
    return max(1, -(-blocks // MAX_SHARDS))


def shard_count(images: int, block_images: int) -> int:
    """Return G, the number of shards of a training set."""
    blocks = -(-images // block_images)
    return -(-blocks // blocks_per_shard(images, block_images))


def beta_noise(section: IdentifySection, shape: tuple[int, ...], rng: np.random.Generator) -> F32:
    """Return ε of Algorithm 1, line 5, scaled and, if the run file says so, centred at 0."""
    noise = rng.beta(section.a, section.b, size=shape)
    if section.center:
        noise -= section.a / (section.a + section.b)
    return (section.scale * noise).astype(np.float32)


def nearest_failures(failed: Bool, distance: F32, cap: int | None) -> Bool:
    """Return `failed` (n, Q) with at most `cap` draws per image left, those nearest to mu; ties go to the earlier."""
    if cap is None or cap >= failed.shape[1]:
        return failed
    order = np.argsort(np.where(failed, distance, np.inf), axis=1, kind="stable")
    kept = np.zeros_like(failed)
    np.put_along_axis(kept, order[:, :cap], True, axis=1)
    return kept & failed


class Identifier:
    """One worker: holds the models and the training set, and identifies shard after shard of it."""

    def __init__(self, spec: RunFile, models: Models) -> None:
        """Open both. Raises DataError, ModelError, or RunMismatchError where the images are not those trained on."""
        self.spec, self.train = spec, reopen_splits(spec.data, spec.seed, models.data_fingerprint).train
        self.classifier = load_classifier(spec, models.classifier, len(models.classes))
        self.vae = load_vae(spec, models.vae)

    def shard(self, index: int) -> Shard:
        """Return Ψ of shard `index`, on one CPU thread or this process's GPU."""
        started = time.perf_counter()
        section = self.spec.identify
        size = blocks_per_shard(len(self.train), section.block_images)
        last = -(-len(self.train) // section.block_images)
        with cpu_threads(1):
            found = [self._block(block) for block in range(index * size, min((index + 1) * size, last))]
        return _join(found, time.perf_counter() - started)

    def _block(self, block: int) -> Shard:
        """Algorithm 1 for every image of one block at once."""
        section = self.spec.identify
        start = block * section.block_images
        rows = np.arange(start, min(start + section.block_images, len(self.train)))
        truth = self.train.labels[rows]
        mu = encode_images(self.vae, self.train.batch(rows), section.batch_size)  # (n, Z)
        flips = (
            predict(self.classifier, decode_codes(self.vae, mu, section.batch_size), section.batch_size)
            != truth
        )

        shape = (len(rows), section.draws, mu.shape[1])
        noise = beta_noise(section, shape, generator(self.spec.seed, "identify", block))
        codes = mu[:, None, :] + noise  # (n, Q, Z)
        predicted = self._classify(codes.reshape(-1, shape[2])).reshape(shape[:2])  # (n, Q)

        failed = predicted != truth[:, None]
        kept = nearest_failures(failed, np.linalg.norm(noise, axis=2), section.max_per_image)
        image, _ = np.nonzero(kept)
        return Shard(
            failures=Failures(codes[kept], rows[image], truth[image], predicted[kept]),
            images=len(rows),
            decodings=predicted.size,
            images_with_any=int(failed.any(axis=1).sum()),
            zero_noise_flips=int(flips.sum()),
            seconds=0.0,
        )

    def _classify(self, codes: F32) -> I64:
        """Decode and classify (n, Z) codes in large batches: f(p(z)), (n,)."""

        def answers(rows: slice) -> torch.Tensor:
            logits: torch.Tensor = self.classifier(
                self.vae.decode(torch.from_numpy(codes[rows]).to(device()))
            )
            return logits.argmax(dim=1)

        return map_batches(answers, len(codes), self.spec.identify.batch_size)


def _join(shards: list[Shard], seconds: float) -> Shard:
    parts = [shard.failures for shard in shards]
    failures = Failures(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.predicted for part in parts]),
    )
    return Shard(
        failures=failures,
        images=sum(shard.images for shard in shards),
        decodings=sum(shard.decodings for shard in shards),
        images_with_any=sum(shard.images_with_any for shard in shards),
        zero_noise_flips=sum(shard.zero_noise_flips for shard in shards),
        seconds=seconds,
    )


@dataclass(frozen=True)
class ShardRecord:
    """What is told of a finished shard; its presence in the store says that the shard is there, whole."""

    index: int
    codes: int
    images: int
    decodings: int
    images_with_any: int
    zero_noise_flips: int
    seconds: float


def shard_key(index: int) -> str:
    """Return where the codes of a shard lie in the run's store."""
    return f"psi/{index:06d}.safetensors"


def save_shard(store: Store, index: int, shard: Shard) -> ShardRecord:
    """Write a shard, then the record that marks it as done, and return the record."""
    store.write(shard_key(index), encode(shard))
    record = ShardRecord(
        index,
        len(shard.failures),
        shard.images,
        shard.decodings,
        shard.images_with_any,
        shard.zero_noise_flips,
        shard.seconds,
    )
    store.write(f"psi/{index:06d}.json", json.dumps(asdict(record)).encode())
    return record


def finished_shards(store: Store) -> dict[int, ShardRecord]:
    """Return the records of the shards that are done."""
    keys = [key for key in store.list("psi/") if key.endswith(".json")]
    records = (ShardRecord(**json.loads(store.read(key))) for key in keys)
    return {record.index: record for record in records}


def gather_shards(records: dict[int, ShardRecord]) -> Psi:
    """Return the record of all shards together. The codes stay where they are."""
    done = [records[index] for index in sorted(records)]
    return Psi(
        codes=np.array([record.codes for record in done], np.int64),
        images=sum(record.images for record in done),
        decodings=sum(record.decodings for record in done),
        images_with_any=sum(record.images_with_any for record in done),
        zero_noise_flips=sum(record.zero_noise_flips for record in done),
        worker_seconds=sum(record.seconds for record in done),
    )
