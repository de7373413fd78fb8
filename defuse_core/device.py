"""The device of this process, how many threads it computes with, and in which format: numerics depend on each.

So `torch_defaults` gives the modes of a new process to a run in a program of the user's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

log = logging.getLogger("defuse")
# torch's flags of how it computes f32: convolutions and recurrent layers of GPUs, and the products of both
_backends: Any = torch.backends  # its annotations lack some of them
F32_FLAGS = (
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.cuda.matmul,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    _backends.mkldnn.rnn,
)
# the CPU time that a container may use in a period, and the period: one file of cgroup v2, or two of v1
CGROUP = Path("/sys/fs/cgroup")
CPU_QUOTAS = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
_chosen: ContextVar[torch.device | None] = ContextVar("chosen", default=None)
# threads share the default dtype, F32_FLAGS, the random generators and the allocator
_one_at_a_time = threading.RLock()


def device() -> torch.device:
    """Return the GPU of this process if torch can use one, else the CPU; inside computing_on its device."""
    return _chosen.get() or torch.device("cuda" if can_use_gpu() else "cpu")


def can_use_gpu() -> bool:
    """Whether torch finds a GPU for this process, and can compute on it."""
    return torch.cuda.is_available() and _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    """Whether this build of torch is for the GPU, as that for a newer CUDA is not for an old one; warns if it is not.

    Any other failure of the GPU is left to the computation: to repeat it elsewhere would change its results.
    """
    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            return True
        log.warning(
            "torch %s has no kernels for the GPU of this machine: working on the CPU; install a build of torch that "
            "has them, such as for an older CUDA",
            torch.__version__,
        )
        return False
    return True


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
        if device().type == "cuda"
        else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    )


def usable_cpus() -> int:
    """Return how many CPUs this process may use: those of its affinity, and whole ones of its container's quota.

    At least one, also where the quota is half of one. Affinity is set by taskset, Slurm or a container's cpuset.
    """
    # macOS has no affinity
    has_affinity = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for names in CPU_QUOTAS:
        # without such files, or with "max" in place of a number, there is no quota
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
            if int(quota) >= 0:  # -1: none
                allowed = min(allowed, int(quota) // int(period))
    return max(1, allowed)


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads inside the block, and reproducibly; f32 is IEEE single precision, on GPUs too.

    Another number of threads adds in another order and so rounds differently. Each step therefore fixes its number,
    whatever the machine has. NumPy's linear algebra has one thread. On GPUs attention is computed by torch's plain
    kernel, since the others add gradients in any order.
    """
    before, cudnn = torch.get_num_threads(), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    attention = plain_attention if device().type == "cuda" else contextlib.nullcontext()
    # entered before torch's number is set, which a library that both use then has
    with _blas_threads().limit(limits=1), ieee_f32(), attention:
        torch.set_num_threads(count)
        cudnn.deterministic, cudnn.benchmark = True, False
        _set_allocator(KEEPING)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            cudnn.deterministic, cudnn.benchmark = flags


@functools.cache
def _blas_threads() -> ThreadpoolController:
    """Return what sets the threads of NumPy's BLAS. To find the library takes some milliseconds."""
    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def ieee_f32() -> Iterator[None]:
    """Compute f32 in IEEE single precision: torch's default rounds the inputs of convolutions to 10 bits (TF32)."""
    before = [flag.fp32_precision for flag in F32_FLAGS]
    compute_in_ieee_f32()
    try:
        yield
    finally:
        _set_f32_flags(before)


def compute_in_ieee_f32() -> None:
    """Compute f32 in IEEE single precision from here on, in all threads of this process, as a server does."""
    _set_f32_flags(["ieee"] * len(F32_FLAGS))


def _set_f32_flags(precisions: Sequence[str]) -> None:
    """Set F32_FLAGS, and torch's older flags to the same: where both differ torch.export and others fail."""
    conv, rnn, product, product_on_cpu = precisions[:4]
    torch.backends.cudnn.allow_tf32 = conv == rnn == "tf32"
    rounded = "medium" if product_on_cpu == "bf16" else "high"
    torch.set_float32_matmul_precision(rounded if product == "tf32" else "highest")
    for flag, precision in zip(F32_FLAGS, precisions, strict=True):
        # where it has this value by torch.backends.fp32_precision, it is to follow that one also later
        flag.fp32_precision = "none"
        if flag.fp32_precision != precision:
            flag.fp32_precision = precision


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Compute inside the block with gradients, f32, no autocast and the CPU as default device, as in a new process.

    These modes of the caller are set again after it, its random numbers, of Python too, go on as before, and freed
    memory is returned to the system again. Blocks of several threads wait for each other.
    """
    with _one_at_a_time, contextlib.ExitStack() as modes:
        place = torch.get_default_device()
        modes.callback(_set_allocator, RETURNING)
        # the first import of scikit-learn draws from it
        modes.callback(random.setstate, random.getstate())
        modes.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if place.type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for kind in {"cpu", device().type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        for mode in (torch.inference_mode(False), torch.enable_grad(), ieee_f32(), forked_random()):
            modes.enter_context(mode)
        yield


def forked_random() -> AbstractContextManager[None]:
    """Let torch's random numbers, on the CPU and on all accelerators, go on after the block as before it."""
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else "cuda"
    return torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind)


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


def is_device_failure(error: BaseException) -> bool:
    """Whether the GPU or a library of it failed, after which nothing may succeed on it in this process."""
    words = ("CUDA error: ", "cuDNN error: ", "CUDNN_STATUS_", "CUBLAS_STATUS_")
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def release_memory() -> None:
    """Return freed memory to the system, some 0.1 ms for each MB, and that of a GPU to other processes.

    The process keeps it otherwise: of the system after cpu_threads, of a GPU always.
    """
    with contextlib.suppress(RuntimeError):  # of a GPU that failed
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt
# Large blocks come from the heap, which is never trimmed: to return and zero memory again costs a fifth of the time.
KEEPING = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
# What glibc itself comes to in a process that frees large blocks; it no longer does once an option was set.
RETURNING = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}


def _set_allocator(options: Mapping[int, int]) -> None:
    """Set what glibc does with the memory of freed tensors."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            libc.mallopt(option, value)


ATTENTION_KERNELS = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp", "math_sdp")  # torch's, the plain one last


class _PlainAttention:
    """A context in which attention is computed by torch's plain kernel: a setting of the process, shared by threads.

    The first thread that enters sets it and the last one that leaves ends it, which torch's own sdpa_kernel refuses
    where these are two.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, [True] * len(ATTENTION_KERNELS)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [getattr(_backends.cuda, f"{name}_enabled")() for name in ATTENTION_KERNELS]
                self._enable([name == "math_sdp" for name in ATTENTION_KERNELS])
            self._inside += 1

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._enable(self._before)

    @staticmethod
    def _enable(wanted: Sequence[bool]) -> None:
        for name, value in zip(ATTENTION_KERNELS, wanted, strict=True):
            getattr(_backends.cuda, f"enable_{name}")(value)


plain_attention = _PlainAttention()
