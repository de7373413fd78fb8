"""The Python API in a program that does other things, too: in several threads, and with random numbers of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import defuse_core as defuse
from tests.core.test_debug import SETTINGS, arguments

QUICK = SETTINGS | {"vae": {**SETTINGS["vae"], "epochs": 2, "accept": "blind"}}


@pytest.fixture(autouse=True)
def _same_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan follows the measured speeds, which on a busy machine differ from one run to the next."""
    monkeypatch.setattr("defuse_core.suggest.plan._rate", lambda work: 1000.0)


def test_runs_of_several_threads_give_the_same_as_one_alone(tmp_path: Path) -> None:
    names = ("alone", "one", "another")
    given = {name: arguments(tmp_path, name=name, settings=QUICK) for name in names}
    given["another"]["classifier"] = given["one"]["classifier"]
    defuse.debug(**given["alone"])
    with ThreadPoolExecutor(2) as threads:
        for run in [threads.submit(defuse.debug, **given[name]) for name in names[1:]]:
            run.result()
    for name in names[1:]:
        for made in ("models", "scenarios", "sweep"):
            file = f"{made}.safetensors"
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_the_random_numbers_of_the_caller_are_left_as_they_were(tmp_path: Path) -> None:
    given = arguments(tmp_path, settings=QUICK)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    defuse.debug(**given)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
