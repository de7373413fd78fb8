"""`defuse_core.debug` and `defuse_core.open`: a run from Python, with a classifier and images in memory.

What is in memory becomes two files of the run, `inputs/classifier.pt2` (torch.export, no pickle) and
`inputs/images.npz`. So workers of a cluster, a resumed run and every command of `defuse` read the run as any other.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
from collections.abc import Callable, KeysView, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from defuse_core.config import (
    DataSection,
    RunFile,
    expect_fields,
    first_problem,
    flat_fields,
    load_run_file,
    parse_run_file,
    with_absolute_root,
)
from defuse_core.data import Images, open_splits
from defuse_core.data.npz import Arrays, column, expect_grey_or_rgb, image_shape, splits_of
from defuse_core.device import torch_defaults
from defuse_core.errors import DataError, InputError, ModelError, RunFileError, RunMismatchError
from defuse_core.formatting import first_few, one_line
from defuse_core.local import local_compute, local_device
from defuse_core.models import expect_storable, is_same_program, program_of
from defuse_core.pipeline import expect_may_go_on, run_defuse
from defuse_core.protocols import Annotators, Compute, Progress, silent
from defuse_core.results import RunResult, is_complete
from defuse_core.runs import IMAGES, Run, has_made_something
from defuse_core.steps import MOST_MINUTES
from defuse_core.store import FolderStore, Store, checked_name, folder_store
from defuse_core.suggest import VALIDATION_SHARE, inspect_data, plan_run
from defuse_core.suggest.classifier_inputs import LARGEST, SMALLEST
from defuse_core.training.reference_models import ReferenceAnnotators

log = logging.getLogger("defuse")
CLASSIFIER, GIVEN = "inputs/classifier.pt2", "inputs/settings.json"  # keys within the run
TRACED_IMAGES = 8  # images in the batch with which a classifier is traced
PRETRAINED_FIELDS = ("weights", "import_path", "timm_model")  # fields of a classifier that is not trained

# images, labels, and tracks if there are any
LabelledImages: TypeAlias = Sequence[npt.ArrayLike | Tensor | None]
Settings: TypeAlias = Mapping[str, Any] | RunFile | str | os.PathLike[str]


def debug(  # noqa: PLR0913 - one keyword per choice, as an estimator of scikit-learn has
    classifier: nn.Module | None = None,
    *,
    train: LabelledImages | None = None,
    validation: LabelledImages | None = None,
    test: LabelledImages | None = None,
    classes: Sequence[str] | None = None,
    store: str | os.PathLike[str] | Store = "runs",
    name: str = "run",
    settings: Settings | None = None,
    minutes: float = 30.0,
    compute: Callable[[Run], AbstractContextManager[Compute]] | None = None,
    annotators: Callable[[Run, Compute], Annotators] = ReferenceAnnotators,
    progress: Progress = silent,
) -> RunResult:
    """Find the failure scenarios of a classifier, correct it there, and return the finished run.

        run = defuse.debug(net, train=(images, labels), test=(more_images, more_labels), name="parts", minutes=10)

    The same call again continues where the last one stopped, and returns at once where the run is finished. Calls of
    several threads, also those that show the images or the corrected classifier of a result, wait for each other. The
    caller's random numbers, of Python and torch too, go on as if nothing had happened.

    Args:
        classifier: Maps images (n, channels, H, W) in [0, 1] to logits (n, C), or to probabilities, or to an output
            with `.logits`. Other input ranges and orders of the classes are settings (classifier.input_range,
            classifier.class_order); a warning says where they seem to be needed. It is used as it is in eval mode,
            also while it is fine-tuned, and is not changed, but its hooks are called: remove those that collect
            what they see. None: the run trains one, or the one of `settings`.
        train, validation, test: Images with integer labels (N,). Images are uint8, or floats in [0, 1], of shape
            (N, H, W), (N, H, W, c) or (N, c, H, W), with H = W even, 8 to 512, and c of 1 or 3. If several show one
            object, a third array (N,) names it. Without `validation`, 15 % of the training images are held out.
        classes: The names of the classes; a label is an index into them. Default: the labels themselves.
        store: Folder of runs (~ is the user's home), or another Store if `settings` name images and weights in files.
        name: Name of the run. It becomes a folder in the store.
        settings: With `train`: the fields that differ from what `defuse init` suggests for these images, such as
            `{"vae": {"epochs": 20}}`. Or a whole run file: its path, or a RunFile. `defuse fields` lists all fields.
            Fields that a later call leaves out stay as earlier calls set them; a warning names them.
        minutes: Time that a new run is planned for, on this machine; later calls keep its plan, run files their sizes.
        compute: Where to compute. Default: in this process. On Ray: `cluster.compute.on_ray("head:6379")`.
        annotators: Who labels the scenarios. Default: the reference models of the run. For people see README; all but
            the reference models need review.annotators: label-studio in `settings`.
        progress: Called with what is done so far; see protocols.py.

    Raises:
        DataError: The images or labels are not as described.
        ModelError: The classifier is no nn.Module, fails on the images or in torch.export, or is untrusted TorchScript.
        RunFileError: The settings are not those of a run file.
        RunMismatchError: A run of this name began with other images, another classifier or other settings.
        VaeHealthError: The β-VAE draws images that are of no use (vae.accept).
        LabelsPending: People have not answered yet; the same call continues later.
    """
    _expect_module(classifier)
    expect_storable(classifier)
    if not 1 <= minutes <= MOST_MINUTES:  # NaN is not, either
        raise InputError(f"minutes: expected 1 to {MOST_MINUTES:,}, found {minutes:g}")
    opened = _opened(store)
    arrays = _arrays({"train": train, "validation": validation, "test": test}, classes)
    run_store = opened.within(checked_name(name))
    with torch_defaults(), run_store.lock():
        given = _Given(run_store, classifier, arrays, settings)
        recorded = Run.recorded(opened, name) if given.begun else None
        spec = given.run_file(recorded, minutes, progress)
        run = Run.start(opened, name, spec if compute else with_absolute_root(spec), check=expect_may_go_on)
        given.keep_settings(minutes)
        _expect_annotators(run, annotators)
        if run.spec == recorded and is_complete(result := RunResult(run, classifier)):
            return result
        with local_compute(run.spec, progress) if compute is None else compute(run) as running:
            run_defuse(run, running, annotators(run, running))
    return RunResult(run, classifier)


def open(run: str | os.PathLike[str], store: str | os.PathLike[str] | Store | None = None) -> RunResult:
    """Return a run that exists, finished or not: `defuse.open("runs/parts")`.

    With `store`, a folder or another Store, `run` is a name in it: `defuse.open("parts", "runs")`, or
    `defuse.open("parts", open_store("s3://bucket/runs"))`, where `open_store` is that of `services.storage`. Raises
    InputError where there is no such run.
    """
    name = os.fspath(run)
    if store is None:
        path = Path(name) if Path(name).name else Path.cwd()  # of `.`
        store, name = path.parent, path.name
    return RunResult(Run.open(_opened(store), checked_name(name)))


def _opened(store: str | os.PathLike[str] | Store) -> Store:
    """Return the store, or that of a folder."""
    if not isinstance(store, str | os.PathLike):
        return store
    path = os.fspath(store)
    if ":/" in path:
        raise InputError(
            f"store {path}: expected a folder; for S3 give store=services.storage.open_store('s3://bucket/prefix')"
        )
    try:
        return folder_store(Path(path).expanduser())
    except RuntimeError as error:
        raise InputError(f"store {path}: expected the home of an existing user after ~") from error


def _expect_module(classifier: object) -> None:
    """Raise ModelError for what is neither a network nor None."""
    if isinstance(classifier, nn.Module | None):
        return
    if isinstance(classifier, type) and issubclass(classifier, nn.Module):
        raise ModelError(f"classifier: expected an nn.Module, found the class {classifier.__name__}; call it")
    raise ModelError(
        f"classifier: expected an nn.Module, found {type(classifier).__name__}; wrap it in a module whose forward maps "
        "images to logits, and which has parameters to fine-tune"
    )


def _expect_annotators(run: Run, annotators: object) -> None:
    people, given = run.spec.review.annotators == "label-studio", annotators is not ReferenceAnnotators
    if given and not people:  # the models would answer, too
        raise InputError(
            "annotators: given, so set review.annotators: label-studio; found reference-models; or leave them out"
        )
    if people and not given:
        raise InputError(
            "review.annotators: label-studio: give annotators too (LabelStudioAnnotators of "
            "services.labeling.annotators), or set review.annotators: reference-models"
        )


def _arrays(parts: Mapping[str, LabelledImages | None], classes: Sequence[str] | None) -> Arrays:
    """Return the images and labels as arrays named as in an .npz file; no arrays without any part."""
    arrays: Arrays = {}
    for name, part in parts.items():
        if part is None:
            continue
        if not isinstance(part, tuple | list) or len(part) not in (2, 3):
            raise DataError(
                f"{name}: expected (images, labels) or (images, labels, objects), found {type(part).__name__}; of a "
                "data set of pairs give tuple(zip(*dataset)), with images in [0, 1] that are not augmented"
            )
        names = (f"{name}_labels", f"{name}_tracks")
        expect_grey_or_rgb(name, part[0])
        try:
            images, *others = map(_array, part[:2] if part[-1] is None else part)
            arrays |= zip(names, map(column, names, others), strict=False)
        except (ValueError, TypeError, RuntimeError) as error:  # lists of several shapes, or of no numbers
            raise DataError(f"{name}: expected images of one size and labels; {one_line(error)}") from error
        arrays[f"{name}_images"] = np.asarray(images, np.float32 if images.dtype.kind == "f" else None)
    if arrays and "train_images" not in arrays:
        raise DataError("train: expected (images, labels), found none; validation and test do not suffice")
    if isinstance(classes, str | bytes | Mapping | Set) and not isinstance(classes, KeysView):
        raise DataError(f"classes: expected a list of names, found {type(classes).__name__}")
    if arrays and classes is not None:
        arrays["classes"] = np.array([name if isinstance(name, bytes) else str(name) for name in classes])
    return arrays


def _array(values: npt.ArrayLike | Tensor | Sequence[Tensor]) -> npt.NDArray[Any]:
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        values = torch.stack(list(values))
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has none
    array = np.asarray(values)
    if array.dtype.kind == "U" and not isinstance(values, np.ndarray):  # a list may mix texts and others
        array = np.asarray(values, object)
    is_text = array.dtype == object and all(isinstance(value, str) for value in array.flat)
    return array.astype(str) if is_text else array


class _Given:
    """What a caller gave: stored in the run's folder where it is in memory, and named there by the run file."""

    def __init__(
        self, store: Store, classifier: nn.Module | None, arrays: Arrays, settings: Settings | None
    ) -> None:
        if (arrays or classifier is not None) and not isinstance(store, FolderStore):
            raise InputError(
                f"store {store.address}: expected a folder, since images and a classifier in memory are kept in the "
                "run; for another store, name files in settings (data.root, classifier.weights)"
            )
        self.store, self.classifier, self.arrays = store, classifier, arrays
        self.settings, self.is_run_file = _tree(settings), not isinstance(settings, Mapping | None)
        self.is_over_plan = bool(arrays) and not self.is_run_file  # settings change a plan, or a recorded run
        self.begun = has_made_something(store)

    def run_file(self, recorded: RunFile | None, minutes: float, progress: Progress) -> RunFile:
        """Return the run file, once the images and the classifier that it names are in place."""
        if not self.arrays and "data" not in self.settings:
            raise DataError("debug: expected train=(images, labels), or settings with data; found neither")
        expect_fields(self.settings, "settings")  # before images are stored and speeds are measured
        sections: dict[str, Any] = {}
        base = _tree(recorded) if self.is_over_plan else {}
        if self.arrays:
            sections["data"], images = self._data(base.get("data", {}))
        elif self.classifier is not None:
            images = open_splits(parse_run_file(self.settings, "settings").data, 0).train
        if self.classifier is not None:
            sections["classifier"] = self._classifier(self.classifier, images, base.get("classifier", {}))
        if self.is_over_plan and recorded is None:
            base = self._planned(sections, minutes, progress)
        return parse_run_file(_merged(_merged(base, self.settings), sections), "settings")

    def _data(self, known: Mapping[str, Any]) -> tuple[dict[str, Any], Images]:
        """Store the images, once they are checked; return section data and the training images.

        `known` is the section that the run has recorded, empty for a new run.
        """
        held = {name: known[name] for name in ("channels", "validation_share") if name in known}
        section = _shape(self.arrays["train_images"]) | held | self.settings.get("data", {})
        section |= {"name": "npz", "root": str(Path(self.store.address, IMAGES))}
        if not self.is_run_file and "validation_images" not in self.arrays:
            section.setdefault("validation_share", VALIDATION_SHARE)
        try:
            checked = DataSection.model_validate(section)
        except ValidationError as error:
            raise RunFileError(f"settings: data.{first_problem(error, DataSection)}") from error
        train = splits_of(self.arrays, checked, 0, "debug").train
        self._keep(IMAGES, "images", self._is_same_images, lambda: _npz(self.arrays))
        return section, train

    def _is_same_images(self, data: bytes) -> bool:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return set(found) == set(self.arrays) and all(
                np.array_equal(stored := found[name], array)
                # a pixel of 1 is black in uint8, and white as a float
                and (not name.endswith("_images") or stored.dtype.kind == array.dtype.kind)
                for name, array in self.arrays.items()
            )

    def _classifier(self, classifier: nn.Module, images: Images, known: Mapping[str, Any]) -> dict[str, Any]:
        """Store the classifier; return section classifier. `known` is as in `_data`."""
        batch = torch.from_numpy(images.batch(slice(0, TRACED_IMAGES)))
        self._keep(
            CLASSIFIER,
            "classifier",
            lambda stored: is_same_program(classifier, stored, images),
            lambda: program_of(classifier, batch),
        )
        section = self.settings.get("classifier", {})
        held = {**known, **section}
        epochs = 0 if self.is_run_file else held.get("epochs", 0)
        weights = str(Path(self.store.address, CLASSIFIER))
        fixed = {"architecture": "program", "weights": weights, "import_path": None, "timm_model": None}
        # not what a probe would suggest: what looks like another input range or order can be the fault that is sought
        meant = {"input_range": held.get("input_range", "0..1"), "class_order": held.get("class_order")}
        return {**section, **fixed, **meant, "epochs": epochs}

    def keep_settings(self, minutes: float) -> None:
        """Store what calls set; log what still applies although this call omits it, or gives other `minutes`."""
        if not self.is_over_plan:
            return
        given = flat_fields(self.settings)
        known = json.loads(self.store.read(GIVEN)) if self.begun and self.store.exists(GIVEN) else {}
        planned = known.pop("minutes", None if self.begun else minutes)
        if planned not in (None, minutes):
            reason = f"minutes={minutes:g} has no effect: the run was planned for {planned:g}"
            log.warning("%s: %s; choose another name", self.store.address, reason)
        if left_out := [name for name in known if name not in given]:
            log.warning(
                "%s: settings from earlier calls still apply although this call omits them: %s",
                self.store.address,
                first_few(left_out, most=3),
            )
        kept = {**known, **given, "minutes": planned}
        self.store.write(GIVEN, json.dumps(kept, default=str, indent=1).encode())

    def _planned(self, sections: dict[str, Any], minutes: float, progress: Progress) -> dict[str, Any]:
        """Return what `defuse init` writes for these images."""
        section = sections.get("classifier") or self.settings.get("classifier", {})
        own = section if any(section.get(field) for field in PRETRAINED_FIELDS) else None
        facts = inspect_data(Path(sections["data"]["root"]), "debug")
        facts = replace(facts, channels=sections["data"]["channels"])
        with local_device(flat_fields(self.settings).get("resources.gpus_per_worker")):
            plan = plan_run(facts, own, minutes, progress)
        for note in plan.notes:
            log.warning("%s", note)
        if "channels" not in self.settings.get("data", {}):  # the classifier may need others
            sections["data"]["channels"] = plan.tree["data"]["channels"]
        return plan.tree

    def _keep(self, key: str, what: str, is_same: Callable[[bytes], bool], made: Callable[[], bytes]) -> None:
        """Store what the caller gave, unless the run began with it. Raises RunMismatchError where it began with other.

        Files of an earlier call that made no artefact are replaced without a comparison: that call may have failed on
        them.
        """
        if not self.begun or not self.store.exists(key):
            self.store.write(key, made())
        elif not is_same(self.store.read(key)):
            raise RunMismatchError(
                f"{self.store.address}: expected the {what} that this run began with, found others; choose "
                f"another name, or give the same {what} to continue"
            )


def _tree(settings: Settings | None) -> dict[str, Any]:
    """Return settings as a tree of sections."""
    if isinstance(settings, str | os.PathLike):
        settings = load_run_file(Path(settings))
    if isinstance(settings, RunFile):
        return settings.model_dump(mode="json")
    tree = copy.deepcopy(dict(settings or {}))
    for name in {"data", "classifier"} & tree.keys():
        if not isinstance(tree[name], Mapping):
            raise RunFileError(f"settings: {name}: expected a section with fields, found {tree[name]}")
    return tree


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with the fields of `changes` replaced, at any depth."""
    merged = dict(tree)
    for name, value in changes.items():
        below = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[name] = _merged(cast(Mapping[str, Any], below), value) if both else value
    return merged


def _shape(images: npt.NDArray[Any]) -> dict[str, int]:
    """Return size and channels as section data has them. Raises DataError where the array holds no usable images."""
    if (shape := image_shape(images)) is None:
        raise DataError(
            "train: expected images of shape (N, H, W), (N, H, W, c) or (N, c, H, W) with c of 1 or 3, found "
            f"{images.shape}"
        )
    height, width, channels = shape
    if min(height, width) < SMALLEST or max(height, width) > LARGEST:
        found = "too small" if min(height, width) < SMALLEST else "too large"
        raise DataError(
            f"debug: train_images: expected {SMALLEST} to {LARGEST} pixels in height and width, "
            f"found {width}x{height}, which is {found}; resize the images"
        )
    return {"image_size": height, "channels": channels}


def _npz(arrays: Arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()
