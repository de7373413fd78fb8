"""Algorithm 1: perturb training images in latent space and keep the codes whose decoding the classifier gets wrong, Ψ;
and Ψ as it is read from the store, shard by shard or as a sample of all.

The unit of work is a block of consecutive training images. Its noise is seeded by (seed, block) and its batches have
fixed boundaries, so a block gives the same codes on any worker, in any order.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from defuse_core.artifacts import F32, I64, SAMPLE_INDEX, Bool, Failures, Models, Psi, ReferenceSet, Shard
from defuse_core.codec import artefact_digest, decode, encode
from defuse_core.config import IdentifySection, RunFile
from defuse_core.data import Images, reopen_splits
from defuse_core.data.images import evenly_spaced
from defuse_core.data.splits import is_perturbed
from defuse_core.device import cpu_threads, device
from defuse_core.errors import DamagedError, StoreError
from defuse_core.files import map_ahead
from defuse_core.formatting import count_of
from defuse_core.models import (
    Decoder,
    Vae,
    answers_from,
    decoder_at,
    load_classifier,
    load_vae,
    map_batches,
    predict,
    to_tensor,
)
from defuse_core.protocols import Progress, silent
from defuse_core.seeds import generator
from defuse_core.store import Store
from defuse_core.training.precision import MEASURED_INPUTS, answers_as_in_f32, margin_bound
from defuse_core.training.reference_models import load_reference_models, mean_probabilities, sees_class

log = logging.getLogger("defuse")
SHARDS = 512  # most shards of a training set, unless they would be larger than SHARD_DECODINGS
SHARD_DECODINGS = 2**19  # most decodings of a shard: two minutes of a CPU core, about a second of a GPU
COUNTS = (  # fields of Shard and Psi
    "images", "decodings", "images_with_any", "zero_noise_flips", "failing", "wrong", "wrong_decoded", "wrong_kept",
)  # fmt: skip
SAMPLE_CODES = 50_000  # most codes of Ψ that are looked at where max_codes is null
SAMPLE_KEY = "psi_sample.safetensors"  # the rows that subsample_psi draws, as a shard


def blocks_per_shard(images: int, section: IdentifySection) -> int:
    """Return how many consecutive blocks make a shard: one object in the store, and what a lost worker costs.

    It depends on the run file alone, never on the workers, and no result depends on it: noise is seeded by block.
    """
    blocks = -(-images // section.block_images)
    return max(1, min(-(-blocks // SHARDS), SHARD_DECODINGS // (section.block_images * section.draws)))


def shard_count(images: int, section: IdentifySection) -> int:
    """Return G, the number of shards of a training set."""
    blocks = -(-images // section.block_images)
    return -(-blocks // blocks_per_shard(images, section))


def encode_posterior(vae: Vae, images: Images, batch_size: int) -> tuple[F32, F32]:
    """Return the means and standard deviations of q(z|x), each (n, Z)."""

    def moments(rows: slice) -> torch.Tensor:
        mu, log_variance = vae.encode(to_tensor(images.batch(rows)))
        return torch.cat([mu, torch.exp(0.5 * log_variance)], dim=1)

    both = map_batches(moments, len(images), batch_size)
    mu, sigma = np.split(both, 2, axis=1)
    return np.ascontiguousarray(mu), sigma


def draw_noise(section: IdentifySection, sigma: F32, rng: np.random.Generator) -> F32:
    """Return the noise of `draws` draws around each image, (n, Q, Z), for (n, Z) posterior standard deviations."""
    shape = (len(sigma), section.draws, sigma.shape[1])
    if section.noise == "beta":
        return beta_noise(section, shape, rng)
    noise: F32 = (section.scale * sigma[:, None, :] * rng.standard_normal(shape)).astype(np.float32)
    return noise


def beta_noise(section: IdentifySection, shape: tuple[int, ...], rng: np.random.Generator) -> F32:
    """Return ε of Algorithm 1, line 5, of `shape`, scaled and, with identify.center, centred at 0."""
    noise = rng.beta(section.a, section.b, size=shape)
    if section.center:
        noise -= section.a / (section.a + section.b)
    return (section.scale * noise).astype(np.float32)


def nearest_failures(failed: Bool, distance: F32, cap: int | None) -> Bool:
    """Return `failed` (n, Q) reduced to at most `cap` draws per image, the nearest to mu; the earlier of equals."""
    if cap is None or cap >= failed.shape[1]:
        return failed
    order = np.argsort(np.where(failed, distance, np.inf), axis=1, kind="stable")
    kept = np.zeros_like(failed)
    np.put_along_axis(kept, order[:, :cap], True, axis=1)
    return kept & failed


def open_training_images(spec: RunFile, models: Models, *, progress: Progress = silent) -> Images:
    """Return the training images. Raises DataError, or RunMismatchError for images other than those trained on."""
    progress("opening the training images")
    return reopen_splits(spec, models.data_fingerprint).train


class Identifier:
    """One worker: holds the models and the training set, and identifies shard after shard of it.

    With `references` a failing draw is kept only if these models still recognise the class of its source image.
    """

    def __init__(
        self,
        spec: RunFile,
        models: Models,
        references: ReferenceSet | None = None,
        train: Images | None = None,
    ) -> None:
        """Load the models, and the images where they are not given. Raises ModelError, or as open_training_images."""
        self.spec = spec
        self.train = train or open_training_images(spec, models)
        self.is_perturbed = is_perturbed(self.train, spec.identify.share, spec.seed)  # (N,)
        self.classifier = load_classifier(spec, models.classifier, len(models.classes))
        self.vae = load_vae(spec, models.vae)
        self.references = (
            None
            if references is None
            else load_reference_models(spec, spec.review.reference, references, len(models.classes))
        )
        self.fingerprint = shard_fingerprint(spec, models, references)

    def shard(self, index: int) -> Shard:
        """Return Ψ of shard `index`, on one CPU thread or this process's GPU."""
        started = time.perf_counter()
        section = self.spec.identify
        size = blocks_per_shard(len(self.train), section)
        with cpu_threads(1):
            found = [self._block(block) for block in range(index * size, (index + 1) * size)]
        merged = _merge(found, time.perf_counter() - started)
        return replace(merged, index=index, fingerprint=self.fingerprint)

    def _block(self, block: int) -> Shard:
        """Algorithm 1 for every image of one block that is perturbed, at once; behind the last image there is none."""
        section = self.spec.identify
        start = block * section.block_images
        rows = np.arange(start, min(start + section.block_images, len(self.train)))
        rows = rows[self.is_perturbed[rows]]
        if not len(rows):
            nothing = Failures.none(self.spec.vae.latent_dim)
            return Shard(nothing, images=0, decodings=0, images_with_any=0, zero_noise_flips=0, seconds=0.0)
        truth = self.train.labels[rows]
        images = self.train.take(rows).loaded()  # read once
        wrong = predict(self.classifier, images, section.batch_size) != truth  # (n,)
        mu, sigma = encode_posterior(self.vae, images, section.batch_size)  # (n, Z)
        decoder = decoder_at(self.spec, self.vae, images, section.batch_size)
        shown = decoder.decode(mu, np.arange(len(rows)))
        flips = predict(self.classifier, shown, section.batch_size) != truth

        noise = draw_noise(section, sigma, generator(self.spec.seed, "identify", block))
        codes = mu[:, None, :] + noise  # (n, Q, Z)
        anchors = np.repeat(np.arange(len(rows)), section.draws)
        flat = codes.reshape(-1, mu.shape[1])
        predicted = self._classify(decoder, flat, anchors).reshape(codes.shape[:2])  # (n, Q)

        failed = predicted != truth[:, None]
        screened = self._screen(decoder, codes, truth, failed)
        kept = nearest_failures(screened, np.linalg.norm(noise, axis=2), section.max_per_image)
        image, _ = np.nonzero(kept)
        return Shard(
            failures=Failures(
                codes=codes[kept],
                source=rows[image],
                truth=truth[image],
                predicted=predicted[kept],
                source_wrong=wrong[image],
                source_track=None if images.tracks is None else images.tracks[image],
            ),
            images=len(rows),
            decodings=predicted.size,
            images_with_any=int(failed.any(axis=1).sum()),
            zero_noise_flips=int(flips.sum()),
            seconds=0.0,
            failing=int(failed.sum()),
            wrong=int(wrong.sum()),
            wrong_decoded=int((wrong & flips).sum()),
            wrong_kept=int((wrong & kept.any(axis=1)).sum()),
        )

    def _screen(self, decoder: Decoder, codes: F32, truth: I64, failed: Bool) -> Bool:
        """Return `failed` (n, Q) without the draws whose decoding no longer shows the source's class.

        One batch is decoded at a time: with the decodings of all failing draws, memory would grow with Q.
        """
        if self.references is None or not failed.any():
            return failed
        image, draw = np.nonzero(failed)
        section, size = self.spec.identify, self.spec.identify.batch_size
        kept = failed.copy()
        for start in range(0, len(image), size):
            batch = image[start : start + size], draw[start : start + size]
            seen = mean_probabilities(self.references, decoder.decode(codes[batch], batch[0]), size)
            kept[batch] = sees_class(seen, truth[batch[0]], section.min_probability)
        return kept

    def _classify(self, decoder: Decoder, codes: F32, anchors: I64) -> I64:
        """Decode and classify (n, Z) codes in large batches: f(p(z)), (n,)."""
        size = self.spec.identify.batch_size

        def logits(rows: slice | I64) -> torch.Tensor:
            return self._logits(decoder, codes[rows], anchors[rows])

        if self.spec.resources.arithmetic("answers") == "f32":
            return answers_from(logits, len(codes), size)
        return answers_as_in_f32(logits, len(codes), size, self._margin_bound)

    def _logits(self, decoder: Decoder, codes: F32, anchors: I64) -> torch.Tensor:
        """Return f(p(z)) before its argmax, (n, C)."""
        images = decoder.images(torch.from_numpy(codes).to(device()), anchors)
        logits: torch.Tensor = self.classifier(images)
        return logits

    @functools.cached_property
    def _margin_bound(self) -> float:
        """The margin below which an answer in bf16 is computed again: measured on one draw around some images.

        These are the same for every worker.
        """
        images = self.train.take(evenly_spaced(len(self.train), MEASURED_INPUTS))
        mu, sigma = encode_posterior(self.vae, images, self.spec.identify.batch_size)
        section = self.spec.identify.model_copy(update={"draws": 1})
        codes = mu + draw_noise(section, sigma, generator(self.spec.seed, "identify", "margin"))[:, 0]
        decoder = decoder_at(self.spec, self.vae, images, self.spec.identify.batch_size)
        return margin_bound(lambda rows: self._logits(decoder, codes[rows], rows), len(codes))


