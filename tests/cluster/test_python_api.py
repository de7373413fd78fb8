"""`defuse_core.debug` on Ray: the same results as in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

import defuse_core as defuse
from cluster.compute import on_ray
from tests.core.debug_arguments import SETTINGS, arguments

QUICK = {
    "vae": SETTINGS["vae"] | {"epochs": 3, "accept": "blind"},
    "review": SETTINGS["review"] | {"rho": 0.0},
}


@pytest.mark.usefixtures("no_figures")
def test_a_run_from_python_gives_the_same_on_ray(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: 1000.0)
    local = defuse.debug(**arguments(tmp_path, name="local", settings=SETTINGS | QUICK))
    spec = local.run.spec
    remote = defuse.debug(**arguments(tmp_path, name="remote", settings=spec, compute=on_ray()))
    assert remote.report.accuracy == local.report.accuracy
    assert remote.report.scenarios == local.report.scenarios
