"""Checks of a classifier before anything is trained: what it returns, and whether it can be fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defuse_core.config import ClassifierSection
from defuse_core.data import Images
from defuse_core.data.images import evenly_spaced
from defuse_core.device import forked_random
from defuse_core.errors import ModelError
from defuse_core.models.adapters import (
    EXTERNAL,
    TWO_OF_ONE_LOGIT,
    TWO_OF_ONE_LOGIT_BY_HOOK,
    TWO_OF_ONE_OUTPUT_BY_HOOK,
    expect_full_precision,
    failure_line,
    find_logits,
    raw_output,
    reason_of,
)
from defuse_core.models.layout import to_tensor, use_default_layout_if_needed
from defuse_core.models.vae import gradients_of

log = logging.getLogger("defuse")
CHECKED_IMAGES = 8  # in one batch, whose outputs are checked
SAME_IN_TRAINING = (
    "let its forward take images alone and return the logits in train mode as in eval mode, or give the network by "
    "torch.export.save, which keeps it in eval mode"
)
ANY_SIZE = "that the network accepts batches of any size"


class CallError(ModelError):
    """The classifier's code fails on images; those of another size may be what it takes."""


class ProbabilitiesError(ModelError):
    """The classifier returns probabilities, and classifier.outputs does not say so."""


def check_outputs(
    classifier: nn.Module,
    section: ClassifierSection,
    images: Images,
    classes: int,
    remedy: str = f"check data.image_size and data.channels, and {ANY_SIZE}",
) -> None:
    """Raise ModelError unless the classifier returns one finite logit per class, whatever else is in the batch.

    Of an architecture that is not Defuse's own, also: that the outputs are what classifier.outputs says. `remedy` is
    what to do where it takes no images of this shape.
    """
    batch = to_tensor(images.batch(evenly_spaced(len(images), CHECKED_IMAGES)))
    first = batch[:2].clone()
    use_default_layout_if_needed(classifier.eval(), first.clone())
    with torch.no_grad():  # what the classifier keeps from its first call has to take part in training, too
        _expect_shape(_call(classifier, first, remedy), len(first), classes, section.architecture)
        if not torch.equal(first, batch[:2]):
            raise ModelError(
                "the classifier changes the images that it is given, which are used again; let its forward compute new "
                "ones (x = 2 * x, not x.mul_(2)), or begin with x = x.clone()"
            )
        whole = _call(classifier, batch, remedy)
        _expect_shape(whole, len(batch), classes)
        _expect_finite(whole)
        given = _expect_kind(classifier, section, batch) if section.architecture in EXTERNAL else whole.dtype
        _expect_batch_independence(classifier, batch, whole, given)


def _expect_shape(logits: Tensor, images: int, classes: int, architecture: str = "custom") -> None:
    """Raise ModelError unless the logits have the shape (images, classes)."""
    found = tuple(logits.shape)
    if found == (images, classes):
        return
    if classes == 2 and logits.numel() == images and architecture == "transformers":
        remedy = TWO_OF_ONE_OUTPUT_BY_HOOK
    elif classes == 2 and logits.numel() == images:
        remedy = (
            f"for one logit z of shape (images, 1) return {TWO_OF_ONE_LOGIT}; or, {TWO_OF_ONE_LOGIT_BY_HOOK}"
        )
    elif images == 1 and found == (classes,):
        remedy = "squeeze() drops the batch of one image: use flatten(1)"
    elif found[:1] != (images,):
        remedy = "let it return one row for each image, in batches of any size"
    elif found[1:2] == (classes,) and logits.numel() == images * classes:
        remedy = "return logits.flatten(1)"
    else:
        remedy = f"the data set has {classes} classes, so let it return {classes} logits for each image"
    raise ModelError(
        f"the classifier: expected logits of shape {(images, classes)} (images, classes), found {found}; {remedy}"
    )


def expect_trainable(classifier: nn.Module, images: Images) -> None:
    """Raise ModelError for a classifier without a parameter that fine-tuning may change and its logits depend on.

    Also for one that fails in train mode or returns something else there, and for weights that are not of float32.
    Expects one that passed `check_outputs`. Leaves it in eval mode, as it was.
    """
    expect_full_precision(classifier, "the classifier", trained=True)
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    if not parameters:
        remedy = "call requires_grad_(True) on those to fine-tune before it is saved or given to Defuse"
        if not list(classifier.parameters()):
            remedy = "it has none at all; save it without torch.jit.freeze, which makes constants of them"
        raise ModelError(
            f"the classifier: expected parameters to fine-tune, found none that requires a gradient; {remedy}"
        )
    batch = to_tensor(images.batch(evenly_spaced(len(images), 2)))
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    try:  # its code may switch gradients off in eval mode alone
        with forked_random():  # dropout draws
            shape, reached = _logits_with_gradient(classifier.eval(), batch, parameters)
            trained_shape, trained_reached = _logits_with_gradient(classifier.train(), batch, parameters)
    finally:
        classifier.eval().load_state_dict(state)  # statistics of batch normalisation
    if trained_shape != shape:
        raise ModelError(
            f"the classifier: expected logits of shape {shape} also in train mode, in which it is "
            f"fine-tuned, found {trained_shape}; {SAME_IN_TRAINING}"
        )
    if not (reached or trained_reached):
        raise ModelError(
            "the classifier: expected a gradient from its logits to the parameters to fine-tune, found none; remove "
            "torch.no_grad, torch.inference_mode, detach and rounding from its forward"
        )


