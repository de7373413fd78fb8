"""Whatever happens to identification, Psi is the same; and what cannot be borne is named."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.compute import RayCompute
from cluster.identify import ShardQueue
from defuse_core.artifacts import Models, Psi
from defuse_core.config import RunFile
from defuse_core.data import PictureFiles, open_splits
from defuse_core.errors import DataError
from defuse_core.identify import finished_shards, gather_shards
from defuse_core.models import build_classifier, build_vae, weights_of
from defuse_core.progress import silent
from defuse_core.store import FolderStore
from tests.cluster.checks import Lines, assert_same_psi
from tests.cluster.fakes import CountingStore
from tests.conftest import tiny

pytestmark = pytest.mark.usefixtures("ray_session")
SHARDS = 10  # of the tiny run


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    workers=st.integers(1, 2),
    order=st.permutations(range(SHARDS)),
    there=st.sets(st.integers(0, SHARDS - 1), max_size=4),
    kill_after=st.integers(0, 5),
)
def test_any_number_of_workers_any_order_and_any_kill_give_the_same_psi(
    tiny_models: Models,
    local_psi: Psi,
    local_store: FolderStore,
    lines: Lines,
    workers: int,
    order: list[int],
    there: set[int],
    kill_after: int,
) -> None:
    """A worker is killed after so many shards; some shards are there from an earlier driver."""
    spec = tiny(resources={"workers": workers})
    with tempfile.TemporaryDirectory() as name:
        store = CountingStore(Path(name) / "run", pause_s=0.05)
        for key in local_store.list("psi/"):
            if int(Path(key).stem) in there:
                FolderStore(store.folder).write(key, local_store.read(key))
        lines.lines.clear()
        killed: list[int] = []
        killer = threading.Thread(target=kill_a_worker, args=(store, lines, len(there) + kill_after, killed))
        killer.start()
        records = finished_shards(store)
        with RayCompute(None, spec) as compute:
            pool = compute._pool(spec, tiny_models, store)
            waiting = [index for index in order if index not in records]
            records |= ShardQueue(pool, waiting, SHARDS, silent).run()
        killer.join()
        assert len(killed) == 1
        assert np.array_equal(gather_shards(records).codes, local_psi.codes)
        assert_same_psi(SHARDS, store, local_store)


def kill_a_worker(store: FolderStore, lines: Lines, after: int, killed: list[int]) -> None:
    """Kill the newest worker once `after` shards are stored, and note it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        processes = lines.processes("identify: worker")
        if processes and len(store.list("psi/")) >= 2 * after:
            os.kill(processes[-1], signal.SIGKILL)
            killed.append(processes[-1])
            return
        time.sleep(0.01)


@pytest.fixture
def spoilt(tmp_path: Path) -> Iterator[tuple[RunFile, Models, str]]:
    """A folder of 160 pictures, one of which becomes unreadable after training: its name."""
    rng = np.random.default_rng(0)
    for index in range(160):
        folder = tmp_path / "images" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / f"{index:03}.png")
    data = {"name": "folder", "root": str(tmp_path / "images"), "validation_share": 0.0, "train_images": None}
    spec = tiny(data=data)
    splits = open_splits(spec.data, spec.seed)
    models = Models(
        weights_of(build_classifier(spec, 2)), weights_of(build_vae(spec)), splits.classes, splits.counts(),
        splits.fingerprint(), {}, (), (), 0.0, 0.0, np.zeros(4),
    )  # fmt: skip
    read_at_once = np.linspace(0, 159, 128).astype(int)  # by the fingerprint, when the data set is opened
    row = next(row for row in range(128, 160) if row not in read_at_once)
    assert isinstance(splits.train.pixels, PictureFiles)
    path = Path(splits.train.pixels._paths[row])
    path.write_bytes(b"not a picture any more")
    yield spec, models, path.name


def test_a_picture_that_cannot_be_read_stops_the_run_at_once_and_is_named_with_its_shard(
    spoilt: tuple[RunFile, Models, str], tmp_path: Path, lines: Lines
) -> None:
    spec, models, name = spoilt
    with RayCompute(None, spec) as compute, pytest.raises(DataError) as raised:
        compute.identify(spec, models, FolderStore(tmp_path / "run"))
    line = str(raised.value)
    assert "shard 4 of 5 (training images 128 to 159) failed" in line
    assert name in line
    assert not any("again" in line for line in lines.lines)
