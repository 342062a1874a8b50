"""Pools with sequences in them, and attention over what they hold in dense float64: an oracle."""

import itertools
import random
from dataclasses import dataclass

import torch

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import make_backend
from kvchat.attention.rope import RopeTable, build_rope
from kvchat.config import KVSpec, ModelConfig
from kvchat.kv.cache import KVCache
from kvchat.kv.codecs import decode, encode
from kvchat.kv.layout import Codec, pack_entry, unpack_entry

NUM_LAYERS, LAYER = 2, 1
# bfloat16 keeps 8 bits, so its last rounding alone may be 2^-9 of the value.
TOLERANCE = {"float32": (2e-5, 1e-5), "float16": (1e-3, 1e-3), "bfloat16": (1e-3, 5e-3)}


@dataclass(frozen=True)
class Shape:
    block_size: int = 16
    head_dim: int = 16
    num_kv_heads: int = 2
    group: int = 4
    dtype: str = "float32"
    window: int = 0


def make_config(shape):
    return ModelConfig(
        family="llama",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_layers=NUM_LAYERS,
        num_heads=shape.num_kv_heads * shape.group,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position=4096,
        norm_eps=1e-5,
        rope_theta=10000.0,
        layer_windows=(0, shape.window),
    )


class World:
    """A pool of NaN with the given sequences in it, in shuffled blocks, but for their new tokens.

    lens: (query_len, seq_len) per sequence. From position `sink` on, each span of past tokens is
    stored as one of `codecs`, drawn at random; what fits no span is native. Unused slots and side
    bytes are NaN, in every layer.
    """

    def __init__(self, shape, lens, seed=0, codecs=(Codec.NATIVE,), sink=0):
        self.shape, self.lens = shape, lens
        self.generator, self.random = torch.Generator().manual_seed(seed), random.Random(seed)
        self.config, dtype = make_config(shape), getattr(torch, shape.dtype)
        num_blocks = 4 + sum(-(-seq_len // shape.block_size) for _, seq_len in lens)
        spec = KVSpec(NUM_LAYERS, shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype)
        self.cache = KVCache(spec, num_blocks, lowest=max(codecs))
        self.cache.blocks[1:] = float("nan")
        self.cache.side[1:] = 0xFF
        self.rope = build_rope(self.config, 4096)
        tokens, heads = sum(n for n, _ in lens), (shape.num_kv_heads, shape.head_dim)
        self.q = self.draw(tokens, shape.num_kv_heads * shape.group, shape.head_dim).to(dtype)
        self.k, self.v = self.draw(tokens, *heads).to(dtype), self.draw(tokens, *heads).to(dtype)
        self.qkv = (self.q, self.k, self.v)
        self.ids = self.random.sample(range(1, num_blocks), num_blocks - 1)
        self.tables = [self.store(seq_len - n, seq_len, codecs, sink) for n, seq_len in lens]
        self.batch = AttentionBatch([n for n, _ in lens], [n for _, n in lens], self.tables)

    def store(self, num_past, seq_len, codecs, sink):
        """The table of a sequence whose first num_past tokens are drawn and stored."""
        block_size, layout, table = self.shape.block_size, self.cache.layout, []
        while len(table) * block_size < seq_len:
            position, block_id = len(table) * block_size, self.ids.pop()
            fitting = [
                codec
                for codec in codecs
                if position >= sink
                and position % layout.span_tokens(codec) == 0
                and position + layout.span_tokens(codec) <= num_past
            ]
            codec = self.random.choice(fitting or [Codec.NATIVE])
            num_tokens = layout.span_tokens(codec)
            kv = self.draw(2, self.shape.num_kv_heads, num_tokens, self.shape.head_dim)
            if codec == Codec.NATIVE:
                num_stored = max(0, min(block_size, num_past - position))
                block = self.cache.layer(LAYER)[block_id]
                block[:, :, :num_stored] = kv[:, :, :num_stored]
            else:
                payload, side = encode(codec, *kv, layout)
                used = layout.side_used(codec)
                self.cache.payload[block_id, LAYER] = payload
                self.cache.side[block_id, LAYER, :, :used] = side[:, :used]
            table += [pack_entry(block_id, codec, i) for i in range(num_tokens // block_size)]
        return table

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def slot(self, table, position):
        """The pool's K and V of one token: [2, num_kv_heads, head_dim]."""
        block_id, offset = (
            table[position // self.shape.block_size],
            position % self.shape.block_size,
        )
        return self.cache.layer(LAYER)[block_id, :, :, offset]

    def move(self, device):
        """Pool, angles and new tokens to another device."""
        cache = self.cache
        cache.blocks, cache.side = cache.blocks.to(device), cache.side.to(device)
        cache.payload = cache.blocks.view(torch.uint8).flatten(-2)
        self.rope = RopeTable(self.rope.cos.to(device), self.rope.sin.to(device))
        self.q, self.k, self.v = self.qkv = [x.to(device) for x in self.qkv]

    def run(self, name):
        """Store and attend with the backend of that name: (result, backend)."""
        return self.run_with(make_backend(name, self.config, self.cache, self.rope))

    def run_with(self, backend):
        """Store and attend: (result, backend)."""
        torch.use_deterministic_algorithms(True)  # torch.empty gives NaN: unwritten results show
        try:
            backend.plan(self.batch)
            rotated = backend.write_kv(LAYER, self.q, self.k, self.v)
            return backend.attend(LAYER, rotated), backend
        finally:
            torch.use_deterministic_algorithms(False)

    def rotate(self, x, position):
        """x: [n, head_dim] in float64, pairs (i, i + head_dim / 2)."""
        cos, sin = self.rope.cos[position].double(), self.rope.sin[position].double()
        low, high = x.double().chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def history(self, table, seq_len):
        """What is stored of a sequence, decoded: float64 [seq_len, 2, num_kv_heads, head_dim]."""
        block_size, pieces = self.shape.block_size, []
        for entry in table:
            block_id, codec, span_idx = unpack_entry(entry)
            payload, side = self.cache.payload[block_id, LAYER], self.cache.side[block_id, LAYER]
            kv = torch.stack(decode(codec, payload, side, self.cache.layout))
            pieces.append(kv[:, :, span_idx * block_size : (span_idx + 1) * block_size])
        return torch.cat(pieces, 2).permute(2, 0, 1, 3)[:seq_len].double()

    def expected(self):
        """(rotated new keys in float64, attention over what the pool now holds, in float64)."""
        keys, outs, token = [], [], 0
        for (num_new, seq_len), table in zip(self.lens, self.tables, strict=True):
            stored = self.history(table, seq_len)
            k, v = (stored[:, i].repeat_interleave(self.shape.group, 1) for i in (0, 1))
            for position in range(seq_len - num_new, seq_len):
                first = max(0, position + 1 - self.shape.window) if self.shape.window else 0
                q = self.rotate(self.q[token], position)
                seen = slice(first, position + 1)
                scores = torch.einsum("hd,thd->ht", q, k[seen]) * self.shape.head_dim**-0.5
                outs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v[seen]))
                keys.append(self.rotate(self.k[token], position))
                token += 1
        return torch.stack(keys), torch.stack(outs)

    def new_slots(self):
        return [
            self.slot(table, position)
            for (num_new, seq_len), table in zip(self.lens, self.tables, strict=True)
            for position in range(seq_len - num_new, seq_len)
        ]


def assert_close(out, expected, dtype):
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=rtol)


def pairwise(*values):
    """Tuples in which every two values of two dimensions meet, chosen greedily."""
    combos = list(itertools.product(*values))
    random.Random(1).shuffle(combos)
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in combos}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(combos, key=lambda c: len(pairs[c] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen
