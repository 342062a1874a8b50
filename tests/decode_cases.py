"""Decode attention over a pool of any codecs: cases with all they need, and what is right for them.

A case's pool is poisoned: what no position of its rows stands in is NaN bytes, payload and side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from emulator import load_emulated
from torch import Tensor

from kvchat.attention.cuda_ops import Load
from kvchat.attention.paged_decode import (
    RECORD_HEADER,
    RECORD_INTS,
    TILE_HEADS,
    PagedDecode,
    decode_defines,
    default_tuning,
    max_splits,
    records_read,
)
from kvchat.config import KVSpec
from kvchat.kv import codecs
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import BlockLayout, Codec, pack_entry, unpack_entry

NUM_LAYERS, LAYER = 2, 1
MIXED = "mixed"


@dataclass(frozen=True)
class DecodeCase:
    """One launch: what is in the rows' blocks and how the model looks."""

    head_dim: int = 128
    num_kv_heads: int = 2
    group: int = 4
    block_size: int = 16
    dtype: str = "float16"
    codec: str = "native"  # native, int8, int4 or mixed: of every span that fits
    lens: tuple[int, ...] = (97,)
    window: int = 0
    seed: int = 0
    magnitude: float = 1.0  # of q, K and V


@dataclass
class DecodeInputs:
    """The tensors of a case, on `device`."""

    case: DecodeCase
    cache: KVCache
    tables: Tensor  # int32 [rows, entries]
    seq_lens: Tensor  # int32 [rows]
    q: Tensor  # [rows, num_heads, head_dim]
    q_rotated: Tensor  # float16, of the same shape
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # by row: K, V

    @property
    def scale(self) -> float:
        """Of the scores, times log2(e)."""
        return self.case.head_dim**-0.5 * math.log2(math.e)


def lowest_codec(case: DecodeCase) -> Codec:
    """The lowest codec that the case's tables name."""
    return {"native": Codec.NATIVE, "int8": Codec.INT8}.get(case.codec, Codec.INT4)


