"""Classifiers that other tools saved: TorchScript, torch.export and Hugging Face transformers.

The first two need no code of the user. `program_inspection` checks a file of torch.export before torch reads it: the
checked bytes, not the path, are what torch reads, and its own zip reader is what both are read with, as Python's can
find other entries in the same bytes. A TorchScript file is code that no inspection makes safe: it needs consent.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import logging
import os
import platform
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import nn
from torch.export.passes import move_to_device_pass

from defuse_core.device import device, plain_attention
from defuse_core.errors import ModelError
from defuse_core.files import is_special_file, weights_in
from defuse_core.formatting import count_of, one_line
from defuse_core.models.adapters import classifier_failure, find_logits
from defuse_core.models.program_inspection import PLAIN, expect_harmless_program
from defuse_core.optional_packages import import_package

OTHER_WAY = (
    "name its factory and its weights in settings instead "
    "(classifier.architecture: custom, import_path, weights)"
)
TRUST = "DEFUSE_TRUST_TORCHSCRIPT"  # 1: load files of TorchScript
LARGEST_BATCH = 512  # images that a classifier gets at once by default: two times correct.batch_size
SOURCE = "source"  # key in a state dict: the bytes that its network is built from


class SelfContainedClassifier(nn.Module):
    """A classifier that is built from one source, which its state dict carries along as the tensor `source`.

    So a run, a λ trial and a served version need no other file than the weights.
    """

    def __init__(self, net: nn.Module, source: bytes) -> None:
        super().__init__()
        self.net = net
        self.source: torch.Tensor
        self.register_buffer(SOURCE, torch.frombuffer(bytearray(source), dtype=torch.uint8))

    def train(self, mode: bool = True) -> SelfContainedClassifier:
        """Set the mode of a network of a library. A program stays in eval mode, as an exported one has no other."""
        self.training = mode
        if not isinstance(self.net, torch.fx.GraphModule):
            self.net.train(mode and not isinstance(self.net, torch.jit.ScriptModule))
        return self

    def forward(self, images: torch.Tensor) -> Any:
        """(n, channels, H, W) -> whatever the network returns.

        In a program attention is computed by torch's plain kernel: the others trust that key and value are as long.
        """
        if not isinstance(self.net, torch.fx.GraphModule):
            return self.net(images)
        with plain_attention:
            return self.net(images)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file of weights. Raises ModelError."""
    try:
        if is_special_file(path):
            raise ModelError(
                f"{path}: expected a file of weights, found a pipe, a device or a socket; copy its content to a file"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: expected a file of weights, found none on {platform.node()}") from error
    except IsADirectoryError as error:
        raise ModelError(
            f"{path}: expected a file of weights, found a folder; a folder of Hugging Face's needs "
            "classifier.architecture: transformers"
        ) from error
    except PermissionError as error:
        raise ModelError(f"{path}: may not be read; fix access") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def program_kind(data: bytes) -> str | None:
    """Return "torchscript" for the bytes of such an archive, "torch.export" for those of a program, else None."""
    try:
        listed = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # the last of newer versions of zip
        return None
    names = {name.partition("/")[2] or name for name in listed}
    if "models/model.json" in names or "serialized_exported_program.json" in names:
        return "torch.export"
    return "torchscript" if any(name.startswith("code/") for name in names) else None


def expect_trusted(where: str) -> None:
    """Raise ModelError, of a TorchScript program, unless the environment says that its author is trusted."""
    if os.environ.get(TRUST) != "1":
        raise ModelError(
            f"{where}: found a TorchScript program, which can do whatever its author wants on this machine; if you "
            f"trust its author, set {TRUST}=1 (on every node of a cluster), else save the network with "
            "torch.export.save, or give its function and a state dict (classifier.architecture: custom, import_path, "
            "weights)"
        )


def expect_storable(module: nn.Module | None) -> None:
    """Raise ModelError for a module of TorchScript, which is stored as such a file, where none are loaded."""
    if module is not None and isinstance(_unwrapped(module), torch.jit.ScriptModule):
        expect_trusted("classifier")


def _expect_harmless(data: bytes, where: str) -> None:
    """Raise ModelError for a torch.export file that could do more than compute with tensors."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    names = reader.get_all_records()
    listed = [name.partition("/")[2] for name in zipfile.ZipFile(io.BytesIO(data)).namelist()]
    if sorted(names) != sorted(listed) or len({name.lower() for name in names}) < len(names):
        raise ModelError(
            f"{where}: the entries of its zip archive are ambiguous (a name twice, or two lists of entries), so it is "
            "not loaded; save the network again"
        )
    expect_harmless_program(reader, names, where)


def load_program(data: bytes, where: str) -> SelfContainedClassifier:
    """Return the classifier in the bytes of a TorchScript or torch.export file. Raises ModelError naming `where`."""
    kind = program_kind(data)
    if kind is None:
        raise ModelError(
            f"{where}: expected a file of torch.jit.save or torch.export.save, found neither; a state dict, or a whole "
            "module of torch.save, needs its code: --classifier package.module:factory --weights FILE (in a run file "
            "classifier.architecture: custom, import_path and weights; the file is to hold the state dict)"
        )
    if kind == "torchscript":
        expect_trusted(where)
    try:
        net = _load_script(data) if kind == "torchscript" else _load_exported(data, where)
    except ModelError:
        raise
    except Exception as error:  # on broken files both loaders raise a dozen kinds of errors
        raise ModelError(
            f"{where}: torch cannot read this {kind} file ({one_line(error)}); save it again with torch "
            f"{torch.__version__}"
        ) from error
    return SelfContainedClassifier(net, data)


# classes of torch, by name since importing those of torch.compile takes a second, and where they hold the network
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the network in the wrappers of torch.compile, DataParallel and DistributedDataParallel.

    Raises ModelError for a wrapper with hooks of its own, which the network in it lacks.
    """
    while type(module).__module__.startswith("torch.") and (name := WRAPPERS.get(type(module).__name__)):
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"the classifier: {type(module).__name__} has hooks of its own; register them at its .{name}"
            )
        module = getattr(module, name)
    return module


