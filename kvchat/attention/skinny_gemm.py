"""Launches skinny_gemm: y = x W^T for 1 to 16 rows of x, weights as they are or int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvchat.attention.cuda_ops import Launch, Load

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROWS = 16
# Few loads a warp and many warps: measured best on an H200 (docs/benchmarks).
WARPS, DEPTH, MIN_BLOCKS = 16, 1, 2
_TILE = 16  # rows of W that a block takes at a time; 8 of the gate and 8 of the up rows if gated
_DIM_STEP = {False: 64, True: 128}  # of the inner dimension, by whether the weights are int8


def is_supported(dim: int, is_int8: bool = False) -> bool:
    """Whether the kernel can do products over an inner dimension `dim`; else a library does."""
    return dim % _DIM_STEP[is_int8] == 0


def gemm_defines(is_bf16: bool, num_rows: int, is_gated: bool) -> dict[str, int]:
    """The constants of skinny_gemm.cuh."""
    return {
        "SCALAR_BF16": int(is_bf16),
        "WARPS": WARPS,
        "DEPTH": DEPTH,
        "MIN_BLOCKS": MIN_BLOCKS,
        "TOKEN_TILES": -(-num_rows // 8),
        "GATED": int(is_gated),
    }


class SkinnyGemm:
    """The products for one dtype, float16 or bfloat16. `load` gives kernels, as in cuda_ops.

    A kernel is loaded with its first product, which must not be in a capture; or by load_all.
    """

    def __init__(self, dtype: str, load: Load) -> None:
        self._is_bf16 = dtype == "bfloat16"
        self._load = load
        self._kernels: dict[tuple[int, bool, bool], Launch] = {}

    def load_all(self, max_rows: int, is_int8: bool) -> None:
        """Every kernel that products of up to max_rows rows need."""
        for num_rows in range(1, max_rows + 1, 8):
            for is_gated in (False, True):
                self._kernel(num_rows, is_gated, is_int8)

    def __call__(
        self,
        y: Tensor,
        x: Tensor,
        w: Tensor,
        scales: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        is_gated: bool = False,
    ) -> None:
        """y = x W^T (+ bias) (+ residual); gated: y = silu(x W1^T) * (x W2^T), W = (W1, W2).

        y: [rows, out]; x: [rows, dim], rows up to MAX_ROWS, and may be further apart; w:
        [out, dim], gated [2 out, dim], of x's dtype, or int8 with scales, float32, one a row; bias:
        one a row of w; residual: as y, which it may be. A row's result does not depend on how many
        there are.
        """
        is_int8 = scales is not None
        num_out = w.shape[0] // (2 if is_gated else 1)
        num_tiles = -(-num_out * (2 if is_gated else 1) // _TILE)
        weights = [w, scales] if is_int8 else [w]
        args = [y, x, x.stride(0), *weights, bias, residual, x.shape[0], num_out, x.shape[1]]
        kernel = self._kernel(x.shape[0], is_gated, is_int8)
        kernel.launch((num_tiles,), (32 * WARPS,), args)

    def _kernel(self, num_rows: int, is_gated: bool, is_int8: bool) -> Launch:
        key = (-(-num_rows // 8), is_gated, is_int8)
        if key not in self._kernels:
            name = "skinny_gemm_int8" if is_int8 else "skinny_gemm"
            defines = gemm_defines(self._is_bf16, num_rows, is_gated)
            self._kernels[key] = self._load(f"{name}.cu", f"{name}_kernel", defines)
        return self._kernels[key]
