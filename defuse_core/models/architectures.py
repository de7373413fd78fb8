"""Classifiers: the CNN of Appendix B, ResNet-18, the networks of reference models and judges, and custom modules."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from defuse_core.artifacts import Weights
from defuse_core.config import RunFile
from defuse_core.errors import ModelError
from defuse_core.formatting import one_line
from defuse_core.models.adapters import EXTERNAL, IMAGENET_MEAN, IMAGENET_SD, adapt, reorder
from defuse_core.models.programs import load_program, open_transformers, read_file, transformers_from
from defuse_core.optional_packages import import_package


def halving_convolutions(channels_in: int, channels: int, stages: int) -> Iterator[nn.Module]:
    """4x4 convolutions of stride 2, each halving height and width (Figures 7, 8, 10, 12)."""
    for stage in range(stages):
        yield nn.Conv2d(channels if stage else channels_in, channels, 4, stride=2, padding=1)
        yield nn.ReLU()


def dense_layers(*widths: int) -> Iterator[nn.Module]:
    """Fully connected layers from width to width, each followed by a ReLU."""
    for width_in, width_out in itertools.pairwise(widths):
        yield nn.Linear(width_in, width_out)
        yield nn.ReLU()


_IMPORTED: WeakSet[nn.Module] = WeakSet()  # the modules in use that users' factories built in this process


def import_module(field: str, path: str) -> nn.Module:
    """Return the new module that the factory at `package.module:factory` builds.

    Raises ModelError, naming the run file's field.
    """
    module = _called(field, path)
    if module in _IMPORTED:
        raise ModelError(
            f"{field} {path}: it returned the same module as before, which Defuse has changed since; let it build a "
            "new one, or return a copy.deepcopy of it, at each call"
        )
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{field} {path}: it returned a module with lazy layers (such as torch.nn.LazyLinear) that have no weights "
            "yet; let it call the module once, on images of the size to use, before it returns it"
        )
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{field} {path}: it returned a module on the device meta, which has no weights; build it on the CPU"
        )
    odd = [
        name
        for name, value in module.state_dict().items()
        if not isinstance(value, Tensor) or value.is_quantized
    ]
    if odd:
        raise ModelError(
            f"{field} {path}: its state dict has {odd[0]}, which is no plain tensor; of a quantized network give "
            "the one before quantization, else keep such a value out of the state dict"
        )
    _IMPORTED.add(module)
    return module


def expect_own_weights(path: str) -> None:
    """Raise ModelError where each call of the factory at `package.module:factory` returns other, random weights."""
    first, second = (dict(_called("--classifier", path).named_parameters()) for _ in range(2))
    if any(not torch.equal(parameter, second[name]) for name, parameter in first.items()):
        raise ModelError(
            f"--classifier {path}: each call returns other weights, so they are random; give trained ones with "
            "--weights FILE, or load them in the factory"
        )


def _called(field: str, path: str) -> nn.Module:
    """Return what the factory returns. Raises ModelError, naming the field."""
    module_name, _, factory = path.partition(":")
    try:
        module = _factory(field, module_name, factory)()
    except ModelError:
        raise
    except SystemExit as error:
        # such as a training script without that guard; a worker of Ray would end by it
        raise ModelError(
            f"{field} {path}: it exits (SystemExit: {error}) when it is imported or called; put what it does as a "
            'program below `if __name__ == "__main__":`'
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a library may raise what is no Exception, such as pytest's Skipped
        raise ModelError(
            f"{field} {path}: calling it failed ({type(error).__name__}: {error}); "
            "expected package.module:factory, importable from here and callable without arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{field} {path}: expected an nn.Module, found {type(module).__name__}")
    return module


def _factory(field: str, module_name: str, factory: str) -> Any:
    """Return the factory. Raises ModelError where its module is not found, or has no such function."""
    try:
        imported = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # its own code imports what is not there
        where = "run defuse in the folder that contains it, or set PYTHONPATH to that folder"
        raise ModelError(f"{field} {module_name}:{factory}: cannot import {error.name}; {where}") from error
    if not hasattr(imported, factory):
        raise ModelError(f"{field} {module_name}:{factory}: module {module_name} has no function {factory}")
    return getattr(imported, factory)


def _cnn(spec: RunFile, classes: int) -> nn.Module:
    """Figure 7. Its last row says 10x2; a classifier needs C logits."""
    section, data = spec.classifier, spec.data
    flat = section.channels * (data.image_size >> section.stages) ** 2
    return nn.Sequential(
        *halving_convolutions(data.channels, section.channels, section.stages),
        nn.Flatten(),
        *dense_layers(flat, section.hidden, section.hidden),
        nn.Linear(section.hidden, classes),
    )


class ResNet18(nn.Module):
    """torchvision's ResNet-18 for images in [0, 1], which it normalises as ImageNet's; grey is repeated to RGB."""

    def __init__(self, classes: int, imagenet: bool, stem: str) -> None:
        super().__init__()
        from torchvision.models import ResNet18_Weights, resnet18

        self.net = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1 if imagenet else None)
        self.net.fc = nn.Linear(self.net.fc.in_features, classes)
        if stem == "small":
            self.net.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
            self.net.maxpool = nn.Identity()
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD).view(1, 3, 1, 1), persistent=False)

    def with_own_names(self, weights: Weights, new_head: bool) -> Weights:
        """Return torchvision's state dict of a ResNet-18 with this module's names; any other state dict unchanged.

        With `new_head`, a last layer for another number of classes is replaced by this module's untrained one.
        """
        if "fc.weight" not in weights:
            return weights
        own = {name: tensor.detach().numpy() for name, tensor in self.net.fc.state_dict().items()}
        if new_head and weights["fc.weight"].shape != own["weight"].shape:
            weights = weights | {f"fc.{name}": array for name, array in own.items()}
        return {f"net.{name}": array for name, array in weights.items()}

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> logits (n, C)."""
        logits: Tensor = self.net((images - self.mean) / self.sd)
        return logits


