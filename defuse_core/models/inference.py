"""Apply classifiers and β-VAEs to images and codes in batches, on this process's device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F32, I64, Anchors
from defuse_core.config import DataSection, RunFile
from defuse_core.data import Images
from defuse_core.device import device
from defuse_core.errors import ModelError
from defuse_core.models.vae import Vae

NOT_A_NUMBER = -1  # in place of an answer


def to_device(module: nn.Module, data: DataSection | None = None) -> nn.Module:
    """Move `module` to this process's device, in the memory layout in which convolutions are fastest.

    With `data`, which has the size of its images, a network of a user's own is settled as by settle_layout.
    """
    if device().type == "cpu":
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and _overruns(part):
                part.register_forward_pre_hook(_crop_for_training)
    module.to(device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if data is not None:
        blank = np.zeros((2, data.channels, data.image_size, data.image_size), np.float32)
        settle_layout(module, to_tensor(blank))
    return module


def settle_layout(network: nn.Module, images: Tensor) -> None:
    """Move a classifier or β-VAE back to torch's default layout where its code takes no other; else change nothing.

    Such code is x.view(n, -1) after a convolution. It is looked for with `images`, two or more in the layout of
    to_device. Any other failure is left to the checks, which name it.
    """
    training, entry = network.training, "encode" if isinstance(network, Vae) else "forward"
    network.eval()
    try:
        with torch.no_grad():
            if isinstance(network, Vae):
                network.decode(network.encode(images)[0])
            else:
                network(images)
    except (Exception, SystemExit) as error:
        if "view size is not compatible" in str(error):
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            setattr(network, entry, partial(_of_contiguous, getattr(network, entry)))
    finally:
        network.train(training)


def _of_contiguous(function: Callable[..., Any], images: Tensor, *others: Any, **named: Any) -> Any:
    return function(images.contiguous(), *others, **named)


def _overruns(convolution: nn.Conv2d) -> bool:
    """Whether oneDNN's weight gradient of this convolution can write past the end of its memory on this CPU.

    That of a 1x1 convolution with a stride does in the layout of to_device, where there are fewer channels than numbers
    in a vector register, and the stride divides the image (github.com/uxlfoundation/oneDNN/issues/6035). With one
    channel, or several groups, torch takes another way.
    """
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return (
        convolution.kernel_size == (1, 1)
        and max(convolution.stride) > 1
        and convolution.padding in ((0, 0), "valid")
        and convolution.groups == 1
        and 1 < convolution.in_channels < block
    )


def _crop_for_training(convolution: nn.Conv2d, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return images (..., channels, H, W) without a last row and column that the stride passes over anyway.

    The stride then no longer divides the image, and oneDNN computes the gradient in another, correct way.
    """
    if not torch.is_grad_enabled() or not arguments:  # answers stay as they are, to the last bit
        return arguments
    images, *others = arguments
    height, width = (
        side - (stride > 1 and side % stride == 0)
        for side, stride in zip(images.shape[-2:], convolution.stride, strict=True)
    )
    return images[..., :height, :width], *others


def to_tensor(images: F32) -> Tensor:
    """Move (n, channels, H, W) pixels to this process's device, in the memory layout of to_device."""
    return torch.from_numpy(images).to(device()).contiguous(memory_format=torch.channels_last)


def map_batches(function: Callable[[slice], Tensor], count: int, batch_size: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return function(rows) for consecutive rows of at most batch_size, concatenated.

    Raises ModelError where the function returns more or fewer rows than it was given.
    """
    parts = []
    with torch.no_grad():  # inference mode marks what a network keeps, which then fails in its fine-tuning
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            parts.append(function(rows).cpu().numpy())
            expect_rows(len(parts[-1]), rows.stop - rows.start)
    return np.concatenate(parts)


def expect_rows(found: int, given: int) -> None:
    """Raise ModelError where a network returns more or fewer rows than it was given."""
    if found != given:
        raise ModelError(
            f"a network returns {found} rows for a batch of {given}; let it return one for each, in batches of any size"
        )


def _as_images(images: Images | F32) -> Images:
    return images if isinstance(images, Images) else Images(images, np.zeros(len(images), np.int64))


def predict(classifier: nn.Module, images: Images | F32, batch_size: int = 256) -> I64:
    """Return the classifier's answer for each image, (n,). Raises ModelError where its logits are nan."""
    source = _as_images(images)
    return answers_from(logits_of(classifier, source), len(source), batch_size)


def logits_of(classifier: nn.Module, images: Images) -> Callable[[slice | I64], Tensor]:
    """Return a function of some rows of the images that computes their logits, (n, C)."""

    def logits(rows: slice | I64) -> Tensor:
        found: Tensor = classifier(to_tensor(images.batch(rows)))
        return found

    return logits


def answers_from(logits: Callable[[slice], Tensor], count: int, batch_size: int) -> I64:
    """Return the index of the largest logit of each of `count` inputs, (count,); `logits(rows)` computes (n, C).

    Raises ModelError where a logit is nan: torch and numpy would both answer with a class.
    """
    if not count:
        return np.zeros(0, np.int64)

    def answer(rows: slice) -> Tensor:
        found = logits(rows)
        return torch.where(found.isnan().any(dim=1), NOT_A_NUMBER, found.argmax(dim=1))

    found: I64 = map_batches(answer, count, batch_size)
    if nan := int((found == NOT_A_NUMBER).sum()):
        raise ModelError(
            f"the classifier returns nan for {nan} of {count} images; often it divides by the spread of an image, "
            "which is 0 where all pixels are equal: add a small number there"
        )
    return found


def predict_probabilities(classifier: nn.Module, images: Images | F32, batch_size: int = 256) -> F32:
    """Return the classifier's class probabilities, (n, C)."""
    source = _as_images(images)
    if not len(source):
        return np.zeros((0, 1), np.float32)
    logits = logits_of(classifier, source)
    return map_batches(lambda rows: logits(rows).softmax(1), len(source), batch_size)


def predict_logits(classifier: nn.Module, images: Images | F32) -> F32:
    """Return the classifier's logits, (n, C), of at least one image."""
    source = _as_images(images)
    logits = logits_of(classifier, source)
    found: F32 = map_batches(lambda rows: logits(rows).float(), len(source), 256)
    return found


def accuracy(classifier: nn.Module, images: Images) -> float:
    """Return the share of images that the classifier gets right; nan for no images."""
    return float((predict(classifier, images) == images.labels).mean()) if len(images) else math.nan


def encode_images(vae: Vae, images: Images | F32, batch_size: int = 256) -> F32:
    """Return the means of q(z|x), (n, Z)."""
    source = _as_images(images)
    return map_batches(lambda rows: vae.encode(to_tensor(source.batch(rows)))[0], len(source), batch_size)


def decode_codes(vae: Vae, codes: F32, batch_size: int = 256) -> F32:
    """Return the plain decodings of (n, Z) codes: (n, channels, H, W) in [0, 1]."""
    return Decoder(vae, batch_size=batch_size).decode(codes)


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
