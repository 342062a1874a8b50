"""DecoderOps on a GPU: our own product for few rows, cuBLAS for more, fused steps between.

cuBLAS does not multiply with int8 weights: they are made wide for it, a piece at a time, in memory
that is reserved once.

`load` gives the kernels, as in attention/cuda_ops: kernels.load_kernel, or the emulator in tests.
Nothing is loaded in a capture: warm_up is to be called before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kvchat.attention.cuda_ops import Load, RowOps
from kvchat.attention.skinny_gemm import MAX_ROWS, SkinnyGemm, is_supported
from kvchat.model.linear import Linear
from kvchat.model.ops import TorchOps
from kvchat.model.sizes import DEQUANTISED_VALUES

# Rows up to which our product is used. With more cuBLAS is faster (docs/benchmarks); with int8
# weights it would have to read more.
MAX_SKINNY_ROWS = 8
MAX_INT8_ROWS = MAX_ROWS
_VECTOR = 8  # elements: rows of another length are left to torch


class CudaOps(TorchOps):
    """For one dtype, float16 or bfloat16. A residual is added to in place."""

    def __init__(self, dtype: str, load: Load) -> None:
        self._rows = RowOps(dtype, load)
        self._skinny = SkinnyGemm(dtype, load)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._wide: Tensor | None = None  # where int8 weights are made wide

    def warm_up(self, linears: Iterable[Linear]) -> None:
        """Load the kernels and reserve the memory that the first step with these would wait for."""
        for linear in linears:
            is_int8 = linear.scales is not None
            if is_supported(linear.weight.shape[1], is_int8):
                self._skinny.load_all(MAX_INT8_ROWS if is_int8 else MAX_SKINNY_ROWS, is_int8)
            if is_int8:
                self._reserve_wide(linear.weight)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See DecoderOps.norm."""
        if x.shape[-1] % _VECTOR:
            return super().norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._rows.rms_norm(out, None, x, weight, eps)
        return out

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """See DecoderOps.linear."""
        is_skinny = self._is_skinny(x, linear)
        if not is_skinny and linear.scales is None:
            return super().linear(x, linear)
        linear.num_reads += 1
        y = torch.empty(x.shape[0], linear.weight.shape[0], dtype=x.dtype, device=x.device)
        if is_skinny:
            self._skinny(y, x, linear.weight, linear.scales, linear.bias)
            return y
        for rows, weight in self._pieces(linear):
            torch.mm(x, weight.t(), out=y[:, rows])
        return y if linear.bias is None else y.add_(linear.bias)

    def add_linear(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """See DecoderOps.add_linear."""
        linear.num_reads += 1
        if self._is_skinny(x, linear):
            self._skinny(residual, x, linear.weight, linear.scales, linear.bias, residual)
            return residual
        for rows, weight in self._pieces(linear):
            residual[:, rows].addmm_(x, weight.t())
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
        is_int8 = linear.scales is not None
        max_rows = MAX_INT8_ROWS if is_int8 else MAX_SKINNY_ROWS
        return x.shape[0] <= max_rows and is_supported(x.shape[1], is_int8)

    def _pieces(self, linear: Linear) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, these rows in the model's dtype); the next piece overwrites one."""
        weight, scales = linear.weight, linear.scales
        num_out, num_in = weight.shape
        if scales is None:
            yield slice(num_out), weight
            return
        wide = self._reserve_wide(weight)
        num_rows = wide.numel() // num_in
        for first in range(0, num_out, num_rows):
            rows = slice(first, min(first + num_rows, num_out))
            piece = wide[: (rows.stop - first) * num_in].view(-1, num_in)
            yield rows, torch.mul(weight[rows], scales[rows, None], out=piece)

    def _reserve_wide(self, weight: Tensor) -> Tensor:
        """Memory for a piece of this weight."""
        num_values = min(max(DEQUANTISED_VALUES, weight.shape[1]), weight.numel())
        if self._wide is None or self._wide.numel() < num_values:
            self._wide = torch.empty(num_values, dtype=self._dtype, device=weight.device)
        return self._wide
