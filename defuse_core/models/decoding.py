"""Decode codes into images, plainly or anchored at others: at once, or as a set of images that is decoded on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from defuse_core.artifacts import F32, I64, Anchors, Weights
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.device import device, forked_random
from defuse_core.models.inference import BATCH, load_vae, map_batches
from defuse_core.models.layout import to_tensor
from defuse_core.models.vae import Vae

MAX_DECODED = 16 * 2**30  # bytes; larger sets are decoded in every epoch


def decode_codes(vae: Vae, codes: F32) -> F32:
    """Return the plain decodings of (n, Z) codes: (n, channels, H, W) in [0, 1]."""
    return Decoder(vae).decode(codes)


class Decoder:
    """Decodes codes into images: plainly, p(z), or anchored at images x, clip(x + p(z) - p(mu(x)), 0, 1).

    An anchored picture moves as its plain decoding moves. It stays as sharp as x, whatever the β-VAE can draw, and a
    code that is mu(x) itself gives x.
    """

    def __init__(self, vae: Vae, images: Images | Anchors | None = None, batch_size: int = BATCH) -> None:
        """Decode plainly, or anchored at `images` (M of them), which are encoded and decoded once.

        An artefact has the images of all components: encoded are those that a batch of codes is anchored at.
        """
        self.vae, self.batch_size = vae, batch_size
        self.residuals: F32 | _ResidualsOnDemand | None = None
        if isinstance(images, Images):
            self.residuals = _residuals(vae, images, batch_size)
        elif (stored := images_of(images)) is not None:
            self.residuals = _ResidualsOnDemand(vae, stored, batch_size)

    def decode(self, codes: F32, anchors: I64 | None = None) -> F32:
        """Return the images of (..., Z) codes, one after the other: (n, channels, H, W) in [0, 1].

        `anchors` (...) holds the row of each code's image. Plain decoding ignores it.
        """
        codes = codes.reshape(-1, codes.shape[-1])
        anchors = None if anchors is None else anchors.reshape(-1)
        if not len(codes):
            return self.decode(np.zeros((1, codes.shape[1]), np.float32), np.zeros(1, np.int64))[:0]

        def images(rows: slice) -> Tensor:
            batch = torch.from_numpy(codes[rows].copy()).to(device())
            return self.images(batch, None if anchors is None else anchors[rows])

        return map_batches(images, len(codes), self.batch_size)

    def images(self, codes: Tensor, anchors: I64 | None) -> Tensor:
        """Return what `decode` does, for one batch of codes on this process's device."""
        plain = self.vae.decode(codes)
        if self.residuals is None or not len(self.residuals):
            return plain
        if anchors is None:
            raise ValueError("anchored decoding needs the image of each code")
        return (plain + to_tensor(self.residuals[anchors])).clamp(0, 1)


def _residuals(vae: Vae, images: Images, batch_size: int) -> F32:
    """Return x - p(mu(x)) of each image, (M, channels, H, W): what the β-VAE cannot draw of it."""
    if not len(images):
        return images.batch(slice(0, 0))

    def residuals(rows: slice) -> Tensor:
        shown = to_tensor(images.batch(rows))
        return shown - vae.decode(vae.encode(shown)[0])

    return map_batches(residuals, len(images), batch_size)


class _ResidualsOnDemand:
    """`_residuals` of the images that are asked for, made when they are; those of the last request are kept."""

    def __init__(self, vae: Vae, images: Images, batch_size: int) -> None:
        self.vae, self.images, self.batch_size = vae, images, batch_size
        self.used: I64 = np.zeros(0, np.int64)
        self.held = images.batch(slice(0, 0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: I64) -> F32:
        used, place = np.unique(rows, return_inverse=True)
        if not np.array_equal(used, self.used):
            self.used, self.held = used, _residuals(self.vae, self.images.take(used), self.batch_size)
        return self.held[place]


def decoder_at(spec: RunFile, vae: Vae, images: Images, batch_size: int = BATCH) -> Decoder:
    """Return the decoder of codes near `images`, as vae.decode says; plain decoding does not read them."""
    return Decoder(vae, images if spec.vae.decode == "anchored" else None, batch_size)


def images_of(anchors: Anchors | None) -> Images | None:
    """Return the images that an artefact's codes are anchored at; None where these are decoded plainly."""
    return None if anchors is None else Images(anchors.pixels, np.zeros(len(anchors.source), np.int64))


@dataclass(frozen=True, eq=False)
class StoredVae:
    """The β-VAE of a run, which each process that uses it loads once; only its weights travel between processes."""

    spec: RunFile
    weights: Weights

    @cached_property
    def loaded(self) -> Vae:
        # perhaps in the middle of a training, whose random numbers go on as before
        with forked_random():
            return load_vae(self.spec, self.weights)

    def __getstate__(self) -> dict[str, object]:
        return {"spec": self.spec, "weights": self.weights}


class Decodings:
    """Images of codes as a float32 array (N, channels, H, W) that is decoded when it is indexed.

    It holds the codes and the images that these are anchored at. What rows are decoded together changes the rounding.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, vae: StoredVae, codes: F32, images: Images | None = None, anchors: I64 | None = None
    ) -> None:
        """Decode (..., Z) codes plainly, or anchored at `images`. `anchors` (...) has the row of each code's image."""
        self.vae, self.codes, self.images = vae, codes.reshape(-1, codes.shape[-1]), images
        self.anchors: I64 | None = None if anchors is None else anchors.reshape(-1)

    @property
    def shape(self) -> tuple[int, ...]:
        data = self.vae.spec.data
        return (len(self.codes), data.channels, data.image_size, data.image_size)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | I64) -> F32:
        """Return pixels (n, channels, H, W) in [0, 1]."""
        images, anchors = self.images, self.anchors
        if images is not None and anchors is not None:
            used, place = np.unique(anchors[rows], return_inverse=True)
            images, anchors = images.take(used), place.astype(np.int64)
        # in f32 also where the answers to these images are computed in bf16
        with torch.autocast(device().type, enabled=False):
            return Decoder(self.vae.loaded, images).decode(self.codes[rows], anchors)

    def at(self, rows: slice | I64) -> Decodings:
        """Return the decodings of `rows`. Decodes nothing."""
        anchors = None if self.anchors is None else self.anchors[rows]
        return Decodings(self.vae, self.codes[rows], self.images, anchors)

    def loaded(self) -> F32 | Decodings:
        """Return the pixels in memory, unless they take over MAX_DECODED."""
        return self[:] if fits_in_memory(self.shape) else self


def fits_in_memory(shape: tuple[int, ...]) -> bool:
    """Return whether decodings of this shape are held in memory: at most MAX_DECODED bytes."""
    return math.prod(shape) * Decodings.dtype.itemsize <= MAX_DECODED
