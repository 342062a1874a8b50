"""Which models kvchat runs: config.json -> ModelConfig, tensor names and shapes. No torch.

Everything in config.json is untrusted: each number has a range, and what kvchat would compute
wrongly (another architecture, quantized weights, an unknown RoPE rule) is refused by name.
Defaults for absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvchat.config import DTYPE_BYTES, ModelConfig, RopeScaling
from kvchat.errors import ModelError, quoted
from kvchat.model.header import FLOAT_DTYPES, TensorInfo
from kvchat.model.source import ModelSource

SUPPORTED = "Llama 1 to 3.x, TinyLlama, Mistral, Qwen2, Qwen2.5, Qwen3, SmolLM and SmolLM2"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PLAIN = "float32, bfloat16 or float16 safetensors"
# Buffers that old Llama checkpoints carry and that are computed here.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
# Weights may take this share of the memory available on a CPU before 16 bits are preferred.
_FLOAT32_SHARE = 0.40


@dataclass(frozen=True)
class _Family:
    """How one model_type departs from Llama. Biases that a config key switches: has_bias_keys."""

    architecture: str
    num_kv_heads: int | None = None  # when config.json names none; None = num_attention_heads
    head_dim: int | None = None  # likewise; None = hidden_size / num_attention_heads
    has_bias_keys: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    max_position: int = 32768


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", has_bias_keys=True, max_position=2048),
    "mistral": _Family("MistralForCausalLM", num_kv_heads=8, max_position=131072),
    "qwen2": _Family("Qwen2ForCausalLM", num_kv_heads=32, has_qkv_bias=True),
    "qwen3": _Family(
        "Qwen3ForCausalLM", num_kv_heads=32, head_dim=128, has_bias_keys=True, has_qk_norm=True
    ),
}

_MOE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "text_config")


def parse_config(source: ModelSource) -> ModelConfig:
    """The decoder's shape for this checkpoint, or ModelError naming what cannot be run."""
    fields = _Fields(source.config)
    family_name = _check_supported(source.config)
    family = _FAMILIES[family_name]
    hidden_size = fields.integer("hidden_size", None, 2**17)
    num_heads = fields.integer("num_attention_heads", None, 1024)
    num_kv_heads = fields.integer("num_key_value_heads", family.num_kv_heads or num_heads, 1024)
    head_dim = fields.integer("head_dim", family.head_dim or hidden_size // num_heads, 1024)
    if num_heads % num_kv_heads:
        raise fields.refused("num_key_value_heads", f"not a divisor of {num_heads} heads")
    if head_dim % 2:
        raise fields.refused("head_dim", f"{head_dim} a head, but it must be even for RoPE")
    num_layers = fields.integer("num_hidden_layers", None, 1024)
    vocab_size = fields.integer("vocab_size", None, 2**20)
    max_position = fields.integer("max_position_embeddings", family.max_position, 2**27)
    rope_theta, scaling = _parse_rope(source.config, max_position)
    has_bias = family.has_bias_keys and fields.boolean("attention_bias", False)
    return ModelConfig(
        family=family_name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", None, 2**20),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=_scaled_max_position(max_position, scaling),
        norm_eps=fields.number("rms_norm_eps", 1e-6, 1e-12, 0.1),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        has_qkv_bias=family.has_qkv_bias or has_bias,
        has_o_bias=has_bias,
        has_mlp_bias=family_name == "llama" and fields.boolean("mlp_bias", False),
        has_qk_norm=family.has_qk_norm,
        layer_windows=_layer_windows(fields, family_name, num_layers),
        eos_token_ids=tuple(
            dict.fromkeys(
                _token_ids(source.config, "eos_token_id", vocab_size)
                + _token_ids(source.generation_config, "eos_token_id", vocab_size)
            )
        ),
        checkpoint_dtype=_checkpoint_dtype(source),
    )


def layer_name(layer_idx: int, part: str, kind: str) -> str:
    """The checkpoint's name of a layer's tensor; the same in all families."""
    return f"model.layers.{layer_idx}.{part}.{kind}"


def has_bias(config: ModelConfig, part: str) -> bool:
    """Whether the linear `part` ("self_attn.q_proj") has a bias."""
    if part.startswith("mlp."):
        return config.has_mlp_bias
    return config.has_o_bias if part == "self_attn.o_proj" else config.has_qkv_bias


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config; a tied one has no lm_head.weight."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.has_qk_norm:
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for idx in range(config.num_layers):
        shapes |= {layer_name(idx, part, "weight"): (size,) for part, size in norms.items()}
        for part, shape in linears.items():
            shapes[layer_name(idx, part, "weight")] = shape
            if has_bias(config, part):
                shapes[layer_name(idx, part, "bias")] = shape[:1]
    return shapes


def auto_dtype(num_values: int, checkpoint_dtype: str, device: str, available: int) -> str:
    """What --dtype auto means for a model of so many values: on a GPU the checkpoint's dtype, and
    float16 for float32, which its kernels do not compute in.

    On a CPU it is float32 where its weights fit 40 % of the `available` bytes, for without
    AVX512-BF16 or AMX a prompt's matrix products in 16 bits take 4 to 5 times as long there
    (256 x 2048 x 5632: 55 ms against 233 and 285 ms); else the checkpoint's 16 bits.
    """
    if device != "cpu":
        return "float16" if checkpoint_dtype == "float32" else checkpoint_dtype
    wide_bytes = num_values * DTYPE_BYTES["float32"]
    return "float32" if wide_bytes <= available * _FLOAT32_SHARE else checkpoint_dtype


def check_tensors(source: ModelSource, config: ModelConfig) -> dict[str, TensorInfo]:
    """The checkpoint's tensors without those that are not needed; ModelError unless they are what
    the config implies: every name, no other, shapes and dtypes."""
    tensors = {n: i for n, i in source.tensors.items() if not n.endswith(_IGNORED_SUFFIX)}
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings and LM_HEAD in tensors:
        shapes[LM_HEAD] = shapes[EMBEDDING]
        if EMBEDDING not in tensors:
            del shapes[EMBEDDING]
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    if missing or unexpected:
        found = [
            f"{what} {len(names)} tensors (first: {quoted(names[0], 60)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ModelError(f"model refused: {'; '.join(found)}; config.json is of another model?")
    for name, shape in shapes.items():
        info = tensors[name]
        if info.shape != shape:
            raise ModelError(
                f'model refused: tensor "{name}" has shape {list(info.shape)}, '
                f"config.json implies {list(shape)}"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f'model refused: tensor "{name}" is {info.dtype}; '
                f"kvchat reads {', '.join(FLOAT_DTYPES)}: use the unquantized checkpoint"
            )
    return tensors


class _Fields:
    """Checked access to a dict that came out of config.json."""

    def __init__(self, values: Mapping[str, object], where: str = "") -> None:
        self.values = values
        self.where = where  # "rope_scaling." in nested ones

    def refused(self, key: str, why: str = "") -> ModelError:
        shown = quoted(repr(self.values.get(key)), 40)
        why = f" ({why})" if why else ""
        return ModelError(f"config.json: {self.where}{key} = {shown} is not allowed{why}")

    def integer(self, key: str, default: int | None, largest: int) -> int:
        """A whole number 1 .. largest; null counts as absent."""
        value = self.values.get(key)
        if value is None and default is not None:
            value = default
        if type(value) is not int or not 1 <= value <= largest:  # type(): a bool is no number
            raise self.refused(key, f"a whole number from 1 to {largest}")
        return value

    def number(self, key: str, default: float | None, lowest: float, largest: float) -> float:
        """A finite number within the bounds."""
        value = self.values.get(key)
        if value is None and default is not None:
            value = default
        if type(value) not in (int, float) or not lowest <= value <= largest:  # type: ignore[operator]
            raise self.refused(key, f"a number from {lowest:g} to {largest:g}")
        return float(value)  # type: ignore[arg-type]

    def optional(self, key: str, lowest: float, largest: float) -> float | None:
        """Likewise, None where the key is absent or null."""
        return None if self.values.get(key) is None else self.number(key, None, lowest, largest)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.refused(key, "true or false")
        return value


def _check_supported(config: Mapping[str, object]) -> str:
    """The family's name; ModelError for whatever the decoder would compute wrongly."""
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    named = quoted(str(architectures[0] if architectures else model_type), 60)
    _check_not_quantized(config)
    if "auto_map" in config:
        raise ModelError(
            "config.json: auto_map asks for code from the model's folder, and kvchat runs none; "
            f"supported: {SUPPORTED}"
        )
    if any(key in config for key in _MOE_KEYS) or model_type == "mixtral":
        raise ModelError(f"{named} is a mixture of experts; kvchat runs dense models: {SUPPORTED}")
    if any(key in config for key in _MULTIMODAL_KEYS) or named.endswith("ForConditionalGeneration"):
        raise ModelError(
            f"{named} is multimodal or an encoder-decoder; kvchat runs text decoders: {SUPPORTED}"
        )
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise ModelError(
            f"config.json: architecture {named} is not supported; kvchat runs {SUPPORTED}"
        )
    if architectures and family.architecture not in architectures:
        raise ModelError(
            f"config.json: architecture {named} is not a chat decoder; "
            f"for {model_type} kvchat needs {family.architecture}"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _Fields(config).refused("hidden_act", "kvchat has silu")
    return model_type


def _check_not_quantized(config: Mapping[str, object]) -> None:
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    shown = quoted(str(method or "unknown method"), 40)
    raise ModelError(
        f"the checkpoint is quantized ({shown}); kvchat reads {_PLAIN}: "
        "use the model this one was made from"
    )


def _layer_windows(fields: _Fields, family: str, num_layers: int) -> tuple[int, ...]:
    """Per layer the sliding window in tokens, the token itself included; () when none slides."""
    if family == "mistral":
        is_off = "sliding_window" in fields.values and fields.values["sliding_window"] is None
        return () if is_off else (fields.integer("sliding_window", 4096, 2**27),) * num_layers
    is_on = family in ("qwen2", "qwen3") and fields.boolean("use_sliding_window", False)
    if not is_on or fields.values.get("sliding_window", 4096) is None:
        return ()
    window = fields.integer("sliding_window", 4096, 2**27)
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        first = fields.values.get("max_window_layers", 28)
        if type(first) is not int:
            raise fields.refused("max_window_layers", "a whole number")
        return tuple(window if idx >= first else 0 for idx in range(num_layers))
    windows = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.refused("layer_types", f"a list of {num_layers}")
    found = tuple(windows.get(kind, -1) if isinstance(kind, str) else -1 for kind in layer_types)
    if -1 in found:
        raise fields.refused("layer_types", "full_attention or sliding_attention")
    return found


def _parse_rope(
    config: Mapping[str, object], max_position: int
) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from `rope_parameters` or the older rope_theta and rope_scaling."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _Fields(config).refused("rope_parameters", "one RoPE rule for all layers")
    fields = _Fields({"rope_theta": config.get("rope_theta")} | rope, "rope_parameters.")
    theta = fields.number("rope_theta", 10_000.0, 2.0, 1e12)
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise ModelError("config.json: partial_rotary_factor below 1 is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        shown = quoted(str(kind), 40)
        raise ModelError(
            f"config.json: rope type {shown} is not supported; kvchat has linear, llama3 and yarn"
        )
    outer = config.get("original_max_position_embeddings")
    if outer is not None:  # a value outside the rule wins, as in transformers
        fields.values = {**fields.values, "original_max_position_embeddings": outer}
    original = fields.integer("original_max_position_embeddings", max_position, 2**27)
    default_factor = max_position / original if kind == "yarn" else None
    scaling = RopeScaling(
        kind=kind,
        factor=fields.number("factor", default_factor, 0.01, 1e6),
        original_max_position=original,
        low_freq_factor=fields.number("low_freq_factor", 1.0, 1e-3, 1e6),
        high_freq_factor=fields.number("high_freq_factor", 4.0, 1e-3, 1e6),
        beta_fast=fields.number("beta_fast", 32.0, 1e-3, 1e6),
        beta_slow=fields.number("beta_slow", 1.0, 1e-3, 1e6),
        attention_factor=fields.optional("attention_factor", 0.0, 1e3),
        mscale=fields.optional("mscale", 0.0, 1e3),
        mscale_all_dim=fields.optional("mscale_all_dim", 0.0, 1e3),
        truncate=fields.boolean("truncate", True),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise fields.refused("high_freq_factor", "it must be above low_freq_factor")
    return theta, scaling


def _scaled_max_position(max_position: int, scaling: RopeScaling | None) -> int:
    """Positions the scaled model is good for. llama3 configs already name the long context."""
    if scaling is None or scaling.kind == "llama3":
        return max_position
    if scaling.kind == "linear":
        return int(max_position * scaling.factor)
    return max(max_position, int(scaling.original_max_position * scaling.factor))


def _token_ids(config: Mapping[str, object], key: str, vocab_size: int) -> tuple[int, ...]:
    """An id or a list of ids; what is no token of this vocabulary is left out."""
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and 0 <= v < vocab_size)


def _checkpoint_dtype(source: ModelSource) -> str:
    """The dtype most of the weights are stored in; without tensors what config.json says."""
    stored = source.stored_bytes()
    if stored:
        return max(stored, key=lambda dtype: stored[dtype])
    named = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")
    return named if named in DTYPE_BYTES else "float32"
