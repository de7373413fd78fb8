"""Codes as images: plainly, or anchored at the images that they are near to (vae.decode)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from defuse_core.artifacts import F32, I64, Anchors
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.device import device
from defuse_core.models.inference import map_batches, to_tensor
from defuse_core.models.vae import Vae


class Decoder:
    """Decodes codes into images: plainly, p(z), or anchored at images x, clip(x + p(z) - p(mu(x)), 0, 1).

    An anchored picture moves as its plain decoding moves. It stays as sharp as x, whatever the β-VAE can draw, and a
    code that is mu(x) itself gives x.
    """

    def __init__(self, vae: Vae, images: Images | None = None, batch_size: int = 256) -> None:
        """Decode plainly, or anchored at `images` (M of them), which are encoded and decoded once."""
        self.vae, self.batch_size = vae, batch_size
        self.residuals = None if images is None else _residuals(vae, images, batch_size)

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


def decoder_at(spec: RunFile, vae: Vae, images: Images, batch_size: int = 256) -> Decoder:
    """Return the decoder of codes near `images`, as vae.decode says; plain decoding does not read them."""
    return Decoder(vae, images if spec.vae.decode == "anchored" else None, batch_size)


def decoder_of(vae: Vae, anchors: Anchors | None) -> Decoder:
    """Return the decoder of an artefact's codes: anchored at its images, or plain where it has none."""
    if anchors is None:
        return Decoder(vae)
    return Decoder(vae, Images(anchors.pixels, np.zeros(len(anchors.source), np.int64)))
