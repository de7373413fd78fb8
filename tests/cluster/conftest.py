"""What the tests of the cluster share: the tiny run's results in one process, to which all others must be equal."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from defuse_core.artifacts import Corrections, Models, Psi, Sweep
from defuse_core.config import RunFile
from defuse_core.local import LocalCompute
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore
from tests.cluster.checks import Lines


@pytest.fixture(scope="session")
def fixes(tiny_spec: RunFile) -> Corrections:
    """Two made-up scenarios."""
    rng = np.random.default_rng(0)
    shape = (2, 24, tiny_spec.vae.latent_dim)
    tune, test = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return Corrections(np.arange(2), np.arange(2), tune, test)


@pytest.fixture(scope="session")
def local_store(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    return FolderStore(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="session")
def local_psi(tiny_spec: RunFile, tiny_models: Models, local_store: FolderStore) -> Psi:
    return LocalCompute().identify(tiny_spec, tiny_models, local_store)


@pytest.fixture(scope="session")
def local_sweep(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, local_store: FolderStore
) -> Sweep:
    return LocalCompute().sweeps(
        tiny_models, [SweepRequest(tiny_spec, fixes, None, local_store.within("trials"))]
    )[0]


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, handler = logging.getLogger("defuse"), Lines()
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)
