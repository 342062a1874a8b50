"""The loops of the cpu backend, compiled by numba. Arrays in, arrays out; no torch, no threads.

Importing this module imports numba; only attention/cpu does. The pool comes as float32, or as
uint16 that holds bfloat16 or float16 (`kind` says which); all sums are float32. Inner loops run
over contiguous head_dim so that LLVM turns them into SIMD. Every size is a run-time value, so a
kernel compiles once for float32 pools and once for 16-bit ones.

Dimensions in comments: B blocks, L layers, H query heads, K kv heads, G = H / K, T block_size,
D head_dim, N tokens of the step, S splits. Indices: h kv head, g head of its group, t token.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numba
import numpy as np
from numba import njit
from numpy import float32, int32, uint16, uint32
from numpy.typing import NDArray

from kvchat import paths

Floats = NDArray[float32]
Ints = NDArray[np.int64]
Table = NDArray[int32]
Elements = NDArray[float32] | NDArray[uint16]  # the pool's kind: bits of 16-bit floats
Pool = Elements  # [B, L, 2, K, T, D]

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
# Reassociation lets a sum use lanes, contraction makes fused multiply-adds. NaN and infinity keep
# their meaning: a bad number must reach the sampler as one.
_FAST = {"reassoc", "contract", "nsz"}
_LOWEST = float32(-1e30)  # below every score, and finite: no inf - inf


def _cache_folder() -> Path:
    return paths.cache_dir() / "numba"


def _is_cache_writable() -> bool:
    """Point numba at the user's cache folder; False where nothing can be written there."""
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return False
    # Read when njit(cache=True) decorates, below. numba's settings are module attributes.
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    return True


_kernel = njit(cache=_is_cache_writable(), nogil=True, error_model="numpy", fastmath=_FAST)
_fast = njit(error_model="numpy", fastmath=_FAST)  # parts of kernels, compiled into them
_exact = njit(error_model="numpy")  # its own flags hold wherever LLVM inlines it


@_exact
def _float_of(bits: uint32) -> float32:
    return uint32(bits).view(float32)


@_exact
def _bits_of(x: float32) -> uint32:
    return float32(x).view(uint32)


@_exact
def _widen(x: float32 | uint16, kind: int) -> float32:
    """A pool element as float32, exactly."""
    if kind == FLOAT32:
        return float32(x)
    if kind == BFLOAT16:
        return _float_of(uint32(x) << uint32(16))
    # A product with 2^112 rebases the exponent, and makes subnormals come out right, too.
    magnitude = uint32(uint32(x) & uint32(0x7FFF))
    wide = _bits_of(_float_of(magnitude << uint32(13)) * float32(2.0**112))
    if magnitude >= uint32(0x7C00):  # infinity or NaN
        wide = uint32(wide | uint32(0x7F800000))
    return _float_of(wide | uint32(uint32(uint32(x) & uint32(0x8000)) << uint32(16)))


@_exact
def _narrow(x: float32, kind: int) -> uint32:
    """The bits of x as bfloat16 or float16, rounded to nearest even; NaN stays NaN."""
    bits = _bits_of(x)
    sign = uint32(uint32(bits >> uint32(16)) & uint32(0x8000))
    magnitude = uint32(bits & uint32(0x7FFFFFFF))
    if kind == BFLOAT16:
        if magnitude > uint32(0x7F800000):
            return uint32(sign | uint32(0x7FC0))
        is_odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
        return uint32(uint32(bits + uint32(0x7FFF) + is_odd) >> uint32(16))
    if magnitude >= uint32(0x47800000):  # 65536 and above, infinity, NaN
        return uint32(sign | uint32(0x7E00 if magnitude > uint32(0x7F800000) else 0x7C00))
    if magnitude < uint32(0x38800000):  # below 2^-14: adding 0.5 rounds at the subnormals' step
        half = _bits_of(_float_of(magnitude) + float32(0.5))
        return uint32(sign | uint32(half - uint32(0x3F000000)))
    is_odd = uint32(uint32(magnitude >> uint32(13)) & uint32(1))
    rebased = uint32(magnitude - uint32(112 << 23) + uint32(0xFFF) + is_odd)
    return uint32(sign | uint32(rebased >> uint32(13)))


