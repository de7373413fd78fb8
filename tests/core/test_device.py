"""The device of a process: the same numerics wherever it is, and memory that is given back."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from defuse_core.device import computing_on, cpu_threads
from defuse_core.local import LocalCompute
from defuse_core.models.programs import load_program


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


class WithOffsets(nn.Module):
    """Makes a tensor in each call, on the device of the images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + torch.arange(3, device=images.device)


@pytest.mark.parametrize(("made", "used"), [("cpu", "meta"), ("meta", "cpu")])  # meta stands for a GPU
def test_a_program_makes_its_tensors_where_it_computes_and_not_where_it_was_exported(
    made: str, used: str
) -> None:
    images, file = torch.rand(2, 3, 4, 4), io.BytesIO()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(WithOffsets(), (images.to(made),), dynamic_shapes=shapes)
    program.example_inputs = None  # those of meta cannot be moved
    torch.export.save(program, file)
    with computing_on(torch.device(used)):
        loaded = load_program(file.getvalue(), "net.pt2")
    assert loaded(images.to(used)).device.type == used