def _totals(parts: Sequence[Shard] | Sequence[Psi]) -> dict[str, Any]:
    """Return the sum of each of COUNTS over all parts."""
    return {name: sum(getattr(part, name) for part in parts) for name in COUNTS}


def _merge(shards: list[Shard], seconds: float) -> Shard:
    """Return one shard with the failures of all, whose computation took `seconds` together."""
    failures = Failures.concatenate([shard.failures for shard in shards])
    return Shard(failures=failures, seconds=seconds, **_totals(shards))


def shard_fingerprint(spec: RunFile, models: Models, references: ReferenceSet | None = None) -> str:
    """Return what all shards of a run share and no other run's shards have: models, images, noise and seed."""
    size = blocks_per_shard(models.images["train"], spec.identify)
    parts = (spec.seed, spec.identify, models.data_fingerprint, spec.vae.decode, size)
    digest = hashlib.sha256(repr(parts).encode())
    screen = () if references is None else references.models
    for weights in (models.classifier, models.vae, *screen):
        for name in sorted(weights):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()[:16]


def shard_key(index: int) -> str:
    """Return the key of a shard's codes in the run's store."""
    return f"psi/{index:06d}.safetensors"


def save_shard(store: Store, shard: Shard) -> Psi:
    """Write a shard, whose presence marks it as complete, and return its counts."""
    store.write(shard_key(shard.index), encode(shard))
    return _counts_of(shard)


