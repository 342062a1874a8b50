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
from typing import TYPE_CHECKING, cast

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
    "double": "float64",
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


class ArgumentCheck:
    """Raises TypeError or ValueError where an argument is not what a kernel's signature says.

    Tensors, or None for a null pointer: of the dtype, contiguous (or, with a parameter
    `<name>_stride`, strided in the first dimension by exactly that many elements), and aligned for
    vectors where elements are of 1 or 2 bytes. Numbers: int or float, within their width.
    What is right passes in about a microsecond an argument; words are found for what is not.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        import torch

        self._num_parameters = len(parameters)
        where = {parameter.name: idx for idx, parameter in enumerate(parameters)}
        self._numbers = [(idx, p) for idx, p in enumerate(parameters) if not p.is_array]
        self._arrays = [
            (idx, getattr(torch, p.dtype), where.get(f"{p.name}_stride"), p)
            for idx, p in enumerate(parameters)
            if p.is_array
        ]

    def __call__(self, args: Sequence[object]) -> None:
        if len(args) != self._num_parameters:
            raise TypeError(f"{len(args)} arguments for {self._num_parameters} parameters")
        for idx, parameter in self._numbers:
            _check_number(parameter, args[idx])
        for idx, dtype, stride_idx, parameter in self._arrays:
            tensor = args[idx]
            if tensor is None:
                continue
            if getattr(tensor, "dtype", None) is not dtype:
                raise TypeError(
                    f"{parameter.name} must be a tensor of {dtype}, not {_kind(tensor)}"
                )
            stride = None if stride_idx is None else args[stride_idx]
            _check_tensor(parameter.name, cast("Tensor", tensor), cast("int | None", stride))


def _kind(arg: object) -> str:
    return str(arg.dtype) if hasattr(arg, "dtype") else repr(arg)


def _check_number(parameter: Parameter, arg: object) -> None:
    wanted = float if parameter.dtype == "float32" else int
    if type(arg) is not wanted:
        raise TypeError(f"{parameter.name} must be {wanted.__name__}, not {arg!r}")
    bits = 31 if parameter.dtype == "int32" else 63
    if isinstance(arg, int) and not -(1 << bits) <= arg < 1 << bits:
        raise ValueError(f"{parameter.name} = {arg} does not fit in {bits + 1} bits")


def _check_tensor(name: str, tensor: Tensor, stride: int | None) -> None:
    shape, strides, row_bytes = tensor.shape, tensor.stride(), 0
    if stride is not None and shape[0] > 1:
        if strides[0] != stride:
            raise ValueError(f"{name} has rows {strides[0]} elements apart, not {stride}")
        shape, strides, row_bytes = shape[1:], strides[1:], stride * tensor.element_size()
    dense = 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and step != dense:
            raise ValueError(f"{name} is not contiguous: {tuple(shape)} by {strides}")
        dense *= size
    if tensor.element_size() <= 2 and (tensor.data_ptr() | row_bytes) % VECTOR_BYTES:
        raise ValueError(f"{name} is not aligned to {VECTOR_BYTES} bytes")
