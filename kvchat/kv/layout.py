"""Where everything in a block stands, for every codec: arithmetic only, no tensors.

A block is `bytes_per_block` bytes of payload, [num_layers, 2 (K, V), num_kv_heads] parts of
`part_bytes` each, whatever its codec; a compressed one holds more tokens in the same bytes. Its
scales and zeros are its side piece, [num_layers, num_kv_heads, side_bytes], in an array of its own.

    codec   tokens S in a block                payload part      side piece of one layer and kv head
    NATIVE  T                                  dtype [T, D]      -
    INT8    T * native bits / 8                int8  [S, D]      k_scales f16 [S], v_scales f16 [S]
    INT4    T * native bits / 4                uint8 [S, D / 2]  k_zeros f16 [S / 64, D],
                                                                 v_scales f16 [S, D / V_GROUP],
                                                                 k_supers f16 [S / 64],
                                                                 k_scales u8 [S / 64, D]

Pieces stand one after another and are padded to 16 bytes. Byte j of an INT4 row holds channel j in
its low four bits and channel j + D / 2 in its high four. What the numbers mean is kv/codecs'.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvchat.config import DTYPE_BYTES, KVSpec
from kvchat.errors import UsageError

BLOCK_ID_BITS = 24  # 16.7 million blocks: 256 GiB of 16 KiB blocks
SPAN_INDEX_BITS = 4  # an entry is an int32: codec (4 bits), index in the span (4), block id (24)
# The parts of an entry, also for arrays of them.
CODEC_SHIFT = BLOCK_ID_BITS + SPAN_INDEX_BITS
SPAN_INDEX_MASK = (1 << SPAN_INDEX_BITS) - 1
BLOCK_ID_MASK = (1 << BLOCK_ID_BITS) - 1
_SPAN_INDEX_FIELD = SPAN_INDEX_MASK << BLOCK_ID_BITS  # zero in a span's first entry
K_GROUP = 64  # tokens that share an INT4 key channel's scale and zero
MAX_V_GROUP = 64  # channels that share an INT4 value's scale, at most
_SIDE_ALIGNMENT = 16  # bytes: one vector load of a GPU


class Codec(IntEnum):
    """How a block stores its tokens; the order is that of the ladder, best first."""

    NATIVE = 0
    INT8 = 1
    INT4 = 2

    @property
    def label(self) -> str:
        """How a person reads it."""
        return "native" if self is Codec.NATIVE else self.name


_CODECS = tuple(Codec)
CODEC_BITS = {Codec.INT8: 8, Codec.INT4: 4}


def pack_entry(block_id: int, codec: Codec, span_idx: int) -> int:
    """A block table's entry: which block, which of its block_size pieces, stored how."""
    return block_id | span_idx << BLOCK_ID_BITS | codec << CODEC_SHIFT


def unpack_entry(entry: int) -> tuple[int, Codec, int]:
    """(block_id, codec, span_idx) of a block table's entry; a native entry is its block id."""
    span_idx = entry >> BLOCK_ID_BITS & SPAN_INDEX_MASK
    codec = _CODECS[entry >> CODEC_SHIFT]
    return entry & BLOCK_ID_MASK, codec, span_idx


def block_ids(entries: list[int]) -> list[int]:
    """The blocks of whole spans, each once, in order of position."""
    return [entry & BLOCK_ID_MASK for entry in entries if not entry & _SPAN_INDEX_FIELD]


def span_blocks(dtype: str, lowest: Codec) -> tuple[int, ...]:
    """By codec, down to `lowest`: the native blocks whose tokens one block of it holds."""
    native_bits = 8 * DTYPE_BYTES[dtype]
    return (1, *(native_bits // bits for codec, bits in CODEC_BITS.items() if codec <= lowest))


def v_group(head_dim: int) -> int:
    """Channels that share an INT4 value's scale: the largest even divisor up to MAX_V_GROUP."""
    return max(n for n in range(2, MAX_V_GROUP + 1, 2) if head_dim % n == 0)


@dataclass(frozen=True)
class BlockLayout:
    """The bytes of a pool whose mode goes down to `lowest`. Raises UsageError for a head_dim that
    the codecs cannot store."""

    spec: KVSpec
    lowest: Codec = Codec.NATIVE

    def __post_init__(self) -> None:
        if self.lowest != Codec.NATIVE and self.spec.head_dim % 8:
            raise UsageError(
                f"this model's head_dim is {self.spec.head_dim}, and compressed KV needs a multiple"
                " of 8; use --kv-cache native"
            )

    @property
    def span_blocks(self) -> tuple[int, ...]:
        """By codec: the native blocks whose tokens one block of it holds."""
        return span_blocks(self.spec.dtype, self.lowest)

    def span_tokens(self, codec: Codec) -> int:
        """Tokens in a block of this codec."""
        return self.span_blocks[codec] * self.spec.block_size

    @property
    def part_bytes(self) -> int:
        """Payload of one layer, K or V, and kv head, in every codec."""
        return self.spec.block_size * self.spec.head_dim * DTYPE_BYTES[self.spec.dtype]

    def side_used(self, codec: Codec) -> int:
        """Bytes of a side piece that a block of this codec uses, padding included."""
        dim, num_tokens = self.spec.head_dim, self.span_tokens(codec)
        if codec == Codec.NATIVE:
            return 0
        if codec == Codec.INT8:
            used = 2 * 2 * num_tokens
        else:
            num_groups = num_tokens // K_GROUP
            assert num_groups * K_GROUP == num_tokens, f"a span of {num_tokens} tokens"
            keys = num_groups * (2 * dim + 2 + dim)
            used = keys + 2 * num_tokens * (dim // v_group(dim))
        return -(-used // _SIDE_ALIGNMENT) * _SIDE_ALIGNMENT

    @property
    def side_bytes(self) -> int:
        """Bytes of a side piece, as reserved: enough for every codec of the mode."""
        return max(self.side_used(codec) for codec in Codec if codec <= self.lowest)

    @property
    def side_bytes_per_block(self) -> int:
        """Side bytes reserved for one block, all layers and kv heads."""
        return self.spec.num_layers * self.spec.num_kv_heads * self.side_bytes

    @property
    def bytes_per_block(self) -> int:
        """All that one block takes of the pool's memory: payload and side piece."""
        return self.spec.bytes_per_block + self.side_bytes_per_block

    def bytes_used(self, codec: Codec) -> int:
        """Payload and the used part of the side piece of one block of this codec."""
        num_pieces = self.spec.num_layers * self.spec.num_kv_heads
        return self.spec.bytes_per_block + num_pieces * self.side_used(codec)

    def block_ratio(self, codec: Codec) -> float:
        """Native bytes over stored bytes, for the tokens of one block, scales counted."""
        native = self.span_blocks[codec] * self.spec.bytes_per_block
        return native / self.bytes_used(codec)

    def pool_ratio(self, codec: Codec) -> float:
        """The same over all that is reserved: a pool full of such blocks against a native pool."""
        native = self.span_blocks[codec] * self.spec.bytes_per_block
        return native / self.bytes_per_block
