"""What the kernels cost on this GPU, beside others': attention, products, draws, and (by
bench/block_kernels) the rest.

Each time is the median of launches between two events, the caches filled with other data before
each, as a model's weights fill them: what counts is the memory's speed, so that is measured too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvchat.attention.kernels import check_cuda, load_kernel
from kvchat.attention.paged_decode import PagedDecode
from kvchat.attention.skinny_gemm import SkinnyGemm
from kvchat.attention.top_k import NUM_DRAW_FIELDS, TOP, TopK
from kvchat.bench.block_kernels import BLOCK_PARTS
from kvchat.bench.kernel_cases import (
    BLOCK_SIZE,
    HEAD_DIM,
    DecodeShape,
    DecodeTensors,
    make_tensors,
)
from kvchat.bench.kernel_timer import KernelTime, Timer
from kvchat.kv.layout import Codec

if TYPE_CHECKING:
    from torch import Tensor

_NATIVE, _INT8, _INT4 = (Codec.NATIVE,), (Codec.INT8,), (Codec.INT4,)
DECODE_SHAPES = (
    DecodeShape(1, 4096, 32, 8),
    DecodeShape(1, 32768, 32, 8),
    DecodeShape(8, 4096, 32, 8),
    DecodeShape(8, 32768, 32, 8),
    DecodeShape(64, 16384, 32, 8),
    DecodeShape(1, 4096, 32, 32),
    DecodeShape(8, 4096, 32, 32),
    DecodeShape(8, 32768, 32, 8, _INT8),
    DecodeShape(8, 32768, 32, 8, _INT4),
    DecodeShape(8, 32768, 32, 8, (*_NATIVE, *_INT8, *_INT4)),
)
# The 8B shape's: (rows of W, inner dimension).
PRODUCTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate+up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
PRODUCT_ROWS = (1, 8, 16)
VOCAB_SIZE, LOGITS_ROWS = 128256, (1, 8, 64)
_DRAW_RULES = (0.8, 40, 0.95, 0.05, 0.5)  # temperature, top_k, top_p, min_p, uniform
_READ_BYTES = 1 << 30
_READ_GRIDS = (1056, 2112, 8192, 33792)


@dataclass(frozen=True)
class KernelReport:
    """read_tb_per_s: of a kernel that only reads; empty_us: of a launch that does nothing."""

    device: str
    read_tb_per_s: float
    empty_us: float
    times: list[KernelTime]


def run_kernel_bench(progress: Callable[[str, int, int], None]) -> KernelReport:
    """All shapes that fit the device's memory. Raises UsageError where there is no GPU to use."""
    check_cuda()
    timer = Timer()
    read_tb_per_s, empty_us = _measure_reads(timer)
    times: list[KernelTime] = []
    parts: list[tuple[str, Callable[[Timer], Iterable[KernelTime]]]] = [
        *((shape.label, partial(_time_decode, shape)) for shape in DECODE_SHAPES),
        *((name, partial(_time_products, name)) for name in PRODUCTS),
        *((f"{num} rows of logits", partial(_time_draws, num)) for num in LOGITS_ROWS),
        *BLOCK_PARTS.items(),
    ]
    for done, (name, measure) in enumerate(parts):
        progress(name, done, len(parts))
        times += measure(timer)
        torch.cuda.empty_cache()
    progress("", len(parts), len(parts))
    device = torch.cuda.get_device_name()
    return KernelReport(device, read_tb_per_s, empty_us, times)


