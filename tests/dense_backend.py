"""An attention backend without blocks: each sequence's K and V in one tensor. An oracle."""

import torch

from kvchat.attention import AttentionBatch
from kvchat.attention.rope import apply_rope, build_rope
from kvchat.config import ModelConfig


class DenseBackend:
    """Sequences are told apart by their block table's first entry; every plan appends to them."""

    def __init__(self, config: ModelConfig, max_len: int = 512) -> None:
        self.config = config
        self.rope = build_rope(config, max_len)
        self.stored: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.bytes_gathered = 0

    def warm_up(self, progress) -> None:
        """Nothing to compile."""

    def plan(self, batch: AttentionBatch) -> None:
        """Positions are seq_lens - query_lens onwards; the store must end there."""
        self.batch = batch
        starts = [n - q for n, q in zip(batch.seq_lens, batch.query_lens, strict=True)]
        self.positions = [
            torch.arange(start, end) for start, end in zip(starts, batch.seq_lens, strict=True)
        ]

    def write_kv(self, layer_idx, q, k, v):
        """Rotate, append each sequence's K and V, return the rotated q."""
        positions = torch.cat(self.positions)
        cos, sin = self.rope.cos[positions], self.rope.sin[positions]
        k = apply_rope(k, cos, sin)
        rows = zip(k.split(self.batch.query_lens), v.split(self.batch.query_lens), strict=True)
        for (new_k, new_v), table, where in zip(
            rows, self.batch.block_tables, self.positions, strict=True
        ):
            key = (layer_idx, table[0])
            if int(where[0]) > 0:
                old_k, old_v = (stored[: int(where[0])] for stored in self.stored[key])
                assert len(old_k) == int(where[0]), "a gap in the sequence"
                new_k, new_v = torch.cat((old_k, new_k)), torch.cat((old_v, new_v))
            self.stored[key] = (new_k, new_v)
        return apply_rope(q, cos, sin)

    def attend(self, layer_idx, q):
        """Plain softmax in float32 over everything stored, with the causal and window masks."""
        group = self.config.num_heads // self.config.num_kv_heads
        windows = self.config.layer_windows
        window = windows[layer_idx] if windows else 0
        outs = []
        for new_q, table, where in zip(
            q.split(self.batch.query_lens), self.batch.block_tables, self.positions, strict=True
        ):
            k, v = (t.repeat_interleave(group, dim=1) for t in self.stored[layer_idx, table[0]])
            keys = torch.arange(len(k))
            visible = keys[None] <= where[:, None]
            if window:
                visible &= keys[None] > where[:, None] - window
            scores = torch.einsum("qhd,khd->hqk", new_q.float(), k.float())
            scores = scores * self.config.attention_scale
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype))
        return torch.cat(outs)
