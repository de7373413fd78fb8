"""The corrected classifier of a finished run as .safetensors, .pt2 or .onnx, compared with it on 1,000 images."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save
from torch import Tensor, nn

from defuse_core.artifacts import F32, Gallery, Models, Sweep, Verdicts, Weights
from defuse_core.config import ClassifierSection, RunFile
from defuse_core.correct import no_lambda_chosen
from defuse_core.data import reopen_splits
from defuse_core.device import computing_on
from defuse_core.errors import DataError, InputError, ModelError, RunMismatchError
from defuse_core.evaluation import expect_same_code
from defuse_core.files import expect_writable, replace_file, writing
from defuse_core.formatting import class_difference, listed, one_line
from defuse_core.models import ResNet18, SelfContainedClassifier, load_classifier
from defuse_core.models.adapters import (
    CODE_ELSEWHERE,
    EXTERNAL,
    INPUT_RANGES,
    as_logits,
    plain_section,
    raw_output,
    scaled,
)
from defuse_core.models.probe import COMPARED_AT_ONCE, COMPARED_IMAGES
from defuse_core.models.programs import SOURCE, class_names_of
from defuse_core.optional_packages import import_package
from defuse_core.protocols import silent
from defuse_core.runs import UNFINISHED, Run

SUFFIXES = (".safetensors", ".pt2", ".onnx")
FACTS = "defuse.json"
TOLERANCE = 1e-3  # share of the largest logit: other kernels add in another order

Answer = Callable[[F32], F32]  # images (n, channels, H, W) in [0, 1] -> logits (n, C)


@dataclass(frozen=True)
class ExportedModel:
    """A written file, and how its answers compare with those of the run's classifier."""

    path: Path
    images: int
    source: str  # which images were compared
    same_answers: int
    difference: float  # largest difference of a logit


def export_model(run: Run, path: Path) -> ExportedModel:
    """Write the corrected classifier of a finished run to `path`, and compare the file's answers with the run's.

    .safetensors holds the state dict under the network's own names, and as metadata what that network gets and
    returns: input_range, outputs and class_order (JSON: for each of `classes` the index of its output, or null).
    .pt2 and .onnx hold the whole network, from images in [0, 1] to logits in the order of `classes`, for batches of any
    size. Every file names the run, the classes (JSON), channels and image_size: .onnx in metadata_props, .pt2 as a JSON
    object in its extra file FACTS. A file at `path` is replaced only by one that passes. Raises InputError where the
    run has no corrected classifier, its code has changed or `path` cannot be written, ModelError where the answers
    differ.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"--to {path}: expected a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    models, classifier = corrected_classifier(run)
    example, facts = _example(run), _facts(run, models)
    with writing("--to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    expect_writable("--to", path)
    network = ClassifierForExport(classifier, run.spec.classifier)
    with _failure_named(path):
        if path.suffix == ".safetensors":
            data, answer = _as_safetensors(run, models, classifier, path)
        elif path.suffix == ".pt2":
            data, answer = _as_program(network, example, facts)
        else:
            data, answer = _as_onnx(network, example, facts, path)
    images, source = _sample_images(run, models)
    done = _compared(path, classifier, answer, images, source)
    replace_file("--to", path, data)
    return done


def corrected_classifier(run: Run) -> tuple[Models, nn.Module]:
    """Return what the run trained, and its corrected classifier in eval mode.

    Raises InputError where there is none, RunMismatchError where its code has changed since the run began.
    """
    models, sweep = run.load(Models), run.load(Sweep)
    if models is None or sweep is None:
        raise run.incomplete_error(UNFINISHED)
    if not sweep.has_correction:
        raise InputError(
            f"run {run.name} corrected nothing ({why_not_corrected(run)}), so there is no corrected classifier"
        )
    if run.spec.classifier.architecture in CODE_ELSEWHERE:
        expect_same_code(run.spec, models, run.require(Gallery), progress=silent)
    return models, _load_on_cpu(run.spec, sweep.weights, len(models.classes), "the run's classifier")


def why_not_corrected(run: Run) -> str:
    """Return why a finished run has no corrected classifier."""
    verdicts = run.load(Verdicts)
    if verdicts is not None and len(verdicts.accepted):
        sweep = run.require(Sweep)
        return no_lambda_chosen(len({row.lam for row in sweep.rows}), len(sweep.failed))
    return f"no failure scenario was accepted; `{run.command('report')}` says why"


def _load_on_cpu(spec: RunFile, weights: Weights, classes: int, where: str) -> nn.Module:
    """Return the classifier in eval mode, in the memory layout that the exporters expect."""
    with computing_on(torch.device("cpu")):
        module = load_classifier(spec, weights, classes, where)
    moved: nn.Module = module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, unused-ignore]
    return moved.eval()


class ClassifierForExport(nn.Module):
    """The network with what classifier.input_range, outputs and class_order say, and without the file it came from."""

    def __init__(self, classifier: nn.Module, section: ClassifierSection) -> None:
        super().__init__()
        self.net = classifier.net if isinstance(classifier, SelfContainedClassifier) else classifier
        self.training = False  # its parts are in eval mode; an exported program has no other
        is_external = section.architecture in EXTERNAL
        self.input_range = section.input_range if is_external else "0..1"
        self.outputs = section.outputs if is_external else "logits"
        # buffers, since a tensor that is made in a call stays on the CPU where the exported program is moved
        order = None if section.class_order is None else torch.tensor(section.class_order)
        self.shift: Tensor
        self.factor: Tensor
        self.order: Tensor | None
        self.register_buffer("order", order)
        if self.input_range != "0..1":
            for name, values in zip(("shift", "factor"), INPUT_RANGES[self.input_range], strict=True):
                self.register_buffer(name, torch.tensor(values))

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) in [0, 1] -> logits (n, C)."""
        if self.input_range != "0..1":
            images = scaled(images, self.shift, self.factor)
        return as_logits(raw_output(self.net, images, "0..1"), self.outputs, self.order)


