"""What a step tells the device, in one copy: arrays here, tensors of fixed place there."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

# What is being written, one that may still be on its way, and one to spare: the engine has read a
# step when the one after the next is launched.
_NUM_BUFFERS = 3


class StepBuffer:
    """`fields`: dtype and shape by name, those of wide dtypes first so that all are aligned."""

    def __init__(
        self, fields: dict[str, tuple[str, tuple[int, ...]]], device: torch.device | str
    ) -> None:
        sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in fields.values()]
        ends = [0, *accumulate(sizes)]

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[start:end].view(getattr(torch, dtype)).view(shape)
                for (name, (dtype, shape)), (start, end) in zip(
                    fields.items(), pairwise(ends), strict=True
                )
            }

        self._there = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        is_gpu = self._there.is_cuda
        self._here = [
            torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=is_gpu) for _ in range(_NUM_BUFFERS)
        ]
        self.tensors = views(self._there)
        self._arrays = [
            {name: part.numpy() for name, part in views(buffer).items()} for buffer in self._here
        ]
        self._idx = 0

    def begin(self) -> dict[str, np.ndarray]:
        """The arrays to fill for the next step; they hold what some step before left there."""
        self._idx = (self._idx + 1) % _NUM_BUFFERS
        return self._arrays[self._idx]

    def send(self) -> None:
        """Queue the copy of what was filled."""
        self._there.copy_(self._here[self._idx], non_blocking=True)
