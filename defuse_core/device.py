"""The device of this process, how many threads it computes with, and in which format: numerics depend on each."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch

_chosen: ContextVar[torch.device | None] = ContextVar("chosen", default=None)


def device() -> torch.device:
    """Return the GPU of this process if torch can use one, else the CPU; inside computing_on its device."""
    return _chosen.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def computing_on(chosen: torch.device) -> Iterator[None]:
    """Let device() be `chosen` inside the block, in this thread alone: threads that start inside do not see it.

    A network that is to compute elsewhere is loaded so: an exported program cannot be moved once it is loaded.
    """
    before = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(before)


def device_name() -> str:
    """Return the name of the device, for the manifest: results are equal, bit for bit, on devices of one kind."""
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    )


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads inside the block, and reproducibly; f32 is IEEE single precision, on GPUs too.

    Another number of threads adds in another order and so rounds differently. Each step therefore fixes its number,
    whatever the machine has.
    """
    before, cudnn = torch.get_num_threads(), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    torch.set_num_threads(count)
    # torch's default rounds the inputs of convolutions to 10 bits (TF32)
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    _keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = flags


def autocast(arithmetic: str) -> AbstractContextManager[object]:
    """Compute the block's convolutions and matrix products in bf16, or change nothing (f32)."""
    if arithmetic == "f32":
        return contextlib.nullcontext()
    return torch.autocast(device().type, dtype=torch.bfloat16)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of this machine or of its GPU was missing, which says nothing about what was computed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # of torch on a CPU; of a GPU outside torch's own allocator; of its libraries
    words = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def release_memory() -> None:
    """Return freed memory to the system, some 0.1 ms for each MB. After cpu_threads the process keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@functools.cache
def _keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors: returning it and zeroing it again costs a fifth of the time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and never trim it
