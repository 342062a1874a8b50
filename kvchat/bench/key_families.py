"""Synthetic keys and values on which codecs are compared: seeded, shaped like those of real models.

Keys after RoPE are noise of size 1 plus, before RoPE, a constant vector with a few large pairs of
channels: moderate ones as trained Llama models have, huge ones as Qwen2's key biases make. A pair
that RoPE turns slowly is a constant offset within a block; one that it turns fast runs through all
its values there. The numbers and sizes of the pairs were chosen so that group-of-32 codecs err
about as much as is known for such models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20_240_501
NUM_HEADS = 32
NUM_TOKENS = 512
_FIRST_POSITION = 1000
_FAST_SHARE = 1 / 3  # of the pairs, from the fastest on: full turns within 64 tokens
_SLOW_SHARE = 3 / 8  # of the pairs, from the slowest on: next to no turn within a block


@dataclass(frozen=True)
class KeyFamily:
    """How many large pairs a head has, how large, and which."""

    name: str
    num_slow: int = 0
    num_fast: int = 0
    size: float = 0.0  # of each pair, against noise of 1
    rope_theta: float = 5e5


FAMILIES = (
    KeyFamily("gauss"),
    KeyFamily("llama-low", num_slow=3, size=12),
    KeyFamily("llama-mix", num_slow=2, num_fast=1, size=11),
    KeyFamily("qwen-low", num_slow=4, size=82, rope_theta=1e6),
    KeyFamily("qwen-mix", num_slow=3, num_fast=1, size=90, rope_theta=1e6),
)


def make_keys(family: KeyFamily, head_dim: int = 128) -> Tensor:
    """float32 [NUM_HEADS, NUM_TOKENS, head_dim], the same on every call."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(NUM_HEADS, NUM_TOKENS, head_dim, generator=generator)
    constants = [_constant_pairs(family, head_dim // 2, generator) for _ in range(NUM_HEADS)]
    return noise + _turn(torch.stack(constants), family.rope_theta)


def make_values(kind: str, head_dim: int = 128) -> Tensor:
    """float32 [NUM_HEADS, NUM_TOKENS, head_dim] of kind gauss or laplace (heavy tails)."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (NUM_HEADS, NUM_TOKENS, head_dim)
    if kind == "gauss":
        return torch.randn(shape, generator=generator)
    assert kind == "laplace", kind
    first, second = torch.empty((2, *shape)).exponential_(generator=generator).unbind(0)
    return first - second


def make_queries(num_queries: int = 256, head_dim: int = 128) -> Tensor:
    """float32 [num_queries, head_dim] of size 1."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(num_queries, head_dim, generator=generator)


def _constant_pairs(family: KeyFamily, num_pairs: int, generator: torch.Generator) -> Tensor:
    """One head's constant vector before RoPE: complex64 [num_pairs], as pairs of channels."""
    num_fast, num_slow = int(num_pairs * _FAST_SHARE), int(num_pairs * _SLOW_SHARE)
    fast = torch.randperm(num_fast, generator=generator)[: family.num_fast]
    slow = torch.randperm(num_slow, generator=generator)[: family.num_slow]
    pairs = torch.cat((fast, num_pairs - 1 - slow))
    angles = 2 * math.pi * torch.rand(len(pairs), generator=generator)
    constants = torch.zeros(num_pairs, dtype=torch.complex64)
    constants[pairs] = torch.polar(torch.full_like(angles, family.size), angles)
    return constants


def _turn(constants: Tensor, theta: float) -> Tensor:
    """RoPE of the same vector at every position: float32 [heads, NUM_TOKENS, 2 * pairs] of
    complex64 [heads, pairs]; pair i is channels i and i + pairs, as in Llama and Qwen."""
    num_pairs = constants.shape[-1]
    frequencies = theta ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    positions = torch.arange(_FIRST_POSITION, _FIRST_POSITION + NUM_TOKENS, dtype=torch.float64)
    angles = torch.outer(positions, frequencies)
    turned = torch.polar(torch.ones_like(angles), angles) * constants[:, None]
    return torch.cat((turned.real, turned.imag), -1).float()
