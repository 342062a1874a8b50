"""What the cpu kernels do with an entry whose tokens are codes: INT8 and INT4, read as stored.

Called by cpu_kernels alone, and compiled into its kernels. Codes become float32 once for all heads
of a group; what scales them is applied to the query, the score or the probability, never to each
value. Bytes stand as kv/layout tells, and mean what kv/codecs tells.

Dimensions in comments: G heads that share a kv head, T block_size, D head_dim, W columns of a tile.
`codes` and `side` are the part (K or V) and the side piece of a block's layer and kv head.
"""

from __future__ import annotations

import numpy as np
from numpy import float32, int8, int32

from kvchat.attention.cpu_jit import FLOAT16, Bytes, Floats, Halves, fast
from kvchat.attention.cpu_tiles import accumulate, score, widen
from kvchat.attention.slots import CODEC_SHIFT, SPAN_INDEX_MASK
from kvchat.kv.layout import BLOCK_ID_BITS, K_GROUP, Codec

_INT8, _INT4 = int(Codec.INT8), int(Codec.INT4)
_MIDPOINT = float32(7.5)  # of an INT4 value's codes


@fast
def fold_tile(
    queries: Floats,  # [3, G, D] the last becomes the INT4 keys' query
    dots: Floats,  # [G] out
    side: Halves,  # the piece of the tile's first block
    entry: int,  # the tile's first
    block_size: int,
    part_bytes: int,
    v_group: int,
) -> None:
    """Fold the tile's key scales into the query, if it is INT4: then all of it is one group."""
    if entry >> CODEC_SHIFT != _INT4:
        return
    dim = queries.shape[2]
    scales, zeros = np.empty(dim, np.float32), np.empty(dim, np.float32)
    group_idx = _slot(entry, block_size) // K_GROUP
    _load_key_scales(scales, zeros, side, group_idx, part_bytes * 2 // dim, v_group)
    _fold_query(queries[2], dots, queries[0], scales, zeros)


@fast
def score_codes(
    scores: Floats,  # [G, W] columns from `column` on are filled
    column: int,
    queries: Floats,  # [3, G, D]
    dots: Floats,  # [G]
    wide: Floats,  # [T, D] spare
    codes: Bytes,
    side: Halves,
    entry: int,
) -> None:
    """Scores of an INT8 or INT4 entry's keys."""
    block_size, dim = wide.shape
    slot = _slot(entry, block_size)
    if entry >> CODEC_SHIFT == _INT8:
        _load_int8(wide, codes[slot * dim :])
        score(scores, column, queries[1], wide, block_size)
        for t in range(block_size):
            scale = widen(side[slot + t], FLOAT16)
            for g in range(scores.shape[0]):
                scores[g, column + t] *= scale
    else:
        _load_int4(wide, codes[slot * dim // 2 :], float32(0))
        score(scores, column, queries[2], wide, block_size)
        for g in range(dots.size):
            for t in range(block_size):
                scores[g, column + t] += dots[g]


@fast
def accumulate_codes(
    out: Floats,  # [G, D]
    scores: Floats,  # [G, W] probabilities
    column: int,
    weights: Floats,  # [G, T] spare
    wide: Floats,  # [T, D] spare
    codes: Bytes,
    side: Halves,
    entry: int,
    v_group: int,
) -> None:
    """Add an INT8 or INT4 entry's values, weighed with their scales and probabilities."""
    block_size, dim = wide.shape
    slot = _slot(entry, block_size)
    if entry >> CODEC_SHIFT == _INT8:
        _load_int8(wide, codes[slot * dim :])
        _weigh(weights, scores, column, side[codes.size // dim + slot :], 1, 0)
        accumulate(out, weights, 0, wide, block_size, 0, dim)
    else:
        _load_int4(wide, codes[slot * dim // 2 :], _MIDPOINT)
        num_groups, num_slots = dim // v_group, codes.size * 2 // dim
        scales = side[num_slots // K_GROUP * dim + slot * num_groups :]
        for i in range(num_groups):
            _weigh(weights, scores, column, scales, num_groups, i)
            accumulate(out, weights, 0, wide, block_size, i * v_group, (i + 1) * v_group)


@fast
def hadamard(row: Floats, spare: Floats) -> None:
    """The transform of each run of n channels of row: [D], in place; n: the power of two in D.

    Every stage pairs j with j + n / 2 and puts the results side by side, so that loads and stores
    are contiguous; after log2(n) stages all stand where they began. spare: [D]
    """
    n = row.size & -row.size
    half, size = n // 2, 1
    source, target = row, spare
    while size < n:
        for start in range(0, row.size, n):
            low, high = source[start : start + half], source[start + half : start + n]
            out = target[start : start + n]
            for j in range(half):
                out[2 * j] = low[j] + high[j]
                out[2 * j + 1] = low[j] - high[j]
        source, target = target, source
        size *= 2
    row[:] = source


@fast
def decode_keys(
    wide: Floats,  # [T, D] out
    codes: Bytes,
    side: Halves,
    signs: Floats,
    entry: int,
    v_group: int,
) -> None:
    """An INT8 or INT4 entry's keys, unrotated."""
    block_size, dim = wide.shape
    slot, spare = _slot(entry, block_size), np.empty(dim, np.float32)
    if entry >> CODEC_SHIFT == _INT8:
        _load_int8(wide, codes[slot * dim :])
        for t in range(block_size):
            hadamard(wide[t], spare)
            scale = widen(side[slot + t], FLOAT16)
            for d in range(dim):
                wide[t, d] *= scale * signs[d]
    else:
        _load_int4(wide, codes[slot * dim // 2 :], float32(0))
        zeros = np.empty(dim, np.float32)
        _load_key_scales(spare, zeros, side, slot // K_GROUP, codes.size * 2 // dim, v_group)
        for t in range(block_size):
            for d in range(dim):
                wide[t, d] = zeros[d] + spare[d] * wide[t, d]


@fast
def decode_values(
    wide: Floats,  # [T, D] out
    codes: Bytes,
    side: Halves,
    entry: int,
    v_group: int,
) -> None:
    """An INT8 or INT4 entry's values."""
    block_size, dim = wide.shape
    slot = _slot(entry, block_size)
    if entry >> CODEC_SHIFT == _INT8:
        _load_int8(wide, codes[slot * dim :])
        scales, width = side[codes.size // dim + slot :], dim
    else:
        _load_int4(wide, codes[slot * dim // 2 :], _MIDPOINT)
        num_groups, num_slots = dim // v_group, codes.size * 2 // dim
        scales, width = side[num_slots // K_GROUP * dim + slot * num_groups :], v_group
    for i in range(block_size * (dim // width)):
        scale = widen(scales[i], FLOAT16)
        row = wide[i * width // dim]
        start = i * width % dim
        for d in range(start, start + width):
            row[d] *= scale


@fast
def _slot(entry: int, block_size: int) -> int:
    """The first of a block's tokens that an entry means."""
    return (entry >> BLOCK_ID_BITS & SPAN_INDEX_MASK) * block_size


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
def _load_key_scales(
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


@fast
def _fold_query(folded: Floats, dots: Floats, query: Floats, scales: Floats, zeros: Floats) -> None:
    """query . (zeros + scales * code) = dots + folded . code. query, folded: [G, D]; dots: [G]."""
    for g in range(query.shape[0]):
        row, out, dot = query[g], folded[g], float32(0)
        for d in range(row.size):
            out[d] = row[d] * scales[d]
            dot += row[d] * zeros[d]
        dots[g] = dot


@fast
def _weigh(
    weights: Floats,  # [G, T] out
    scores: Floats,  # [G, W] probabilities; 0 where a token is not seen
    first: int,
    scales: Halves,  # float16; token t has scales[t * stride + offset]
    stride: int,
    offset: int,
) -> None:
    """weights[g, t] = scores[g, first + t] * token t's scale, but 0 stays 0 whatever the scale."""
    for t in range(weights.shape[1]):
        scale = widen(scales[t * stride + offset], FLOAT16)
        for g in range(weights.shape[0]):
            weight = scores[g, first + t]
            weights[g, t] = weight * scale if weight != float32(0) else weight
