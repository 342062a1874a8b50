"""The arguments of CUDA kernels, as their sources declare them. Knows no compiler and no GPU.

A kernel's signature in its source is the one description of its arguments: dtype, constness and
width are read from it and checked before every launch, on a GPU (attention/kernels) and in the
tests' emulator alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvchat.paths import data_dir

if TYPE_CHECKING:
    from torch import Tensor

Defines = Mapping[str, int]

_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\('
)
_PARAMETER = re.compile(r"(const )?((?:unsigned |signed |long )?\w+)(?: const)?\s*(\*?)\s*(\w+)")
_POINTER_DTYPES = {
    "half_t": "float16",
    "bfloat16_t": "bfloat16",
    "float": "float32",
    "unsigned char": "uint8",
    "u8": "uint8",
    "signed char": "int8",
    "s8": "int8",
    "int": "int32",
    "unsigned int": "int32",  # torch counts in signed numbers
    "u32": "int32",
    "long long": "int64",
    "s64": "int64",
}
_SCALAR_KINDS = {"int": "int32", "long long": "int64", "s64": "int64", "float": "float32"}
_EMULATOR = "emulator/emulator.h"
VECTOR_BYTES = 16  # kernels read 16-bit and 8-bit elements by the vector


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel: an array of `dtype` (is_array) or a number of that width."""

    name: str
    dtype: str
    is_array: bool
    is_const: bool


def inline_source(file_name: str) -> str:
    """The text of a file of kernels_cu/ with its quoted includes put in place, each once.

    The emulator's header is left out: a GPU compiler never reaches it.
    """
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen or name == _EMULATOR:
            return ""
        seen.add(name)
        text = (data_dir("kernels_cu") / name).read_text()
        text = re.sub(r"^#pragma once$", "", text, flags=re.MULTILINE)
        return re.sub(
            r'^#include "([^"]+)"$', lambda m: expand(m.group(1)), text, flags=re.MULTILINE
        )

    return expand(file_name)


@functools.cache
def _signatures(file_name: str) -> dict[str, str]:
    """By kernel: the text between the brackets of its signature, comments removed."""
    text = (data_dir("kernels_cu") / file_name).read_text()
    text = re.sub(r"//[^\n]*", "", text)
    return {
        found.group(1): text[found.end() : text.index(")", found.end())]
        for found in _KERNEL.finditer(text)
    }


def kernel_names(file_name: str) -> list[str]:
    """The kernels a file defines, in its order."""
    return list(_signatures(file_name))


def signature(file_name: str, kernel_name: str, defines: Defines) -> tuple[Parameter, ...]:
    """The parameters of a kernel, in order; scalar_t as SCALAR_BF16 says."""
    scalar = "bfloat16_t" if defines.get("SCALAR_BF16") else "half_t"
    text = _signatures(file_name)[kernel_name]
    return tuple(_parameter(part, scalar) for part in text.split(",") if part.strip())


def _parameter(text: str, scalar: str) -> Parameter:
    plain = " ".join(text.replace("__restrict__", " ").split())
    found = _PARAMETER.fullmatch(plain.replace("long long", "long_long"))
    assert found, f"kernel parameter {plain!r} cannot be read"
    is_const, kind, star, name = found.groups()
    kind = kind.replace("long_long", "long long")
    kind = scalar if kind == "scalar_t" else kind
    dtypes = _POINTER_DTYPES if star else _SCALAR_KINDS
    assert kind in dtypes, f"kernel parameter {plain!r}: no rule for {kind}"
    return Parameter(name, dtypes[kind], bool(star), bool(is_const) or not star)


def check_args(parameters: Sequence[Parameter], args: Sequence[Tensor | float | None]) -> None:
    """Raise TypeError or ValueError where an argument is not what the kernel's signature says.

    Tensors, or None for a null pointer: of the dtype, contiguous (or, with a parameter
    `<name>_stride`, strided in the first dimension by exactly that many elements), and aligned for
    vectors where elements are of 1 or 2 bytes. Numbers: int or float, within their width.
    """
    if len(args) != len(parameters):
        raise TypeError(f"{len(args)} arguments for {len(parameters)} parameters")
    by_name = {p.name: arg for p, arg in zip(parameters, args, strict=True)}
    for parameter, arg in zip(parameters, args, strict=True):
        if not parameter.is_array:
            _check_number(parameter, arg)
        elif arg is not None:
            _check_tensor(parameter, arg, by_name.get(f"{parameter.name}_stride"))


def _check_number(parameter: Parameter, arg: object) -> None:
    wanted = float if parameter.dtype == "float32" else int
    if type(arg) is not wanted:
        raise TypeError(f"{parameter.name} must be {wanted.__name__}, not {arg!r}")
    bits = 31 if parameter.dtype == "int32" else 63
    if isinstance(arg, int) and not -(1 << bits) <= arg < 1 << bits:
        raise ValueError(f"{parameter.name} = {arg} does not fit in {bits + 1} bits")


def _check_tensor(parameter: Parameter, arg: object, stride: object) -> None:
    if not hasattr(arg, "data_ptr"):
        raise TypeError(f"{parameter.name} must be a tensor, not {arg!r}")
    tensor: Tensor = arg  # type: ignore[assignment]
    name, dtype = parameter.name, str(tensor.dtype).removeprefix("torch.")
    if dtype != parameter.dtype:
        raise TypeError(f"{name} must be {parameter.dtype}, not {dtype}")
    row_stride = tensor.stride(0) if tensor.dim() else 1
    if isinstance(stride, int) and tensor.shape[0] > 1:
        if row_stride != stride:
            raise ValueError(f"{name} has rows {row_stride} elements apart, not {stride}")
        tensor = tensor[0]
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: {tuple(tensor.shape)} by {tensor.stride()}")
    item = tensor.element_size()
    steps = tensor.data_ptr() | (item * stride if isinstance(stride, int) else 0)
    if item <= 2 and steps % VECTOR_BYTES:
        raise ValueError(f"{name} is not aligned to {VECTOR_BYTES} bytes")
