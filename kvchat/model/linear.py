"""A weight matrix and its product. Counts how often the weight is read; knows no model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x weight^T + bias. weight: [num_out, num_in]; bias: [num_out] or None, the same dtype.

    num_reads counts products, so that "every weight is read once a step" can be tested.
    """

    __slots__ = ("bias", "num_reads", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.num_reads = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, num_in] -> [num_rows, num_out]."""
        self.num_reads += 1
        return F.linear(x, self.weight, self.bias)
