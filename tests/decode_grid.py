"""The full grid of decode attention, made fast: one pool for all cases of a shape and codec.

Blocks are drawn at random with repeats, so that few of them serve rows of any length; each row ends
in a block that is filled as far as the row goes, and NaN stands in what no row reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from decode_cases import LAYER, MIXED, NUM_LAYERS, DecodeCase, DecodeInputs, lowest_codec
from torch import Tensor

from kvchat.config import KVSpec
from kvchat.kv import codecs
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec, pack_entry

HEAD_DIMS, KV_HEADS, BLOCK_SIZES = (64, 128, 256), (1, 8), (16, 32)
CODECS, GROUPS, BATCHES = ("native", "int8", "int4", MIXED), (1, 4, 8), (1, 2, 7, 8)
NUM_CASES = 4032
NUM_ROWS = max(BATCHES)
MAX_NMSE = 1e-6  # of a case's output
_NUM_BODY = 24  # full blocks of each codec
_NUM_TAILS = 2  # blocks filled to each length below a whole one
_NUM_SPARE = 9  # blocks of NaN that no row names, or only behind its end
_DTYPE = "float16"
_N, _I8, _I4 = Codec
# By codec: what the blocks of a unit, a span of the lowest codec, may be.
_PATTERNS = {
    "native": [(_N,)],
    "int8": [(_I8,)],
    "int4": [(_I4,)],
    MIXED: [(_N,) * 4, (_I8, _I8), (_I4,), (_N, _N, _I8), (_I8, _N, _N)],
}


@dataclass(frozen=True)
class PoolShape:
    """What the cases of one pool have in common."""

    head_dim: int
    num_kv_heads: int
    block_size: int
    codec: str

    def case(self, group: int, lens: tuple[int, ...]) -> DecodeCase:
        """Rows of these lengths over such a pool."""
        return DecodeCase(
            self.head_dim, self.num_kv_heads, group, self.block_size, _DTYPE, self.codec, lens
        )


def pool_shapes() -> list[PoolShape]:
    """Of the whole grid."""
    return [PoolShape(*x) for x in itertools.product(HEAD_DIMS, KV_HEADS, BLOCK_SIZES, CODECS)]


def lengths(block_size: int) -> tuple[int, ...]:
    """Of the rows of a case."""
    return (1, block_size - 1, block_size, block_size + 1, 97, 2048, 16384)


def grid_cases(shape: PoolShape) -> Iterator[tuple[int, int, int]]:
    """(length, group, rows) of every case of this shape."""
    yield from itertools.product(lengths(shape.block_size), GROUPS, BATCHES)


class GridPool:
    """A pool of a shape, and rows over it. All tensors are on `device`, drawn there by `seed`."""

    def __init__(self, shape: PoolShape, device: str = "cpu", seed: int = 0) -> None:
        self.shape = shape
        self._generator = torch.Generator(device).manual_seed(seed)
        spec = KVSpec(NUM_LAYERS, shape.num_kv_heads, shape.head_dim, shape.block_size, _DTYPE)
        used = [c for c in Codec if any(c in pattern for pattern in _PATTERNS[shape.codec])]
        sizes = [_NUM_BODY] * len(Codec) + [_NUM_TAILS * (shape.block_size - 1), _NUM_SPARE]
        self.cache = KVCache(spec, 1 + sum(sizes), device, lowest_codec(shape.case(1, ())))
        self.cache.payload.fill_(255)
        self.cache.side.fill_(255)
        ids = 1 + torch.randperm(sum(sizes), generator=self._generator, device=device)
        *body, self._tails, self._spare = ids.int().split(sizes)
        self._body = torch.stack(body)  # [codecs, _NUM_BODY]
        self._pieces = torch.zeros(1 + sum(sizes), dtype=torch.long, device=device)  # by block id
        values: list[Tensor] = []
        for codec in sorted({Codec.NATIVE, *used}):
            self._fill(codec)
            values += self._decoded(self._body[codec], codec, values)
        self._fill_tails()
        values += self._decoded(self._tails, Codec.NATIVE, values)
        # [pieces, 2 (K, V), heads, block_size, head_dim], as stored; NaN where nothing is
        self._values = torch.cat(values)
        self.payload, self.side = self.cache.payload.clone(), self.cache.side.clone()

    @property
    def is_unchanged(self) -> bool:
        """Whether every byte is as it was made."""
        is_same = torch.equal(self.cache.payload, self.payload)
        return is_same and torch.equal(self.cache.side, self.side)

    def rows(self, lens: tuple[int, ...], group: int) -> DecodeInputs:
        """Inputs of rows of these lengths; entries behind a row's end name a block of NaN."""
        shape = self.shape
        tables = [self._table(seq_len) for seq_len in lens]
        width = max(map(len, tables)) + 2
        packed = self._spare[:1].repeat(len(lens), width)
        for row, table in zip(packed, tables, strict=True):
            row[: len(table)] = table
        num_queries = (len(lens), shape.num_kv_heads * group, shape.head_dim)
        q = self._draw(*num_queries).half()
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=packed.device)
        rotated = codecs.rotate(q.float()).half()
        return DecodeInputs(shape.case(group, lens), self.cache, packed, seq_lens, q, rotated)

    def keys_and_values(self, tables: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """K and V of rows of one length: float64, each [rows, heads, seq_len, head_dim]."""
        entries = tables[:, : -(-seq_len // self.shape.block_size)]
        pieces = self._pieces[entries & 0xFFFFFF] + (entries >> 24 & 15)
        k, v = (
            x[pieces].transpose(1, 2).flatten(2, 3)[:, :, :seq_len] for x in self._values.unbind(1)
        )
        return k.double(), v.double()

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self._generator.device)

    def _pick(self, num_choices: int, *size: int) -> Tensor:
        device = self._generator.device
        return torch.randint(num_choices, size, generator=self._generator, device=device)

    def _random_kv(self, num_blocks: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """K, with offsets by channel, and V of all sizes: [blocks, layers, heads, tokens, dim]."""
        size = (num_blocks, NUM_LAYERS, self.shape.num_kv_heads, num_tokens, self.shape.head_dim)
        offsets = self._draw(*size[:3], 1, size[-1])
        return self._draw(*size) + offsets, self._draw(*size) * 0.1 ** self._pick(3, *size[:-1], 1)

    def _fill(self, codec: Codec) -> None:
        """The body blocks of a codec, all layers."""
        cache, ids = self.cache, self._body[codec].long()
        k, v = self._random_kv(_NUM_BODY, cache.layout.span_tokens(codec))
        if codec == Codec.NATIVE:
            cache.blocks[ids] = torch.stack((k, v), 2).to(cache.blocks.dtype)
            return
        payload, side = codecs.encode(codec, k, v, cache.layout)
        used = cache.layout.side_used(codec)
        cache.payload[ids] = payload
        cache.side[ids, ..., :used] = side[..., :used]

    def _fill_tails(self) -> None:
        """_NUM_TAILS blocks of 1 token, of 2, ... one less than a block."""
        k, v = self._random_kv(len(self._tails), self.shape.block_size)
        kv = torch.stack((k, v), 2).to(self.cache.blocks.dtype)
        for idx, filled in enumerate(kv):
            filled[:, :, :, 1 + idx // _NUM_TAILS :] = torch.nan
        self.cache.blocks[self._tails.long()] = kv

    def _decoded(self, ids: Tensor, codec: Codec, before: list[Tensor]) -> list[Tensor]:
        """The values of LAYER, a piece each block_size tokens; notes where they will be."""
        cache, ids = self.cache, ids.long()
        kv = codecs.decode(codec, cache.payload[ids, LAYER], cache.side[ids, LAYER], cache.layout)
        spans = torch.stack(kv, 1).unflatten(3, (-1, self.shape.block_size))
        num_each, num_before = spans.shape[3], sum(map(len, before))
        self._pieces[ids] = num_before + num_each * torch.arange(len(ids), device=ids.device)
        return [spans.movedim(3, 1).flatten(0, 1)]

    def _table(self, seq_len: int) -> Tensor:
        """A row's entries: whole units of the codec, then native blocks, then a part of one."""
        patterns = _PATTERNS[self.shape.codec]
        span_blocks = self.cache.layout.span_blocks
        unit = sum(span_blocks[codec] for codec in patterns[0])
        num_blocks, num_last = divmod(seq_len, self.shape.block_size)
        num_units, num_rest = divmod(num_blocks, unit)
        rest = [_I8] if num_rest >= 2 and len(patterns) > 1 else []
        rest += [_N] * (num_rest - 2 * len(rest))
        parts = [self._units(patterns, num_units), self._units([tuple(rest)], 1)]
        if num_last:
            tail = self._tails[_NUM_TAILS * (num_last - 1) + self._pick(_NUM_TAILS, 1)]
            parts.append(tail)
        return torch.cat(parts)

    def _units(self, patterns: list[tuple[Codec, ...]], num_units: int) -> Tensor:
        """Entries of units, each of a random pattern with random blocks: int32, one dimension."""
        device, span_blocks = self._generator.device, self.cache.layout.span_blocks
        # by pattern and place in the unit: codec and index of the span as an entry without a
        # block, the codec, and the place where the span begins
        rows: list[list[tuple[int, int, int]]] = []
        for pattern in patterns:
            places: list[tuple[int, int, int]] = []
            for codec in pattern:
                begin = len(places)
                for idx in range(span_blocks[codec]):
                    places.append((pack_entry(0, codec, idx), int(codec), begin))
            rows.append(places)
        known = torch.tensor(rows, dtype=torch.int32, device=device).view(len(patterns), -1, 3)
        fields, codec, begin = known[self._pick(len(patterns), num_units)].unbind(-1)
        picked = self._pick(_NUM_BODY, *begin.shape).gather(1, begin.long())
        return (fields + self._body[codec.long(), picked]).flatten()


def attention(inputs: DecodeInputs, k: Tensor, v: Tensor) -> Tensor:
    """In float64, over keys and values of keys_and_values: [rows, num_heads, head_dim]."""
    q = inputs.q.double().unflatten(1, (k.shape[1], -1))
    scores = q @ k.mT * inputs.case.head_dim**-0.5
    return (scores.softmax(-1) @ v).flatten(1, 2)


def errors(out: Tensor, expected: Tensor) -> Tensor:
    """[2]: the largest error over what is allowed (1e-3 and a unit in the last place), and the mean
    squared error over the mean square; NaN if there is one."""
    difference = out.double() - expected
    allowed = 1e-3 + torch.finfo(out.dtype).eps * expected.abs()
    nmse = difference.square().mean() / expected.square().mean()
    return torch.stack(((difference.abs() / allowed).max(), nmse))


def is_good(found: Tensor) -> bool:
    """Whether these errors are within the bounds; False for NaN."""
    worst, nmse = found.tolist()
    return worst < 1 and nmse <= MAX_NMSE and not math.isnan(worst + nmse)
