"""β-VAEs: the paper's of Figures 8-13, a convolutional one, and custom modules behind the same methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defuse_core.config import RunFile
from defuse_core.device import is_device_failure, is_out_of_memory
from defuse_core.errors import ModelError
from defuse_core.models.architectures import dense_layers, halving_convolutions, import_module

LOGIT_MARGIN = 1e-6  # keeps the logits of a custom decoder's pixels 0 and 1 finite


class Vae(nn.Module):
    """A Gaussian encoder, images to mean and log-variance, and a decoder, codes to the logits of pixels."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, channels, H, W) -> mean and log-variance of q(z|x), each (n, Z)."""
        mu, log_variance = self.encoder(images).chunk(2, dim=1)
        return mu, log_variance

    def decode_logits(self, codes: Tensor) -> Tensor:
        """(n, Z) -> (n, channels, H, W) before the sigmoid."""
        logits: Tensor = self.decoder(codes)
        return logits

    def decode(self, codes: Tensor) -> Tensor:
        """(n, Z) -> images (n, channels, H, W) in [0, 1]."""
        return torch.sigmoid(self.decode_logits(codes))


class CustomVae(Vae):
    """A module of the user's own: `encode(images) -> mean, log-variance` and `decode(codes) -> images` in [0, 1]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(nn.Identity(), nn.Identity())
        self.module = module

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See Vae."""
        mu, log_variance = self.module.encode(images)  # type: ignore[operator]
        return mu, log_variance

    def decode(self, codes: Tensor) -> Tensor:
        """See Vae."""
        images: Tensor = self.module.decode(codes)  # type: ignore[operator]
        return images

    def decode_logits(self, codes: Tensor) -> Tensor:
        """See Vae."""
        return torch.logit(self.decode(codes).float(), eps=LOGIT_MARGIN)


def kl_to_prior(mu: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(q || N(0, 1)) per image and latent dimension, (n, Z), in nats."""
    return 0.5 * (mu.square() + log_variance.exp() - log_variance - 1)


def build_vae(spec: RunFile) -> Vae:
    """Return the β-VAE of the run file: untrained, or as a custom factory returns it."""
    if spec.vae.architecture == "custom":
        return _custom_vae(spec)
    return _convolutional_vae(spec) if spec.vae.architecture == "convolutional" else _paper_vae(spec)


def _paper_vae(spec: RunFile) -> Vae:
    """Figures 8-13."""
    section, data = spec.vae, spec.data
    width, channels = section.hidden, section.channels
    flat = channels * (data.image_size >> section.encoder_stages) ** 2
    encoder = nn.Sequential(
        *halving_convolutions(data.channels, channels, section.encoder_stages),
        nn.Flatten(),
        *dense_layers(flat, width, width),
        nn.Linear(width, 2 * section.latent_dim),
    )
    side = data.image_size >> section.decoder_stages
    widths = [width // side**2] + [channels] * (section.decoder_stages - 1) + [data.channels]
    layers = [
        *dense_layers(section.latent_dim, width, width, width),
        nn.Unflatten(1, (widths[0], side, side)),
    ]
    for channels_in, channels_out in itertools.pairwise(widths):
        layers += [nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1), nn.ReLU()]
    return Vae(encoder, nn.Sequential(*layers[:-1]))


def _convolutional_vae(spec: RunFile) -> Vae:
    """Encoder of stride-2 convolutions that double their channels, the decoder its mirror image; batch normalisation.

    Between both there is one dense layer on each side. It needs far fewer steps than the paper's, whose decoder
    starts from images of 2x2 pixels behind three dense layers.
    """
    section, data = spec.vae, spec.data
    widths = [section.channels << stage for stage in range(section.encoder_stages)]
    side = data.image_size >> section.encoder_stages
    flat = widths[-1] * side**2
    down: list[nn.Module] = []
    for channels_in, channels_out in itertools.pairwise([data.channels, *widths]):
        convolution = nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
        down += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
    encoder = nn.Sequential(
        *down,
        nn.Flatten(),
        *dense_layers(flat, section.hidden),
        nn.Linear(section.hidden, 2 * section.latent_dim),
    )
    up: list[nn.Module] = [
        *dense_layers(section.latent_dim, section.hidden, flat),
        nn.Unflatten(1, (widths[-1], side, side)),
    ]
    for channels_in, channels_out in itertools.pairwise(widths[::-1]):
        transposed = nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
        up += [transposed, nn.BatchNorm2d(channels_out), nn.ReLU()]
    last = nn.ConvTranspose2d(widths[0], data.channels, 4, stride=2, padding=1)
    return Vae(encoder, nn.Sequential(*up, last))


def _custom_vae(spec: RunFile) -> CustomVae:
    path = spec.vae.import_path or ""
    module = import_module("vae.import_path", path)
    for name in ("encode", "decode"):
        if not callable(getattr(module, name, None)):
            raise ModelError(
                f"vae.import_path {path}: expected a module with the methods encode(images) -> mean, log-variance "
                f"and decode(codes) -> images, found none called {name}"
            )
    return CustomVae(module)


def expect_autoencoder(vae: Vae, images: Tensor, latent_dim: int) -> None:
    """Raise ModelError unless `vae` maps images (n, channels, H, W) to codes and back, with gradients.

    Checks the shapes of mean, log-variance and decodings, that they are finite, that pixels are in [0, 1], and that
    a gradient flows from the decodings to the codes and to the encoder's input.
    """
    pixels = images.clone().requires_grad_()
    codes_shape = (len(images), latent_dim)
    try:
        mu, log_variance = vae.encode(pixels)
        _expect_tensor("mean", mu, codes_shape)
        _expect_tensor("log-variance", log_variance, codes_shape)
        decoded = vae.decode(mu)
        _expect_tensor("decoded images", decoded, tuple(images.shape))
    except ModelError:
        raise
    except SystemExit as error:  # a worker of Ray would end by it
        raise ModelError(f"the β-VAE exits (SystemExit: {error}) when it is called; remove that") from error
    except Exception as error:
        if is_out_of_memory(error) or is_device_failure(error):
            raise
        raise ModelError(
            f"the β-VAE cannot encode and decode images of shape {tuple(images.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    low, high = float(decoded.detach().min()), float(decoded.detach().max())
    if low < 0 or high > 1:
        raise ModelError(
            f"the β-VAE's decoded images: expected pixels in [0, 1], found {low:.3g} to {high:.3g}; "
            "end the decoder with a sigmoid, or rescale its output"
        )
    _expect_gradients(decoded, mu, pixels)


def _expect_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"the β-VAE's {name}: expected shape {shape}, found {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"the β-VAE's {name}: expected finite numbers, found NaN or infinity")


def _expect_gradients(decoded: Tensor, mu: Tensor, pixels: Tensor) -> None:
    gradients = gradients_of(decoded, [mu, pixels])
    if all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return
    raise ModelError(
        "the β-VAE: expected gradients from the decoded images to the codes and to the encoded images, found none; "
        "remove torch.no_grad, detach and rounding from encode and decode"
    )


def gradients_of(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of the sum of `output` for each of `inputs`; None where none flows to it."""
    if not output.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(output.sum(), inputs, allow_unused=True))
