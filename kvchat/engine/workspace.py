"""What steps on a GPU take beside weights and pool, by arithmetic alone. No torch.

All of it is reserved before the pool is, so that the pool cannot be given memory that the first
long prompt would need. Sizes are upper bounds from the shapes; docs/benchmarks has them measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvchat.config import DTYPE_BYTES, ModelConfig
from kvchat.engine.capture_sizes import chunk_sizes
from kvchat.kv.layout import BlockLayout
from kvchat.model.sizes import DEQUANTISED_VALUES

# torch gives cuBLAS 32 MiB for each stream that computes: the usual one, and that of captures.
CUBLAS_BYTES = 2 * 32 * 2**20
# Kernels that the driver loads when they are first used, and what it keeps for a captured graph.
_DRIVER_BYTES = 256 * 2**20
_INT, _FLOAT = 4, 4


@dataclass(frozen=True)
class StepCaps:
    """How large a step may become."""

    num_tokens: int  # max_num_batched_tokens
    num_rows: int  # that decode: max_num_seqs
    max_len: int  # tokens of the longest sequence


@dataclass(frozen=True)
class Workspace:
    """Bytes by what they are for."""

    activations: int  # of the widest moment of a layer
    logits: int  # and the copies that drawing makes of them
    gathered: int  # K and V of one layer of the longest sequence
    decode: int  # partial results and work lists of paged_decode
    tables: int  # block tables and what a step sends; RoPE angles
    products: int  # cuBLAS's workspace; int8 weights made wide
    graphs: int  # activations and logits again, in the memory of captured graphs
    driver: int  # an allowance, not torch's

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def cuda_workspace(
    config: ModelConfig, layout: BlockLayout, caps: StepCaps, weights: str = "auto"
) -> Workspace:
    """For steps up to `caps` over a pool of this layout, with --weights as given."""
    size = DTYPE_BYTES[layout.spec.dtype]
    logits = config.vocab_size * (2 * size + 3 * _FLOAT)  # a row: twice as made, thrice as drawn
    entries = -(-caps.max_len // layout.spec.block_size) + 1
    widest = max(config.hidden_size, config.intermediate_size)
    most = max(caps.num_rows, chunk_sizes(caps.num_tokens)[-1])  # tokens of a captured step
    return Workspace(
        activations=caps.num_tokens * token_bytes(config, size),
        logits=caps.num_rows * logits,
        gathered=_gathered_bytes(config, layout, caps, size),
        decode=_decode_bytes(config, layout, caps),
        tables=caps.num_rows * entries * _INT + caps.max_len * config.head_dim * _FLOAT,
        products=CUBLAS_BYTES
        + (max(DEQUANTISED_VALUES, widest) * size if weights == "int8" else 0),
        graphs=most * token_bytes(config, size) + caps.num_rows * logits,
        driver=_DRIVER_BYTES,
    )


def token_bytes(config: ModelConfig, size: int) -> int:
    """A token's activations at the widest moment of a layer, `size` bytes a value."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = 2 * hidden + 3 * ffn  # residual, normed; gate and up, their product
    # residual, normed; q, k, v; q rotated twice, attended by parts and in one
    attention = 2 * hidden + (q + 2 * kv) + 4 * q
    return size * max(mlp, attention)


def _gathered_bytes(config: ModelConfig, layout: BlockLayout, caps: StepCaps, size: int) -> int:
    num_slots = -(-caps.max_len // layout.spec.block_size) * layout.spec.block_size
    values = 2 * config.num_kv_heads * config.head_dim * num_slots
    if config.layer_windows:  # torch is given K and V of every query head, of the window alone
        seen = min(caps.max_len, max(config.layer_windows) + caps.num_tokens)
        values += 2 * config.num_heads * config.head_dim * seen
    return size * values


def _decode_bytes(config: ModelConfig, layout: BlockLayout, caps: StepCaps) -> int:
    """What PagedDecode reserves, and a work list for each window in use."""
    from kvchat.attention.paged_decode import (
        RECORD_HEADER,
        RECORD_INTS,
        TILE_HEADS,
        default_tuning,
        is_supported,
        max_splits,
    )

    if not is_supported(layout):
        return 0
    group = config.num_heads // config.num_kv_heads
    tiles = config.num_kv_heads * -(-group // TILE_HEADS)
    records = caps.num_rows * max_splits(caps.max_len, default_tuning(layout))
    partials = records * tiles * min(group, TILE_HEADS) * (config.head_dim + 2) * _FLOAT
    counters = caps.num_rows * tiles * _INT
    num_plans = len(set(config.layer_windows)) or 1
    return partials + counters + num_plans * (RECORD_HEADER + records * RECORD_INTS) * _INT
