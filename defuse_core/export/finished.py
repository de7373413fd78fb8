"""What a finished run has for others: its classifiers, its pictures as files, and its versions in the registry."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from torch import nn

from defuse_core.artifacts import I64, NONE_OF_THE_ABOVE, U8, Corrections, Gallery, Verdicts
from defuse_core.codec import array_digest, decode
from defuse_core.config import RunFile
from defuse_core.data import Images, reopen_splits
from defuse_core.data.images import to_levels, to_picture
from defuse_core.device import ieee_f32
from defuse_core.errors import DamagedError, DataError, InputError, RunMismatchError
from defuse_core.evaluation import Findings, expect_same_answers
from defuse_core.files import expect_new_folder, filling
from defuse_core.models import StoredVae, load_classifier, predict
from defuse_core.models.inference import BATCH
from defuse_core.runs import Run
from defuse_core.store import Store
from defuse_core.tuning_data import held_out_images, tuning_images

log = logging.getLogger("defuse")
TABLE = "labels.csv"


@dataclass(frozen=True)
class PictureRow:
    """One picture: a row of labels.csv."""

    filepath: str  # below the folder
    label: str
    class_index: int  # of the label, as the classifier numbers its classes; ImageFolder numbers the folders
    label_from: str  # votes: the majority on this very picture; scenario: the one label of its scenario
    scenario: int
    # reviewed by the annotators; tuned: drawn to tune on; held-out: drawn to measure the correction
    origin: str
    before: str  # answer of the classifier before the correction
    after: str  # and after it; empty where nothing was corrected
    # file of the training image that it is made from, below data.root; empty where decoded plainly, or of no file
    source: str


@dataclass(frozen=True, eq=False)
class LabelledPictures:
    """Pictures of the scenarios with their labels, for one origin."""

    part: str  # train or test
    origin: str
    label_from: str
    images: Images  # n of them
    scenario: I64  # (n,)
    source: I64 | None  # (n,) training image that each is anchored at; None where decoded plainly


@ieee_f32()
def export_scenarios(run: Run, folder: Path) -> int:
    """Write FOLDER/train/CLASS/*.png, FOLDER/test/CLASS/*.png and labels.csv; return how many pictures.

    Those in `test` are the held-out ones of the accepted scenarios, which a suite checks as well; those in `train` are
    the reviewed ones and D_f. Raises InputError where the run accepted no scenario, or the folder is not empty or
    cannot be written.
    """
    expect_new_folder("--scenarios", folder)
    spec, found = run.spec, Findings.load(run)
    if not len(found.verdicts.accepted):
        raise InputError(f"run {run.name} accepted no failure scenario, so there are no pictures to export")
    before, after = both_classifiers(spec, found)
    classifiers, parts = [before, after] if found.sweep.has_correction else [before], _parts(spec, found)
    classes, files, root = found.models.classes, _training_files(spec, found), spec.data.root

    def file_of(index: int) -> str:
        """Return the file of a training image below data.root; empty where there is none."""
        return "" if files is None or root is None else Path(files[index]).relative_to(root).as_posix()

    with filling("--scenarios", folder) as unfinished:
        rows: list[PictureRow] = []
        for pictures in parts:
            rows += _write(pictures, classifiers, classes, unfinished, file_of=file_of)
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(PictureRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        (unfinished / TABLE).write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
    return len(rows)


def _training_files(spec: RunFile, found: Findings) -> Sequence[str] | None:
    """Return the file of each training image; None where decoded plainly, and where images are in no files."""
    if found.gallery.source is None:
        return None
    try:
        return reopen_splits(spec, found.models.data_fingerprint).train.files
    except (DataError, RunMismatchError) as error:
        log.warning(
            "%s: the column source is empty, since the training images are not available: %s", TABLE, error
        )
        return None


def _parts(spec: RunFile, found: Findings) -> list[LabelledPictures]:
    vae, fixes = StoredVae(spec, found.models.vae), found.fixes
    return [
        _reviewed(found.gallery, found.verdicts),
        _drawn("train", "tuned", tuning_images(vae, fixes), fixes, fixes.tune_anchor),
        _drawn("test", "held-out", held_out_images(vae, fixes), fixes, fixes.test_anchor),
    ]


def _drawn(
    part: str, origin: str, images: Images, fixes: Corrections, anchor: I64 | None
) -> LabelledPictures:
    """Return images that were drawn from each scenario of `fixes` in turn, under the label of the scenario."""
    each = np.repeat(fixes.scenario, len(images) // len(fixes.scenario))
    source = None
    if fixes.anchors is not None and anchor is not None:
        source = fixes.anchors.source[anchor.ravel()]
    return LabelledPictures(part, origin, "scenario", images, each, source)


def _reviewed(gallery: Gallery, verdicts: Verdicts) -> LabelledPictures:
    accepted = verdicts.accepted
    labels = verdicts.image_labels[accepted]  # (A, R)
    labelled = labels != NONE_OF_THE_ABOVE
    scenario = np.repeat(accepted[:, None], labels.shape[1], axis=1)
    return LabelledPictures(
        "train",
        "reviewed",
        "votes",
        Images(gallery.images[accepted][labelled], labels[labelled]),
        scenario[labelled],
        None if gallery.source is None else gallery.source[accepted][labelled],
    )


def _write(
    pictures: LabelledPictures,
    classifiers: Sequence[nn.Module],
    classes: tuple[str, ...],
    folder: Path,
    *,
    file_of: Callable[[int], str],
) -> Iterator[PictureRow]:
    counts: dict[int, int] = {}
    folders = folder_names(classes)
    answered = _answered(classifiers, pictures.images)
    for index, (label, scenario, (levels, answers)) in enumerate(
        zip(pictures.images.labels, pictures.scenario, answered, strict=True)
    ):
        number = counts[int(scenario)] = counts.get(int(scenario), -1) + 1
        name = f"scenario-{scenario:03d}-{pictures.origin}-{number:03d}.png"
        place = Path(pictures.part, folders[label], name)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        to_picture(levels).save(folder / place)
        yield PictureRow(
            filepath=place.as_posix(),
            label=classes[label],
            class_index=int(label),
            label_from=pictures.label_from,
            scenario=int(scenario),
            origin=pictures.origin,
            before=classes[answers[0]],
            after=classes[answers[1]] if len(answers) > 1 else "",
            source="" if pictures.source is None else file_of(pictures.source[index]),
        )


def _answered(classifiers: Sequence[nn.Module], images: Images) -> Iterator[tuple[U8, I64]]:
    """Yield each picture as its file holds it, and the classifiers' answers to it; BATCH are in memory at once."""
    for first in range(0, len(images), BATCH):
        rows = slice(first, first + BATCH)
        levels = to_levels(images.batch(rows))
        stored = Images(levels, images.labels[rows]).batch()
        yield from zip(levels, np.stack([predict(each, stored) for each in classifiers], axis=1), strict=True)


def folder_names(classes: tuple[str, ...]) -> list[str]:
    """Return the folder of each class: its name, or number and name of all where two would share one."""
    names = [name.replace("/", "_").lstrip(".") or "_" for name in classes]
    taken = {name.casefold() for name in names}  # some file systems do not tell a from A
    return names if len(taken) == len(names) else [f"{index}-{name}" for index, name in enumerate(names)]


def both_classifiers(spec: RunFile, found: Findings) -> tuple[nn.Module, nn.Module]:
    """Return the classifier before and after the correction; the same where nothing was corrected.

    Raises RunMismatchError where its code has changed since the run began.
    """
    weights = found.models.classifier, found.sweep.weights or found.models.classifier
    before, after = (load_classifier(spec, each, len(found.models.classes)) for each in weights)
    expect_same_answers(spec, before, found.gallery)
    return before, after


def expect_no_version_of(runs: Store, run: str, versions: Mapping[str, tuple[str, str]], remedy: str) -> None:
    """Raise InputError where a version comes from this run, or may: not from another of its name, nor from its copy.

    `versions` are the name and components_digest of each version's run, by the version's number.
    """
    components = stored_components(runs, run) if versions else None
    if made := [
        number
        for number, (name, digest) in versions.items()
        # Where the run of the version's name is another one, this one was renamed; else it is a copy. Names that differ
        # in case alone can be of one folder.
        if (
            components == digest
            and (name.casefold() == run.casefold() or stored_components(runs, name) != digest)
        )
        or (components is None and name == run)
    ]:
        raise InputError(
            f"run {run}: version {made[-1]} in the registry was made from it, and it is that version's record; {remedy}"
        )


def components_digest(gallery: Gallery) -> str:
    """Return a SHA-256, in hex, of the images drawn from a run's components: it tells runs of one name apart."""
    return array_digest({"codes": gallery.codes, "images": gallery.images})


def stored_components(runs: Store, name: str) -> str | None:
    """Return the components_digest of a run; None where it has no components, or they cannot be read."""
    folder = runs.within(name)
    with contextlib.suppress(FileNotFoundError, DamagedError):
        return components_digest(decode(Gallery, folder.read("gallery.safetensors"), folder.address))
    return None


def registered_versions(runs: Store) -> dict[str, tuple[str, str]]:
    """Return the versions after the last change in the registry of services/serving. Raises DamagedError."""
    changes = runs.within("registry/changes")
    keys = [key for key in changes.list() if re.fullmatch(r"\d{6,}\.json", key)]
    last = max(keys, key=lambda key: (len(key), key), default=None)
    if last is None:
        return {}
    try:
        versions = json.loads(changes.read(last))["versions"].items()
        return {number: (str(info["run"]), info["components_digest"]) for number, info in versions}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{changes.address}/{last}: expected a registry state, found none; restore the file"
        ) from error
