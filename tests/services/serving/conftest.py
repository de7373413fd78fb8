from __future__ import annotations

from pathlib import Path

import pytest

from defuse_core.artifacts import Models
from defuse_core.config import RunFile
from defuse_core.data import Splits, open_splits
from defuse_core.runs import FolderStore
from planted import nudged, plant_run


@pytest.fixture(scope="session")
def tiny_splits(tiny_spec: RunFile) -> Splits:
    return open_splits(tiny_spec.data, tiny_spec.seed)


@pytest.fixture(scope="session")
def planted(tmp_path_factory, tiny_spec: RunFile, tiny_models: Models, tiny_splits: Splits) -> FolderStore:
    """A store with three finished runs: first, second (almost the same classifier), and swapped (another one)."""
    store = FolderStore(Path(tmp_path_factory.mktemp("planted")))
    good = tiny_models.classifier
    plant_run(store, "first", tiny_spec, tiny_models, tiny_splits, good)
    plant_run(store, "second", tiny_spec, tiny_models, tiny_splits, nudged(good, 2))
    return store
