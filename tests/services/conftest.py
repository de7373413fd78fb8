"""What the tests of commands on finished runs share: a store with one finished run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from defuse_core.artifacts import Models
from defuse_core.config import RunFile
from defuse_core.data import open_splits
from defuse_core.store import FolderStore
from tests.services.serving.synthetic_runs import make_run


@pytest.fixture(autouse=True)
def _same_signal_handlers() -> Iterator[None]:
    """Put back what a command that was stopped has changed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_spec: RunFile, tiny_models: Models) -> FolderStore:
    """A store with one finished run, `digits`."""
    found = FolderStore(tmp_path_factory.mktemp("store"))
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    make_run(found, "digits", tiny_spec, tiny_models, splits, tiny_models.classifier)
    return found


@pytest.fixture
def own_store(store: FolderStore, tmp_path: Path) -> FolderStore:
    """A copy of `store` that the test may change."""
    for key in store.list():
        FolderStore(tmp_path).write(key, store.read(key))
    return FolderStore(tmp_path)
