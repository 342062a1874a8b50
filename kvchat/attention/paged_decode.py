"""Launches paged_decode: its constants, its work list, its scratch. One object for a pool.

    decode = PagedDecode(cache.layout, num_heads, max_rows, max_len, "cuda")
    plan = decode.make_plan()
    decode.plan(plan, tables, seq_lens, window=0)            # once a step, for layers of one window
    decode.attend(out, q, q_rotated, cache, plan, layer_idx, scale)     # once a layer

Nothing is allocated after the constructor and make_plan, so that both calls may be captured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvchat.attention.cuda_ops import Launch, Load
from kvchat.attention.kernels import load_kernel
from kvchat.kv.layout import BlockLayout, Codec, v_group

if TYPE_CHECKING:
    from torch import Tensor

    from kvchat.kv.cache import KVCache

HEAD_DIMS = (64, 96, 128, 256)  # that paged_decode is written for
# Of decode_record.cuh.
RECORD_HEADER = 8
MAX_SPLIT = 2048
RECORD_INTS = RECORD_HEADER + MAX_SPLIT // 16
# Of decode_items.cuh.
_SLOTS = 4
_AHEAD = 2
_COUNTED_BYTES = 32 * 24  # of paged_decode.cu: what is kept of items until they are counted
TILE_HEADS = 8  # heads of a group that share a pass over K and V


@dataclass(frozen=True)
class DecodeTuning:
    """What is chosen by measuring; docs/benchmarks holds the figures."""

    warps: int = 8
    teams: int = 2  # of so many warps, on each multiprocessor
    target_splits: int = 8  # of a row, where they are no longer than MAX_SPLIT
    min_split: int = 256  # positions of a split, a power of two from the longest span (128) up


def default_tuning(layout: BlockLayout, max_shared: int = 227 << 10) -> DecodeTuning:
    """For a model: enough splits that one long row keeps the device busy, and as many warps as fit.

    max_shared: bytes of shared memory that a block may have (227 KiB on sm_90).
    """
    target_splits = min(max(64 // layout.spec.num_kv_heads, 8), 64)
    min_split = 256 if target_splits <= 16 else 128
    # As many as registers allow; those of 96 spend some on places that are no powers of two.
    most = {64: 8, 96: 6, 128: 8}.get(layout.spec.head_dim, 4)
    fitting = [
        (warps * teams, teams, warps)
        for warps in (8, 6, 4, 3, 2, 1)
        for teams in (2, 1)
        if warps <= most and shared_bytes(layout, DecodeTuning(warps, teams)) <= max_shared
    ]
    _, teams, warps = max(fitting)
    return DecodeTuning(warps, teams, target_splits, min_split)


def shared_bytes(layout: BlockLayout, tuning: DecodeTuning) -> int:
    """Bytes of paged_decode.cu, a struct Shared a team; the kernel asserts that they are enough."""
    dim, lowest = layout.spec.head_dim, layout.lowest
    num_forms = 3 if lowest else 1
    side = 128 if lowest else 0
    if lowest == Codec.INT4:
        side = 2 * dim + 128 * (dim // v_group(dim)) + -(-(4 + 2 * dim) // 16) * 16
    most_units = -(-MAX_SPLIT // 16 // tuning.warps) + 1
    state = 2 * 32 * dim + _AHEAD * side + 16
    state += 16 * (1 << (most_units - 1).bit_length() if tuning.warps > 4 else most_units)
    if lowest == Codec.INT4:
        state += 2 * dim + 16
    queries = 2 * 16 * dim * (2 if lowest else 1) + num_forms * (16 * dim + 32)
    slots = _SLOTS * 4 * (RECORD_INTS + 8)
    warp = _whole_lines(state) + 64
    return tuning.teams * _whole_lines(slots + queries + tuning.warps * warp + _COUNTED_BYTES + 48)


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


class PagedDecode:
    """Decode attention for pools of one layout, up to max_rows rows of up to max_len tokens.

    `load` gives the kernels: kernels.load_kernel, or the emulator in tests.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_heads: int,
        max_rows: int,
        max_len: int,
        device: str,
        tuning: DecodeTuning | None = None,
        load: Load = load_kernel,
    ) -> None:
        import torch

        self.tuning = tuning or default_tuning(layout, _max_shared(device))
        self.layout, self.num_heads, self.device = layout, num_heads, device
        self._group = num_heads // layout.spec.num_kv_heads
        self._shared_bytes = shared_bytes(layout, self.tuning)
        self.num_tiles = layout.spec.num_kv_heads * -(-self._group // TILE_HEADS)
        self.max_records = max_rows * max_splits(max_len, self.tuning)
        slots = (self.max_records * self.num_tiles, min(self._group, TILE_HEADS))
        self._sums = torch.empty((*slots, layout.spec.head_dim), device=device)
        self._stats = torch.empty((*slots, 2), device=device)
        self._counters = torch.zeros(
            (max_rows, self.num_tiles), dtype=torch.int32, device=device
        )  # the kernel leaves them at zero
        self._plan_kernel, self._kernel = self._load(load)
        self._grid = _num_processors(device)

    def make_plan(self) -> Tensor:
        """Memory for a work list, int32; one for each window that is in use at the same time."""
        import torch

        num_records = max(self.max_records, records_read(self._grid, self.num_tiles, self.tuning))
        num_ints = RECORD_HEADER + num_records * RECORD_INTS
        return torch.zeros(num_ints, dtype=torch.int32, device=self.device)

    def plan(self, plan: Tensor, tables: Tensor, seq_lens: Tensor, window: int = 0) -> None:
        """Fill `plan`. tables: int32 [rows, entries], entries of kv/layout; seq_lens: int32 [rows],
        0 for a row that is padding; window: positions a row sees, 0 for all."""
        args = [
            plan, tables, tables.stride(0), seq_lens, self.layout.spec.block_size, window,
            self.tuning.target_splits, self.tuning.min_split,
        ]  # fmt: skip
        self._plan_kernel.launch((seq_lens.shape[0],), (128,), args)

    def attend(
        self,
        out: Tensor,
        q: Tensor,
        q_rotated: Tensor | None,
        cache: KVCache,
        plan: Tensor,
        layer_idx: int,
        scale: float,
    ) -> None:
        """out, q: [rows, num_heads, head_dim] in the pool's dtype, q rotated by position.

        q_rotated: codecs.rotate of it, float16 of the same shape, for INT8 blocks. scale: of the
        scores, as attention is defined.
        """
        self._kernel.launch(
            (self._grid,),
            (32 * self.tuning.warps * self.tuning.teams,),
            self.arguments(out, q, q_rotated, cache, plan, layer_idx, scale),
            self._shared_bytes,
        )

    def arguments(
        self,
        out: Tensor,
        q: Tensor,
        q_rotated: Tensor | None,
        cache: KVCache,
        plan: Tensor,
        layer_idx: int,
        scale: float,
    ) -> list[Tensor | float | None]:
        """The kernel's, in order."""
        spec = self.layout.spec
        return [
            out, self._sums, self._stats, self._counters, q, q_rotated, cache.payload,
            cache.side if self.layout.side_bytes else None, plan, scale * math.log2(math.e),
            layer_idx, spec.num_layers, spec.num_kv_heads, self._group, spec.block_size,
            self.layout.side_bytes,
        ]  # fmt: skip

    def _load(self, load: Load) -> tuple[Launch, Launch]:
        defines = decode_defines(self.layout, self.tuning)
        plan_kernel = load("plan_decode.cu", "plan_decode_kernel", {"SCALAR_BF16": 0})
        shared = defines["SHARED_BYTES"]
        return plan_kernel, load("paged_decode.cu", "paged_decode_kernel", defines, shared)


def _num_processors(device: str) -> int:
    """Of a GPU; the emulator runs one block after another, and two show what depends on others."""
    import torch

    if device == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _max_shared(device: str) -> int:
    """Bytes of shared memory that a block of this device may have; the emulator's is sm_90's."""
    if device == "cpu":
        return 227 << 10
    import torch
    from cupy.cuda import runtime

    max_shared_per_block_optin = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
    device_idx = torch.device(device).index or 0
    return int(runtime.deviceGetAttribute(max_shared_per_block_optin, device_idx))


def decode_defines(layout: BlockLayout, tuning: DecodeTuning) -> dict[str, int]:
    """The constants of paged_decode.cu for a pool."""
    spec = layout.spec
    return {
        "SCALAR_BF16": int(spec.dtype == "bfloat16"),
        "HEAD_DIM": spec.head_dim,
        "MAX_CODEC": int(layout.lowest),
        "WARPS": tuning.warps,
        "TEAMS": tuning.teams,
        "SHARED_BYTES": shared_bytes(layout, tuning),
    }


def records_read(grid: int, num_tiles: int, tuning: DecodeTuning) -> int:
    """Records that the kernel's teams read before they know how many there are."""
    return -(-grid * tuning.teams * _SLOTS // num_tiles)


def max_splits(max_len: int, tuning: DecodeTuning) -> int:
    """The most splits that plan_decode makes of a row; one more where a window cuts one."""
    by_target = max(tuning.target_splits, -(-max_len // MAX_SPLIT))
    return min(by_target, -(-max_len // tuning.min_split)) + 1


def is_supported(layout: BlockLayout) -> bool:
    """Whether paged_decode can read this pool; others go through a gathered copy."""
    is_16_bit = layout.spec.dtype in ("float16", "bfloat16")
    return is_16_bit and layout.spec.head_dim in HEAD_DIMS and layout.lowest in Codec
