"""What the codecs cost in error, bytes and time: synthetic keys and values, no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvchat.bench.key_families import FAMILIES, make_keys, make_queries, make_values
from kvchat.config import KVSpec
from kvchat.kv import codecs
from kvchat.kv.block_pool import BlockOp, CompressSpan, CopyBlock
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import BlockLayout, Codec

HEAD_DIM = 128
VALUE_KINDS = ("gauss", "laplace")
LAYOUT_SHAPES = ((128, 16), (64, 16), (128, 32), (64, 32), (96, 16), (256, 16), (8, 16))
_GROUP = 32  # channels of a token that share a scale in the codecs compared with
_SPEED_SPEC = KVSpec(num_layers=8, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
_NUM_NATIVE = 64  # blocks read in one run: 32 MiB

Codes = Callable[[Tensor], Tensor]  # float32 [heads, tokens, head_dim], through a codec and back


@dataclass(frozen=True)
class ErrorRow:
    """One codec's error on every key family (std of the logit error) and kind of values (relative
    root mean square)."""

    codec: str
    bits: float  # a number with its share of the scales, K and V together
    by_keys: dict[str, float]
    by_values: dict[str, float]


@dataclass(frozen=True)
class SizeRow:
    """Native bytes over bytes, scales counted, of one head_dim and block size in 16 bits."""

    head_dim: int
    block_size: int
    int8_block: float
    int4_block: float
    int8_pool: float  # over all that is reserved in mode auto
    int4_pool: float  # and in auto4


@dataclass(frozen=True)
class SpeedRow:
    """How fast blocks are compressed, against copying the same blocks in the same run."""

    name: str
    mb_per_s: float  # of blocks read, in the fastest run: what noise on the machine cannot raise
    copy_share: float  # of the copy's speed


def measure_errors() -> list[ErrorRow]:
    """Ours, and codecs of llama.cpp's kind computed on the same numbers."""
    layout = BlockLayout(KVSpec(1, 1, HEAD_DIM, 16, "bfloat16"), Codec.INT4)
    rows = [
        _error_row(
            codec.name,
            16 / layout.block_ratio(codec),
            partial(_keys_through, codec, layout),
            partial(_values_through, codec, layout),
        )
        for codec in (Codec.INT8, Codec.INT4)
    ]
    for name, bits, codes in (("q8_0", 8, q8_0), ("q4_0", 4, q4_0), ("q4 abs/7", 4, q4_symmetric)):
        rows.append(_error_row(name, bits + 16 / _GROUP, codes, codes))
    return rows


def logit_error(keys: Tensor, codec: Codes) -> float:
    """Standard deviation of (q . k' - q . k) / sqrt(head_dim) over queries of size 1."""
    queries, difference = make_queries(), codec(keys) - keys
    errors = queries @ difference.flatten(0, 1).T * keys.shape[-1] ** -0.5
    return float(errors.std())


def relative_error(values: Tensor, codec: Codes) -> float:
    """Root mean square of the error over that of the values."""
    return float((codec(values) - values).norm() / values.norm())


def q8_0(x: Tensor) -> Tensor:
    """llama.cpp's Q8_0 and back: 32 channels share a scale, their peak / 127."""
    return _symmetric(x, 127)


def q4_symmetric(x: Tensor) -> Tensor:
    """The same with 4 bits: the peak / 7, which leaves one code unused."""
    return _symmetric(x, 7)


def q4_0(x: Tensor) -> Tensor:
    """llama.cpp's Q4_0 and back: 32 channels share a scale, their value of largest magnitude with
    its sign / -8, so that all 16 codes are used (quantize_row_q4_0_ref)."""
    groups = x.unflatten(-1, (-1, _GROUP))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    codes = (groups / scale + 8.5).floor().clamp(0, 15) - 8
    return _scaled(codes, scale)


def measure_sizes() -> list[SizeRow]:
    """Counted on a pool's tensors."""
    rows = []
    for head_dim, block_size in LAYOUT_SHAPES:
        spec = KVSpec(1, 1, head_dim, block_size, "bfloat16")
        row = []
        for codec in (Codec.INT8, Codec.INT4):
            cache = KVCache(spec, 4, lowest=codec)
            native = cache.layout.span_blocks[codec] * cache.block_bytes(Codec.NATIVE)
            row += [native / cache.block_bytes(codec), native * 4 / cache.num_bytes]
        rows.append(SizeRow(head_dim, block_size, row[0], row[2], row[1], row[3]))
    return rows


def measure_speed(num_repeats: int = 5) -> list[SpeedRow]:
    """Through KVCache.apply, as in a run, and codecs.decode."""
    runs = _speed_runs()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(num_repeats):
        for row, (_, _, run) in zip(times, runs, strict=True):
            started = time.perf_counter()
            run()
            row.append(time.perf_counter() - started)
    speeds = [
        num_blocks * _SPEED_SPEC.bytes_per_block / min(row) / 1e6
        for row, (_, num_blocks, _) in zip(times, runs, strict=True)
    ]
    return [
        SpeedRow(name, speed, speed / speeds[0])
        for (name, _, _), speed in zip(runs, speeds, strict=True)
    ]