@_fast
def _exp2(x: float32) -> float32:
    """2^x for x <= 0 by the polynomial of Cephes' exp2f; 2^-126 for what is below -126."""
    clamped = float32(-126.0) if x < float32(-126.0) else x  # NaN passes
    whole = np.floor(clamped + float32(0.5))
    f = clamped - whole  # [-0.5, 0.5)
    p: float32 = float32(1.535336188319500e-4)
    p = p * f + float32(1.339887440266574e-3)
    p = p * f + float32(9.618437357674640e-3)
    p = p * f + float32(5.550332471162809e-2)
    p = p * f + float32(2.402264791363012e-1)
    p = p * f + float32(6.931472028550421e-1)
    p = p * f + float32(1.0)
    return p * _float_of(uint32(int32(whole) + int32(127)) << uint32(23))


@_kernel
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
                low, high = _widen(q[i, head, d], kind), _widen(q[i, head, d + half], kind)
                q_out[i, head, d] = low * cos[i, d] - high * sin[i, d]
                q_out[i, head, d + half] = high * cos[i, d] + low * sin[i, d]
        for h in range(k.shape[1]):
            k_slot = pool[block_id, layer_idx, 0, h, offset]
            v_slot = pool[block_id, layer_idx, 1, h, offset]
            for d in range(half):
                low, high = _widen(k[i, h, d], kind), _widen(k[i, h, d + half], kind)
                rotated_low = low * cos[i, d] - high * sin[i, d]
                rotated_high = high * cos[i, d] + low * sin[i, d]
                if kind == FLOAT32:
                    k_slot[d] = rotated_low
                    k_slot[d + half] = rotated_high
                else:
                    k_slot[d] = _narrow(rotated_low, kind)
                    k_slot[d + half] = _narrow(rotated_high, kind)
            for d in range(2 * half):
                v_slot[d] = v[i, h, d]


