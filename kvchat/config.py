"""What a run is configured with: frozen records, passed down whole. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Positions 0 .. num_blocks-1 name blocks; block 0 is the null block and is never handed out.
NULL_BLOCK_ID = 0


@dataclass(frozen=True)
class RopeScaling:
    """A long-context RoPE rule, named as in config.json: kind is linear, llama3 or yarn."""

    kind: str
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, whatever its family; field names follow the Hugging Face configs."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # positions the model was made for, rope scaling included
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    layer_windows: tuple[int, ...] = ()  # per layer: sliding window in tokens, 0 = full attention
    eos_token_ids: tuple[int, ...] = ()
    checkpoint_dtype: str = "float32"

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied with: head_dim ** -0.5."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class KVSpec:
    """What one block of the pool holds: `block_size` tokens' K and V of all layers, one dtype."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        """One block, all layers inside."""
        return self.bytes_per_token * self.block_size


# By mode: what is compressed, (from, to) in the order of the ladder, as numbers of kv/layout.Codec.
KV_RUNGS: dict[str, tuple[tuple[int, int], ...]] = {
    "native": (),
    "auto": ((0, 1),),
    "auto4": ((0, 1), (1, 2)),
    "int8": ((0, 1),),
    "int4": ((0, 2),),
}


@dataclass(frozen=True)
class KVPolicy:
    """Which spans of a sequence may be compressed, and when. `span_blocks` is by codec, as the
    pool's. auto and auto4 compress when memory runs short, int8 and int4 all that may be."""

    mode: str = "native"
    window: int = 128  # last tokens that stay native
    sink: int = 64  # first tokens that do
    span_blocks: tuple[int, ...] = (1,)
    num_reserved: int = 0  # blocks for compression and copy-on-write alone
    slice_tokens: int = 1024  # compressed in one step at most; a span always may be. Eager modes
    # also compress what was computed meanwhile: see kv/ladder
    low_share: float = 1 / 32  # of the blocks: when fewer are free, compression begins
    high_share: float = 1 / 16  # it goes on until so many are

    @property
    def rungs(self) -> tuple[tuple[int, int], ...]:
        """(from, to) codecs, in the order in which they are used."""
        return KV_RUNGS[self.mode]

    @property
    def is_eager(self) -> bool:
        """Whatever has left the window is compressed, also when there is room."""
        return self.mode in ("int8", "int4")

    def compressible(self, num_tokens: int, codec: int, block_size: int) -> tuple[int, int]:
        """Positions [start, end) that lie in whole spans outside sinks and window; end <= start
        when there are none. The window moves when a block is full, so that no step must ask."""
        span_tokens = self.span_blocks[codec] * block_size
        window_start = num_tokens // block_size * block_size - self.window
        return (
            -(-self.sink // span_tokens) * span_tokens,
            window_start // span_tokens * span_tokens,
        )

    def num_blocks(self, num_tokens: int, block_size: int) -> int:
        """Blocks that hold a sequence of so many tokens when all is compressed that may be."""
        return -(-num_tokens // block_size) - self._num_saved(num_tokens, block_size)

    def max_tokens(self, num_blocks: int, block_size: int) -> int:
        """The longest sequence that so many blocks hold on its whole way, token after token."""
        low, high = 0, num_blocks * self.span_blocks[-1] * block_size
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak_blocks(middle, block_size) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def peak_blocks(self, num_tokens: int, block_size: int) -> int:
        """The most blocks that are needed at any length up to num_tokens: a new token's slot is
        claimed before its block's span can be compressed. A longest span later more are needed
        than before, so only the last lengths count."""
        first = max(1, num_tokens - self.span_blocks[-1] * block_size)
        starts = range(first - first % block_size + 1, num_tokens, block_size)  # of a new block
        lengths: list[int] = [*starts, num_tokens]
        return max(
            -(-length // block_size) - self._num_saved(length - 1, block_size) for length in lengths
        )

    def _num_saved(self, num_tokens: int, block_size: int) -> int:
        """Blocks that compression frees of a sequence, rung after rung."""
        num_saved = 0
        for src, codec in self.rungs:
            span = self.span_blocks[codec]
            start, end = self.compressible(num_tokens, codec, block_size)
            num_spans = max(0, end - start) // (span * block_size)
            num_saved += num_spans * (span // self.span_blocks[src] - 1)
        return num_saved


@dataclass(frozen=True)
class SchedulerConfig:
    """The caps of a step. num_blocks counts the null block; max_model_len caps a request;
    num_host_slots blocks of idle sessions may be parked in main memory."""

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    kv: KVPolicy = KVPolicy()
    num_host_slots: int = 0

    @property
    def num_request_blocks(self) -> int:
        """Blocks that one request can hold: all but the null block and the reserve."""
        return self.num_blocks - 1 - self.kv.num_reserved

    @cached_property
    def max_request_tokens(self) -> int:
        """The longest sequence one request may reach: the model's, or all the pool holds when it
        is compressed as far as may be."""
        num_held: int = self.kv.max_tokens(self.num_request_blocks, self.block_size)
        return min(self.max_model_len, num_held)

    @property
    def max_native_tokens(self) -> int:
        """The same for a session that is not to be compressed."""
        return min(self.max_model_len, self.num_request_blocks * self.block_size)


@dataclass(frozen=True)
class SamplingParams:
    """How a reply is drawn. The order in which they act is documented in engine/sampler.

    temperature 0 is greedy. Values that switch a rule off: top_k 0, top_p 1, min_p 0, typical_p 1,
    repetition_penalty 1, frequency_penalty 0, presence_penalty 0, dry_multiplier 0.
    max_tokens None means: as far as the context goes. A `stop` string ends a reply, unshown.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64  # tokens the three penalties look back; 0 = off, -1 = whole context
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
