"""The run that the tests of evidence and of controls begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from defuse_core.artifacts import Models, ReferenceSet
from defuse_core.local import LocalCompute
from defuse_core.pipeline import run_defuse
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from tests.conftest import FIGURES, MakeOnce, recommended, trained_run

JUDGES = {"count": 3, "epochs": 20}  # they agree on most images, on any processor


@pytest.fixture(scope="session")
def judged_run(make_once: MakeOnce, tiny_models: Models, references: ReferenceSet) -> Run:
    """A finished run of the recommended way with its judges, to be copied."""

    def make(folder: Path) -> None:
        run = trained_run(FolderStore(folder), "a", recommended(judges=JUDGES), tiny_models, references)
        compute = LocalCompute()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FIGURES, lambda *_: {})
            run_defuse(run, compute, ReferenceAnnotators(run, compute))

    return Run.open(FolderStore(make_once("judged_run", make)), "a")