@_kernel
def attend_splits(
    sums: Floats,  # [S, H, D] out: sum over the split's tokens of 2^(score - top) v
    stats: Floats,  # [S, H, 2] out: top = the largest score, sum of 2^(score - top)
    q: Floats,  # [N, H, D]
    pool: Pool,
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
    wide = np.empty((block_size, dim), np.float32)  # a block's K, then its V
    scores = np.empty((group, block_size), np.float32)
    query = np.empty((group, dim), np.float32)
    for unit in range(first, last):
        split_idx, h = unit // num_kv_heads, unit % num_kv_heads
        token_idx, table_start = splits[split_idx, 0], splits[split_idx, 1]
        begin, end = splits[split_idx, 2], splits[split_idx, 3]
        out = sums[split_idx, h * group : (h + 1) * group]
        stat = stats[split_idx, h * group : (h + 1) * group]
        for g in range(group):
            stat[g, 0] = _LOWEST
            stat[g, 1] = float32(0)
            for d in range(dim):
                query[g, d] = q[token_idx, h * group + g, d] * scale
                out[g, d] = float32(0)
        for block_idx in range(begin // block_size, (end + block_size - 1) // block_size):
            block = pool[tables[table_start + block_idx], layer_idx]
            skipped = max(begin - block_idx * block_size, 0)
            num_tokens = min(end - block_idx * block_size, block_size)
            _load(wide, block[0, h], num_tokens, kind)
            _score(scores, query, wide, num_tokens)
            _update(scores, stat, out, skipped, num_tokens)
            _load(wide, block[1, h], num_tokens, kind)
            _accumulate(out, scores, wide, num_tokens)


@_fast
def _load(wide: Floats, tokens: Elements, num_tokens: int, kind: int) -> None:
    """tokens: [T, D] of the pool; its first num_tokens rows as float32, the others zero: an
    unwritten slot, or another sequence's value in `wide`, may be NaN, and 0 * NaN is NaN."""
    for t in range(num_tokens):
        for d in range(wide.shape[1]):
            wide[t, d] = _widen(tokens[t, d], kind)
    wide[num_tokens:] = float32(0)


@_fast
def _score(scores: Floats, query: Floats, wide: Floats, num_tokens: int) -> None:
    """scores[g, t] = query[g] . wide[t]; four tokens at a time, so that a load of q serves four."""
    for g in range(query.shape[0]):
        row, out = query[g], scores[g]
        for t in range(0, num_tokens, 4):
            k0, k1, k2, k3 = wide[t], wide[t + 1], wide[t + 2], wide[t + 3]
            s0 = s1 = s2 = s3 = float32(0)
            for d in range(row.size):
                s0 += row[d] * k0[d]
                s1 += row[d] * k1[d]
                s2 += row[d] * k2[d]
                s3 += row[d] * k3[d]
            out[t], out[t + 1], out[t + 2], out[t + 3] = s0, s1, s2, s3


@_fast
def _update(scores: Floats, stat: Floats, out: Floats, skipped: int, num_tokens: int) -> None:
    """Online softmax: scores become 2^(score - top), zero outside [skipped, num_tokens)."""
    for g in range(scores.shape[0]):
        row, top = scores[g], stat[g, 0]
        row[:skipped] = _LOWEST
        row[num_tokens:] = _LOWEST
        for t in range(row.size):
            top = row[t] if row[t] > top else top
        total = float32(0)
        for t in range(row.size):
            row[t] = _exp2(row[t] - top)
            total += row[t]
        row[:skipped] = float32(0)
        row[num_tokens:] = float32(0)
        shrink = _exp2(stat[g, 0] - top)
        stat[g, 0] = top
        stat[g, 1] = stat[g, 1] * shrink + total
        for d in range(out.shape[1]):
            out[g, d] *= shrink


@_fast
def _accumulate(out: Floats, weights: Floats, wide: Floats, num_tokens: int) -> None:
    """out[g] += sum over t of weights[g, t] * wide[t], four tokens for each pass over out."""
    for g in range(out.shape[0]):
        row, weight = out[g], weights[g]
        for t in range(0, num_tokens, 4):
            v0, v1, v2, v3 = wide[t], wide[t + 1], wide[t + 2], wide[t + 3]
            w0, w1, w2, w3 = weight[t], weight[t + 1], weight[t + 2], weight[t + 3]
            for d in range(row.size):
                row[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])


@_kernel
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
            top = stats[begin:end, head, 0].max()
            row = out[splits[begin, 0], head]
            row[:] = float32(0)
            total = float32(0)
            for s in range(begin, end):
                weight = _exp2(stats[s, head, 0] - top)
                total += stats[s, head, 1] * weight
                for d in range(row.size):
                    row[d] += sums[s, head, d] * weight
            for d in range(row.size):
                row[d] /= total
        begin = end


@_kernel
def gather_blocks(
    scratch: Floats,  # [2 (K, V), K, number of blocks, T, D] out
    pool: Pool,
    layer_idx: int,
    table: Table,  # the blocks wanted
    last_tokens: int,  # tokens of the last block that are written
    kind: int,
    first: int,  # kv heads of K, then of V
    last: int,
) -> None:
    """Copy one layer of one sequence out of the pool, as float32; unwritten slots are zero."""
    for unit in range(first, last):
        part, h = unit // pool.shape[3], unit % pool.shape[3]
        for block_idx in range(table.size):
            is_last = block_idx == table.size - 1
            num_tokens = last_tokens if is_last else pool.shape[4]
            block = pool[table[block_idx], layer_idx]
            _load(scratch[part, h, block_idx], block[part, h], num_tokens, kind)


def compile_kernels(kind: int, progress: Callable[[int, int], None]) -> None:
    """Compile, or load from the user's cache, every kernel that a pool of this kind needs.

    progress(kernels done, of how many). Calls with other types would compile at the first call.
    """
    element = numba.uint16 if kind else numba.float32
    pool, new_kv = element[:, :, :, :, :, ::1], element[:, :, ::1]
    heads, angles = numba.float32[:, :, ::1], numba.float32[:, ::1]
    index, table, splits = numba.int64, numba.int32[::1], numba.int64[:, ::1]
    jobs = [
        (
            rope_write.compile,
            (heads, pool, index, numba.int64[::1], *[new_kv] * 3, angles, angles, index),
        ),
        (
            attend_splits.compile,
            (heads, heads, heads, pool, index, table, splits, numba.float64, *[index] * 3),
        ),
        (merge_splits.compile, (heads, heads, heads, splits)),
        (gather_blocks.compile, (numba.float32[:, :, :, :, ::1], pool, index, table, *[index] * 4)),
    ]
    for num_done, (compile_kernel, signature) in enumerate(jobs):
        progress(num_done, len(jobs))
        # The kernel is there before it is saved: a full disk costs the next start some seconds.
        with suppress(OSError):
            try:
                compile_kernel(signature)
            except (EOFError, pickle.UnpicklingError):  # a file of the cache was cut short
                for path in _cache_folder().rglob("*.nb?"):
                    path.unlink(missing_ok=True)
                compile_kernel(signature)
    progress(len(jobs), len(jobs))
