"""A weight matrix of a model. Counts how often the weight is read; model/ops does the products."""

from __future__ import annotations

from torch import Tensor


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

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        parts = (self.weight, self.bias, self.scales)
        return sum(part.nbytes for part in parts if part is not None)