class ReferenceCnn(nn.Module):
    """A stronger network than the paper's: a halving convolution, then three stages of two 3x3 convolutions each.

    Batch normalisation throughout, dropout before the last layer.
    """

    def __init__(self, image_size: int, channels_in: int, channels: int, classes: int) -> None:
        super().__init__()
        side = (image_size + 1) // 2
        stem = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU()]
        channels_in = channels
        for width in (channels, 2 * channels, 4 * channels):
            for first in (channels_in, width):
                layers += [
                    nn.Conv2d(first, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
            if side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            channels_in = width
        self.net = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels_in, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> logits (n, C)."""
        logits: Tensor = self.net(images)
        return logits


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first may halve the image."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (channels_in, channels))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        inner = F.silu(self.norms[0](images))
        again = self.second(F.silu(self.norms[1](self.first(inner))))
        total: Tensor = self.shortcut(images) + again
        return total


class ResidualNet(nn.Module):
    """A small pre-activation ResNet with SiLU: another kind of network than ReferenceCnn.

    A 5x5 convolution, then three stages of one block each, of which the last two halve the image again.
    """

    def __init__(self, channels_in: int, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels_in, channels, 5, stride=2, padding=2, bias=False)
        self.blocks = nn.Sequential(
            _ResidualBlock(channels, channels, 1),
            _ResidualBlock(channels, 2 * channels, 2),
            _ResidualBlock(2 * channels, 4 * channels, 2),
        )
        self.norm = nn.BatchNorm2d(4 * channels)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4 * channels, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> logits (n, C)."""
        maps = F.silu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


def build_classifier(spec: RunFile, classes: int, stored: Weights | None = None) -> nn.Module:
    """Return the untrained (or ImageNet) classifier of the run file: images in [0, 1] -> logits (n, C).

    A program or a model of transformers is read from classifier.weights, or rebuilt from `stored`, its state dict.
    """
    section = spec.classifier
    if section.architecture in EXTERNAL:
        return adapt(_external_classifier(spec, classes, stored), section, classes)
    own = _resnet18(spec, classes) if section.architecture == "resnet18" else _cnn(spec, classes)
    return own if section.class_order is None else reorder(own, section.class_order, classes)


def _resnet18(spec: RunFile, classes: int) -> ResNet18:
    section = spec.classifier
    imagenet = section.imagenet and section.weights is None
    if imagenet and not spec.data.download:
        _expect_imagenet()
    try:
        return ResNet18(classes, imagenet, section.stem)
    except OSError as error:
        raise ModelError(
            f"classifier.imagenet: torchvision could not fetch its ImageNet weights ({error}); "
            "set classifier.imagenet: false, or classifier.weights to a local file"
        ) from error


def _expect_imagenet() -> None:
    """Raise ModelError unless torchvision's weights are in its cache."""
    from torchvision.models import ResNet18_Weights

    cached = Path(torch.hub.get_dir()) / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    if not cached.is_file():
        raise ModelError(
            f"classifier.imagenet: torchvision's weights are not in {cached}, and data.download is false; set it to "
            f"true, or classifier.weights to a copy of {cached.name}"
        )


def _expect_python(module: nn.Module) -> nn.Module:
    """Return a module of Python. Raises ModelError for one of TorchScript, which takes no translation."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            "classifier.import_path: expected a module of Python, found one of TorchScript; save it with "
            "torch.jit.save, and give the file: classifier.architecture: program, classifier.weights: FILE (with "
            "DEFUSE_TRUST_TORCHSCRIPT=1 in the environment)"
        )
    return module


def _open_timm(name: str, classes: int, channels: int) -> nn.Module:
    """Return timm's architecture `name` without weights. Raises ModelError for names that would be downloaded."""
    timm = import_package("classifier.architecture: timm", "timm", error=ModelError)
    if ":" in name or "/" in name:
        raise ModelError(
            f"classifier.timm_model: {name} would be downloaded; expected a plain name of timm such as resnet18, and "
            "classifier.weights with its file"
        )
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    except Exception as error:
        raise ModelError(
            f"classifier.timm_model: timm cannot make {name} ({one_line(error)}); see timm.list_models()"
        ) from error
    return net


def _external_classifier(spec: RunFile, classes: int, stored: Weights | None) -> nn.Module:
    section = spec.classifier
    if section.architecture == "custom":
        return _expect_python(import_module("classifier.import_path", section.import_path or ""))
    if section.architecture == "timm":
        return _open_timm(section.timm_model or "", classes, spec.data.channels)
    if stored is not None:
        source, where = stored["source"].tobytes(), "the run's classifier"
        program = section.architecture == "program"
        return load_program(source, where) if program else transformers_from(source, where)
    assert section.weights is not None  # RunFile has checked it
    if section.architecture == "transformers":
        return open_transformers(section.weights)
    return load_program(read_file(section.weights), str(section.weights))