def make_inputs(case: DecodeCase, device: str = "cpu") -> DecodeInputs:
    """Rows of random K and V in shuffled blocks, encoded as the case says."""
    generator = torch.Generator().manual_seed(case.seed)
    spec = KVSpec(
        num_layers=NUM_LAYERS,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        dtype=case.dtype,
    )
    spans = [_spans(case, seq_len, generator) for seq_len in case.lens]
    num_blocks = sum(map(len, spans)) + 3
    cache = KVCache(spec, num_blocks, lowest=lowest_codec(case))
    cache.payload.fill_(255)
    cache.side.fill_(255)
    ids = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    num_entries = max(-(-seq_len // case.block_size) for seq_len in case.lens) + 2
    tables = torch.zeros(len(case.lens), num_entries, dtype=torch.int32)
    inputs = DecodeInputs(case, cache, tables, torch.tensor(case.lens, dtype=torch.int32),
                          *_queries(case, generator))  # fmt: skip
    for row, row_spans in enumerate(spans):
        entries = []
        for codec, num_tokens in row_spans:
            block_id = ids.pop()
            _fill(cache, block_id, codec, num_tokens, generator, case.magnitude)
            steps = cache.layout.span_blocks[codec]
            entries += [pack_entry(block_id, codec, idx) for idx in range(steps)]
        tables[row, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
        inputs.values.append(_decoded(inputs, row))
    if device != "cpu":
        _move(inputs, device)
    return inputs


def run_emulated(
    inputs: DecodeInputs,
    grid: int = 3,
    target_splits: int = 4,
    lowest: Codec = Codec.INT4,
    warps: int | None = None,
    teams: int | None = 1,
    **defines: int,
) -> Tensor:
    """Plan and launch on the emulator; scratch and output begin as NaN, counters must end as 0.

    lowest: what the kernel is built for; the same for most tests, so that fewer are compiled.
    warps: None for those of default_tuning. teams: one, since the emulator takes a barrier of one
    team for a barrier of both.
    """
    return run_kernel(load_emulated, inputs, grid, target_splits, lowest, warps, teams, **defines)


def run_kernel(
    load: Load,
    inputs: DecodeInputs,
    grid: int = 3,
    target_splits: int = 4,
    lowest: Codec = Codec.INT4,
    warps: int | None = None,
    teams: int | None = None,
    **defines: int,
) -> Tensor:
    """run_emulated where `load` says: one of machines.MACHINES."""
    case, cache = inputs.case, inputs.cache
    layout = BlockLayout(cache.spec, lowest)
    tuning = replace(default_tuning(layout), target_splits=target_splits)
    tuning = replace(tuning, warps=warps or tuning.warps, teams=teams or tuning.teams)
    rows = inputs.seq_lens.shape[0]
    tiles = case.num_kv_heads * -(-case.group // TILE_HEADS)
    num_records = rows * max_splits(max(case.lens), tuning) + records_read(grid, tiles, tuning)
    plan = torch.full((RECORD_HEADER + num_records * RECORD_INTS,), -1, dtype=torch.int32)
    args = [plan, inputs.tables, inputs.tables.stride(0), inputs.seq_lens, case.block_size]
    load("plan_decode.cu", "plan_decode_kernel", {"SCALAR_BF16": 0}).launch(
        (rows,), (32,), [*args, case.window, target_splits, tuning.min_split]
    )
    slots = (int(plan[0]) * tiles, min(case.group, TILE_HEADS))
    out = torch.full_like(inputs.q, torch.nan)
    sums = torch.full((*slots, case.head_dim), torch.nan)
    stats = torch.full((*slots, 2), torch.nan)
    counters = torch.zeros(rows, tiles, dtype=torch.int32)
    constants = {**decode_defines(layout, tuning), **defines}
    shared = constants["SHARED_BYTES"]
    load("paged_decode.cu", "paged_decode_kernel", constants, shared).launch(
        (grid,), (32 * tuning.warps * tuning.teams,),
        [
            out, sums, stats, counters, inputs.q, inputs.q_rotated, cache.payload,
            cache.side if cache.side.numel() else None, plan,
            inputs.scale, LAYER, NUM_LAYERS, case.num_kv_heads, case.group, case.block_size,
            cache.layout.side_bytes,
        ],
        shared,
    )  # fmt: skip
    assert not counters.any()
    return out


def reference(inputs: DecodeInputs, rows: list[int] | None = None) -> Tensor:
    """Softmax attention in float64 over the decoded values: [rows, num_heads, head_dim]."""
    case = inputs.case
    out = []
    for row in range(len(case.lens)) if rows is None else rows:
        seq_len, (k, v) = case.lens[row], inputs.values[row]
        oldest = max(0, seq_len - case.window) if case.window else 0
        q = inputs.q[row].cpu().double().unflatten(0, (case.num_kv_heads, case.group))
        scores = q @ k[:, oldest:seq_len].mT * case.head_dim**-0.5
        out.append((scores.softmax(-1) @ v[:, oldest:seq_len]).flatten(0, 1))
    return torch.stack(out)


def excess(out: Tensor, expected: Tensor) -> float:
    """The largest error over what is allowed: 1e-3 and a unit in the last place of 16-bit output.
    NaN if there is one."""
    eps = torch.finfo(out.dtype).eps
    allowed = 1e-3 + eps * expected.abs()
    return float(((out.cpu().double() - expected).abs() / allowed).max())


def _spans(case: DecodeCase, seq_len: int, generator: torch.Generator) -> list[tuple[Codec, int]]:
    """Codec and tokens of each block of a row, in order; a compressed one is full and aligned."""
    sizes = {
        codec: case.block_size * 16 // bits
        for codec, bits in ((Codec.NATIVE, 16), (Codec.INT8, 8), (Codec.INT4, 4))
    }
    wanted = {
        "native": [Codec.NATIVE],
        "int8": [Codec.INT8],
        "int4": [Codec.INT4],
        MIXED: list(sizes),
    }[case.codec]
    spans, start = [], 0
    while start < seq_len:
        fitting = [
            codec
            for codec in wanted
            if start % sizes[codec] == 0 and start + sizes[codec] <= seq_len
        ] or [Codec.NATIVE]
        codec = fitting[int(torch.randint(len(fitting), (), generator=generator))]
        spans.append((codec, min(sizes[codec], seq_len - start)))
        start += sizes[codec]
    return spans


def _fill(
    cache: KVCache,
    block_id: int,
    codec: Codec,
    num_tokens: int,
    generator: torch.Generator,
    magnitude: float,
) -> None:
    """Random K (with offsets by channel) and V in all layers of a block."""
    spec = cache.spec
    shape = (spec.num_layers, spec.num_kv_heads, num_tokens, spec.head_dim)
    offsets = torch.randn(spec.num_layers, spec.num_kv_heads, 1, spec.head_dim, generator=generator)
    k = (torch.randn(shape, generator=generator) + offsets) * magnitude
    v = (
        magnitude
        * torch.randn(shape, generator=generator)
        * 0.1 ** torch.randint(3, (*shape[:-1], 1), generator=generator)
    )
    if codec == Codec.NATIVE:
        cache.blocks[block_id, :, 0, :, :num_tokens] = k.to(cache.blocks.dtype)
        cache.blocks[block_id, :, 1, :, :num_tokens] = v.to(cache.blocks.dtype)
        return
    payload, side = codecs.encode(codec, k, v, cache.layout)
    cache.payload[block_id] = payload
    used = cache.layout.side_used(codec)
    cache.side[block_id, ..., :used] = side[..., :used]


def _decoded(inputs: DecodeInputs, row: int) -> tuple[Tensor, Tensor]:
    """K and V of a row's layer LAYER as stored: float64 [num_kv_heads, tokens, head_dim]."""
    cache, entries = inputs.cache, inputs.tables[row].tolist()
    parts, idx = [], 0
    while idx * cache.spec.block_size < inputs.case.lens[row]:
        block_id, codec, _ = unpack_entry(entries[idx])
        payload, side = cache.payload[block_id, LAYER], cache.side[block_id, LAYER]
        parts.append(codecs.decode(codec, payload, side, cache.layout))
        idx += cache.layout.span_blocks[codec]
    k, v = (torch.cat(kind, -2).double() for kind in zip(*parts, strict=True)) if parts else (
        torch.zeros(cache.spec.num_kv_heads, 0, cache.spec.head_dim).double(),
    ) * 2  # fmt: skip
    return k, v


def _queries(case: DecodeCase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (len(case.lens), case.num_kv_heads * case.group, case.head_dim)
    q = torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))
    return q, codecs.rotate(q.float()).half()


def _move(inputs: DecodeInputs, device: str) -> None:
    inputs.cache.blocks = inputs.cache.blocks.to(device)
    inputs.cache.payload = inputs.cache.blocks.view(torch.uint8).flatten(-2)
    inputs.cache.side = inputs.cache.side.to(device)
    for name in ("tables", "seq_lens", "q", "q_rotated"):
        setattr(inputs, name, getattr(inputs, name).to(device))


def run_on_gpu(inputs: DecodeInputs, target_splits: int = 16) -> Tensor:
    """The same on the GPU, inputs there; twice, the second time with what the first left behind."""
    case, layout = inputs.case, inputs.cache.layout
    decode = PagedDecode(
        layout, case.num_kv_heads * case.group, len(case.lens), max(case.lens), "cuda",
        replace(default_tuning(layout), target_splits=target_splits),
    )  # fmt: skip
    plan = decode.make_plan()
    decode.plan(plan, inputs.tables, inputs.seq_lens, case.window)
    outs = [torch.full_like(inputs.q, torch.nan) for _ in range(2)]
    for out in outs:
        decode.attend(
            out, inputs.q, inputs.q_rotated, inputs.cache, plan, LAYER, case.head_dim**-0.5
        )
    assert torch.equal(*outs), case
    return outs[0]
