"""The device of a process: the same numerics wherever it is, and memory that is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from defuse_core.device import cpu_threads
from defuse_core.local import LocalCompute


def test_f32_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    with cpu_threads(1):
        assert not torch.backends.cudnn.allow_tf32


def test_what_computes_reproducibly_leaves_the_callers_convolutions_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudnn = torch.backends.cudnn
    chosen = {"deterministic": False, "benchmark": True, "allow_tf32": True}
    for name, value in chosen.items():
        monkeypatch.setattr(cudnn, name, value)
    with cpu_threads(1):
        with cpu_threads(2):
            pass
        assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
    assert {name: getattr(cudnn, name) for name in chosen} == chosen


def resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def use_memory(*, progress: object) -> int:
    with cpu_threads(1):
        blocks = [torch.ones(2**20) for _ in range(64)]  # 4 MB each
        return resident_bytes() + 0 * len(blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_task_returns_the_memory_that_it_freed() -> None:
    peak = LocalCompute().task("draw", use_memory)
    assert resident_bytes() < peak - 200e6
