"""Bytes of memory behind tensors and arrays: each byte once, however many views there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

# [start, end) addresses.
Range = tuple[int, int]


def ranges_of(*roots: object, on_gpu: bool = False) -> list[Range]:
    """The memory of all tensors and arrays that kvchat's own objects lead to from the roots:
    whole storages, also where only a part is looked at. on_gpu: those on a GPU alone."""
    ranges, waiting, seen = [], list(roots), set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if on_gpu and not item.is_cuda:
                continue
            storage = item.untyped_storage()
            ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        elif isinstance(item, np.ndarray):
            ranges += [] if on_gpu else [_range_of_array(item)]
        else:
            waiting += _members(item)
    return ranges


def num_bytes(ranges: Iterable[Range]) -> int:
    """Bytes that lie in any of the ranges."""
    total = end = 0
    for start, stop in sorted(ranges):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def num_bytes_outside(ranges: list[Range], others: list[Range]) -> int:
    """Bytes that lie in the ranges and in none of the others."""
    return num_bytes(ranges + others) - num_bytes(others)


def _range_of_array(array: np.ndarray) -> Range:
    while isinstance(array.base, np.ndarray):
        array = array.base
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _members(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple | set):
        yield from item
    elif type(item).__module__.partition(".")[0] == "kvchat":
        yield from getattr(item, "__dict__", {}).values()
        names = getattr(type(item), "__slots__", ())
        yield from (getattr(item, name) for name in names if hasattr(item, name))
