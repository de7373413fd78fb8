"""What all tests share: one tiny run file, its trained models and finished run, one Ray, and silence about usage.

`make test` runs them in four processes, since many wait for servers; each has a Ray. Tests that share a server, or
models that only they use, run in one process, and the longest begin first.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes ~/.ray/auth_token
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ |= {
    "RAY_worker_niceness": "0",  # default 15: the other process of tests would starve the workers
    "RAY_metrics_report_interval_ms": "3000",  # default 10 s
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # default 2 s: so much later the end of a training is seen
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # else it looks for new logs ten times a second, and nobody reads them
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # else all processes are measured each 5 s, for a page that nobody opens
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes of tests have all cores

import pytest
import yaml
from hypothesis import HealthCheck, settings

from defuse_core.artifacts import Corrections, Models, ReferenceSet
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile, parse_run_file
from defuse_core.data import Images
from defuse_core.local import LocalCompute
from defuse_core.protocols import Compute, SweepRequest, silent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.train import train
from defuse_core.training.reference_models import reference_models
from defuse_core.tuning_data import FineTuningData, load_fine_tuning_data
from services.labeling.local_server import NEWEST_PYTHON
from tests.forked_workers import POSSIBLE, fork_server, forked_workers
from tests.start_forked_worker import ADDRESS

ROOT = Path(__file__).parents[1]
# the SDK and the server cannot be installed on a later Python yet
collect_ignore = (
    ["services/labeling", "e2e/test_label_studio.py"] if sys.version_info[:2] > NEWEST_PYTHON else []
)
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

PAPER_LAMBDAS = (
    1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0, 1000.0
)  # fmt: skip
T = TypeVar("T")
Sections = dict[str, dict[str, Any]]
TINY: Sections = {
    "data": {"name": "digits", "image_size": 16, "channels": 1, "validation_share": 0.2, "train_images": 300},
    "classifier": {"stages": 2, "channels": 8, "hidden": 64, "epochs": 15, "batch_size": 16},
    "vae": {
        "latent_dim": 4,
        "beta": 0.3,
        "encoder_stages": 2,
        "decoder_stages": 2,
        "channels": 8,
        "hidden": 64,
        "epochs": 50,
        "batch_size": 16,
        "learning_rate": 0.003,
        "kl_warmup_steps": 20,
    },
    "identify": {
        "draws": 4,
        "noise": "beta",
        "screen": "none",
        "max_per_image": 3,
        "block_images": 32,
        "batch_size": 64,
    },
    "distill": {
        "by": "all",
        "max_codes": 400,
        "max_components": 6,
        "min_weight": 0.02,
        "min_support": 1,
        "engine": "scikit-learn",
        "max_iterations": 40,
    },
    "review": {
        "images": 5,
        "tau": 0.1,
        "accept": "share",
        "rho": 0.1,  # so that some scenario is accepted on any CPU
        "reference": {"count": 3, "channels": 8, "epochs": 8, "batch_size": 32, "min_confidence": 0.2},
    },
    "judges": {"count": 0},
    "correct": {
        "filter": "none",
        "lambdas": [1e-3, 1.0, 10.0],
        "epochs": 2,
        "batch_size": 64,
        "schedule": "constant",
        "augment": False,
        "tune_images": 24,
        "test_images": 24,
        "choose_by": "tune",
        "max_loss": 0.2,
    },
    "report": {"tsne_images": 60, "tsne_failures": 40, "perplexity": 10},
    "resources": {"train_threads": 1},
}

RECOMMENDED: Sections = {  # what a new run file does, as tiny; with limits that its weak models reach
    "identify": {
        "noise": "posterior",
        "scale": 2.0,
        "screen": "reference-models",
        "min_probability": 0.2,
        "max_per_image": None,
    },
    "distill": {"by": "cell", "min_support": 3, "engine": "torch"},
    "review": {
        "tau": "auto",
        "purity": 0.3,
        "failing": 0.1,
        "accept": "lower-bound",
        "max_false": 0.2,
        "more_images": 20,
    },
    "judges": {"count": 2, "channels": 8, "epochs": 8, "batch_size": 32, "share": 0.3},
    "correct": {"filter": "reference-models", "schedule": "one_cycle", "augment": True},
}


def tiny(**sections: dict[str, object]) -> RunFile:
    """Return the tiny run file with fields of some sections changed."""
    tree = {name: {**section, **sections.get(name, {})} for name, section in TINY.items()}
    return parse_run_file(tree | {n: s for n, s in sections.items() if n not in tree}, "tiny")


def fine_tuning_data(
    spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None = None
) -> FineTuningData:
    """Return what the trials of a sweep read."""
    request = SweepRequest(spec, fixes, reviewed, FolderStore(Path("no trials")))
    return load_fine_tuning_data(models, request, progress=silent)


def recommended(**sections: dict[str, object]) -> RunFile:
    """Return the tiny run file of the recommended way, with fields of some sections changed."""
    names = RECOMMENDED.keys() | sections.keys()
    return tiny(**{name: {**RECOMMENDED.get(name, {}), **sections.get(name, {})} for name in names})


@pytest.fixture(scope="session")
def tiny_spec() -> RunFile:
    return tiny()


TOGETHER = {  # folder or file of tests -> the group that runs in one process; other files are groups of their own
    "tests/services/labeling/test_annotations.py": "label-studio-answers",
    "tests/services/labeling/test_simulate.py": "label-studio-answers",
    "tests/services/labeling/test_sure_images.py": "label-studio-answers",
    "tests/e2e/test_label_studio.py": "label-studio-answers",
    "tests/services/labeling": "label-studio",  # each of both has a server; the second copies its data
    "tests/services/serving": "serving",  # one Serve, and models that are trained well
    "tests/services/storage": "storage",  # one server
    "tests/cluster/test_on_s3.py": "drivers",  # one process that commands are forked from
    "tests/cluster/test_ray_compat.py": "drivers",
    "tests/e2e/test_kill.py": "drivers",
    "tests/core/training/test_read_ahead.py": "drivers",
    "tests/core/training/test_loop.py": "drivers",
    "tests/core/test_external_classifiers.py": "libraries",  # one process imports transformers, timm and ONNX's
    "tests/core/test_hugging_face_folders.py": "libraries",
    "tests/core/test_own_networks.py": "libraries",
    "tests/services/test_export": "libraries",  # and test_exported_*.py
}
FIRST = (
    "label-studio",
    "serving",
    "drivers",
    "tests/cluster",
    "tests/e2e",
    "storage",
    "tests/deploy",
    "libraries",
    "tests/core",
)
ENDED_EARLY = ("serve_port", "ray_session")  # fixtures of the session that end where no later test uses them
USERS = pytest.StashKey[dict[str, set[str]]]()  # fixture -> the groups whose tests use it
ENDS = pytest.StashKey[dict[str, Callable[[], None]]]()  # fixture that was set up -> what ends it


def group_of(nodeid: str) -> str:
    """Return the group of a test: that of its folder or file, else the file."""
    groups = (group for place, group in TOGETHER.items() if nodeid.startswith(place))
    return next(groups, nodeid.partition("::")[0])


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that processes of tests and Ray's workers are forked from, where there are several."""
    config.stash[ENDS] = {}
    config.pluginmanager.register(KeepEnds())
    if POSSIBLE and not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        stack = contextlib.ExitStack()
        stack.enter_context(fork_server())
        config.add_cleanup(stack.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Any) -> None:
    """Have the processes of tests forked, too: torch and much else is then imported once for all of them."""
    if ADDRESS in os.environ:
        command = shlex.join([sys.executable, "-I", "-S", str(ROOT / "tests" / "start_forked_tests.py")])
        for spec in specs:
            spec.python = spec.python or (command if spec.popen else None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage among what is imported now, nor later: it lives to the end."""
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    # Libraries look for their objects at the end; some (nanobind's) call those leaked that they do not find.
    atexit.register(gc.unfreeze)
    gc.enable()
    return collected


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest groups first, so that two processes end at the same time, and those that use Ray together."""
    users = {
        name: {group_of(item.nodeid) for item in items if name in item.fixturenames} for name in ENDED_EARLY
    }
    with_ray = users["ray_session"]
    with_ray.add(group_of("tests/e2e/test_kill.py"))  # of which some tests ask for it when they run
    config.stash[USERS] = users

    def place(item: pytest.Item) -> tuple[int, bool]:
        group = group_of(item.nodeid)
        number = next((number for number, first in enumerate(FIRST) if group.startswith(first)), len(FIRST))
        return number, group not in with_ray

    items.sort(key=place)


class KeepEnds:
    """A plugin, since pytest calls no hook of a conftest.py below its root for a fixture of the session."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
    ) -> None:
        """Keep how Ray and Serve are ended: with what depends on them, such that a later test starts them again."""
        if fixturedef.argname in ENDED_EARLY:
            request.config.stash[ENDS][fixturedef.argname] = functools.partial(fixturedef.finish, request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """End Serve and Ray where other tests follow, beside which each would cost a twentieth of a core."""
    yield
    users, ends = item.config.stash[USERS], item.config.stash[ENDS]
    for name in ENDED_EARLY:
        if name in ends and nextitem is not None and group_of(nextitem.nodeid) not in users[name]:
            ends.pop(name)()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands whole groups to the processes. (xdist's own `loadgroup` does nothing under pytest 9.)"""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


MakeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Return make_once(name, make): the path that `make(path)` wrote, once for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        path, unfinished = root / name, root / f"{name}.unfinished"
        with (root / f".{name}.lock").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            if not path.exists():
                make(unfinished)
                unfinished.rename(path)
        return path

    return made


def made_in_a_run(make: Callable[[Run, Compute], T], spec: RunFile) -> T:
    """Return what `make`, such as `reference_models` or `judges`, trains in a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return make(Run.start(FolderStore(Path(folder)), "made", spec), LocalCompute())


def trained_models(spec: RunFile) -> Models:
    """Return what `train` returns; its checkpoints are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        return train(spec, FolderStore(folder), progress=silent)


def trained_run(
    store: FolderStore, name: str, spec: RunFile, models: Models, references: ReferenceSet | None = None
) -> Run:
    """Begin a run that finds its models, and the reference models where they are given, trained already."""
    run = Run.start(store, name, spec)
    run.once("train", Models, lambda: models)
    if references is not None:
        run.once("train", ReferenceSet, lambda: references, "references")
    return run


@pytest.fixture(scope="session")
def tiny_models(tiny_spec: RunFile, make_once: MakeOnce) -> Models:
    def make(path: Path) -> None:
        path.write_bytes(encode(trained_models(tiny_spec)))

    return decode(Models, make_once("tiny_models", make).read_bytes(), "tiny_models")


@pytest.fixture(scope="session")
def references(make_once: MakeOnce) -> ReferenceSet:
    """The reference models of the recommended way."""

    def make(path: Path) -> None:
        path.write_bytes(encode(made_in_a_run(reference_models, recommended())))

    return decode(ReferenceSet, make_once("references", make).read_bytes(), "references")


@pytest.fixture(scope="session")
def finished_run(make_once: MakeOnce) -> Path:
    """A folder with the tiny run `runs/tiny`, finished by one command in one process; its run file is beside it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
        words = ["run", folder / "tiny.yaml", "--store", folder / "runs", "--on", "local"]
        words = [sys.executable, "-m", "services.cli", *words]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=270, check=False)
        assert done.returncode == 0, done.stderr

    return make_once("finished_run", make)


FIGURES = "defuse_core.report.figures.draw_figures"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without its figures, which take longer than all else: for tests of what is written there."""
    monkeypatch.setattr(FIGURES, lambda *_: {})


@pytest.fixture(scope="module")
def no_figures_in_module() -> Iterator[None]:
    """The same for all tests of a module, and for its fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FIGURES, lambda *_: {})
        yield


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Ray puts sockets into its own, and stops without a word where they do not fit."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One embedded Ray of two CPUs for all tests that need one."""
    import ray

    from cluster.ray_compat import keep_idle_workers

    keep_idle_workers(2)
    with forked_workers():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def trusted_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFUSE_TRUST_TORCHSCRIPT", "1")
