"""A weight matrix of a model. Counts how often the weight is read; model/ops does the products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MAX_CODE = 127


class Quantised(NamedTuple):
    """A matrix as int8: row i is codes[i] * scales[i], symmetric, its largest value 127.

    codes: int8 [num_out, num_in]; scales: float32 [num_out].
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, num_out: int, num_in: int, device: torch.device | str) -> Quantised:
        """Memory for one, to be filled by `put`."""
        codes = torch.empty(num_out, num_in, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(num_out, dtype=torch.float32, device=device))

    def put(self, first: int, rows: Tensor) -> None:
        """Encode rows, float32 [n, num_in], as rows first .. first + n - 1."""
        scales = rows.abs().amax(dim=1) / _MAX_CODE
        codes = (rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        self.codes[first : first + len(rows)] = codes.clamp_(-_MAX_CODE, _MAX_CODE)
        self.scales[first : first + len(rows)] = scales

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The values that it stands for."""
        return (self.codes * self.scales[:, None]).to(dtype)


def quantise(matrix: Tensor) -> Quantised:
    """A matrix as int8."""
    num_out, num_in = matrix.shape
    made = Quantised.empty(num_out, num_in, matrix.device)
    made.put(0, matrix.float())
    return made


class Linear:
    """y = x weight^T + bias. weight: [num_out, num_in]; bias: [num_out] or None.

    An int8 weight has scales, float32 [num_out], that its rows are multiplied with.
    num_reads counts products, so that "every weight is read once a step" can be tested.
    """

    __slots__ = ("bias", "num_reads", "scales", "weight")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.scales = scales
        self.num_reads = 0

    @classmethod
    def of(cls, matrix: Tensor | Quantised, bias: Tensor | None = None) -> Linear:
        """From what a loader gives."""
        if isinstance(matrix, Quantised):
            return cls(matrix.codes, bias, matrix.scales)
        return cls(matrix, bias)

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        parts = (self.weight, self.bias, self.scales)
        return sum(part.nbytes for part in parts if part is not None)