def _logits_with_gradient(
    classifier: nn.Module, batch: Tensor, parameters: Sequence[Tensor]
) -> tuple[tuple[int, ...], bool]:
    """Return the shape of the logits, and whether a gradient flows from them to any parameter.

    Raises ModelError where they cannot be computed with gradients.
    """
    try:
        logits = classifier(batch)
        gradients = gradients_of(logits, parameters)
    except SystemExit as error:  # a worker of Ray would end by it
        raise ModelError(
            f"the classifier exits (SystemExit: {error}) when it is trained; remove that"
        ) from error
    except Exception as error:
        where, remedy = "where gradients are computed", "change its forward"
        if classifier.training:
            where, remedy = "in train mode, in which it is fine-tuned", SAME_IN_TRAINING
        raise ModelError(
            f"the classifier cannot be fine-tuned, since its forward or backward pass fails {where}: "
            f"{reason_of(error)}; {remedy}"
        ) from error
    return tuple(logits.shape), any(gradient is not None for gradient in gradients)


def _call(classifier: nn.Module, batch: Tensor, remedy: str = f"check {ANY_SIZE}") -> Tensor:
    """Return the logits of a batch. Raises ModelError, with the reason that the classifier gave, where it fails."""
    try:
        logits: Tensor = classifier(batch)
    except ModelError:
        raise
    except SystemExit as error:  # a worker of Ray would end by it
        raise ModelError(
            f"the classifier exits (SystemExit: {error}) when it is called; remove that"
        ) from error
    except Exception as error:
        raise CallError(failure_line(classifier, batch, error, remedy)) from error
    if not isinstance(logits, Tensor):
        raise ModelError(f"the classifier: expected logits as a tensor, found {type(logits).__name__}")
    return logits


def _expect_kind(classifier: nn.Module, section: ClassifierSection, batch: Tensor) -> torch.dtype:
    """Return the type of the numbers that the network returns. Logs where the logits were found.

    Raises ModelError where probabilities come as logits, or the reverse.
    """
    values, where = find_logits(raw_output(classifier, batch, section.input_range))
    if where != "a tensor":
        log.info("the classifier returns more than logits; used: %s", where)
    sums = values.sum(dim=1)
    probabilities = bool((values >= 0).all() and (values <= 1).all() and (sums - 1).abs().max() < 1e-3)
    if probabilities and section.outputs == "logits":
        raise ProbabilitiesError(
            "the classifier: expected logits, found probabilities (each row sums to 1); set classifier.outputs: "
            "probabilities, or return what its softmax is given"
        )
    if not probabilities and section.outputs == "probabilities":
        raise ModelError(
            f"classifier.outputs: probabilities: expected rows that sum to 1, found sums from {sums.min():.4g} to "
            f"{sums.max():.4g}; set classifier.outputs: logits"
        )
    return values.dtype


def _expect_finite(logits: Tensor) -> None:
    bad = ~torch.isfinite(logits).all(dim=1)
    if bad.any():
        raise ModelError(
            f"the classifier: expected finite logits, found NaN or infinity for {int(bad.sum())} of {len(logits)} "
            "training images; check its weights and its input range"
        )


def _expect_batch_independence(
    classifier: nn.Module, batch: Tensor, whole: Tensor, given: torch.dtype
) -> None:
    """Raise ModelError where a logit depends on the call, or on the other images of the batch.

    `given` is the type of the numbers that the network returns: those of bfloat16 are rounded to 8 bits.
    """
    rounding = torch.finfo(given).eps if given.is_floating_point else 0.0
    tolerance = max(1e-3, 2 * rounding) * float(whole.abs().max()) + 1e-4
    if (_call(classifier, batch) - whole).abs().max() > tolerance:
        raise ModelError(
            "the classifier: expected equal logits for equal images, found different ones at the second call; dropout "
            "or other noise stays on in eval mode, so switch it off there"
        )
    parts = [_call(classifier, batch[:1]), _call(classifier, batch[1:])]
    for logits, images in zip(parts, (1, len(batch) - 1), strict=True):
        _expect_shape(logits, images, whole.shape[1])
    if (torch.cat(parts) - whole).abs().max() > tolerance:
        raise ModelError(
            "the classifier: expected logits that depend on the image alone, found different ones when the batch "
            "changes; batch statistics are used in eval mode, so export or return it in eval mode"
        )