def copy_for_inference(module: nn.Module) -> nn.Module:
    """Return a copy of the module on the CPU in eval mode, of a wrapped one of the network itself.

    Raises ModelError where it holds what cannot be copied.
    """
    module = _unwrapped(module)
    if not isinstance(module, torch.jit.ScriptModule):
        try:
            return copy.deepcopy(module).cpu().eval()
        except Exception as error:  # of any object that the module holds
            raise ModelError(f"the classifier cannot be copied ({one_line(error)}); {OTHER_WAY}") from error
    out = io.BytesIO()
    torch.jit.save(module, out)
    return _load_script(out.getvalue()).eval()


def program_of(module: nn.Module, images: torch.Tensor) -> bytes:
    """Return the bytes from which load_program builds the module as it is in eval mode; the module stays unchanged.

    It returns the logits alone, but a TorchScript module is stored as it is. `images` (n, channels, H, W), two or more,
    is what it is traced with. Raises ModelError where the module fails on them or torch.export cannot follow its code.
    """
    net = copy_for_inference(module)
    # a class of the output would have to be known to each reader
    if not isinstance(net, torch.jit.ScriptModule):
        net.register_forward_hook(lambda _module, _arguments, returned: find_logits(returned)[0])
    try:
        with torch.no_grad():  # what it keeps from this call is traced below, with gradients
            net(images)
    except ModelError:
        raise
    except Exception as error:
        raise classifier_failure(net, images, error) from error
    out = io.BytesIO()
    if isinstance(net, torch.jit.ScriptModule):
        torch.jit.save(net, out)
        return out.getvalue()
    try:
        with warnings.catch_warnings(), _quiet_exporter():
            warnings.simplefilter("ignore")
            sizes: Any = {0: torch.export.Dim("images")}
            takes = next(iter(inspect.signature(net.forward).parameters.values()))
            shapes = ((sizes,),) if takes.kind is takes.VAR_POSITIONAL else (sizes,)  # forward(self, *inputs)
            torch.export.save(torch.export.export(net, (images,), dynamic_shapes=shapes, strict=False), out)
    except Exception as error:  # torch's exporter raises a dozen kinds of errors
        raise ModelError(
            f"torch.export cannot follow the classifier's code ({one_line(error)}); {OTHER_WAY}"
        ) from error
    return out.getvalue()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from printing the graph of code that it cannot follow; the error says it in one line."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    try:
        logger.disabled = True
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = before


def _load_script(data: bytes) -> nn.Module:
    net: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    return net


def _load_exported(data: bytes, where: str) -> nn.Module:
    _expect_harmless(data, where)
    program = torch.export.load(io.BytesIO(data))
    _expect_any_batch(program, where)
    # also to the CPU: the graph names the device of the export where it makes tensors
    return move_to_device_pass(program, device()).module()


