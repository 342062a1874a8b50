"""The kernels of the cpu backend, compiled by numba. Arrays in, arrays out; no torch, no threads.

Importing this module imports numba; only attention/cpu does. The pool comes as float32, or as
uint16 that holds bfloat16 or float16 (`kind` says which); all sums are float32. Every size is a
run-time value, so a kernel compiles once for float32 pools and once for 16-bit ones. `side` is None
in a pool that never compresses: then numba drops all branches that read codes.

Dimensions in comments: B blocks, L layers, H query heads, K kv heads, G = H / K, T block_size,
D head_dim, N tokens of the step, S splits. Indices: h kv head, g head of its group, t token.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numpy import float32

from kvchat.attention.cpu_codes import (
    decode_keys,
    decode_values,
    fold_tile,
    hadamard,
    load_codes,
    scale_scores,
    scale_values,
)
from kvchat.attention.cpu_jit import (
    FLOAT32,
    Bytes,
    Elements,
    Floats,
    Halves,
    Ints,
    Table,
    compile_all,
    kernel,
)
from kvchat.attention.cpu_tiles import (
    LOWEST,
    TILE_TOKENS,
    accumulate,
    exp2,
    load_native,
    narrow,
    scale_query,
    score,
    start_sums,
    update,
    widen,
)
from kvchat.kv.layout import BLOCK_ID_MASK, CODEC_SHIFT

Pool = Elements  # [B, L, 2, K, T, D]
Payload = Bytes  # [B, L, 2, K, T * D * element size]: the pool's bytes
Side = Halves  # [B, L, K, side bytes / 2]


@kernel
def rope_write(
    q_out: Floats,  # [N, H, D]
    pool: Pool,
    layer_idx: int,
    slots: Ints,  # [N]
    q: Elements,  # [N, H, D]
    k: Elements,  # [N, K, D]
    v: Elements,  # [N, K, D]
    cos: Floats,  # [N, D / 2]
    sin: Floats,  # [N, D / 2]
    kind: int,
) -> None:
    """Rotate q into q_out; rotate k and store it and v in their slots. Pairs are (d, d + D / 2)."""
    block_size, half = pool.shape[4], pool.shape[5] // 2
    for i in range(slots.size):
        block_id, offset = slots[i] // block_size, slots[i] % block_size
        for head in range(q.shape[1]):
            for d in range(half):
                low, high = widen(q[i, head, d], kind), widen(q[i, head, d + half], kind)
                q_out[i, head, d] = low * cos[i, d] - high * sin[i, d]
                q_out[i, head, d + half] = high * cos[i, d] + low * sin[i, d]
        for h in range(k.shape[1]):
            k_slot = pool[block_id, layer_idx, 0, h, offset]
            v_slot = pool[block_id, layer_idx, 1, h, offset]
            for d in range(half):
                low, high = widen(k[i, h, d], kind), widen(k[i, h, d + half], kind)
                rotated_low = low * cos[i, d] - high * sin[i, d]
                rotated_high = high * cos[i, d] + low * sin[i, d]
                if kind == FLOAT32:
                    k_slot[d] = rotated_low
                    k_slot[d + half] = rotated_high
                else:
                    k_slot[d] = narrow(rotated_low, kind)
                    k_slot[d + half] = narrow(rotated_high, kind)
            for d in range(2 * half):
                v_slot[d] = v[i, h, d]


@kernel
def rotate_heads(
    out: Floats,  # [N, H, D]
    q: Floats,  # [N, H, D]
    tokens: Ints,  # of the step: those wanted
    signs: Floats,  # [D] the codecs' signs, over the root of the power of two in D
) -> None:
    """Rotate the queries of `tokens` as INT8 keys are rotated."""
    for i in range(tokens.size):
        for head in range(q.shape[1]):
            source, row = q[tokens[i], head], out[tokens[i], head]
            for d in range(signs.size):
                row[d] = source[d] * signs[d]
            hadamard(row)


@kernel
def attend_splits(
    sums: Floats,  # [S, H, D] out: sum over the split's tokens of 2^(score - top) v
    stats: Floats,  # [S, H, 2] out: top = the largest score, sum of 2^(score - top)
    q: Floats,  # [N, H, D]
    rotated_q: Floats,  # [N, H, D] see rotate_heads; read if a table names an INT8 block
    pool: Pool,
    payload: Payload,
    side: Side | None,
    v_group: int,
    layer_idx: int,
    tables: Table,  # all block tables, one after another
    splits: Ints,  # [S, 4] token of the step, its table's start, first and last + 1 position
    scale: float,  # of the scores, log2(e) included
    kind: int,
    first: int,  # units of work: unit u is split u // K and kv head u % K
    last: int,
) -> None:
    """One query token against one run of positions, for the G heads that share a kv head."""
    num_kv_heads, block_size, dim = pool.shape[3], pool.shape[4], pool.shape[5]
    group = q.shape[1] // num_kv_heads
    wide = np.empty((block_size, dim), np.float32)  # an entry's keys or values, or their codes
    scores = np.empty((group, TILE_TOKENS), np.float32)
    queries, dots = np.empty((3, group, dim), np.float32), np.zeros((3, group), np.float32)
    scales = np.empty(block_size * (dim // v_group), np.float32)
    for unit in range(first, last):
        split_idx, h = unit // num_kv_heads, unit % num_kv_heads
        token_idx, table_start = splits[split_idx, 0], splits[split_idx, 1]
        begin, end = splits[split_idx, 2], splits[split_idx, 3]
        heads = slice(h * group, (h + 1) * group)
        out, stat = sums[split_idx, heads], stats[split_idx, heads]
        start_sums(out, stat)
        scale_query(queries[0], q[token_idx, heads], scale)
        if side is not None:
            scale_query(queries[1], rotated_q[token_idx, heads], scale)
        for start in range(begin - begin % TILE_TOKENS, end, TILE_TOKENS):
            unseen, num_tokens = max(begin - start, 0), min(end - start, TILE_TOKENS)
            tile = tables[table_start + start // block_size :]  # its entries, and what follows
            entries = range(unseen // block_size, -(-num_tokens // block_size))
            if side is not None:
                entry = tile[entries.start]
                piece = side[entry & BLOCK_ID_MASK, layer_idx, h]
                fold_tile(queries, dots, piece, entry, block_size, payload.shape[4], v_group)
            for part in range(2):  # K, then V
                if part == 1:
                    update(scores, stat, out, unseen, num_tokens, entries.stop * block_size)
                for i in entries:
                    entry, block_id = tile[i], tile[i] & BLOCK_ID_MASK
                    column, num_rows = i * block_size, min(num_tokens - i * block_size, block_size)
                    if entry <= BLOCK_ID_MASK:
                        load_native(wide, pool[block_id, layer_idx, part, h], num_rows, kind)
                    elif side is not None:
                        load_codes(wide, payload[block_id, layer_idx, part, h], entry, part == 1)
                    if part == 0:
                        score(scores, column, queries[entry >> CODEC_SHIFT], wide, num_rows)
                        if side is not None and entry > BLOCK_ID_MASK:
                            piece = side[block_id, layer_idx, h]
                            scale_scores(scores, column, scales[:block_size], dots, piece, entry)
                        continue
                    if side is not None and entry > BLOCK_ID_MASK:
                        piece = side[block_id, layer_idx, h]
                        scale_values(wide, scores, column, scales, piece, entry, payload.shape[4])
                    wide[: max(unseen - column, 0)] = float32(0)  # 0 * NaN is NaN
                    accumulate(out, scores, column, wide, num_rows)


@kernel
def merge_splits(
    out: Floats,  # [N, H, D]
    sums: Floats,  # [S, H, D]
    stats: Floats,  # [S, H, 2]
    splits: Ints,  # [S, 4]; a token's splits stand together, in the order of their positions
) -> None:
    """out of every token that has splits: their sums brought to one top, over their total."""
    begin = 0
    while begin < len(splits):
        end = begin + 1
        while end < len(splits) and splits[end, 0] == splits[begin, 0]:
            end += 1
        for head in range(out.shape[1]):
            row, top, total = out[splits[begin, 0], head], LOWEST, float32(0)
            row[:] = float32(0)
            for s in range(begin, end):
                top = stats[s, head, 0] if stats[s, head, 0] > top else top
            for s in range(begin, end):
                weight = exp2(stats[s, head, 0] - top)
                total += stats[s, head, 1] * weight
                for d in range(row.size):
                    row[d] += sums[s, head, d] * weight
            for d in range(row.size):
                row[d] /= total
        begin = end


@kernel
def gather_blocks(
    scratch: Floats,  # [2 (K, V), K, number of entries, T, D] out
    pool: Pool,
    payload: Payload,
    side: Side | None,
    signs: Floats,  # see rotate_heads
    v_group: int,
    layer_idx: int,
    table: Table,  # the entries wanted
    last_tokens: int,  # tokens of the last entry that are written
    kind: int,
    first: int,  # kv heads of K, then of V
    last: int,
) -> None:
    """Copy one layer of one sequence out of the pool, as float32; unwritten slots are zero."""
    block_size, dim, part_bytes = pool.shape[4], pool.shape[5], payload.shape[4]
    scales = np.empty(block_size * (dim // v_group), np.float32)
    for unit in range(first, last):
        part, h = unit // pool.shape[3], unit % pool.shape[3]
        for i in range(table.size):
            entry, block_id, wide = table[i], table[i] & BLOCK_ID_MASK, scratch[part, h, i]
            num_tokens = last_tokens if i == table.size - 1 else block_size
            if entry <= BLOCK_ID_MASK:
                load_native(wide, pool[block_id, layer_idx, part, h], num_tokens, kind)
            elif side is not None:
                piece = side[block_id, layer_idx, h]
                load_codes(wide, payload[block_id, layer_idx, part, h], entry, part == 1)
                if part == 0:
                    decode_keys(wide, scales[:block_size], piece, signs, entry, part_bytes, v_group)
                else:
                    decode_values(wide, scales, piece, entry, part_bytes)


def compile_kernels(kind: int, has_codes: bool, progress: Callable[[int, int], None]) -> None:
    """Compile, or load from the user's cache, every kernel that a pool of this kind needs.

    has_codes: the pool may hold compressed blocks. progress(kernels done, of how many). Calls with
    other types would compile at the first call.
    """
    element = numba.uint16 if kind else numba.float32
    pool, new_kv = element[:, :, :, :, :, ::1], element[:, :, ::1]
    heads, angles, row = numba.float32[:, :, ::1], numba.float32[:, ::1], numba.float32[::1]
    scratch, index, indices = numba.float32[:, :, :, :, ::1], numba.int64, numba.int64[::1]
    table, splits = numba.int32[::1], numba.int64[:, ::1]
    side = numba.uint16[:, :, :, ::1] if has_codes else numba.none
    stored = (pool, numba.uint8[:, :, :, :, ::1], side)
    jobs = [
        (rope_write, (heads, pool, index, indices, *[new_kv] * 3, angles, angles, index)),
        (
            attend_splits,
            (*[heads] * 4, *stored, *[index] * 2, table, splits, numba.float64) + (index,) * 3,
        ),
        (merge_splits, (heads, heads, heads, splits)),
        (gather_blocks, (scratch, *stored, row, *[index] * 2, table, *[index] * 4)),
    ]
    if has_codes:
        jobs.append((rotate_heads, (heads, heads, indices, row)))
    compile_all(jobs, progress)