def format_errors(rows: list[ErrorRow]) -> str:
    """A markdown table."""
    names = [*(f"K {name}" for name in rows[0].by_keys), *(f"V {n}" for n in rows[0].by_values)]
    lines = [f"| codec | bits | {' | '.join(names)} |", "|---|" + "---:|" * (len(names) + 1)]
    for row in rows:
        errors = [*row.by_keys.values(), *row.by_values.values()]
        shown = " | ".join(f"{error:.4f}" for error in errors)
        lines.append(f"| {row.codec} | {row.bits:.2f} | {shown} |")
    return "\n".join(lines)


def format_sizes(rows: list[SizeRow]) -> str:
    """A markdown table."""
    lines = [
        "| head_dim | block | INT8 block | INT4 block | auto pool | auto4 pool |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = (row.int8_block, row.int4_block, row.int8_pool, row.int4_pool)
        shown = " | ".join(f"{ratio:.3f}x" for ratio in ratios)
        lines.append(f"| {row.head_dim} | {row.block_size} | {shown} |")
    return "\n".join(lines)


def format_speed(rows: list[SpeedRow]) -> str:
    """A markdown table."""
    lines = ["| blocks | MB/s read | of a copy |", "|---|---:|---:|"]
    lines += [f"| {row.name} | {row.mb_per_s:,.0f} | {row.copy_share:.1%} |" for row in rows]
    return "\n".join(lines)


def format_report(
    errors: list[ErrorRow], sizes: list[SizeRow], speeds: list[SpeedRow], num_threads: int
) -> str:
    """Three tables with what stands in them."""
    return f"""\
Error, head_dim {HEAD_DIM}: std of the logit error by family of keys, relative RMS of values

{format_errors(errors)}

Native bytes over stored bytes, 16 bits, scales counted: of a block, and of a pool full of them

{format_sizes(sizes)}

Speed, {num_threads} threads

{format_speed(speeds)}"""


def run_codec_bench() -> str:
    """All measurements as one text."""
    return format_report(
        measure_errors(), measure_sizes(), measure_speed(), torch.get_num_threads()
    )


def _error_row(name: str, bits: float, on_keys: Codes, on_values: Codes) -> ErrorRow:
    return ErrorRow(
        name,
        bits,
        {family.name: logit_error(make_keys(family), on_keys) for family in FAMILIES},
        {kind: relative_error(make_values(kind), on_values) for kind in VALUE_KINDS},
    )


def _symmetric(x: Tensor, max_code: int) -> Tensor:
    groups = x.unflatten(-1, (-1, _GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / max_code
    return _scaled((groups / scale).round(), scale)


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    values: Tensor = codes * scale.half().float()  # scales are stored in fp16
    return values.flatten(-2)


def _keys_through(codec: Codec, layout: BlockLayout, keys: Tensor) -> Tensor:
    """Keys, float32 [heads, tokens, head_dim], encoded in blocks and decoded."""
    return _through(codec, layout, keys)[0]


def _values_through(codec: Codec, layout: BlockLayout, values: Tensor) -> Tensor:
    """The same as values."""
    return _through(codec, layout, values)[1]


def _through(codec: Codec, layout: BlockLayout, x: Tensor) -> list[Tensor]:
    # [heads, blocks, 1, tokens of a block, head_dim]
    blocks = x.unflatten(1, (-1, layout.span_tokens(codec)))[:, :, None]
    decoded = codecs.decode(codec, *codecs.encode(codec, blocks, blocks, layout), layout)
    return [part.flatten(1, 3) for part in decoded]


def _speed_runs() -> list[tuple[str, int, Callable[[], object]]]:
    """(name, blocks read, what to time), in an order in which each finds its sources written."""
    num_native, num_int8, num_int4 = _NUM_NATIVE, _NUM_NATIVE // 2, _NUM_NATIVE // 4
    cache = KVCache(_SPEED_SPEC, 1 + 3 * num_native, lowest=Codec.INT4)
    torch.manual_seed(1)
    cache.blocks.normal_()
    native = range(1, 1 + num_native)
    copied = range(1 + num_native, 1 + 2 * num_native)
    int8 = range(1 + 2 * num_native, 1 + 2 * num_native + num_int8)
    int4 = range(int8.stop, int8.stop + num_int4)
    copies: list[BlockOp] = [CopyBlock(a, b) for a, b in zip(native, copied, strict=True)]
    return [
        ("copy", num_native, partial(cache.apply, copies)),
        ("native to INT8", num_native, _compressing(cache, native, int8, Codec.NATIVE, Codec.INT8)),
        ("native to INT4", num_native, _compressing(cache, native, int4, Codec.NATIVE, Codec.INT4)),
        ("INT8 to INT4", num_int8, _compressing(cache, int8, int4, Codec.INT8, Codec.INT4)),
        ("decode INT8", num_int8, partial(_decode_each, cache, int8, Codec.INT8)),
        ("decode INT4", num_int4, partial(_decode_each, cache, int4, Codec.INT4)),
    ]


def _compressing(
    cache: KVCache, srcs: range, dsts: range, src_codec: Codec, codec: Codec
) -> Callable[[], None]:
    """A run that compresses the blocks `srcs`, in order, into `dsts`."""
    span = len(srcs) // len(dsts)
    ops: list[BlockOp] = [
        CompressSpan(tuple(srcs[i * span : (i + 1) * span]), src_codec, dst, codec)
        for i, dst in enumerate(dsts)
    ]
    return partial(cache.apply, ops)


def _decode_each(cache: KVCache, block_ids: range, codec: Codec) -> None:
    for block_id in block_ids:
        codecs.decode(codec, cache.payload[block_id], cache.side[block_id], cache.layout)
