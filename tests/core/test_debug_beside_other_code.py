"""The Python API in a program that does other things, too: in several threads, and with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import defuse_core as defuse
from tests.conftest import FIGURES
from tests.core.debug_arguments import SETTINGS, arguments

QUICK = SETTINGS | {"vae": {**SETTINGS["vae"], "epochs": 2, "accept": "blind"}}


@pytest.fixture(scope="module", autouse=True)
def _same_speeds() -> Iterator[None]:
    """A plan follows the measured speeds, which on a busy machine differ from one run to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defuse_core.suggest.speeds._rate", lambda work: 1000.0)
        yield


@dataclass(frozen=True)
class RunAlone:
    """The folder of a run of this thread, and the caller's random numbers without it and after it."""

    folder: Path
    expected: torch.Tensor
    found: torch.Tensor


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunAlone:
    store = tmp_path_factory.mktemp("runs")
    given = arguments(store, name="alone", settings=QUICK)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FIGURES, lambda *_: {})  # those in threads draw theirs
        defuse.debug(**given)
    return RunAlone(store / "alone", expected, torch.rand(3))


@pytest.fixture
def _other_modes() -> Iterator[None]:
    """Set what a program sets for all of its threads. torch.export fails with these flags."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.allow_tf32 = True


def debug_in_modes(given: dict[str, Any]) -> None:
    """Call `debug` as a program does that infers in bf16 on another device."""
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        defuse.debug(**given)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float64, "meta")


def test_runs_of_several_threads_give_the_same_as_one_alone_whatever_their_modes(
    alone: RunAlone, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    names = ("one", "another")
    given = {name: arguments(tmp_path, name=name, settings=QUICK) for name in names}
    given["another"]["classifier"] = given["one"]["classifier"]
    request.getfixturevalue("_other_modes")
    with ThreadPoolExecutor(2) as threads:
        for run in [threads.submit(debug_in_modes, given[name]) for name in names]:
            run.result()
    for name in names:
        for made in ("models", "scenarios", "sweep"):
            file = f"{made}.safetensors"
            assert (tmp_path / name / file).read_bytes() == (alone.folder / file).read_bytes()


def test_the_random_numbers_of_the_caller_are_left_as_they_were(alone: RunAlone) -> None:
    torch.testing.assert_close(alone.found, alone.expected, rtol=0, atol=0)
