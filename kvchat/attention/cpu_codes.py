"""What the cpu kernels do with an entry whose tokens are codes: INT8 and INT4, read as stored.

Called by cpu_kernels alone, and compiled into its kernels. Codes become float32 once for all heads
of a group. What scales them is applied to the query, the score or the probability; only where a
token's values have several scales, to those, also once for all heads. Bytes stand as kv/layout
tells, and mean what kv/codecs tells.

Dimensions in comments: G heads that share a kv head, T block_size, D head_dim, W columns of a tile.
`codes` is the part (K or V) of a block's layer and kv head, `side` its side piece.
"""

from __future__ import annotations

import numpy as np
from numpy import float32, int8, int32

from kvchat.attention.cpu_jit import FLOAT16, Bytes, Floats, Halves, fast
from kvchat.attention.cpu_tiles import widen
from kvchat.kv.layout import BLOCK_ID_BITS, CODEC_SHIFT, K_GROUP, SPAN_INDEX_MASK, Codec

_INT8, _INT4 = int(Codec.INT8), int(Codec.INT4)
_MIDPOINT = float32(7.5)  # of an INT4 value's codes
_ZERO = float32(0)


@fast
def load_codes(wide: Floats, codes: Bytes, entry: int, is_value: bool) -> None:
    """wide: [T, D] becomes an INT8 or INT4 entry's codes; those of INT4 values less 7.5."""
    slot, dim = _slot(entry, wide.shape[0]), wide.shape[1]
    if entry >> CODEC_SHIFT == _INT8:
        _load_int8(wide, codes[slot * dim :])
    else:
        _load_int4(wide, codes[slot * dim // 2 :], _MIDPOINT if is_value else _ZERO)


@fast
def fold_tile(
    queries: Floats,  # [3, G, D] by codec; that of INT4 keys is filled
    dots: Floats,  # [3, G] likewise
    side: Halves,
    entry: int,  # the tile's first
    block_size: int,
    part_bytes: int,
    v_group: int,
) -> None:
    """If the tile is INT4, and so one group of keys: query . key = dot + folded query . code."""
    if entry >> CODEC_SHIFT != _INT4:
        return
    dim = queries.shape[2]
    scales, zeros = np.empty(dim, np.float32), np.empty(dim, np.float32)
    group_idx = _slot(entry, block_size) // K_GROUP
    _load_key_grid(scales, zeros, side, group_idx, part_bytes * 2 // dim, v_group)
    for g in range(queries.shape[1]):
        query, folded, dot = queries[0, g], queries[_INT4, g], _ZERO
        for d in range(dim):
            folded[d] = query[d] * scales[d]
            dot += query[d] * zeros[d]
        dots[_INT4, g] = dot


@fast
def _load_key_scales(scales: Floats, side: Halves, entry: int) -> None:
    """scales: [T] what the scores of an entry's codes are multiplied with."""
    if entry >> CODEC_SHIFT == _INT8:
        _load_scales(scales, side[_slot(entry, scales.size) :])
    else:
        scales[:] = float32(1)


@fast
def _load_value_scales(
    scales: Floats,  # [T * D / V_GROUP] out: token after token
    side: Halves,
    entry: int,
    block_size: int,
    part_bytes: int,
    dim: int,
) -> int:
    """What an entry's values are multiplied with; returns how many scales a token has."""
    slot = _slot(entry, block_size)
    if entry >> CODEC_SHIFT == _INT8:
        _load_scales(scales[:block_size], side[part_bytes // dim + slot :])
        return 1
    num_groups = scales.size // block_size
    _load_scales(scales, side[part_bytes * 2 // K_GROUP + slot * num_groups :])
    return int(num_groups)


@fast
def scale_scores(
    scores: Floats,  # [G, W] in and out: of queries and codes
    column: int,
    scales: Floats,  # [T] spare
    dots: Floats,  # [3, G] by codec
    side: Halves,
    entry: int,
) -> None:
    """Make the scores of an entry's codes those of its keys."""
    _load_key_scales(scales, side, entry)
    for g in range(scores.shape[0]):
        row, dot = scores[g, column : column + scales.size], dots[entry >> CODEC_SHIFT, g]
        for t in range(scales.size):
            row[t] = row[t] * scales[t] + dot


@fast
def scale_values(
    wide: Floats,  # [T, D] in and out: codes
    scores: Floats,  # [G, W] in and out: probabilities, 0 of tokens that are not seen
    column: int,
    scales: Floats,  # [T * D / V_GROUP] spare
    side: Halves,
    entry: int,
    part_bytes: int,
) -> None:
    """Make a sum of probabilities times codes one of probabilities times values.

    A token's one scale goes to its probabilities. Several (INT4 of more than 64 channels) go to
    its values, once for all heads: a sum over few channels at a time would cost more. What is not
    seen counts 0 even if its scale is NaN.
    """
    block_size, dim = wide.shape
    if _load_value_scales(scales, side, entry, block_size, part_bytes, dim) > 1:
        _multiply(wide, scales)
        return
    for g in range(scores.shape[0]):
        row = scores[g, column : column + block_size]
        for t in range(row.size):
            row[t] = row[t] * scales[t] if row[t] != _ZERO else _ZERO


@fast
def hadamard(row: Floats) -> None:
    """The transform of each run of n channels of row: [D], in place; n: the power of two in D."""
    n, half = row.size & -row.size, 1
    while half < n:
        for start in range(0, row.size, 2 * half):
            low, high = row[start : start + half], row[start + half : start + 2 * half]
            for j in range(half):
                low[j], high[j] = low[j] + high[j], low[j] - high[j]
        half *= 2


@fast
def decode_keys(
    wide: Floats,  # [T, D] in: codes; out: keys, unrotated
    scales: Floats,  # [T] spare
    side: Halves,
    signs: Floats,  # [D]
    entry: int,
    part_bytes: int,
    v_group: int,
) -> None:
    """What an INT8 or INT4 entry's codes mean."""
    block_size, dim = wide.shape
    spare, zeros = np.empty(dim, np.float32), np.empty(dim, np.float32)
    if entry >> CODEC_SHIFT == _INT8:
        _load_key_scales(scales, side, entry)
        for t in range(block_size):
            hadamard(wide[t])
            for d in range(dim):
                wide[t, d] *= scales[t] * signs[d]
    else:
        group_idx = _slot(entry, block_size) // K_GROUP
        _load_key_grid(spare, zeros, side, group_idx, part_bytes * 2 // dim, v_group)
        for t in range(block_size):
            for d in range(dim):
                wide[t, d] = zeros[d] + spare[d] * wide[t, d]


@fast
def decode_values(wide: Floats, scales: Floats, side: Halves, entry: int, part_bytes: int) -> None:
    """wide: [T, D] an INT8 or INT4 entry's codes become its values. scales: spare, as loaded."""
    block_size, dim = wide.shape
    num_groups = _load_value_scales(scales, side, entry, block_size, part_bytes, dim)
    _multiply(wide, scales[: block_size * num_groups])


@fast
def _slot(entry: int, block_size: int) -> int:
    """The first of a block's tokens that an entry means."""
    return (entry >> BLOCK_ID_BITS & SPAN_INDEX_MASK) * block_size


@fast
def _multiply(wide: Floats, scales: Floats) -> None:
    """wide: [T, D] * scales: [T * N], each for D / N channels of a token."""
    width = wide.size // scales.size
    rows = wide.reshape(scales.size, width)
    for i in range(scales.size):
        scale = scales[i]
        for d in range(width):
            rows[i, d] *= scale


@fast
def _load_scales(scales: Floats, halves: Halves) -> None:
    for i in range(scales.size):
        scales[i] = widen(halves[i], FLOAT16)


@fast
def _load_int8(wide: Floats, codes: Bytes) -> None:
    """codes: [T * D] int8 in their bytes; wide: [T, D] the same numbers, unscaled."""
    dim = wide.shape[1]
    for t in range(wide.shape[0]):
        row, out = codes[t * dim : (t + 1) * dim], wide[t]
        for d in range(dim):
            out[d] = float32(int8(row[d]))


@fast
def _load_int4(wide: Floats, codes: Bytes, midpoint: float32) -> None:
    """codes: [T * D / 2], channel j in the low and j + D / 2 in the high four bits of byte j; wide:
    [T, D] code - midpoint."""
    half = wide.shape[1] // 2
    for t in range(wide.shape[0]):
        row, out = codes[t * half : (t + 1) * half], wide[t]
        for d in range(half):
            out[d] = float32(int32(row[d]) & int32(15)) - midpoint
            out[d + half] = float32(int32(row[d]) >> int32(4)) - midpoint


@fast
def _load_key_grid(
    scales: Floats,  # [D] out
    zeros: Floats,  # [D] out
    side: Halves,
    group_idx: int,  # which K_GROUP tokens of the block
    num_slots: int,  # tokens of the block
    v_group: int,
) -> None:
    """An INT4 key is zeros[d] + scales[d] * code."""
    dim, num_groups = scales.size, num_slots // K_GROUP
    supers = num_groups * dim + num_slots * (dim // v_group)
    factor = widen(side[supers + group_idx], FLOAT16)
    start = 2 * (supers + num_groups) + group_idx * dim
    small = side.view(np.uint8)[start : start + dim]
    large = side[group_idx * dim : (group_idx + 1) * dim]
    for d in range(dim):
        scales[d] = factor * float32(small[d])
        zeros[d] = widen(large[d], FLOAT16)