def plain_weights(classifier: nn.Module) -> Weights:
    """Return the state dict under the names of the network itself, such as torchvision's for a ResNet-18."""
    wrapped = isinstance(classifier, ResNet18 | SelfContainedClassifier)
    return {
        name.removeprefix("net.") if wrapped else name: tensor.cpu().contiguous().numpy()
        for name, tensor in classifier.state_dict().items()
        if name != SOURCE or not wrapped
    }


def _facts(run: Run, models: Models) -> dict[str, str]:
    """Return what a user of the network has to know beside it, as the metadata of its file."""
    data = run.spec.data
    return {
        "run": run.name,
        "classes": json.dumps(models.classes),
        "channels": str(data.channels),
        "image_size": str(data.image_size),
    }


def expect_stated_classes(
    section: ClassifierSection, classifier: nn.Module, classes: tuple[str, ...], whose: str
) -> None:
    """Raise InputError where the classifier's own file names other classes than `classes`, or in another order.

    Names of Hugging Face's count where some are among `classes`. A class_order that is given is believed.
    """
    if section.class_order is not None:
        return
    names = None if section.weights is None else _stated_classes(Path(section.weights))
    if names is None and set(classes) & set(listed := class_names_of(classifier) or ()):
        names = listed
    if names is None or names == classes:
        return
    wanted = f"{section.weights}: expected the classes of {whose}, in their order"
    if len(names) != len(classes):
        differ = class_difference(names, classes, "the file", whose)
        raise InputError(
            f"{wanted}; {differ}; a classifier of other classes needs the suite of a run of its own"
        )
    pairs = enumerate(zip(classes, names, strict=True))
    number, (expected, found) = next(each for each in pairs if each[1][0] != each[1][1])
    raise InputError(
        f"{wanted}; its class {number} is {found}, expected {expected}; if its outputs are in another order, or "
        "its names are wrong, set classifier.class_order to the index of each class's output"
    )


def _stated_classes(path: Path) -> tuple[str, ...] | None:
    """Return the classes that a file of export_model names; None for any other file."""
    with contextlib.suppress(OSError, RuntimeError, SafetensorError, KeyError, TypeError, ValueError):
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                facts = file.metadata()
        else:
            facts = json.loads(torch._C.PyTorchFileReader(str(path)).get_record(f"extra/{FACTS}"))
        classes = json.loads(facts["classes"])
        if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
            return tuple(classes)
    return None


