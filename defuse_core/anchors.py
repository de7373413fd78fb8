"""The training images that codes are decoded at with vae.decode: anchored, as artefacts keep them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defuse_core.arrays import F32, I64, U8, expect_shapes


@dataclass(frozen=True, eq=False)
class Anchors:
    """Training images that codes are decoded at (vae.decode: anchored)."""

    pixels: U8 | F32  # (M, channels, H, W), uint8 0 to 255 or float32 in [0, 1], as in Images
    source: I64  # (M,) index into the training set, ascending

    def __post_init__(self) -> None:
        expect_shapes(self, {"pixels": "M c H W", "source": "M"})


@dataclass(frozen=True, eq=False)
class ComponentFailures:
    """Failures of each component, L of each (repeated where it has fewer): what its draws are anchored at."""

    codes: F32  # (S, L, Z)
    anchor: I64  # (S, L) index into anchors
    anchors: Anchors

    def __post_init__(self) -> None:
        expect_shapes(self, {"codes": "S L Z", "anchor": "S L"})

    def take(self, rows: I64) -> ComponentFailures:
        """Return the failures of the components `rows`, with the images that they need."""
        used, anchor = np.unique(self.anchor[rows], return_inverse=True)
        anchors = Anchors(self.anchors.pixels[used], self.anchors.source[used])
        return ComponentFailures(self.codes[rows], anchor.reshape(self.anchor[rows].shape), anchors)
