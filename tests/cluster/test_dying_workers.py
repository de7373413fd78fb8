"""Workers whose process ends whenever it starts, such as on a node whose disk is full: Ray starts them without end."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.compute import RayCompute
from defuse_core.artifacts import Models
from defuse_core.errors import ComputeError
from tests.cluster.checks import Lines
from tests.cluster.fakes import DyingWorker, ImpatientStore
from tests.conftest import tiny
from tests.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("ray_session")


def test_workers_whose_process_ends_whenever_it_starts_are_dropped_and_none_left_is_an_error(
    tiny_models: Models, tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.identify.ShardWorker", DyingWorker)
    monkeypatch.setattr("cluster.identify.MAX_RESTARTS", 1)
    monkeypatch.setattr("cluster.identify.SCALE_EVERY_S", 0.2)
    died = r"worker \d does not start: its process ended 2 times before it answered; free memory and disk"
    with (
        RayCompute(None, tiny(resources={"workers": 2})) as compute,
        pytest.raises(ComputeError, match=f"^identify: {died}"),
    ):
        compute.identify(compute.spec, tiny_models, ImpatientStore(tmp_path, WAIT_S))
    assert [line for line in lines.lines if "going on without a worker: worker" in line]
