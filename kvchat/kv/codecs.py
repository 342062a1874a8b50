"""What the bytes of a compressed block mean, in plain torch: this is the definition of the codecs.

Where the bytes stand is kv/layout's. S: tokens of a block; D: head_dim; T: those of a native block.

    codec   tokens S   bytes of a part (K or V)   stored value
    INT8    T * w / 8  int8 [S, D]                K, rotated: k_scales[t] * c
                                                  V: v_scales[t] * c
    INT4    T * w / 4  uint8 [S, D / 2]           K: k_zeros[g, d] + k_supers[g] k_scales[g, d] c
                                                  V: v_scales[t, d // V_GROUP] * (c - 7.5)

w: the native dtype's bits; g = t // K_GROUP; c: the code, -127 .. 127 or 0 .. 15. Scales count in
a block's size: layout.block_ratio. Codes are computed with the scales and zeros as they are stored,
so that

    |decode(encode(x)) - x| <= scale / 2    for every element, but for the last bit of a float32,

and encoding what was decoded gives the same bytes again (INT4 keys: as long as a channel's
offset is below 500 times its scale, so that fp16 zeros are finer than the scale).

Keys are taken after RoPE. An outlier channel would cost all channels of its token their precision,
so INT8 spreads it with a randomised Hadamard transform, which leaves q . k as it is when q is
rotated too. For 4 bits that is not enough: there a scale and a zero for every channel follow the
outliers, and the constant offsets of key biases, which a rotation would spread.

What a scale or a zero in fp16 cannot hold becomes NaN, never a plausible number: NaN, infinities,
in INT8 |x| beyond 8.3e6, in INT4 keys below -65504 and values beyond 4.9e5. NaN is then all that
shares the scale: in INT8 the token's K or V, in INT4 the token's V group, and 64 tokens of K. What
is smaller than the least scales is stored to an absolute 4e-6 (INT8), 2e-5 (INT4 K), 3e-7 (V).

Sources: the rotation QuaRot (arXiv 2404.00456), exllamav2's quantised cache and llama.cpp's rotated
cache types; keys by channel and values by token KIVI (arXiv 2402.02750) and KVQuant (2401.18079);
scales of scales llama.cpp's k-quants; the midpoint grid and the rest are worked out here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.config import KVSpec
from kvchat.kv.layout import K_GROUP, BlockLayout, Codec, v_group

CODEC_FINGERPRINT = b"kvchat codecs 1, rotation seed 1"  # other bytes: other numbers in a block

_SIGN_SEED = b"kvchat rotation 1"
_INT8_MAX = 127.0
_INT4_MAX = 15.0
_INT4_MID = 7.5
# Least scales: from these up fp16 is fine enough that a rounded scale still covers its values.
_MIN_INT8_SCALE = 2.0**-17
_MIN_V_SCALE = 2.0**-21
_MIN_SUPER = 2.0**-15
_MAX_STEPS = 255.0  # of a key channel's scale, in supers
# A scale that was met exactly comes back with float32's rounding and must not be rounded up again.
_ALMOST_ONE = 1 - 2.0**-10


@dataclass(frozen=True)
class Int8Side:
    """The side pieces of INT8 blocks, as views of the bytes: both float16 [..., Hk, S]."""

    k_scales: Tensor
    v_scales: Tensor


@dataclass(frozen=True)
class Int4Side:
    """The side pieces of INT4 blocks, as views of the bytes; float16 but for k_scales."""

    k_zeros: Tensor  # [..., Hk, S / K_GROUP, D]
    v_scales: Tensor  # [..., Hk, S, D / V_GROUP]
    k_supers: Tensor  # [..., Hk, S / K_GROUP]
    k_scales: Tensor  # uint8 [..., Hk, S / K_GROUP, D]


def encode(codec: Codec, k: Tensor, v: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Blocks of INT8 or INT4 from k and v, float32 [..., Hk, S, D], unrotated keys.

    Returns the payload, uint8 [..., 2, Hk, part_bytes], and the side pieces, uint8
    [..., Hk, side_bytes], whose unused bytes are zero. A block's bytes depend on its values alone,
    bit for bit, not on what is encoded with it.
    """
    *leading, num_heads, _, _ = k.shape
    payload = k.new_empty((*leading, 2, num_heads, layout.part_bytes), dtype=torch.uint8)
    side = k.new_zeros((*leading, num_heads, layout.side_bytes), dtype=torch.uint8)
    if codec == Codec.INT8:
        _encode_int8(k, v, int8_codes(payload, layout), int8_side(side, layout))
    else:
        assert codec == Codec.INT4, f"blocks are not encoded as {codec!r}"
        _encode_int4(k, v, payload, int4_side(side, layout))
    return payload, side


