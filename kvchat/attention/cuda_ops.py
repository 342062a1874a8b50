"""How the kernels around attention are launched: constants, grids, arguments. Knows no device.

`load` gives the kernels: kernels.load_kernel on a GPU, the emulator in tests. Tensors are checked
against the kernels' signatures at launch; shapes that a signature cannot say are asserted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from kvchat.attention.signature import Defines
from kvchat.errors import UsageError
from kvchat.kv.layout import K_GROUP, Codec

if TYPE_CHECKING:
    from torch import Tensor

    from kvchat.kv.cache import KVCache

_WARP = 32
_WARPS_PER_BLOCK = 4
_BLOCK = (_WARP * _WARPS_PER_BLOCK, 1, 1)
_COPY_BLOCK, _COPY_BLOCKS_PER_PAIR = 256, 32
_GATHER_BLOCKS = 256  # for each head, where only the device knows how many have something to do
_VECTOR = 8  # 16-bit elements of a vector
_NORM_VECTORS = 4  # of a thread at most, MAX_VECTORS of rms_norm.cu
_MAX_THREADS = 1024


class Launch(Protocol):
    """A loaded kernel."""

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[object],
        shared_bytes: int = 0,
    ) -> None:
        """Check the arguments, then launch."""


class Load(Protocol):
    """Compiles and loads a kernel of kernels_cu/."""

    def __call__(
        self, file_name: str, kernel_name: str, defines: Defines, max_shared_bytes: int = ...
    ) -> Launch: ...


def _scalar_defines(dtype: str) -> dict[str, int]:
    if dtype not in ("float16", "bfloat16"):
        raise UsageError(f"on CUDA the dtype is float16 or bfloat16, not {dtype}; see --dtype")
    return {"SCALAR_BF16": int(dtype == "bfloat16")}


class RowOps:
    """The fused steps between the products, on rows of one dtype."""

    def __init__(self, dtype: str, load: Load) -> None:
        defines = _scalar_defines(dtype)
        self._rms_norm = load("rms_norm.cu", "rms_norm_kernel", defines)
        self._silu_mul = load("silu_mul.cu", "silu_mul_kernel", defines)

    def rms_norm(
        self, out: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, eps: float
    ) -> None:
        """out = norm(x) * weight; with a residual, residual += x first and that is normed.

        out, residual, x: [num_tokens, ..., size], x strided in tokens if it likes; weight: [size].
        """
        num_tokens, size = x.shape[0], x.shape[-1]
        rows_each = x[0].numel() // size
        num_vectors = 2 if size <= 2 * _VECTOR * _MAX_THREADS else _NORM_VECTORS  # of a thread
        num_threads = _WARP * -(-size // (_WARP * _VECTOR * num_vectors))
        assert size % _VECTOR == 0 and num_threads <= _MAX_THREADS, f"rows of {size}"
        args = [out, residual, x, x.stride(0), weight, rows_each, size, eps]
        self._rms_norm.launch((num_tokens * rows_each, 1, 1), (num_threads, 1, 1), args)

    def silu_mul(self, out: Tensor, gate_up: Tensor) -> None:
        """out = silu(gate) * up. out: [num_rows, size]; gate_up: [num_rows, 2 * size]."""
        num_rows, size = out.shape
        assert gate_up.shape == (num_rows, 2 * size) and size % _VECTOR == 0, f"{gate_up.shape}"
        grid = (-(-size // (_VECTOR * 256)), num_rows, 1)
        self._silu_mul.launch(grid, (256, 1, 1), [out, gate_up, gate_up.stride(0), size])


class BlockOps:
    """Writing, gathering, copying and compressing the blocks of one cache."""

    def __init__(self, cache: KVCache, load: Load) -> None:
        from kvchat.kv.codecs import rotation_signs

        layout, payload, side = cache.layout, cache.payload, cache.side
        spec, lowest = layout.spec, layout.lowest
        # Where nothing is compressed the kernels take none.
        signs = rotation_signs(spec.head_dim).to(payload.device) if lowest else None
        defines = _scalar_defines(spec.dtype)
        defines |= {"HEAD_DIM": spec.head_dim, "BLOCK_SIZE": spec.block_size, "MAX_CODEC": lowest}
        self._layout, self._payload, self._signs = layout, payload, signs
        self._side = side if layout.side_bytes else None
        self._side_stride = side.stride(0) if layout.side_bytes else 0
        self._write = load("rope_write_kv.cu", "rope_write_kv_kernel", defines)
        self._gather = load("gather_blocks.cu", "gather_blocks_kernel", defines)
        self._copy = load("copy_blocks.cu", "copy_blocks_kernel", {})
        self._compress: dict[tuple[Codec, Codec], Launch] = {}
        for src, dst, name in (
            (Codec.NATIVE, Codec.INT8, "compress_native_int8_kernel"),
            (Codec.NATIVE, Codec.INT4, "compress_native_int4_kernel"),
            (Codec.INT8, Codec.INT4, "compress_int8_int4_kernel"),
        ):
            if dst <= lowest:
                shared = self._shared_bytes(src, dst)
                self._compress[src, dst] = load("compress_blocks.cu", name, defines, shared)

    def write(
        self,
        layer_idx: int,
        out: tuple[Tensor, Tensor | None],
        qkv: tuple[Tensor, Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
    ) -> None:
        """RoPE and the slot write of one layer.

        out: the rotated q, [num_tokens, num_heads, head_dim], and the same through the codecs'
        rotation as float16, or None. qkv: q of that shape, k and v [num_tokens, num_kv_heads,
        head_dim], strided in tokens if they like. angles: cos and sin of a RopeTable. positions,
        slots: int32 [num_tokens]; slots below block_size are not written.
        """
        q, k, v = qkv
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        payload = self._payload[:, layer_idx]
        per_warp = max(1, _WARP // (head_dim // 2 // (8 if head_dim % 16 == 0 else 4)))
        num_groups = -(-(num_heads + 2 * num_kv_heads) // (per_warp * _WARPS_PER_BLOCK))
        args = [
            *out, payload, payload.stride(0), q, q.stride(0), k, k.stride(0), v, v.stride(0),
            *angles, self._signs, positions, slots, num_heads, num_kv_heads,
        ]  # fmt: skip
        self._write.launch((num_tokens, num_groups, 1), _BLOCK, args)

    def gather(
        self, layer_idx: int, out: Tensor, table: Tensor, in_use: Tensor | None = None
    ) -> None:
        """Decode blocks of one layer, keys unrotated.

        out: [2 (K, V), num_kv_heads, num_tokens, head_dim]; table: int32 [num_entries], entries of
        its positions 0, block_size, ...; num_tokens ends in the last of them. in_use: int32 [1],
        how many of the entries are wanted, known to the device alone; None: all.
        """
        _, num_kv_heads, num_tokens, _ = out.shape
        block_size = self._layout.spec.block_size
        assert -(-num_tokens // block_size) == table.numel(), f"{num_tokens} in {table.numel()}"
        payload = self._payload[:, layer_idx]
        side = self._side[:, layer_idx] if self._side is not None else None
        args = [
            out, payload, payload.stride(0), side, self._side_stride, table, in_use, self._signs,
            num_tokens, self._layout.side_bytes,
        ]  # fmt: skip
        num_blocks = table.numel() if in_use is None else min(table.numel(), _GATHER_BLOCKS)
        self._gather.launch((num_blocks, num_kv_heads, 2), _BLOCK, args)

    def copy(self, pairs: Tensor) -> None:
        """Copy blocks, payload and side. pairs: int32 [n, 2] of (source, destination), no block
        twice among the destinations, or among both."""
        args = [
            self._payload, self._payload.stride(0), self._side, self._side_stride, pairs,
            self._layout.spec.bytes_per_block, self._layout.side_bytes_per_block,
        ]  # fmt: skip
        grid = (pairs.shape[0], _COPY_BLOCKS_PER_PAIR, 1)
        self._copy.launch(grid, (_COPY_BLOCK, 1, 1), args)

    def compress(self, src: Codec, dst: Codec, jobs: Tensor) -> None:
        """Encode blocks of codec `src` as `dst`. jobs: int32 [n, 1 + sources] of a destination and
        its sources in order; none reads what another writes."""
        spec, layout = self._layout.spec, self._layout
        num_sources = layout.span_blocks[dst] // layout.span_blocks[src]
        assert jobs.shape[1] == 1 + num_sources, f"{jobs.shape} from {src} to {dst}"
        num_chunks = 2 if dst == Codec.INT8 else layout.span_tokens(dst) // K_GROUP
        args = [
            self._payload, self._payload.stride(0), self._side, self._side_stride, jobs,
            self._signs, spec.num_kv_heads, layout.side_bytes,
        ]  # fmt: skip
        grid = (jobs.shape[0] * num_chunks, spec.num_layers, 2 * spec.num_kv_heads)
        self._compress[src, dst].launch(grid, _BLOCK, args, self._shared_bytes(src, dst))

    def _shared_bytes(self, src: Codec, dst: Codec) -> int:
        """Of Int8Shared or Int4Shared in compress_blocks.cu, rounded up."""
        dim = self._layout.spec.head_dim
        if dst == Codec.INT8:
            return self._layout.spec.block_size * dim * 3
        tile = K_GROUP * dim * (2 if src == Codec.NATIVE else 1)
        union = max(2 * _WARPS_PER_BLOCK * dim * 4, K_GROUP * dim // 2)
        return tile + union + (2 + _WARPS_PER_BLOCK) * dim * 4 + K_GROUP * 4 + 48
