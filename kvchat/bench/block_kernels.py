"""Times of the kernels around attention and products, at the 8B shape: what writes, gathers, copies
and compresses blocks, and what stands between the products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kvchat.attention.cuda_ops import BlockOps, RowOps
from kvchat.attention.kernels import load_kernel
from kvchat.bench.kernel_cases import BLOCK_SIZE, DTYPE, HEAD_DIM, DecodeShape, make_tensors
from kvchat.bench.kernel_timer import KernelTime, Timer
from kvchat.config import KVSpec
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec

_NUM_LAYERS, _NUM_HEADS, _NUM_KV_HEADS = 32, 32, 8
_HIDDEN, _FFN = 4096, 14336
_NUM_TOKENS = (8, 2048)  # of a step that decodes, and of a chunk
_GATHERED = 4096  # tokens of a sequence
_NUM_COPIED = (1, 16)  # blocks
_NUM_SPANS = 4
_KINDS = ((Codec.NATIVE, Codec.INT8), (Codec.NATIVE, Codec.INT4), (Codec.INT8, Codec.INT4))


def _time_gather(timer: Timer) -> Iterator[KernelTime]:
    """One layer of one sequence to contiguous K and V."""
    for codecs in ((Codec.NATIVE,), (Codec.INT8,), (Codec.INT4,)):
        shape = DecodeShape(1, _GATHERED, _NUM_HEADS, _NUM_KV_HEADS, codecs)
        tensors = make_tensors(shape)
        cache, table, others = tensors.cache, tensors.tables[0], {}
        sizes = (2, _NUM_KV_HEADS, _GATHERED, HEAD_DIM)
        out = torch.empty(sizes, dtype=cache.blocks.dtype, device="cuda")
        if codecs == (Codec.NATIVE,):
            ids = table.long()
            others["torch"] = timer.us(
                lambda: cache.blocks[ids, 0].permute(1, 2, 0, 3, 4).contiguous()  # noqa: B023
            )
        us = timer.us(partial(BlockOps(cache, load_kernel).gather, 0, out, table))
        label = f"{_GATHERED} tokens {codecs[0].label}"
        yield KernelTime("gather_blocks", label, us, tensors.num_bytes + out.nbytes, others)


def _time_write(timer: Timer) -> Iterator[KernelTime]:
    """RoPE of q and k of one layer, K and V to their slots; into a pool that may be compressed."""
    cache = _make_cache(_NUM_TOKENS[-1] // BLOCK_SIZE, 1)
    ops, dtype = BlockOps(cache, load_kernel), cache.blocks.dtype
    angles = torch.rand(2, _NUM_TOKENS[-1], HEAD_DIM // 2, device="cuda")
    for num_tokens in _NUM_TOKENS:
        heads = _NUM_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS
        fused = torch.randn(num_tokens, sum(heads), HEAD_DIM, device="cuda").to(dtype)
        qkv = fused.split(heads, 1)
        out = (
            torch.empty(qkv[0].shape, dtype=dtype, device="cuda"),
            torch.empty(qkv[0].shape, dtype=torch.float16, device="cuda"),
        )
        positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
        slots = positions + BLOCK_SIZE
        us = timer.us(partial(ops.write, 0, out, qkv, (angles[0], angles[1]), positions, slots))
        num_bytes = fused.nbytes * 2 + out[1].nbytes
        yield KernelTime("rope_write_kv", f"{num_tokens} tokens", us, num_bytes)


def _time_copy(timer: Timer) -> Iterator[KernelTime]:
    """Whole blocks, all layers."""
    cache = _make_cache(2 * max(_NUM_COPIED), _NUM_LAYERS)
    ops, blocks = BlockOps(cache, load_kernel), cache.payload
    for num_blocks in _NUM_COPIED:
        ids = 1 + torch.arange(2 * num_blocks, device="cuda").view(2, num_blocks)
        us = timer.us(partial(ops.copy, ids.T.int().contiguous()))
        others = {"torch": timer.us(lambda: blocks.index_copy_(0, ids[1], blocks[ids[0]]))}  # noqa: B023
        num_bytes = 2 * num_blocks * cache.layout.bytes_per_block
        yield KernelTime("copy_blocks", f"{num_blocks} of all layers", us, num_bytes, others)


def _time_compress(timer: Timer) -> Iterator[KernelTime]:
    """Spans of all layers."""
    for src, dst in _KINDS:
        cache = _make_cache(5 * _NUM_SPANS, _NUM_LAYERS)
        layout, ops = cache.layout, BlockOps(cache, load_kernel)
        num_sources = layout.span_blocks[dst] // layout.span_blocks[src]
        ids = 1 + torch.arange(_NUM_SPANS * (1 + num_sources), dtype=torch.int32, device="cuda")
        jobs = ids.view(_NUM_SPANS, -1)
        if src == Codec.INT8:  # its sources are to be such blocks
            cache.side.view(torch.float16).fill_(0.01)
        us = timer.us(partial(ops.compress, src, dst, jobs))
        num_bytes = num_sources * layout.bytes_used(src) + layout.bytes_used(dst)
        label = f"{src.label} to {dst.label}, {_NUM_SPANS} spans of all layers"
        yield KernelTime("compress_blocks", label, us, _NUM_SPANS * num_bytes)


def _time_rows(timer: Timer) -> Iterator[KernelTime]:
    """What stands between the products."""
    ops, kind = RowOps(DTYPE, load_kernel), {"device": "cuda", "dtype": getattr(torch, DTYPE)}
    weight = torch.ones(_HIDDEN, **kind)
    for num_tokens in _NUM_TOKENS:
        x, residual = torch.randn(2, num_tokens, _HIDDEN, **kind)
        out, label = torch.empty_like(x), f"{num_tokens} x {_HIDDEN}"
        others = {"torch": timer.us(partial(F.rms_norm, x, (_HIDDEN,), weight, 1e-5))}
        us = timer.us(partial(ops.rms_norm, out, None, x, weight, 1e-5))
        yield KernelTime("rms_norm", label, us, 2 * x.nbytes, others)
        us = timer.us(partial(ops.rms_norm, out, residual, x, weight, 1e-5))
        yield KernelTime("rms_norm + residual", label, us, 4 * x.nbytes)
        gate_up = torch.randn(num_tokens, 2 * _FFN, **kind)
        out = torch.empty(num_tokens, _FFN, **kind)
        gate, up = gate_up.split(_FFN, 1)
        others = {"torch": timer.us(lambda: F.silu(gate) * up)}  # noqa: B023
        us = timer.us(partial(ops.silu_mul, out, gate_up))
        label = f"{num_tokens} x {_FFN}"
        yield KernelTime("silu_mul", label, us, gate_up.nbytes + out.nbytes, others)


def _make_cache(num_blocks: int, num_layers: int) -> KVCache:
    """Random numbers, blocks that may become INT4."""
    spec = KVSpec(num_layers, _NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, DTYPE)
    cache = KVCache(spec, 1 + num_blocks, "cuda", Codec.INT4)
    cache.blocks.normal_()
    return cache


# By what is shown while it is measured.
BLOCK_PARTS: dict[str, Callable[[Timer], Iterator[KernelTime]]] = {
    "writing": _time_write,
    "gathering": _time_gather,
    "copying": _time_copy,
    "compressing": _time_compress,
    "norms": _time_rows,
}
