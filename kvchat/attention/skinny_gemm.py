"""Launches skinny_gemm: y = x W^T for 1 to 16 rows of x, weights as they are or int8."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvchat.attention.kernels import Kernel, load_kernel

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


def skinny_gemm(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> None:
    """y = x W^T (+ bias) (+ residual); gated: y = silu(x W1^T) * (x W2^T), W = (W1, W2).

    y: [rows, out]; x: [rows, dim], rows up to MAX_ROWS, and may be further apart; w: [out, dim],
    gated [2 out, dim], of x's dtype, or int8 with scales, float32, one a row; bias: one a row of w;
    residual: as y, which it may be. A row's result does not depend on how many there are.
    """
    is_int8 = scales is not None
    kernel = load_skinny_gemm(str(x.dtype) == "torch.bfloat16", x.shape[0], is_gated, is_int8)
    num_out = w.shape[0] // (2 if is_gated else 1)
    num_tiles = -(-num_out * (2 if is_gated else 1) // _TILE)
    weights = [w, scales] if is_int8 else [w]
    args = [y, x, x.stride(0), *weights, bias, residual, x.shape[0], num_out, x.shape[1]]
    kernel.launch((num_tiles,), (32 * WARPS,), args)


@functools.cache
def load_skinny_gemm(is_bf16: bool, num_rows: int, is_gated: bool, is_int8: bool) -> Kernel:
    """The kernel for that many rows; to be called before a capture, like load_kernel."""
    name = "skinny_gemm_int8" if is_int8 else "skinny_gemm"
    return load_kernel(f"{name}.cu", f"{name}_kernel", gemm_defines(is_bf16, num_rows, is_gated))