def decode(
    codec: Codec, payload: Tensor, side: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """k (unrotated) and v, float32 [..., Hk, S, D], of blocks of one codec, native ones included.

    Shapes as encode returns them; native blocks have no use for `side`.
    """
    if codec == Codec.NATIVE:
        values = payload.view(getattr(torch, layout.spec.dtype))
        k, v = values.unflatten(-1, (-1, layout.spec.head_dim)).float().unbind(-4)
        return k, v
    if codec == Codec.INT8:
        return _decode_int8(int8_codes(payload, layout), int8_side(side, layout))
    return _decode_int4(payload, int4_side(side, layout), layout.spec)


def int8_codes(payload: Tensor, layout: BlockLayout) -> Tensor:
    """A view of INT8 blocks' codes: int8 [..., S, D] of uint8 [..., part_bytes]."""
    codes: Tensor = payload.view(torch.int8).unflatten(-1, (-1, layout.spec.head_dim))
    return codes


def int8_side(side: Tensor, layout: BlockLayout) -> Int8Side:
    """Views of the side pieces of INT8 blocks, uint8 [..., Hk, side_bytes]."""
    num_tokens = layout.span_tokens(Codec.INT8)
    scales = side[..., : 4 * num_tokens].view(torch.float16)
    return Int8Side(*scales.split(num_tokens, -1))


def int4_side(side: Tensor, layout: BlockLayout) -> Int4Side:
    """Views of the side pieces of INT4 blocks, uint8 [..., Hk, side_bytes]."""
    num_tokens, dim = layout.span_tokens(Codec.INT4), layout.spec.head_dim
    num_groups, num_v_groups = num_tokens // K_GROUP, dim // v_group(dim)
    sizes = (2 * num_groups * dim, 2 * num_tokens * num_v_groups, 2 * num_groups, num_groups * dim)
    zeros, v_scales, supers, k_scales = side[..., : sum(sizes)].split(sizes, -1)
    return Int4Side(
        zeros.view(torch.float16).unflatten(-1, (num_groups, dim)),
        v_scales.view(torch.float16).unflatten(-1, (num_tokens, num_v_groups)),
        supers.view(torch.float16),
        k_scales.unflatten(-1, (num_groups, dim)),
    )


def rotation_size(head_dim: int) -> int:
    """Channels that are rotated among themselves: the largest power of two in head_dim."""
    return head_dim & -head_dim


def rotation_signs(head_dim: int) -> Tensor:
    """The rotation's random signs: float32 [head_dim], +1 and -1, the same on every machine."""
    bits = hashlib.shake_256(_SIGN_SEED).digest(-(-head_dim // 8))
    return torch.tensor([1.0 - 2 * (bits[i // 8] >> i % 8 & 1) for i in range(head_dim)])


def rotate(x: Tensor) -> Tensor:
    """H (signs * x) / sqrt(r) for every run of r = rotation_size(D) channels; float32 [..., n, D].

    H is the r x r Hadamard matrix in Sylvester's order, so this is orthonormal.
    """
    dim = x.shape[-1]
    return _hadamard(x * rotation_signs(dim).to(x.device)).mul_(rotation_size(dim) ** -0.5)


def unrotate(x: Tensor) -> Tensor:
    """What rotate made x of: signs * (H x) / sqrt(r); float32 [..., n, D]."""
    dim = x.shape[-1]
    return _hadamard(x).mul_(rotation_signs(dim).to(x.device) * rotation_size(dim) ** -0.5)


def _hadamard(x: Tensor) -> Tensor:
    """H x without a factor, float32 [..., n, D], by butterflies of 1, 2, 4 ... channels.

    Sums in a fixed tree: the same bits in any batch and by any other code that adds in this order
    (a matrix product is two to four times as fast, but its bits depend on the batch).
    """
    source = x.transpose(-1, -2).contiguous()  # every butterfly is a few vectors of n or more
    target = torch.empty_like(source)
    half = 1
    while half < rotation_size(x.shape[-1]):
        a, b = source.unflatten(-2, (-1, 2, half)).unbind(-3)
        sums, differences = target.unflatten(-2, (-1, 2, half)).unbind(-3)
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        source, target = target, source
        half *= 2
    return source.transpose(-1, -2).contiguous()


def _encode_int8(k: Tensor, v: Tensor, codes: Tensor, side: Int8Side) -> None:
    """Fill codes, int8 [..., 2, Hk, S, D], and the scales."""
    k_codes, v_codes = codes.unbind(-4)
    for x, x_codes, scales in ((rotate(k), k_codes, side.k_scales), (v, v_codes, side.v_scales)):
        scale = _fp16(_peaks(x) / _INT8_MAX).clamp(min=_MIN_INT8_SCALE)
        scales.copy_(scale)
        x_codes.copy_(_codes(x / scale[..., None], -_INT8_MAX, _INT8_MAX))


def _decode_int8(codes: Tensor, side: Int8Side) -> tuple[Tensor, Tensor]:
    k_codes, v_codes = codes.unbind(-4)
    return unrotate(k_codes * side.k_scales.float()[..., None]), (
        v_codes * side.v_scales.float()[..., None]
    )


def _encode_int4(k: Tensor, v: Tensor, payload: Tensor, side: Int4Side) -> None:
    """Fill the payload, uint8 [..., 2, Hk, part_bytes], and the side pieces."""
    k_part, v_part = payload.unbind(-3)
    k_part.copy_(_pack(_encode_k_int4(k, side)).flatten(-2))
    v_part.copy_(_pack(_encode_v_int4(v, side.v_scales)).flatten(-2))


def _decode_int4(payload: Tensor, side: Int4Side, spec: KVSpec) -> tuple[Tensor, Tensor]:
    k_codes, v_codes = _unpack(payload.unflatten(-1, (-1, spec.head_dim // 2))).unbind(-4)
    steps = side.k_supers.float()[..., None] * side.k_scales  # [..., Hk, S / K_GROUP, D]
    k = k_codes.unflatten(-2, (-1, K_GROUP)) * steps[..., None, :]
    k = k.add_(side.k_zeros.float()[..., None, :]).flatten(-3, -2)
    v = v_codes.sub(_INT4_MID).unflatten(-1, (-1, v_group(spec.head_dim)))
    return k, v.mul_(side.v_scales.float()[..., None]).flatten(-2)


def _encode_k_int4(k: Tensor, side: Int4Side) -> Tensor:
    """Codes, float32 [..., Hk, S, D]; fills the zeros and scales of the keys."""
    groups = k.unflatten(-2, (-1, K_GROUP))  # [..., Hk, S / K_GROUP, K_GROUP, D]
    low, high = groups.amin(-2), groups.amax(-2)  # ten times as fast as aminmax
    zeros, supers, scales = _channel_grids(low, high)
    side.k_zeros.copy_(zeros)
    side.k_supers.copy_(supers)
    side.k_scales.copy_(scales.nan_to_num(0.0))
    steps = supers[..., None] * scales
    codes = (groups - zeros[..., None, :]).div_(steps[..., None, :])
    return _codes(codes, 0.0, _INT4_MAX).flatten(-3, -2)


def _channel_grids(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """zeros [..., D], supers [...] and scales [..., D] (1 .. 255 supers), as stored, for channels
    with values from low to high, [..., D]: 16 values from each zero, a scale apart, are nowhere
    more than half a scale from any of them.
    """
    needed = (high - low) / _INT4_MAX
    zeros = _fp16(low)
    # An offset so large that its rounding would uncover the least value is rounded down.
    is_coarse = (zeros - low).abs() > 0.48 * needed
    zeros = torch.where(is_coarse, _fp16(low - low.abs() * 2.0**-11), zeros)
    needed = torch.where(is_coarse, (high - zeros) / _INT4_MAX, needed)
    supers = _fp16(needed.amax(-1) / _MAX_STEPS).clamp(min=_MIN_SUPER)
    supers = torch.where(zeros.isfinite().all(-1), supers, torch.nan)
    zeros = torch.where(supers[..., None].isfinite(), zeros, torch.nan)
    scales = (needed * _ALMOST_ONE / supers[..., None]).ceil().clamp(1.0, _MAX_STEPS)
    return _take_smaller(low, high, zeros, supers, scales)


def _take_smaller(
    low: Tensor, high: Tensor, zeros: Tensor, supers: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same grids, one super finer where the rounded-up scale is so large that its codes would
    fit the finer one: what is decoded would be encoded with that. The finer grid may end a little
    inside [low, high] on both sides, never by half a scale.
    """
    steps = supers[..., None] * scales
    last_code = ((high - zeros) / steps).round()
    is_finer = (scales > 1) & (last_code * scales <= _INT4_MAX * (scales - 1))
    steps = steps - supers[..., None]
    centred = _fp16(low + (high - low - _INT4_MAX * steps) / 2)
    is_finer &= (low >= centred - steps / 2) & (high <= centred + (_INT4_MAX + 0.5) * steps)
    return torch.where(is_finer, centred, zeros), supers, scales - is_finer.float()


def _encode_v_int4(v: Tensor, scales: Tensor) -> Tensor:
    """Codes, float32 [..., Hk, S, D]; fills scales, [..., Hk, S, D / V_GROUP]."""
    groups = v.unflatten(-1, (scales.shape[-1], -1))
    peaks = _peaks(groups)
    scale = _fp16(peaks / _INT4_MID).clamp(min=_MIN_V_SCALE)
    scale = torch.where(peaks == 0, 0.0, scale)  # the grid has no 0 but by its scale
    scales.copy_(scale)
    return _codes((groups / scale[..., None]).add_(_INT4_MID), 0.0, _INT4_MAX).flatten(-2)


def _peaks(x: Tensor) -> Tensor:
    """The largest magnitude along the last dim; NaN if there is one."""
    return x.abs().amax(-1)


def _codes(x: Tensor, low: float, high: float) -> Tensor:
    """x rounded in place, halves to even, into low .. high; 0 where a NaN scale leaves none."""
    return x.round_().clamp_(low, high).nan_to_num_(0.0)


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte: uint8 [..., D / 2] of float32 [..., D], values 0 .. 15."""
    low, high = codes.chunk(2, -1)
    return (high * 16).add_(low).to(torch.uint8)


def _unpack(payload: Tensor) -> Tensor:
    """float32 [..., D] of uint8 [..., D / 2]."""
    return torch.cat((payload & 15, payload >> 4), -1).float()


def _fp16(x: Tensor) -> Tensor:
    """x rounded to what float16 stores, as float32; what it cannot hold is NaN, and -0 is 0."""
    rounded = x.half().float()
    return torch.where(rounded.isfinite(), rounded + 0.0, torch.nan)
