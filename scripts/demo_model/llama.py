"""A plain torch Llama whose state dict is the one transformers loads. Training, and decoding with a
cache for the evaluation."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = (
        50_000.0  # slow enough that half of a head's planes turn less than once in 4,096 tokens
    )

    @staticmethod
    def micro() -> "LlamaConfig":
        """For smoke runs on a CPU."""
        return LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
        )

    @staticmethod
    def from_json(path: Path) -> "LlamaConfig":
        fields = json.loads(path.read_text(encoding="utf-8"))
        return LlamaConfig(
            **{name: fields[name] for name in asdict(LlamaConfig()) if name in fields}
        )


def rotary_tables(config: LlamaConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, head_dim], float32."""
    exponents = (
        torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    )
    angles = (
        torch.arange(length, device=device, dtype=torch.float32)[:, None]
        * config.rope_theta**-exponents
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]; cos and sin broadcast to it."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight.to(x.dtype) * (
            wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)


class Cache:
    """Keys and values of a batch whose rows have different lengths. Row b's next token goes to
    position lengths[b]."""

    def __init__(
        self, config: LlamaConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (
            config.num_hidden_layers,
            rows,
            config.num_key_value_heads,
            length,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)
        self.rows = torch.arange(rows, device=device)
        self.span = length  # positions from here on are empty; spares attention the work

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v [rows, kv_heads, tokens, head_dim] at positions [rows, tokens]; returns the
        layer's first `span`."""
        rows = self.rows[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.span], self.values[layer, :, :, : self.span]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], -1, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extend(
        self, x: Tensor, tables: tuple[Tensor, Tensor], cache: Cache, layer: int, positions: Tensor
    ) -> Tensor:
        """New tokens at positions [rows, tokens], over all the cache holds up to each."""
        q, k, v = self.project(x, *tables)
        keys, values = cache.write(layer, k, v, positions)
        longest = keys.shape[2]
        mask = (
            torch.arange(longest, device=x.device) <= positions[:, None, :, None]
        )  # [rows, 1, tokens, longest]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Input and output embeddings are one tensor."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    weight, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if is_output else 0.02
                )

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))

    def hidden(self, ids: Tensor, tables: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """ids [rows, tokens] -> [rows, tokens, hidden_size] after the last norm."""
        x = self.model.embed_tokens(ids).to(dtype)
        tables = tables[0][: ids.shape[1]], tables[1][: ids.shape[1]]
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), *tables)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.norm(x)

    def forward(
        self, ids: Tensor, tables: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.logits(self.hidden(ids, tables, dtype))

    def extend(
        self, ids: Tensor, positions: Tensor, cache: Cache, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Logits [rows, tokens, vocab] of new tokens; the caller keeps cache.lengths."""
        cos, sin = (table[positions][:, None] for table in tables)  # [rows, 1, tokens, head_dim]
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            x = x + layer.self_attn.extend(
                layer.input_layernorm(x), (cos, sin), cache, i, positions
            )
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.logits(self.model.norm(x))
