"""Rotary position embedding: one table for the whole run, and the rotation. Half-split layout.

The rules (default, linear, llama3, yarn) follow transformers' modeling_rope_utils, so that a
position's angles equal those the checkpoint was trained and tested with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class RopeTable:
    """cos, sin: [max_len, head_dim / 2] float32; row p belongs to position p.

    A yarn attention factor is already multiplied in.
    """

    cos: Tensor
    sin: Tensor


def build_rope(config: ModelConfig, max_len: int, device: torch.device | str = "cpu") -> RopeTable:
    """The table for positions 0 .. max_len - 1."""
    inv_freq, factor = _inverse_frequencies(config)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return RopeTable(cos.to(device), sin.to(device))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x: [num_tokens, n, head_dim], any strides, by cos and sin: [num_tokens, head_dim / 2].

    Pairs are (i, i + head_dim / 2). Computed in float32; the result has x's dtype, contiguous.
    """
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """([head_dim / 2] float32 radians per position, what cos and sin are multiplied with)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    assert scaling.kind == "yarn", f"rope kind {scaling.kind}: families lets through what is here"
    return _yarn(config, scaling), _yarn_attention_factor(scaling)


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    original, low, high = (
        scaling.original_max_position,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / scaling.factor, blended)
    return torch.where(wavelength < original / high, inv_freq, scaled)


def _yarn(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions from kept to interpolated frequencies."""
    dim = config.head_dim
    pos_freqs = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def correction_dim(num_rotations: float) -> float:
        turns = scaling.original_max_position / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = correction_dim(scaling.beta_fast), correction_dim(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = 0.001 if low == high else high - low  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * pos_freqs) * (1 - kept) + 1.0 / pos_freqs * kept


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """What yarn multiplies q and k with, given or inferred from the factor."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