def _counts_of(shard: Shard) -> Psi:
    return Psi(
        codes=np.array([len(shard.failures)], np.int64),
        worker_seconds=shard.seconds,
        fingerprint=shard.fingerprint,
        **_totals([shard]),
    )


def _decode_shard(data: bytes, where: str, index: int, fingerprint: str, remedy: str) -> Shard:
    shard = decode(Shard, data, where, remedy)
    if shard.index != index:
        raise DamagedError(f"{where}: expected shard {index}, found shard {shard.index}; {remedy}")
    if shard.fingerprint != fingerprint:
        raise DamagedError(f"{where}: expected a shard of this run, found one of another run; {remedy}")
    return shard


def finished_shards(store: Store, fingerprint: str) -> dict[int, Psi]:
    """Return the counts of the shards that are done, each read once; one that is damaged is logged and made again."""
    keys = [key for key in store.list("psi/") if re.fullmatch(r"psi/\d{6}\.safetensors", key)]
    counts, remedy = {}, "the shard is made again"
    for key, data in zip(keys, map_ahead(store.read, keys), strict=True):
        index = int(key[4:10])
        try:
            shard = _decode_shard(data, f"{store.address}/{key}", index, fingerprint, remedy)
            counts[index] = _counts_of(shard)
        except StoreError as error:
            log.warning("identify: %s", error)
    return counts