def _expect_any_batch(program: torch.export.ExportedProgram, where: str) -> None:
    """Raise ModelError for a program of batches of one size, to which torch.export fixes them, or of few images."""
    first = program.graph_signature.user_inputs[:1]
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.nodes if node.name in first]
    if not shapes or not shapes[0]:
        return
    if isinstance(shapes[0][0], int):
        raise ModelError(
            f"{where}: exported for batches of {count_of(shapes[0][0], 'image')}, expected any number; export it with "
            "an example of two images and dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    bounds = program.range_constraints.get(shapes[0][0].node.expr)
    if bounds is not None and bounds.upper < LARGEST_BATCH:
        raise ModelError(
            f"{where}: exported for batches of at most {count_of(int(bounds.upper), 'image')}, expected any number; "
            "export it with dynamic_shapes=({0: torch.export.Dim('batch')},), without max"
        )


PLAIN_TEXTS = {  # keys of config.json with plain texts, at any depth
    "_name_or_path", "_out_features", "act_layer", "activation_function", "architecture", "architectures", "down_ops",
    "dtype", "finetuning_task", "global_padding", "global_pool", "hidden_act", "hidden_activation", "id2label",
    "layer_type", "layer_types", "model_type", "norm_layer", "out_features", "pooler_act", "pooling_type",
    "problem_type", "qkv_projection_method", "rope_type", "stage_names", "stem_act_func", "torch_dtype",
    "transformers_version",
}  # fmt: skip
LABELS = {"id2label", "label2id", "label_names"}  # free texts, but only at the top level
# in place of what is shown at most, and of timm's description of weights, whose key marks a folder of timm's
UNUSED: dict[str, object] = {"_name_or_path": "", "label_descriptions": {}, "pretrained_cfg": {}}
RENAMING = ("attribute_map", "sub_configs")  # keys that make other attributes of those that were inspected
OF_DEPTH = re.compile("layers|depth|blocks|repeats|per_block")  # matches keys that count parts of a network
MOST_PARTS, LARGEST_NUMBER = 1000, 10**6


def open_transformers(folder: Path) -> SelfContainedClassifier:
    """Return the AutoModelForImageClassification in a local folder: config.json and .safetensors files. No download.

    transformers gets what these files hold, not the folder. Raises ModelError where transformers is not installed, or
    config.json could name other files, downloads or code.
    """
    try:
        source = read_file(folder / "config.json")
    except ModelError as error:
        raise ModelError(
            f"{folder}: expected a folder written by save_pretrained, with a readable config.json"
        ) from error
    if not (files := weights_in(folder)):
        raise ModelError(
            f"{folder}: expected weights in model.safetensors, or in its parts, found none; save the model with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    try:
        weights = {
            name: tensor for file in files for name, tensor in load_safetensors(read_file(file)).items()
        }
        untrained: Any = transformers_from(source, str(folder)).net
        net: nn.Module = type(untrained).from_pretrained(
            None, config=untrained.config, state_dict=weights, dtype="float32"
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: transformers cannot load it ({one_line(error)})") from error
    return SelfContainedClassifier(net, source)


def transformers_from(source: bytes, where: str) -> SelfContainedClassifier:
    """Return the untrained network that the bytes of a config.json describe. Raises ModelError naming `where`."""
    config = _harmless_config(source, where)
    library = _transformers()
    with tempfile.TemporaryDirectory() as folder:  # AutoConfig reads nothing but folders
        Path(folder, "config.json").write_text(json.dumps(config))
        made = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    net: nn.Module = library.AutoModelForImageClassification.from_config(made, trust_remote_code=False)
    return SelfContainedClassifier(net.float(), source)


def _harmless_config(source: bytes, where: str) -> dict[str, Any]:
    """Return a config.json without UNUSED.

    Raises ModelError for a text that transformers or timm could take for a file, address or code, and for a number that
    would make a network without end.
    """
    config = {key: UNUSED.get(key, value) for key, value in json.loads(source).items()}
    for key, leaf in _leaves({key: value for key, value in config.items() if key not in LABELS}):
        if isinstance(leaf, str) and not (key in PLAIN_TEXTS and PLAIN.fullmatch(leaf)):
            raise ModelError(
                f"{where}: its config.json has {leaf[:80]!r} for {key}, which could name a file, a download or code, "
                "so it is not loaded; remove that entry, or use classifier.architecture: custom with an import path"
            )
        most = MOST_PARTS if OF_DEPTH.search(key) else LARGEST_NUMBER
        if isinstance(leaf, int) and leaf > most:
            raise ModelError(
                f"{where}: its config.json has {str(leaf)[:80]} for {key}, expected at most {most:,}; correct it"
            )
    return config


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield (key, value) for every text and number in a tree of JSON, and for keys that no configuration has.

    In place of a number as key the one around it is yielded.
    """
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in RENAMING or not PLAIN.fullmatch(name):
                yield "a key", name
            yield from _leaves(value, key if name.isdigit() else name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, key)
    else:
        yield key, tree


def class_names_of(classifier: nn.Module) -> tuple[str, ...] | None:
    """Return the class names that the model's own configuration lists, in the order of its logits, or None."""
    config = getattr(getattr(classifier, "net", None), "config", None)
    names = getattr(config, "id2label", None)
    if not names:
        return None
    listed = tuple(str(names[index]) for index in sorted(names))
    return None if listed[0].startswith("LABEL_") else listed


def _transformers() -> Any:
    library = import_package("classifier.architecture: transformers", "transformers", error=ModelError)
    library.utils.logging.disable_progress_bar()
    return library
