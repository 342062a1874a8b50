"""Where a kernel's test runs: on the emulator always, on a GPU too where there is one.

Each entry of MACHINES loads a kernel as kernels.load_kernel does; its launch takes CPU tensors.
"""

from __future__ import annotations

import functools

import pytest
import torch
from emulator import load_emulated
from torch import Tensor


def load_for_turing(file_name: str, kernel_name: str, defines, max_shared_bytes: int = 0):
    """On the emulator, with the code for sm_75: other mma, no cp.async."""
    return load_emulated(file_name, kernel_name, {**defines, "ARCH": 750}, max_shared_bytes)


class GpuKernel:
    """A kernel on the GPU whose arguments lie on the CPU: copied there and back, storages whole, so
    that a byte it should not have touched shows."""

    def __init__(self, kernel) -> None:
        self._kernel = kernel

    def launch(self, grid, block, args, shared_bytes=0):
        """As kernels.Kernel.launch, and waits."""
        copies = [(arg, _on_gpu(arg)) for arg in args if isinstance(arg, Tensor)]
        there = iter(copies)
        packed = [next(there)[1] if isinstance(arg, Tensor) else arg for arg in args]
        self._kernel.launch(grid, block, packed, shared_bytes)
        torch.cuda.synchronize()
        for parameter, arg, copy in zip(self._kernel.parameters, args, packed, strict=True):
            if parameter.is_array and not parameter.is_const and arg is not None:
                arg.untyped_storage().copy_(copy.untyped_storage())


def _on_gpu(tensor: Tensor) -> Tensor:
    """The same view of a copy of the tensor's storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
    storage = tensor.untyped_storage().cuda()
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def load_on_gpu(file_name: str, kernel_name: str, defines, *max_shared_bytes: int) -> GpuKernel:
    """The real thing."""
    from kvchat.attention.kernels import load_kernel

    return GpuKernel(load_kernel(file_name, kernel_name, defines, *max_shared_bytes))


GPU = functools.partial(pytest.param, marks=pytest.mark.gpu)
MACHINES = [pytest.param(load_emulated, id="emulator"), GPU(load_on_gpu, id="gpu")]
GENERATIONS = [*MACHINES, pytest.param(load_for_turing, id="emulator-75")]
