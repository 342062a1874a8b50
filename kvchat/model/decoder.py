"""The one decoder: token ids -> logits, steered by ModelConfig. Positions are the backend's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvchat.attention import AttentionBackend
from kvchat.config import ModelConfig
from kvchat.model.families import has_bias, layer_name
from kvchat.model.linear import Linear
from kvchat.model.ops import DecoderOps, TorchOps

# fetch(name, ...) -> the named tensors stacked along their first dimension, final dtype and device:
# a Tensor, or of a matrix a Quantised
Fetch = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights; q, k and v are one matrix, and gate and up are one."""

    attention_norm: Tensor  # [hidden_size]
    qkv: Linear  # rows: q heads, then k heads, then v heads
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear  # rows: gate, then up
    down: Linear


class Decoder:
    """Weights and the forward pass. No state between calls: K and V live in the backend's pool."""

    def __init__(self, config: ModelConfig, fetch: Fetch) -> None:
        self.config = config
        self.ops: DecoderOps = TorchOps()
        self.layers = [_build_layer(config, idx, fetch) for idx in range(config.num_layers)]
        self.norm: Tensor = fetch("model.norm.weight")
        self.embedding: Tensor = fetch("model.embed_tokens.weight")  # [vocab_size, hidden_size]
        is_tied = config.tie_word_embeddings
        self.lm_head = Linear.of(self.embedding if is_tied else fetch("lm_head.weight"))

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where input_ids must be."""
        return self.embedding.device

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, backend: AttentionBackend, logit_rows: Tensor | None = None
    ) -> Tensor:
        """One step over the batch that `backend` was planned for.

        input_ids: [num_tokens] int64; logit_rows: [n] int64, the rows of input_ids whose next
        token is wanted, or None for all. Returns [n, vocab_size] float32.
        """
        hidden = self.hidden(input_ids, backend)
        return self.logits(hidden if logit_rows is None else hidden[logit_rows]).float()

    def hidden(self, input_ids: Tensor, backend: AttentionBackend) -> Tensor:
        """What the layers make of the tokens: [num_tokens, hidden_size], not normed."""
        ops, eps = self.ops, self.config.norm_eps
        x = F.embedding(input_ids, self.embedding)  # [num_tokens, hidden_size]
        for layer_idx, layer in enumerate(self.layers):
            attended = self._attention(layer_idx, ops.norm(x, layer.attention_norm, eps), backend)
            x = ops.add_linear(x, attended, layer.o)
            gated = ops.gated(ops.norm(x, layer.mlp_norm, eps), layer.gate_up)
            x = ops.add_linear(x, gated, layer.down)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Of rows of `hidden`: [n, hidden_size] -> [n, vocab_size], in the model's dtype."""
        return self.ops.linear(self.ops.norm(hidden, self.norm, self.config.norm_eps), self.lm_head)

    def linears(self) -> Iterator[Linear]:
        """Every matrix that a step reads, once each."""
        for layer in self.layers:
            yield from (layer.qkv, layer.o, layer.gate_up, layer.down)
        yield self.lm_head

    def _attention(self, layer_idx: int, x: Tensor, backend: AttentionBackend) -> Tensor:
        """x: [num_tokens, hidden_size], normed -> [num_tokens, num_heads * head_dim].

        q, k and v reach the backend as strided views.
        """
        config, layer, ops = self.config, self.layers[layer_idx], self.ops
        heads = ops.linear(x, layer.qkv).view(x.shape[0], -1, config.head_dim)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.norm(q, layer.q_norm, config.norm_eps)
            k = ops.norm(k, layer.k_norm, config.norm_eps)
        q = backend.write_kv(layer_idx, q, k, v)
        return backend.attend(layer_idx, q).reshape(x.shape[0], -1)


def _build_layer(config: ModelConfig, layer_idx: int, fetch: Fetch) -> Layer:
    def weight(part: str) -> Tensor:
        norm: Tensor = fetch(layer_name(layer_idx, part, "weight"))
        return norm

    def linear(*parts: str) -> Linear:
        names = [layer_name(layer_idx, part, "weight") for part in parts]
        if not has_bias(config, parts[0]):
            return Linear.of(fetch(*names))
        return Linear.of(
            fetch(*names), fetch(*(layer_name(layer_idx, part, "bias") for part in parts))
        )

    return Layer(
        attention_norm=weight("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=weight("self_attn.q_norm") if config.has_qk_norm else None,
        k_norm=weight("self_attn.k_norm") if config.has_qk_norm else None,
        o=linear("self_attn.o_proj"),
        mlp_norm=weight("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
