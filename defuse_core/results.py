"""What `defuse_core.debug` and `defuse_core.open` return. All is read from the run when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from torch import nn

from defuse_core.artifacts import F32, F64, I64, Health, Models
from defuse_core.data import Images, reopen_splits
from defuse_core.data.npz import rows_in_file
from defuse_core.device import torch_defaults
from defuse_core.distill.draws import distances_from
from defuse_core.errors import DefuseError, InputError, ModelError
from defuse_core.evaluation.health import with_measured_health
from defuse_core.export import corrected_classifier, plain_weights
from defuse_core.formatting import count_of
from defuse_core.local import local_device
from defuse_core.models import (
    copy_for_inference,
    encode_images,
    load_classifier,
    load_vae,
    predict,
    set_weights,
)
from defuse_core.models.adapters import adapt, is_adapted, plain_section
from defuse_core.pipeline import load_finished
from defuse_core.report import Report, parse_report
from defuse_core.report.build import FinishedRun, build_report
from defuse_core.report.html import render_real, render_run, render_scenarios, scenario_card
from defuse_core.report.schema import Scenario
from defuse_core.runs import UNFINISHED, Run
from defuse_core.store import GONE

if TYPE_CHECKING:
    import pandas as pd

IMAGE_OF = {"train": "training image", "validation": "validation image"}
SHARES = ("before", "after", "judged_before", "judged_plain", "judged_after")  # columns of to_frame
COLUMNS = ("accepted", "label", "mistaken_for", "name", "purity", "support", *SHARES, "confirmed")


class RunResult:
    """A run and what it found."""

    def __init__(self, run: Run, classifier: nn.Module | None = None) -> None:
        """`classifier` is the one given by the user, if it is in memory; `corrected` returns a copy of it."""
        self.run, self._classifier = run, classifier
        self._codes: dict[str, F32] = {}  # of the parts, from when they are first needed

    @cached_property
    def report(self) -> Report:
        """All figures, as in report.json: `run.report.accuracy.before.test`. Raises InputError before the run's end.

        Where another version of Defuse wrote report.json, they are computed again from what the run has stored.
        """
        try:
            text = self.run.store.read("report.json")
        except FileNotFoundError as error:
            raise self.run.incomplete_error(UNFINISHED) from error
        try:
            return parse_report(text, f"{self.run.store.address}/report.json")
        except InputError:
            return build_report(self.run, self._finished)

    @property
    def page(self) -> str:
        """Where the report is, as a page for the browser."""
        return f"{self.run.store.address}/report.html"

    @cached_property
    def scenarios(self) -> ScenarioList:
        """All scenarios that were reviewed; the index of each is its number. Raises InputError before the run's end."""
        return ScenarioList(self, [ScenarioView(self, row) for row in self.report.scenarios.list])

    def health(self) -> Health:
        """Return whether the β-VAE's images are of use. Raises InputError before the models are trained."""
        return self._models.health

    @torch_defaults()
    def corrected(self, like: nn.Module | None = None) -> nn.Module:
        """Return the corrected classifier on the CPU, in eval mode: images (n, channels, H, W) in [0, 1] -> logits.

        After `debug` it is a copy of the module that was given. After `open` it is the network as the run stores it,
        or with `like` a copy of that module, which has to be of the same architecture (resnet18: torchvision's, for
        which a grey image is repeated to three channels). Raises InputError where the run corrected nothing, ModelError
        where the weights do not fit `like`, or where `like` has a translation of Defuse, as what this returns may have.
        """
        models, stored = corrected_classifier(self.run)
        if like is not None and is_adapted(like):
            raise ModelError(
                "like: expected the network itself, found one whose images or answers Defuse translates already, such "
                "as `corrected` returns it; give the module as it was built"
            )
        like = self._classifier if like is None else like
        if like is None:
            return stored
        net = copy_for_inference(like)
        set_weights(net, plain_weights(stored), "corrected")
        return adapt(net, plain_section(self.run.spec.classifier), len(models.classes))

    def __repr__(self) -> str:
        return f"<run {_shown(self.run.store.address)}: {self._summary()}>"

    def _repr_html_(self) -> str:
        try:
            report = self.report
        except DefuseError:
            report = None
        return render_run(report, self._summary(), _shown(self.page))

    def _summary(self) -> str:
        """Return the headline, or in its place why there is none: a notebook shows what it has."""
        if not self.run.store.exists("report.json"):
            return "not finished" if self.run.exists() else GONE
        try:
            return self.report.headline
        except DefuseError as error:
            return str(error)

    @cached_property
    def _models(self) -> Models:
        models = self.run.load(Models)
        if models is None:
            raise self.run.incomplete_error("has no models yet; the call that started it continues it")
        return with_measured_health(self.run, models)

    @cached_property
    def _finished(self) -> FinishedRun:
        return load_finished(self.run)

    @cached_property
    def _parts(self) -> Mapping[str, Images]:
        return reopen_splits(self.run.spec, self._models.data_fingerprint).parts()

    def _part(self, name: str) -> Images:
        if name not in self._parts:
            raise InputError(f"run {self.run.name}: its data set has no {name} images")
        return self._parts[name]

    def _codes_of(self, name: str) -> F32:
        if name not in self._codes:
            self._codes[name] = encode_images(load_vae(self.run.spec, self._models.vae), self._part(name))
        return self._codes[name]

    @cached_property
    def _before(self) -> nn.Module:
        return load_classifier(self.run.spec, self._models.classifier, len(self._models.classes))

    @cached_property
    def _rows(self) -> dict[str, I64]:
        """Rows of the images in the arrays that were given, by part; only for images that came as arrays."""
        data = self.run.spec.data
        return rows_in_file(data, self.run.spec.seed) if data.name == "npz" else {}

    def _real_images(self, name: str, rows: I64, distances: F64) -> RealImages:
        images, classes = self._part(name).take(rows), self._models.classes
        return RealImages(
            images=images.batch(),
            labels=tuple(classes[label] for label in images.labels),
            answers=tuple(classes[answer] for answer in predict(self._before, images)),
            rows=self._rows[name][rows] if name in self._rows else rows,
            files=images.files,
            distances=distances,
            part=name,
        )

    def _show(self, scenarios: Sequence[ScenarioView]) -> str:
        cards = [scenario_card(scenario.row, self._finished) for scenario in scenarios]
        return render_scenarios(cards, self._models.classes)