def format_kernels(report: KernelReport) -> str:
    """A markdown table."""
    lines = [
        f"{report.device}: reads {report.read_tb_per_s:.2f} TB/s; an empty launch takes"
        f" {report.empty_us:.1f} µs, which is in every time.",
        "",
        "| kernel | shape | µs | MB | TB/s | of reads | beside |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for time in report.times:
        share = time.tb_per_s / report.read_tb_per_s
        beside = ", ".join(f"{name} {us:.1f}" for name, us in time.others.items()) or "-"
        lines.append(
            f"| {time.kernel} | {time.shape} | {time.us:.1f} | {time.num_bytes / 1e6:.1f}"
            f" | {time.tb_per_s:.2f} | {share:.0%} | {beside} |"
        )
    return "\n".join(lines)


def _measure_reads(timer: Timer) -> tuple[float, float]:
    """TB/s of the best of some grids over 1 GiB; microseconds of an empty launch."""
    kernel = load_kernel("read_all.cu", "read_all_kernel", {"SCALAR_BF16": 0})
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    data = torch.randint(0, 255, (_READ_BYTES,), dtype=torch.uint8, device="cuda")
    times = [
        timer.us(partial(kernel.launch, (grid,), (256,), [out, data, _READ_BYTES // 16]))
        for grid in _READ_GRIDS
    ]
    empty_us = timer.us(lambda: kernel.launch((1,), (32,), [out, data, 0]))
    return _READ_BYTES / min(times) / 1e6, empty_us


def _time_decode(shape: DecodeShape, timer: Timer) -> list[KernelTime]:
    tensors = make_tensors(shape)
    decode = PagedDecode(shape.layout, shape.num_heads, shape.num_rows, shape.num_tokens, "cuda")
    plan, out = decode.make_plan(), torch.empty_like(tensors.q)
    decode.plan(plan, tensors.tables, tensors.seq_lens)

    def attend() -> None:
        decode.attend(out, tensors.q, tensors.q_rotated, tensors.cache, plan, 0, HEAD_DIM**-0.5)

    us = timer.us(attend)
    others = dict(_time_others(timer, shape, tensors)) if shape.codecs == _NATIVE else {}
    return [KernelTime("paged_decode", shape.label, us, tensors.num_bytes, others)]


def _time_others(
    timer: Timer, shape: DecodeShape, tensors: DecodeTensors
) -> Iterator[tuple[str, float]]:
    """torch's attention over K and V gathered before; FlashInfer's paged one where installed."""
    if importlib.util.find_spec("flashinfer"):
        yield "FlashInfer", timer.us(_flashinfer(shape, tensors))
    rows = tensors.cache.blocks[tensors.tables.long(), 0]  # [rows, blocks, 2, Hk, T, D]
    k, v = rows.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).contiguous()
    q = tensors.q[:, :, None]  # [rows, heads, 1, D]
    yield (
        "torch over gathered K, V",
        timer.us(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
    )


def _flashinfer(shape: DecodeShape, tensors: DecodeTensors) -> Callable[[], Tensor]:
    """FlashInfer's decode over the same blocks as pages."""
    import flashinfer

    pages_each = shape.num_tokens // BLOCK_SIZE
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=shape.num_heads > shape.num_kv_heads
    )
    starts = torch.arange(shape.num_rows + 1, dtype=torch.int32, device="cuda") * pages_each
    last = torch.full((shape.num_rows,), BLOCK_SIZE, dtype=torch.int32, device="cuda")
    wrapper.plan(
        starts, tensors.tables.flatten(), last, shape.num_heads, shape.num_kv_heads, HEAD_DIM,
        BLOCK_SIZE, q_data_type=tensors.q.dtype, kv_data_type=tensors.q.dtype,
    )  # fmt: skip
    pages = tensors.cache.blocks[:, 0]  # [blocks, 2, Hk, T, D]
    return lambda: wrapper.run(tensors.q, pages)


def _time_products(name: str, timer: Timer) -> Iterator[KernelTime]:
    """One layer's product for some numbers of rows, bf16 and int8 weights, and the library's."""
    num_out, dim = PRODUCTS[name]
    w = torch.randn(num_out, dim, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, w.shape, dtype=torch.int8, device="cuda")
    scales = torch.full((num_out,), 0.01, device="cuda")
    skinny_gemm = SkinnyGemm("bfloat16", load_kernel)
    for num_rows in PRODUCT_ROWS:
        x = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(num_rows, num_out, device="cuda", dtype=torch.bfloat16)
        label = f"{name} [{num_out}, {dim}] x {num_rows}"
        others = {"cuBLAS": timer.us(partial(torch.mm, x, w.T, out=y))}
        us = timer.us(partial(skinny_gemm, y, x, w))
        yield KernelTime("skinny_gemm", label, us, w.nbytes, others)
        us = timer.us(partial(skinny_gemm, y, x, codes, scales))
        yield KernelTime("skinny_gemm int8", label, us, codes.nbytes)


def _time_draws(num_rows: int, timer: Timer) -> Iterator[KernelTime]:
    """A token a row from logits: by sampling rules, and the largest; torch's halves of the work."""
    label = f"{num_rows} x {VOCAB_SIZE}"
    kernels = TopK(VOCAB_SIZE, "bfloat16", num_rows, load_kernel)
    logits = 3 * torch.randn(num_rows, VOCAB_SIZE, device="cuda").bfloat16()
    tokens = torch.empty(num_rows, dtype=torch.int64, device="cuda")
    rules = torch.tensor(_DRAW_RULES, dtype=torch.float64, device="cuda")
    params = rules.expand(num_rows, NUM_DRAW_FIELDS).contiguous()
    others = {"torch.topk": timer.us(partial(torch.topk, logits, TOP))}
    us = timer.us(partial(kernels.draw, tokens, logits, params))
    yield KernelTime("top_k and draw", label, us, logits.nbytes, others)
    others = {"torch.argmax": timer.us(partial(torch.argmax, logits, 1))}
    us = timer.us(partial(kernels.largest, tokens, logits))
    yield KernelTime("largest", label, us, logits.nbytes, others)