def _as_safetensors(run: Run, models: Models, classifier: nn.Module, path: Path) -> tuple[bytes, Answer]:
    section = plain_section(run.spec.classifier)
    facts = {
        **_facts(run, models),
        "format": "pt",
        "class_order": json.dumps(section.class_order),
        "architecture": section.architecture,
        "input_range": section.input_range,
        "outputs": section.outputs,
    }
    data = save(plain_weights(classifier), metadata=facts)
    again = _load_on_cpu(run.spec, _full(classifier, load(data)), len(models.classes), str(path))
    return data, _answers_of(again)


def _full(classifier: nn.Module, plain: Weights) -> Weights:
    """Return weights under this classifier's names: the reverse of plain_weights."""
    if not isinstance(classifier, ResNet18 | SelfContainedClassifier):
        return plain
    full = {f"net.{name}": array for name, array in plain.items()}
    if isinstance(classifier, SelfContainedClassifier):
        full[SOURCE] = classifier.source.cpu().numpy()
    return full


def _as_program(module: nn.Module, example: Tensor, facts: dict[str, str]) -> tuple[bytes, Answer]:
    exported = io.BytesIO()
    torch.export.save(_traced(module, example), exported, extra_files={FACTS: json.dumps(facts)})
    program = torch.export.load(io.BytesIO(exported.getvalue()))
    return exported.getvalue(), _answers_of(program.module())


def _as_onnx(module: nn.Module, example: Tensor, facts: dict[str, str], path: Path) -> tuple[bytes, Answer]:
    # torch's exporter needs the others
    onnxruntime = import_package(f"--to {path}", "onnxruntime", "onnx", "onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        _traced(module, example),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert exported is not None  # without a file name, torch returns the program
    proto = exported.model_proto
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value)
    data: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def answer(images: F32) -> F32:
        logits: F32 = session.run(None, {name: images})[0]
        return logits

    return data, answer


def _traced(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise InputError(
            "the classifier is TorchScript, which torch.export does not read; export its weights with "
            "--to model.safetensors"
        )
    shapes = ({0: torch.export.Dim("images")},)
    program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths on this machine, and lines of the user's code
    return program


def _example(run: Run) -> Tensor:
    data = run.spec.data
    return torch.rand(2, data.channels, data.image_size, data.image_size)


def _answers_of(module: nn.Module) -> Answer:
    def answer(images: F32) -> F32:
        with torch.inference_mode():
            logits: F32 = module(torch.from_numpy(images)).numpy()
            return logits

    return answer


def _sample_images(run: Run, models: Models) -> tuple[F32, str]:
    """Return up to 1,000 images (n, channels, H, W) of the data set, or the reviewed ones where it is not available."""
    try:
        splits = reopen_splits(run.spec, models.data_fingerprint)
    except (DataError, RunMismatchError):
        gallery = run.load(Gallery)
        assert gallery is not None  # a sweep comes after it
        images = gallery.images.reshape(-1, *gallery.images.shape[2:])
        return np.ascontiguousarray(images[:COMPARED_IMAGES]), "reviewed (the data set is not available)"
    parts, names, missing = [], [], COMPARED_IMAGES
    for name in ("test", "validation", "train"):
        if missing > 0 and name in splits.parts():
            parts.append(splits.parts()[name].batch(slice(0, missing)))
            names.append(name)
            missing -= len(parts[-1])
    return np.concatenate(parts), listed(names)


def _compared(path: Path, classifier: nn.Module, answer: Answer, images: F32, source: str) -> ExportedModel:
    own = _answers_of(classifier)
    pairs = [
        (own(images[start : start + COMPARED_AT_ONCE]), answer(images[start : start + COMPARED_AT_ONCE]))
        for start in range(0, len(images), COMPARED_AT_ONCE)
    ]
    expected, found = (np.concatenate(logits) for logits in zip(*pairs, strict=True))
    difference = float(np.abs(expected - found).max())
    same = int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):  # nan is no small difference
        raise ModelError(
            f"--to {path}: not written, since its logits differ from the run's by up to {difference:.3g} on "
            f"{len(images)} {source} images; try another format"
        )
    return ExportedModel(path, len(images), source, same, difference)


@contextlib.contextmanager
def _failure_named(path: Path) -> Iterator[None]:
    """Turn whatever the exporters of torch raise into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (InputError, OSError):
        raise
    except Exception as error:  # torch's exporters raise a dozen kinds of errors
        reason = f"{type(error).__name__}: {one_line(error, limit=300)}"
        raise ModelError(
            f"--to {path}: torch cannot export this network ({reason}); use --to model.safetensors"
        ) from error
