"""What a run is configured with: frozen records, passed down whole. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class SchedulerConfig:
    """The caps of a step. num_blocks counts the null block; max_model_len caps a request."""

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512

    @property
    def max_request_tokens(self) -> int:
        """The longest sequence one request may reach: the model's, or all the pool holds."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)


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
