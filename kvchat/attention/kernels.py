"""CUDA kernels from source to launch: NVRTC, a cubin cache of our own, CuPy's low-level function.

torch and CuPy are imported when a GPU is used; compiling needs NVRTC alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from kvchat.attention.nvrtc import load_nvrtc
from kvchat.attention.signature import (
    ArgumentCheck,
    Defines,
    Parameter,
    inline_source,
    signature,
)
from kvchat.errors import UsageError
from kvchat.paths import cache_dir

if TYPE_CHECKING:
    from cupy.cuda.function import Function, Module
    from torch import Tensor

MIN_ARCH = 75  # Turing: the oldest with the tensor core instructions the kernels use
_DEFAULT_SHARED_BYTES = 48 << 10  # a kernel that wants more says so before its first launch
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NUMBERS: dict[str, type] = {"int32": np.int32, "int64": np.int64, "float32": np.float32}


def compile_options(defines: Defines, arch: int) -> list[str]:
    """NVRTC's options. No contraction to fused multiply-adds: sums are those the source writes,
    as the codecs' definition and the emulator compute them."""
    constants = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    return [f"-arch=sm_{arch}", "-std=c++17", "--fmad=false", "-lineinfo", *constants]


def compile_kernel_file(
    file_name: str, defines: Defines, arch: int, cuda_major: int | None = None
) -> bytes:
    """The cubin of a file of kernels_cu/ for sm_<arch>, from the user's cache if it is there.

    The key is a hash of source, options, compiler version: a changed file compiles anew.
    """
    compiler = load_nvrtc(cuda_major)
    source, options = inline_source(file_name), compile_options(defines, arch)
    key = hashlib.sha256()
    for field in (source, *options, f"nvrtc {compiler.version}"):
        data = field.encode()
        key.update(len(data).to_bytes(8, "little") + data)
    path = cache_dir() / "cubin" / f"{Path(file_name).stem}-{key.hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    cubin, _ = compiler.compile(source, file_name, options)
    # A cache that cannot be written (a full disk, a read-only home) costs time, nothing else.
    with contextlib.suppress(OSError):
        _write_whole(path, cubin)
    return cubin


def _write_whole(path: Path, data: bytes) -> None:
    """Write so that no other process ever reads a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(partial, path)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel. Launches on torch's current stream, which may be capturing a graph."""

    name: str
    parameters: tuple[Parameter, ...]
    max_shared_bytes: int
    function: Function

    @functools.cached_property
    def _check(self) -> ArgumentCheck:
        return ArgumentCheck(self.parameters)

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[object],
        shared_bytes: int = 0,
    ) -> None:
        """Check the arguments, then launch. Allocates nothing on the device and waits for nothing.

        Grids and blocks of no threads are our own mistake, as is more shared memory than load()
        was told.
        """
        try:
            self._check(args)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        assert min(grid) > 0 and min(block) > 0, f"{self.name}: grid {grid}, block {block}"
        assert shared_bytes <= self.max_shared_bytes, f"{self.name}: {shared_bytes} shared bytes"
        packed = [
            _address(arg) if parameter.is_array else _NUMBERS[parameter.dtype](arg)
            for parameter, arg in zip(self.parameters, args, strict=True)
        ]
        self.function(grid, block, packed, shared_bytes, current_stream())


def _address(arg: object) -> np.uint64:
    """A device pointer of the right width. Raises ValueError for a tensor that is not on a GPU."""
    if arg is None:
        return np.uint64(0)
    tensor = cast("Tensor", arg)
    if tensor.device.type != "cuda":
        raise ValueError(f"a tensor on {tensor.device} was given to a kernel")
    return np.uint64(tensor.data_ptr())


@dataclass(frozen=True, slots=True)
class Stream:
    """What CuPy asks of a stream that it did not make: the CUstream."""

    ptr: int


def current_stream() -> Stream:
    """torch's current stream, as CuPy takes it; during a capture, the stream that captures."""
    import torch

    return Stream(torch.cuda.current_stream().cuda_stream)


def load_kernel(
    file_name: str,
    kernel_name: str,
    defines: Defines,
    max_shared_bytes: int = _DEFAULT_SHARED_BYTES,
) -> Kernel:
    """Compile or fetch, load on torch's current device, and allow that much dynamic shared memory.

    To be called before a capture: loading synchronises. Raises UsageError where the GPU or the
    installation cannot run the kernels.
    """
    import torch
    from cupy.cuda import driver

    assert not torch.cuda.is_current_stream_capturing(), f"{kernel_name} loaded inside a capture"
    module = _load_module(
        file_name, tuple(sorted(defines.items())), torch.cuda.current_device(), check_cuda()
    )
    function = module.get_function(kernel_name)
    if max_shared_bytes > _DEFAULT_SHARED_BYTES:
        driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED, max_shared_bytes)
    parameters = signature(file_name, kernel_name, defines)
    return Kernel(kernel_name, parameters, max_shared_bytes, function)


@functools.cache
def _load_module(
    file_name: str, defines: tuple[tuple[str, int], ...], device_idx: int, cuda_major: int
) -> Module:
    import torch
    from cupy.cuda.function import Module

    major, minor = torch.cuda.get_device_capability(device_idx)
    module = Module()
    module.load(compile_kernel_file(file_name, dict(defines), 10 * major + minor, cuda_major))
    return module


@functools.cache
def check_cuda() -> int:
    """The CUDA major version that torch and CuPy share. Raises UsageError with what to install."""
    import torch

    if torch.version.cuda is None:
        raise UsageError(
            f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
        )
    torch_major = int(torch.version.cuda.split(".")[0])
    try:
        import cupy
    except ImportError as error:
        raise UsageError(
            f"CuPy is missing; install it for torch's CUDA: pip install 'kvchat[cuda{torch_major}]'"
        ) from error
    cupy_major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if cupy_major != torch_major:
        raise UsageError(
            f"torch is built for CUDA {torch_major} and CuPy for CUDA {cupy_major}; they must be"
            f" the same: pip uninstall cupy-cuda{cupy_major}x, then"
            f" pip install 'kvchat[cuda{torch_major}]'"
        )
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < MIN_ARCH:
        raise UsageError(
            f"{torch.cuda.get_device_name()} is sm_{major}{minor}; kvchat's CUDA kernels need"
            f" sm_{MIN_ARCH} or newer: use --device cpu"
        )
    return torch_major
