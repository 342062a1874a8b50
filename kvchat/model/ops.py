"""The steps of a decoder layer around attention: what a device does them with.

Rows are tokens; all tensors are of the model's dtype. `residual` is the stream that a layer adds
to: an implementation may add in place, so callers use what is returned and nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvchat.model.linear import Linear


class DecoderOps(Protocol):
    """What the decoder calls."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, in float32 up to the product.

        x: [num_rows, ..., size], strided in rows if it likes; weight: [size].
        """

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """x weight^T + bias. x: [num_rows, num_in] -> [num_rows, num_out]."""

    def add_linear(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """residual + linear(x). residual: [num_rows, num_out]."""

    def gated(self, x: Tensor, gate_up: Linear) -> Tensor:
        """silu(gate) * up of the fused product: [num_rows, num_in] -> [num_rows, num_out / 2]."""


class TorchOps:
    """Plain torch, for a CPU; weights in the model's dtype."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See DecoderOps.norm.

        Written out because torch's rms_norm takes 3 to 6 times as long for hundreds of rows.
        """
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """See DecoderOps.linear."""
        linear.num_reads += 1
        return F.linear(x, linear.weight, linear.bias)

    def add_linear(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """See DecoderOps.add_linear."""
        return residual + self.linear(x, linear)

    def gated(self, x: Tensor, gate_up: Linear) -> Tensor:
        """See DecoderOps.gated."""
        gate, up = self.linear(x, gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up
