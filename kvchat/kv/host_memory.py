"""Main memory that a GPU copies to and from without the CPU: for parked blocks, and on the way."""

from __future__ import annotations

import contextlib
import mmap

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kvchat.errors import CapacityError


def reserve(num_bytes: int, is_locked: bool) -> Tensor:
    """uint8 [num_bytes], in use as it is written to, or all of it and locked until `unlock`.

    Raises CapacityError where the machine has or allows less.
    """
    try:
        if not is_locked:
            return torch.empty(num_bytes, dtype=torch.uint8)
        memory = _pages(num_bytes)
    except (OSError, RuntimeError) as error:
        raise CapacityError(
            f"{num_bytes} bytes of main memory could not be reserved; lower --host-mem"
        ) from error
    if code := int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)):
        raise CapacityError(
            f"{num_bytes} bytes of main memory could not be page-locked (CUDA error {code});"
            " lower --host-mem"
        )
    return memory


def unlock(address: int) -> None:
    """Before locked memory is given back; nothing may be copied there any more."""
    torch.cuda.cudart().cudaHostUnregister(address)


def send(numbers: ArrayLike, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of them on the device, queued on the current stream: the host does not wait, and
    torch keeps what it copies from until it is there."""
    here = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def _pages(num_bytes: int) -> Tensor:
    """Pages that nothing else lies in. Not torch's own locked memory: that comes in powers of two,
    and an arena is as large as somebody could spare."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not on every system
        pages.madvise(mmap.MADV_HUGEPAGE)  # there are fewer of them to lock
    return torch.frombuffer(pages, dtype=torch.uint8)