def is_complete(result: RunResult) -> bool:
    """Whether nothing of the run is left to make, and its report is written, by this version of Defuse."""
    store, judges = result.run.store, result.run.spec.judges.count
    try:
        parse_report(store.read("report.json"), store.address)
        finished = result._finished
    except (FileNotFoundError, InputError):
        return False
    has_evidence = finished.evidence is not None or not judges
    return finished.watch is not None and has_evidence and store.exists("report.html")


def _shown(address: str) -> str:
    """Return an address as it is shown: below the working directory without the way there."""
    path = Path(address)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else address


@dataclass(frozen=True, eq=False)
class RealImages:
    """Real images near to a scenario, the nearest first."""

    images: F32
    """(n, channels, H, W) in [0, 1]."""
    labels: tuple[str, ...]
    """Their classes in the data set."""
    answers: tuple[str, ...]
    """Answers of the classifier before the correction."""
    rows: I64
    """(n,) rows in the arrays that were given (`train`; also for images held out of it), else in the part."""
    files: tuple[str, ...] | None
    """Files of the images, where the data set is a folder."""
    distances: F64
    """(n,) Mahalanobis distances of their codes to the scenario's component."""
    part: str  # train or validation

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<{count_of(len(self), IMAGE_OF[self.part])}, the nearest first, of {', '.join(self.labels)}>"

    def _repr_html_(self) -> str:
        return render_real(self.images, self.labels, self.answers, f"Nearest {IMAGE_OF[self.part]}s")


