"""What the cpu kernels do with float32 tokens: score them, and sum them up. And number formats.

Called by cpu_kernels and cpu_codes alone, and compiled into the kernels. Inner loops run over
contiguous head_dim, so that LLVM turns them into SIMD.

Dimensions in comments: G heads that share a kv head, T block_size, D head_dim, W columns of a tile.
Indices: g head of the group, t token, d channel.
"""

from __future__ import annotations

import numpy as np
from numpy import float32, int32, uint16, uint32

from kvchat.attention.cpu_jit import (
    BFLOAT16,
    FLOAT32,
    Elements,
    Floats,
    exact,
    fast,
)
from kvchat.kv.layout import K_GROUP

# Positions of one softmax update. A tile of them holds whole entries, and one group of INT4 keys.
TILE_TOKENS = K_GROUP
LOWEST = float32(-1e30)  # below every score, and finite: no inf - inf


@exact
def _float_of(bits: uint32) -> float32:
    return uint32(bits).view(float32)


@exact
def _bits_of(x: float32) -> uint32:
    return float32(x).view(uint32)


@exact
def widen(x: float32 | uint16, kind: int) -> float32:
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


@exact
def narrow(x: float32, kind: int) -> uint32:
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


@fast
def exp2(x: float32) -> float32:
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


@fast
def load_native(wide: Floats, tokens: Elements, num_tokens: int, kind: int) -> None:
    """tokens: [T, D] of the pool; its first num_tokens rows as float32, the others zero: an
    unwritten slot, or another sequence's value in `wide`, may be NaN, and 0 * NaN is NaN."""
    for t in range(num_tokens):
        for d in range(wide.shape[1]):
            wide[t, d] = widen(tokens[t, d], kind)
    wide[num_tokens:] = float32(0)


@fast
def start_sums(out: Floats, stat: Floats) -> None:
    """out: [G, D], stat: [G, 2] as update and accumulate take them up, of no token yet."""
    out[:] = float32(0)
    stat[:, 0] = LOWEST
    stat[:, 1] = float32(0)


@fast
def scale_query(query: Floats, q: Floats, scale: float) -> None:
    """query, q: [G, D]; query becomes q * scale."""
    for g in range(query.shape[0]):
        for d in range(query.shape[1]):
            query[g, d] = q[g, d] * scale


@fast
def score(scores: Floats, first: int, query: Floats, wide: Floats, num_tokens: int) -> None:
    """scores[g, first + t] = query[g] . wide[t]; four tokens share a load of q, two heads of k."""
    num_paired = query.shape[0] // 2 * 2
    for g in range(0, num_paired, 2):
        _score_two(
            scores[g, first:], scores[g + 1, first:], query[g], query[g + 1], wide, num_tokens
        )
    if num_paired < query.shape[0]:
        _score_one(scores[num_paired, first:], query[num_paired], wide, num_tokens)


@fast
def _score_two(
    p_out: Floats, q_out: Floats, p: Floats, q: Floats, wide: Floats, num_tokens: int
) -> None:
    for t in range(0, num_tokens, 4):
        k0, k1, k2, k3 = wide[t], wide[t + 1], wide[t + 2], wide[t + 3]
        p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = float32(0)
        for d in range(p.size):
            p0 += p[d] * k0[d]
            p1 += p[d] * k1[d]
            p2 += p[d] * k2[d]
            p3 += p[d] * k3[d]
            q0 += q[d] * k0[d]
            q1 += q[d] * k1[d]
            q2 += q[d] * k2[d]
            q3 += q[d] * k3[d]
        p_out[t], p_out[t + 1], p_out[t + 2], p_out[t + 3] = p0, p1, p2, p3
        q_out[t], q_out[t + 1], q_out[t + 2], q_out[t + 3] = q0, q1, q2, q3


@fast
def _score_one(out: Floats, query: Floats, wide: Floats, num_tokens: int) -> None:
    for t in range(0, num_tokens, 4):
        k0, k1, k2, k3 = wide[t], wide[t + 1], wide[t + 2], wide[t + 3]
        s0 = s1 = s2 = s3 = float32(0)
        for d in range(query.size):
            s0 += query[d] * k0[d]
            s1 += query[d] * k1[d]
            s2 += query[d] * k2[d]
            s3 += query[d] * k3[d]
        out[t], out[t + 1], out[t + 2], out[t + 3] = s0, s1, s2, s3


@fast
def update(
    scores: Floats,  # [G, W]
    stat: Floats,  # [G, 2] the largest score so far, sum of 2^(score - it)
    out: Floats,  # [G, D]
    first: int,
    last: int,
    width: int,  # columns in use
) -> None:
    """Online softmax: scores become 2^(score - top), zero outside [first, last)."""
    for g in range(scores.shape[0]):
        row, top = scores[g, :width], stat[g, 0]
        row[:first] = LOWEST
        row[last:] = LOWEST
        for t in range(row.size):
            top = row[t] if row[t] > top else top
        total = float32(0)
        for t in range(row.size):
            row[t] = exp2(row[t] - top)
            total += row[t]
        row[:first] = float32(0)
        row[last:] = float32(0)
        shrink = exp2(stat[g, 0] - top)
        stat[g, 0] = top
        stat[g, 1] = stat[g, 1] * shrink + total
        for d in range(out.shape[1]):
            out[g, d] *= shrink


@fast
def accumulate(out: Floats, weights: Floats, first: int, wide: Floats, num_tokens: int) -> None:
    """out[g] += sum over t of weights[g, first + t] * wide[t]; a pass over out adds four."""
    for g in range(out.shape[0]):
        row, weight = out[g], weights[g, first:]
        for t in range(0, num_tokens, 4):
            v0, v1, v2, v3 = wide[t], wide[t + 1], wide[t + 2], wide[t + 3]
            w0, w1, w2, w3 = weight[t], weight[t + 1], weight[t + 2], weight[t + 3]
            for d in range(row.size):
                row[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
