from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from synthetic_runs import (
    copied_store,
    make_run,
    overflow_weights,
    perturb_weights,
    png,
    swap_classes,
)

from defuse_core.artifacts import Models
from defuse_core.config import RunFile, parse_run_file
from defuse_core.data import Splits, open_splits
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.candidate import Candidate, prepare_candidate
from services.serving.registry import Registry
from tests.conftest import trained_models
from tests.ports import free_port
from tests.waiting import wait_until

NO_ACCESS_LOG = {"enable_access_log": False}  # as in services/serving/app.py
ASK_EVERY_S = 0.25  # a server that must change: an answer costs 10 ms of processors
LIGHT = {"cpus_per_replica": 0.1, "timeout_s": 60.0}  # many replicas on two cores, both busy


@pytest.fixture(scope="session")
def good_spec(tiny_spec: RunFile) -> RunFile:
    """A run file whose classifier and β-VAE are trained well, in seconds."""
    tree = tiny_spec.model_dump(mode="json")
    tree["data"]["train_images"] = None
    tree["classifier"] |= {"epochs": 12, "channels": 16, "optimizer": "adam", "learning_rate": 3e-3}
    # With a class head every class has its own codes, so that scenarios are right on each kind of processor.
    tree["vae"] |= {"latent_dim": 8, "class_weight": 20.0, "epochs": 40, "beta": 0.1, "learning_rate": 3e-3}
    tree["vae"]["batch_size"] = 64
    tree["check"]["min_scenario_accuracy"] = 0.8
    return parse_run_file(tree, "good")


@pytest.fixture(scope="session")
def good_models(good_spec: RunFile) -> Models:
    return trained_models(good_spec)


@pytest.fixture(scope="session")
def splits(good_spec: RunFile) -> Splits:
    return open_splits(good_spec.data, good_spec.seed)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: Any, good_spec: RunFile, good_models: Models, splits: Splits) -> FolderStore:
    """A store of finished runs whose candidates are made.

    `second` answers like `first`, `swapped` confuses 0 and 1, and the output of `broken` is not finite.
    """
    store = FolderStore(Path(tmp_path_factory.mktemp("planted")))
    good = good_models.classifier
    corrected = {
        "first": good,
        "second": perturb_weights(good, 2),
        "swapped": swap_classes(good, (0, 1)),
        "broken": overflow_weights(good),
    }
    for name, weights in corrected.items():
        run = make_run(store, name, good_spec, good_models, splits, weights)
        prepare_candidate(run)
    return store


@pytest.fixture(scope="session")
def candidate(planted: FolderStore) -> Candidate:
    """The candidate of run `first`."""
    return prepare_candidate(Run.open(planted, "first"))[1]


@pytest.fixture
def candidates(candidate: Candidate) -> list[Candidate]:
    """Four candidates with the same weights that the registry takes for different ones."""
    return [dataclasses.replace(candidate, run=f"run-{n}", digest=f"digest {n}") for n in range(1, 5)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(FolderStore(tmp_path))


@pytest.fixture
def own_store(planted: FolderStore, tmp_path: Path) -> FolderStore:
    """A copy of `planted` for one test, without a registry."""
    return copied_store(planted, tmp_path)


@pytest.fixture(scope="session")
def serve_port(ray_session: None) -> Iterator[int]:
    """A real Serve on loopback for all tests; every application has a prefix of its own."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=NO_ACCESS_LOG)
    yield port
    serve.shutdown()


class ServedApplication:
    """One application under test."""

    def __init__(self, port: int, name: str) -> None:
        self.port, self.name, self.prefix = port, name, f"/{name}"
        self.predict = f"/{name}/v1/predict"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/{name}", timeout=120)

    def model(self) -> Any:
        """Return what the application says of the version in production."""
        return self.http.get("/v1/model").json()

    def wait_for(self, version: str) -> None:
        """Return once the application answers with `version`."""
        wait_until(
            lambda: self.model().get("version") == version,
            lambda: f"expected {version}, still answers with {self.model()}",
            every_s=ASK_EVERY_S,
        )

    def wait_for_others(self, versions: set[str]) -> None:
        """Return once the application has these versions, and no more, as canary or shadow."""

        def others() -> set[str]:
            page = self.model()
            return {page["canary"], page["shadow"]} - {None}

        wait_until(
            lambda: others() == versions,
            lambda: f"expected {versions} beside production, found {others()}",
            every_s=ASK_EVERY_S,
        )


@pytest.fixture(scope="module")
def serving(serve_port: int) -> Iterator[Callable[..., ServedApplication]]:
    """Start applications for the tests of one module: serving(store, run="first", batch_size=1, ...)."""
    from ray import serve

    from services.serving.app import build
    from services.serving.launch import ServeArgs

    numbers, names = itertools.count(), []

    def start(
        store: FolderStore, run: str | None = "first", pin: bool = False, **settings: Any
    ) -> ServedApplication:
        name = f"app{next(numbers)}"
        token = settings.pop("require_token", False)
        args = ServeArgs(
            store=store.address, run=run, pin=pin, require_token=token, settings={**LIGHT, **settings}
        )
        serve.run(build(args), name=name, route_prefix=f"/{name}", logging_config=NO_ACCESS_LOG)
        names.append(name)
        return ServedApplication(serve_port, name)

    yield start
    for name in names:
        serve.delete(name, _blocking=False)


@pytest.fixture(scope="session")
def pictures(splits: Splits) -> list[bytes]:
    """1,000 training and test images as PNG files."""
    images = [*splits.test.batch(slice(0, 500)), *splits.train.batch(slice(0, 500))]  # type: ignore[union-attr]
    return [png(image) for image in images]


@pytest.fixture(scope="session")
def pixels(splits: Splits) -> np.ndarray[Any, Any]:
    """The same images as (1000, 1, 16, 16) pixels."""
    return np.concatenate([splits.test.batch(slice(0, 500)), splits.train.batch(slice(0, 500))])  # type: ignore[union-attr]
