"""Runs a kernel of kernels_cu/ on the CPU, through kernels_cu/emulator, on torch CPU tensors.

    kernel = emulated("rms_norm", SCALAR_BF16=0, ARCH=800)
    kernel((rows, 1, 1), (128, 1, 1), [out, x, ...], shared_bytes=0)

Raises EmulatorError for what a GPU would do wrong or silently get away with. Compiled objects are
kept in build/emulator, by the content of everything that went into them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
from pathlib import Path

from torch import Tensor

from kvchat.attention.signature import ArgumentCheck, Parameter, kernel_names, signature

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels_cu"
BUILD = ROOT / "build" / "emulator"
# -O1: half of -O2's compile time, and the checks take most of the run.
KERNEL_FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique",
    "-fsanitize=thread",
    "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized",
    "-DKVCHAT_EMULATOR", "-x", "c++",
]  # fmt: skip
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Werror"]
_CTYPES = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}


class EmulatorError(Exception):
    """What the kernel did wrong, with block, thread and source line."""


def emulated(name: str, kernel: str = "", folder: Path = SOURCES, **defines: int) -> EmulatedKernel:
    """The kernel `<name>_kernel` (or `kernel`) of <name>.cu, compiled with -D `defines`.

    ARCH stands for __CUDA_ARCH__, 800 unless given.
    """
    return _load(folder, name, tuple(sorted(defines.items()))).kernel(kernel or f"{name}_kernel")


class EmulatedKernel:
    """Call it with grid, block, arguments, dynamic shared bytes.

    has_reversed_blocks: the grid's last block runs first.
    """

    has_reversed_blocks = False

    def __init__(self, library: _Library, name: str, parameters: tuple[Parameter, ...]) -> None:
        self.parameters = parameters
        self._check = ArgumentCheck(parameters)
        self.counts: dict[str, int] = {}  # of the last launch
        self._library = library
        self._entry = library.entry(name)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: list, shared_bytes: int = 0
    ) -> None:
        """Check the arguments and run to the end. Raises EmulatorError."""
        self._check(args)
        library = self._library.handle
        library.emulator_reset()
        library.emulator_set_order(int(self.has_reversed_blocks))
        boxes = []
        for parameter, arg in zip(self.parameters, args, strict=True):
            if parameter.is_array:
                address, num_bytes = _memory(arg)
                library.emulator_add_array(address, num_bytes, not parameter.is_const)
                boxes.append(ctypes.c_uint64(address))
            else:
                boxes.append(_CTYPES[parameter.dtype](arg))
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        sizes = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
        shape = (ctypes.c_int * 7)(*sizes, shared_bytes)
        if self._entry(pointers, shape):
            raise EmulatorError(self._library.explain(library.emulator_error().decode()))
        names = ("bytes_read", "bytes_written", "num_mma", "num_barriers")
        self.counts = dict(zip(names, library.emulator_counts()[:4], strict=True))

    launch = __call__  # as a kernel on a GPU is called


def load_emulated(file_name: str, kernel_name: str, defines, max_shared_bytes: int = 0):
    """kernels.load_kernel's twin: what BlockOps and RowOps are given in tests."""
    given = {name: int(value) for name, value in defines.items()}
    return emulated(file_name.removesuffix(".cu"), kernel_name, **given)


class _Library:
    """A compiled kernel file: one shared object with the emulator inside."""

    def __init__(self, path: Path, source: str, defines: dict[str, int]) -> None:
        self.handle = ctypes.CDLL(str(path))
        self.handle.emulator_error.restype = ctypes.c_char_p
        self.handle.emulator_counts.restype = ctypes.POINTER(ctypes.c_longlong)
        self.handle.emulator_add_array.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
        self._path, self._source, self._defines = path, source, defines

    def entry(self, name: str):
        return getattr(self.handle, f"emulate_{name}")

    def kernel(self, name: str) -> EmulatedKernel:
        return EmulatedKernel(self, name, signature(self._source, name, self._defines))

    def explain(self, message: str) -> str:
        """The message with its code offset as file and line, where addr2line is installed."""
        before, found, after = message.partition(" at +")
        if not found:
            return message
        offset, _, text = after.partition(":")
        command = ["addr2line", "-s", "-i", "-e", str(self._path), hex(int(offset, 16) - 1)]
        try:
            lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        except FileNotFoundError:
            return message
        places = [line.split(" ")[0] for line in lines if line and "emulator.h" not in line]
        return f"{before} at {' < '.join(places)}:{text}"


@functools.cache
def _load(folder: Path, name: str, defines: tuple[tuple[str, int], ...]) -> _Library:
    given = {"ARCH": 800, **dict(defines)}
    flags = [f"-D{key}={value}" for key, value in given.items() if key != "ARCH"]
    flags += [f"-D__CUDA_ARCH__={given['ARCH']}", f"-I{SOURCES}", f"-I{folder}"]
    source = str((folder / f"{name}.cu").resolve())
    text = f'#include "{source}"\n'
    text += "".join(f"EMULATED_KERNEL({kernel})\n" for kernel in kernel_names(source))
    headers = sorted([*SOURCES.rglob("*.cuh"), *SOURCES.rglob("emulator/*.h")])
    key = _digest(KERNEL_FLAGS, flags, text, Path(source), *headers)
    unit = BUILD / f"{Path(name).name}-{key}.cpp"
    library = unit.with_suffix(".so")
    if not library.exists():
        runtime = _runtime()
        unit.write_text(text)
        unlinked = unit.with_suffix(".o")
        _compile([*KERNEL_FLAGS, *flags, "-c", unit], unlinked)
        _compile(["-shared", unlinked, runtime], library)
    return _Library(library, source, given)


def _runtime() -> Path:
    """The emulator's own object file."""
    source = SOURCES / "emulator" / "emulator.cpp"
    headers = sorted(source.parent.glob("*.h"))
    path = BUILD / f"emulator-{_digest(RUNTIME_FLAGS, source, *headers)}.o"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        _compile([*RUNTIME_FLAGS, "-c", source], path)
    return path


def _compile(arguments: list, output: Path) -> None:
    """g++ into a file that appears whole, since tests may run side by side."""
    partial = output.with_name(f"{output.name}.{id(arguments)}.partial")
    command = ["g++", *map(str, arguments), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    partial.replace(output)


def _digest(*parts: object) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return sha.hexdigest()[:16]


def _memory(tensor: Tensor | None) -> tuple[int, int]:
    """Address and bytes of the memory a tensor spans, from its first element to its last."""
    if tensor is None or tensor.numel() == 0:
        return 0, 0
    steps = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), (steps + 1) * tensor.element_size()
