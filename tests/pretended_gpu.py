"""A GPU that is pretended, `pretended:0`, to run GPU paths on a machine that has none.

The CPU computes its tensors, but like those of a GPU they cannot meet a tensor of the CPU: an operation on both fails.
So it checks where tensors are, and nothing else: no autocast, no kernels, no speed. A block of `pretended_gpu` changes
torch in the whole process: use it in one of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = "pretended"
aten = torch.ops.aten
MOVING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}  # a GPU takes indices of the CPU


class OneDevice:
    """What torch asks of the module of a backend, `torch.pretended`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def mem_get_info(self) -> tuple[int, int]:
        return 2**30, 2**30

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing to do: random numbers are the CPU's."""

    def get_rng_state(self, device: object = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = 0) -> None:
        torch.set_rng_state(state)


class GpuTensor(torch.Tensor):
    """A tensor that says it is on the pretended device; `on_cpu` has its values."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> GpuTensor:
        tensor: GpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=torch.device(GPU, 0),
        )
        tensor.on_cpu = on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class GpuGenerator(torch.Generator):
    """A generator of the CPU that says it is of the device it was made for."""

    def __new__(cls, device: str | torch.device = "cpu") -> GpuGenerator:
        generator = super().__new__(cls)
        generator.made_for = torch.device(device)
        return generator

    made_for: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.made_for


class PretendedOperations(TorchDispatchMode):
    """Computes what makes tensors on the device out of nothing or of the CPU's, such as zeros and `to`."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class CheckedGenerators(TorchFunctionMode):
    """Refuses random numbers of one device from a generator of another one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and is_gpu(generator.device) != is_gpu(kwargs.get("device")):
            raise RuntimeError(f"{function.__name__}: a generator of {generator.device} for another device")
        return function(*args, **kwargs)


class NoGrad(torch.no_grad):
    """In place of torch.inference_mode, whose tensors a subclass cannot slice."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


def is_gpu(device: object) -> bool:
    """Whether `device`, a name, a torch.device or None, is the pretended one."""
    return device is not None and str(device).startswith(GPU)


def compute(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one operation on the CPU; its result is on the pretended device if a tensor that it gets is, or `device`.

    Raises RuntimeError for tensors of two devices, as a GPU does, unless those of the CPU are numbers or indices.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    away = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor) and tensor.dim()]
    if operation in INDEXING:
        away = [tensor for tensor in away if not any(tensor is index for index in args[1])]
    if on_gpu and away and operation not in MOVING:
        raise RuntimeError(f"{operation}: tensors of the pretended GPU and of the CPU")
    if operation is aten.copy_.default:
        stays = isinstance(args[0], GpuTensor)
    elif operation is aten._local_scalar_dense.default:  # Tensor.item
        stays = False
    else:
        stays = is_gpu(kwargs["device"]) if kwargs.get("device") is not None else bool(on_gpu)
    cpu_args, cpu_kwargs = tree_map(
        lambda leaf: leaf.on_cpu if isinstance(leaf, GpuTensor) else leaf, (args, kwargs)
    )
    if is_gpu(cpu_kwargs.get("device")):
        cpu_kwargs["device"] = torch.device("cpu")
    found = operation(*cpu_args, **cpu_kwargs)
    if not stays:
        return found
    made = tree_map(lambda leaf: GpuTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, found)
    return return_and_correct_aliasing(operation, args, kwargs, made)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Make `pretended:0` a device, and in the block that of Defuse, which must not be imported before."""
    _setup_privateuseone_for_python_backend(GPU, OneDevice())
    torch.inference_mode = NoGrad  # type: ignore[assignment, misc]
    import defuse_core.device

    lift = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # so that torch.tensor(device=) is seen here
    try:
        with (
            mock.patch.object(torch, "Generator", GpuGenerator),
            mock.patch.object(defuse_core.device, "device", partial(torch.device, GPU, 0)),
            PretendedOperations(),
            CheckedGenerators(),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)  # type: ignore[attr-defined]