@dataclass(frozen=True, eq=False)
class ScenarioView:
    """One scenario: what it looks like, what is right there, and what the correction did. Shares are fractions of 1."""

    _result: RunResult = field(repr=False)
    row: Scenario
    """All figures of the report on it."""

    @property
    def number(self) -> int:
        """Its number in the report, from 0."""
        return self.row.number

    @property
    def accepted(self) -> bool:
        """Whether it is a failure scenario."""
        return self.row.accepted

    @property
    def label(self) -> str | None:
        """The class that is right there; None where it was rejected."""
        return self.row.label

    @property
    def mistaken_for(self) -> str | None:
        """Most common wrong answer of the classifier before; None where it was rejected."""
        return self.row.mistaken_for

    @property
    def name(self) -> str:
        """What sets it apart, such as `7 read as 2: thin, slanted to the right`; the reason where it was rejected."""
        if not self.accepted:
            return self.row.reason
        if self.row.evidence is not None:
            return self.row.evidence.name
        return f"{self.label} read as {self.mistaken_for}" if self.mistaken_for else str(self.label)

    @property
    def purity(self) -> float | None:
        """Share of its reviewed images that show its label."""
        return self.row.purity

    @property
    def support(self) -> int:
        """Training images that its failing codes come from."""
        return int(self._result._finished.found.scenarios.support[self.number])

    @property
    def sources(self) -> tuple[str, ...] | None:
        """Files of the photographs that its failures are moved copies of, at most 64; None where there are no files."""
        failures = self._result._finished.found.scenarios.failures
        if failures is None:
            return None
        rows = np.unique(failures.anchors.source[failures.anchor[self.number]])
        return self._result._part("train").take(rows).files

    @property
    def before(self) -> float | None:
        """Accuracy of the classifier on its held-out images, by its label; None where it was rejected."""
        return self.row.before

    @property
    def after(self) -> float | None:
        """The same for the corrected classifier."""
        return self.row.defuse

    @property
    def judged_before(self) -> float | None:
        """As `before`, by the label that most judges give each image; None without judges, and where rejected."""
        return None if self.row.evidence is None else self.row.evidence.before

    @property
    def judged_plain(self) -> float | None:
        """The same after plain further training (λ = 0), which has seen no scenario; the mean of several."""
        return None if self.row.evidence is None else self.row.evidence.plain

    @property
    def judged_after(self) -> float | None:
        """The same for the corrected classifier; None, too, where nothing was corrected."""
        return None if self.row.evidence is None else self.row.evidence.defuse

    @property
    def confirmed(self) -> bool | None:
        """Whether it is mostly right on held-out images, and more often than plain further training may be.

        By the judges' labels. None without judges, without a correction, and with too few images to tell.
        """
        return None if self.row.evidence is None else self.row.evidence.confirmed

    @property
    def worse(self) -> bool | None:
        """Whether it is less often right there than plain further training would be, likewise."""
        return None if self.row.evidence is None else self.row.evidence.worse

    @property
    def images(self) -> F32:
        """The reviewed images, (R, channels, H, W) in [0, 1]."""
        return np.array(self._result._finished.found.gallery.images[self.number])

    @property
    def codes(self) -> F32:
        """The latent codes of `images`, (R, Z)."""
        return np.array(self._result._finished.found.gallery.codes[self.number])

    @property
    def answers(self) -> tuple[str, ...]:
        """Answers of the classifier before the correction on `images`."""
        gallery = self._result._finished.found.gallery
        return tuple(gallery.classes[answer] for answer in gallery.predicted[self.number])

    def nearest_training(self, count: int = 10) -> RealImages:
        """Return the training images whose codes are nearest to its component. Encodes all of them the first time."""
        return self._nearest("train", count)

    def nearest_validation(self, count: int = 10) -> RealImages:
        """Return the nearest validation images. Raises InputError where the data set has none."""
        return self._nearest("validation", count)

    def _nearest(self, part: str, count: int) -> RealImages:
        if count < 1:
            raise InputError(f"count: expected at least 1, found {count}")
        result, scenarios = self._result, self._result._finished.found.scenarios
        with torch_defaults(), local_device(result.run.spec.resources.gpus_per_worker):
            distances = distances_from(scenarios, self.number, result._codes_of(part))
            rows = np.argsort(distances, kind="stable")[:count]
            return result._real_images(part, rows, distances[rows])

    def __repr__(self) -> str:
        return f"<scenario {self.number}: {self.name}>"

    def _repr_html_(self) -> str:
        return self._result._show([self])


class ScenarioList(Sequence[ScenarioView]):
    """Scenarios in the order of their numbers."""

    def __init__(self, result: RunResult, scenarios: Sequence[ScenarioView]) -> None:
        self._result, self._scenarios = result, list(scenarios)

    @overload
    def __getitem__(self, index: int) -> ScenarioView: ...
    @overload
    def __getitem__(self, index: slice) -> ScenarioList: ...
    def __getitem__(self, index: int | slice) -> ScenarioView | ScenarioList:
        if isinstance(index, slice):
            return ScenarioList(self._result, self._scenarios[index])
        try:
            return self._scenarios[index]
        except IndexError as error:
            raise IndexError(f"scenario {index}: there are {len(self)}, numbered from 0") from error

    def __len__(self) -> int:
        return len(self._scenarios)

    @property
    def accepted(self) -> ScenarioList:
        """The failure scenarios among them. An index into this list is not the scenario's number."""
        return ScenarioList(self._result, [scenario for scenario in self if scenario.accepted])

    def to_frame(self) -> pd.DataFrame:
        """Return a table with one row per scenario, indexed by number. Raises InputError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise InputError("to_frame needs pandas; install it with pip install pandas") from error
        rows = [{name: getattr(scenario, name) for name in COLUMNS} for scenario in self]
        index = pd.Index([scenario.number for scenario in self], name="number")
        return pd.DataFrame(rows, index=index, columns=list(COLUMNS))

    def __repr__(self) -> str:
        return f"<{count_of(len(self), 'scenario')}, {len(self.accepted)} of them failure scenarios>"

    def _repr_html_(self) -> str:
        return self._result._show(self)
