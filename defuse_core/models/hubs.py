"""Classifiers of other libraries: local folders of Hugging Face transformers, and architectures of timm by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from defuse_core.errors import ModelError
from defuse_core.models.programs import SelfContainedClassifier

REMOTE_CODE = "auto_map"  # of config.json: Python files beside the weights, which are never run


def open_transformers(folder: Path) -> SelfContainedClassifier:
    """Return the AutoModelForImageClassification in a local folder: config.json and .safetensors files. No download.

    Raises ModelError where transformers is not installed, or the folder holds anything that would be unpickled or run.
    """
    source = _read_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: expected weights in .safetensors files, found none; save the model with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    auto = _transformers().AutoModelForImageClassification
    try:
        net: nn.Module = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="float32"
        )
    except Exception as error:
        raise ModelError(f"{folder}: transformers cannot load it ({_first_line(error)})") from error
    return SelfContainedClassifier(net, source)


def transformers_from(source: bytes) -> SelfContainedClassifier:
    """Return the untrained network that the bytes of a config.json describe."""
    library, config = _transformers(), json.loads(source)
    made = library.AutoConfig.for_model(**config)
    net: nn.Module = library.AutoModelForImageClassification.from_config(made, trust_remote_code=False)
    return SelfContainedClassifier(net.float(), source)


def class_names_of(classifier: nn.Module) -> tuple[str, ...] | None:
    """Return the class names that the model's own configuration lists, in the order of its logits, or None."""
    config = getattr(getattr(classifier, "net", None), "config", None)
    names = getattr(config, "id2label", None)
    if not names:
        return None
    listed = tuple(str(names[index]) for index in sorted(names))
    return None if listed[0].startswith("LABEL_") else listed


def range_of_folder(folder: Path) -> str | None:
    """Return the input range that preprocessor_config.json describes, as classifier.input_range names it, or None."""
    from defuse_core.models.adapters import INPUT_RANGES

    try:
        config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        scale = (
            float(config.get("rescale_factor", 1 / 255)) * 255 if config.get("do_rescale", True) else 255.0
        )
        normalised = config.get("do_normalize", True)
        mean, sd = (config["image_mean"], config["image_std"]) if normalised else ([0.0], [1.0])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, (shift, factor) in INPUT_RANGES.items():
        if abs(scale / sd[0] - 1 / factor[0]) < 0.01 and abs(mean[0] - shift[0]) < 0.01:
            return name
    return None


def open_timm(name: str, classes: int, channels: int) -> nn.Module:
    """Return timm's architecture `name` without weights. Raises ModelError for names that would be downloaded."""
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            "classifier.architecture: timm needs timm; install it with pip install 'defuse[timm]'"
        ) from error
    if ":" in name or "/" in name:
        raise ModelError(
            f"classifier.timm_model: {name} would be downloaded; expected a plain name of timm such as resnet18, and "
            "classifier.weights with its file"
        )
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    except Exception as error:
        raise ModelError(
            f"classifier.timm_model: timm cannot make {name} ({_first_line(error)}); see timm.list_models()"
        ) from error
    return net


def _read_config(folder: Path) -> bytes:
    try:
        source = (folder / "config.json").read_bytes()
        config = json.loads(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: expected a folder written by save_pretrained, with a readable config.json"
        ) from error
    if REMOTE_CODE in config:
        raise ModelError(
            f"{folder}: its config.json asks to run Python files of the folder ({REMOTE_CODE}), and none is run; "
            "use classifier.architecture: custom with an import path of your own"
        )
    return source


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "classifier.architecture: transformers needs transformers; "
            "install it with pip install 'defuse[transformers]'"
        ) from error
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    return library


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