def gather_shards(counts: dict[int, Psi]) -> Psi:
    """Return the record of all shards together, from the counts of each, and log it. The codes stay in the store."""
    done = [counts[index] for index in sorted(counts)]
    psi = Psi(
        codes=np.array([shard.total for shard in done], np.int64),
        worker_seconds=sum(shard.worker_seconds for shard in done),
        fingerprint=done[0].fingerprint if done else "",
        **_totals(done),
    )
    log.info("kept %s of %s", f"{psi.total:,}", count_of(psi.failing, "failing draw"))
    return psi


def subsample_psi(spec: RunFile, psi: Psi, store: Store) -> Failures:
    """Return at most max_codes rows of Ψ, drawn without replacement, in order; a few shards are in memory at once.

    SAMPLE_CODES rows at most where max_codes is null. What is drawn is kept in the store, since a run asks several
    times.
    """
    most = spec.distill.max_codes or SAMPLE_CODES
    if psi.total <= most:
        return _rows_of_psi(spec, psi, store, np.arange(psi.total))
    # the record has the seconds of all shards, so it is another one after a shard was made again
    fingerprint = f"{artefact_digest(psi)} {spec.seed} {most}"
    try:
        where, remedy = f"{store.address}/{SAMPLE_KEY}", "the sample is drawn again"
        return _decode_shard(store.read(SAMPLE_KEY), where, SAMPLE_INDEX, fingerprint, remedy).failures
    except FileNotFoundError:
        pass
    except DamagedError as error:
        log.warning("identify: %s", error)
    wanted = np.sort(generator(spec.seed, "distill", "sample").choice(psi.total, most, replace=False))
    drawn = _rows_of_psi(spec, psi, store, wanted)
    store.write(SAMPLE_KEY, encode(Shard(drawn, 0, 0, 0, 0, 0.0, fingerprint=fingerprint)))
    return drawn


def _rows_of_psi(spec: RunFile, psi: Psi, store: Store, wanted: I64) -> Failures:
    """Return rows of Ψ, (n,), in ascending order."""
    starts = np.concatenate([[0], np.cumsum(psi.codes)])
    first, last = np.searchsorted(wanted, starts[:-1]), np.searchsorted(wanted, starts[1:])

    def drawn_from(shard: int) -> Failures:
        rows = wanted[first[shard] : last[shard]] - starts[shard]
        return shard_of_psi(store, psi.fingerprint, shard).failures.take(rows)

    parts = [Failures.none(spec.vae.latent_dim)]
    parts.extend(map_ahead(drawn_from, np.flatnonzero(first < last).tolist()))
    return Failures.concatenate(parts)


def shard_of_psi(store: Store, fingerprint: str, index: int) -> Shard:
    """Return a shard of the Ψ with this fingerprint. Raises DamagedError where it is gone or damaged."""
    where = f"{store.address}/{shard_key(index)}"
    remedy = f"delete {store.address}/psi.safetensors and run again: only this shard is made again"
    try:
        data = store.read(shard_key(index))
    except FileNotFoundError as error:
        raise DamagedError(
            f"{where}: expected a shard of psi.safetensors, found no such file; {remedy}"
        ) from error
    return _decode_shard(data, where, index, fingerprint, remedy)
