"""The device of a process: the same numerics wherever it is, and memory that is given back."""

from __future__ import annotations

import functools
import io
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.backends import cudnn
from torch.backends.cuda import matmul

from defuse_core.device import (
    ATTENTION_KERNELS,
    F32_FLAGS,
    _has_kernels,
    computing_on,
    cpu_threads,
    device,
    device_name,
    torch_defaults,
    usable_cpus,
)
from defuse_core.errors import ComputeError
from defuse_core.local import LocalCompute, local_compute
from defuse_core.models.programs import load_program
from defuse_core.protocols import Progress
from tests.conftest import tiny

FLAGS = {
    "torch's default": lambda: None,
    "everything": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "rounded": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuDNN": lambda: setattr(cudnn, "fp32_precision", "ieee"),
    "convolutions": lambda: setattr(cudnn.conv, "fp32_precision", "ieee"),
    "products": lambda: torch.set_float32_matmul_precision("high"),
    "products in bf16": lambda: torch.set_float32_matmul_precision("medium"),
    "older": lambda: setattr(cudnn, "allow_tf32", False),
}


def older_flags() -> list[object]:
    """What torch's older flags are; None where it refuses to read one beside the newer ones."""
    found: list[object] = []
    for read in (lambda: cudnn.allow_tf32, lambda: matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


def newer_flags() -> list[str]:
    return [flag.fp32_precision for flag in (torch.backends, cudnn, *F32_FLAGS)]


@pytest.fixture
def flags_of_a_new_process() -> Iterator[None]:
    _reset_flags()  # another test may have served in this process, which keeps them set
    yield
    _reset_flags()


def _reset_flags() -> None:
    torch.backends.fp32_precision = cudnn.fp32_precision = "none"
    for flag in F32_FLAGS:
        flag.fp32_precision = "none"
    cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("flags_of_a_new_process")
@pytest.mark.parametrize("name", FLAGS)
def test_f32_is_not_rounded_and_the_callers_flags_are_left_as_they_were(name: str) -> None:
    FLAGS[name]()
    newer, older = newer_flags(), older_flags()
    with cpu_threads(1):
        with cpu_threads(2):
            pass
        assert newer_flags()[2:] == ["ieee"] * len(F32_FLAGS)
        assert older_flags() == [False, False, "highest"]  # torch.export reads them
    assert newer_flags() == newer
    assert all(
        after == before for after, before in zip(older_flags(), older, strict=True) if before is not None
    )
    torch.backends.fp32_precision = "bf16"  # of the caller, later
    assert torch.backends.mkldnn.conv.fp32_precision == "bf16"


def test_what_computes_reproducibly_leaves_the_callers_convolutions_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = {"deterministic": False, "benchmark": True}
    for name, value in chosen.items():
        monkeypatch.setattr(cudnn, name, value)
    with cpu_threads(1):
        with cpu_threads(2):
            pass
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert {name: getattr(cudnn, name) for name in chosen} == chosen


def enabled_kernels() -> list[str]:
    return [name for name in ATTENTION_KERNELS if getattr(torch.backends.cuda, f"{name}_enabled")()]


@pytest.mark.parametrize(("gpu", "inside"), [(True, ["math_sdp"]), (False, list(ATTENTION_KERNELS))])
def test_what_computes_reproducibly_on_a_gpu_computes_attention_by_the_plain_kernel(
    gpu: bool, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defuse_core.device.can_use_gpu", lambda: gpu)
    before = enabled_kernels()
    with cpu_threads(1):
        assert enabled_kernels() == inside
    assert enabled_kernels() == before == list(ATTENTION_KERNELS)


def resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def use_memory(*, progress: object) -> int:
    with cpu_threads(1):
        blocks = [torch.ones(2**20) for _ in range(64)]  # 4 MB each
        return resident_bytes() + 0 * len(blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_the_caller_frees_after_a_run_is_returned() -> None:
    with torch_defaults(), cpu_threads(1):
        pass
    blocks = [torch.ones(2**24) for _ in range(4)]  # 64 MB each
    peak, last = resident_bytes(), blocks.pop()
    blocks.clear()
    assert resident_bytes() < peak - 150e6
    assert len(last) == 2**24


def test_blocks_of_several_threads_wait_for_each_other_and_leave_the_modes_as_they_were(
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    flags, drawn, entered = newer_flags(), torch.get_rng_state(), threading.Event()

    def draw() -> torch.dtype:
        with torch_defaults():
            entered.set()
            return torch.rand(3).dtype

    with ThreadPoolExecutor(1) as other:
        with torch_defaults(), torch_defaults():  # as a progress callback does that shows another run
            found = other.submit(draw)
            assert not entered.wait(0.2)
            torch.rand(3)
        assert found.result() == torch.float32
    assert (torch.get_default_dtype(), newer_flags()) == (torch.float64, flags)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_random_numbers_of_python_go_on_as_before() -> None:
    before = random.getstate()
    with torch_defaults():
        random.random()
    assert random.getstate() == before


def where_computed(*, progress: Progress) -> tuple[str, str]:
    return device().type, device_name()


def test_a_run_without_gpus_computes_on_the_cpu_in_this_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defuse_core.device.can_use_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    found = {}
    for gpus in (0, 0.5, "auto"):
        with local_compute(tiny(resources={"gpus_per_worker": gpus})) as compute:
            found[gpus] = compute.task("train", where_computed)
    assert found[0][0] == "cpu" and found[0][1].startswith("cpu (")
    assert found[0.5] == found["auto"] == ("cuda", "a GPU")


def fail_for_memory(*_given: object, **_named: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def fail_on_the_gpu(*_given: object, **_named: object) -> None:
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


CONTINUE = r"free memory and run again to continue \(on the CPU with resources\.gpus_per_worker=0\)"


@pytest.mark.parametrize(
    ("step", "fail", "told"),
    [
        (
            "train",
            fail_for_memory,
            rf"{CONTINUE}, or lower batch_size, channels or hidden of classifier, vae, .* under",
        ),
        ("identify", fail_for_memory, rf"{CONTINUE}, or lower identify\.batch_size or block_images under"),
        ("draw", fail_for_memory, rf"{CONTINUE}$"),
        (
            "train",
            fail_on_the_gpu,
            r"run again in a new process \(restart a notebook's kernel\) to continue$",
        ),
    ],
)
def test_a_step_that_lacks_memory_or_whose_gpu_fails_says_what_to_do(
    step: str, fail: Callable[..., None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defuse_core.local.Identifier", fail)
    monkeypatch.setattr("defuse_core.local.device", lambda: torch.device("cuda"))
    compute: Any = LocalCompute()
    with pytest.raises(ComputeError, match=rf"^{step}: .*CUDA .*; {told}"):
        if step == "identify":
            compute.identify(tiny(), SimpleNamespace(images={"train": 32}), None)
        else:
            compute.task(step, fail)


@pytest.mark.parametrize(
    ("words", "kind", "warnings"),
    [
        ("no kernel image is available for execution on the device", "cpu", 1),
        ("all CUDA-capable devices are busy or unavailable", "cuda", 0),
    ],
)
def test_a_gpu_that_the_installed_torch_has_no_kernels_for_is_not_computed_on(
    words: str, kind: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(f"CUDA error: {words}")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.ones", fail)
    monkeypatch.setattr("defuse_core.device._has_kernels", functools.cache(_has_kernels.__wrapped__))
    assert [device().type, device().type] == [kind, kind]
    assert len([record for record in caplog.records if "no kernels" in record.getMessage()]) == warnings


V1 = "cpu/cpu.cfs_quota_us"


@pytest.mark.skipif(sys.platform != "linux", reason="affinity")
@pytest.mark.parametrize(
    ("quota", "allowed", "usable"),
    [
        ({}, 64, 64),
        ({}, 1, 1),
        ({"cpu.max": "max 100000\n"}, 64, 64),
        ({"cpu.max": "400000 100000\n"}, 64, 4),
        ({"cpu.max": "400000 100000\n"}, 2, 2),
        ({"cpu.max": "150000 100000\n"}, 64, 1),
        ({"cpu.max": "50000 100000\n"}, 64, 1),
        ({V1: "-1\n"}, 64, 64),
        ({V1: "50000\n"}, 64, 1),
        ({V1: "350000\n"}, 64, 3),
    ],
)
def test_a_process_uses_the_cpus_of_its_affinity_and_of_its_containers_quota_and_one_at_least(
    quota: dict[str, str], allowed: int, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for name, text in quota.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("defuse_core.device.CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert usable_cpus() == usable


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_task_returns_the_memory_that_it_freed() -> None:
    peak = LocalCompute().task("draw", use_memory)
    assert resident_bytes() < peak - 200e6


def test_a_task_returns_the_memory_of_the_gpu_that_it_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("empty"))
    LocalCompute().task("draw", lambda *, progress: calls.append("compute"))
    assert calls == ["compute", "empty"]


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
