"""DecoderOps on a GPU: our own product for few rows, cuBLAS for more, fused steps between.

`load` gives the kernels, as in attention/cuda_ops: kernels.load_kernel, or the emulator in tests.
Nothing is loaded in a capture: warm_up is to be called before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.attention.cuda_ops import Load, RowOps
from kvchat.attention.skinny_gemm import SkinnyGemm, is_supported
from kvchat.model.linear import Linear
from kvchat.model.ops import TorchOps

# Rows up to which our product is used. With more cuBLAS is faster (docs/benchmarks).
MAX_SKINNY_ROWS = 8
_VECTOR = 8  # elements: rows of another length are left to torch


class CudaOps(TorchOps):
    """For one dtype, float16 or bfloat16. A residual is added to in place."""

    def __init__(self, dtype: str, load: Load) -> None:
        self._rows = RowOps(dtype, load)
        self._skinny = SkinnyGemm(dtype, load)

    def warm_up(self) -> None:
        """Load the kernels that the first step of any number of rows would wait for."""
        self._skinny.load_all(MAX_SKINNY_ROWS, is_int8=False)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See DecoderOps.norm."""
        if x.shape[-1] % _VECTOR:
            return super().norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._rows.rms_norm(out, None, x, weight, eps)
        return out

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """See DecoderOps.linear."""
        if not self._is_skinny(x, linear):
            return super().linear(x, linear)
        linear.num_reads += 1
        y = torch.empty(x.shape[0], linear.weight.shape[0], dtype=x.dtype, device=x.device)
        self._skinny(y, x, linear.weight, linear.scales, linear.bias)
        return y

    def add_linear(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """See DecoderOps.add_linear."""
        linear.num_reads += 1
        if self._is_skinny(x, linear):
            self._skinny(residual, x, linear.weight, linear.scales, linear.bias, residual)
            return residual
        residual.addmm_(x, linear.weight.t())
        return residual if linear.bias is None else residual.add_(linear.bias)

    def gated(self, x: Tensor, gate_up: Linear) -> Tensor:
        """See DecoderOps.gated."""
        num_out = gate_up.weight.shape[0] // 2
        if num_out % _VECTOR:
            return super().gated(x, gate_up)
        out = torch.empty(x.shape[0], num_out, dtype=x.dtype, device=x.device)
        if self._is_skinny(x, gate_up):
            gate_up.num_reads += 1
            weights = gate_up.weight, gate_up.scales, gate_up.bias
            self._skinny(out, x, *weights, is_gated=True)
        else:
            self._rows.silu_mul(out, self.linear(x, gate_up))
        return out

    def _is_skinny(self, x: Tensor, linear: Linear) -> bool:
        return x.shape[0] <= MAX_SKINNY_ROWS and is_supported(x.shape[1])
