"""The kernels around attention against torch and kv/codecs, on the emulator and on GPUs.

Outputs and unused slots are NaN before, and the pool's bytes outside written slots must not change.
"""

import pytest
import torch
import torch.nn.functional as F
from machines import MACHINES

from kvchat.attention.cuda_ops import BlockOps, RowOps
from kvchat.attention.rope import RopeTable, apply_rope
from kvchat.config import KVSpec
from kvchat.errors import UsageError
from kvchat.kv import codecs
from kvchat.kv.block_pool import CompressSpan, CopyBlock
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec, pack_entry, unpack_entry

NUM_BLOCKS = 16
# head_dim, block_size, dtype: the tuned sizes, one whose halves are no vectors, one of three
# rotations; the 260K test model's 8.
SHAPES = [
    (64, 16, "float16"),
    (128, 16, "bfloat16"),
    (96, 32, "bfloat16"),
    (8, 16, "float16"),
    (256, 16, "float16"),
]
NATIVE, INT8, INT4 = Codec


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


class Pool:
    """A cache on the CPU with random values everywhere, a copy of it, and the kernels over it."""

    def __init__(self, load, head_dim, block_size, dtype, lowest=INT4):
        torch.manual_seed(head_dim)
        spec = KVSpec(2, 2, head_dim, block_size, dtype)
        self.cache = KVCache(spec, NUM_BLOCKS, lowest=lowest)
        self.twin = KVCache(spec, NUM_BLOCKS, lowest=lowest)
        blocks = self.cache.blocks
        blocks[1:] = torch.randn(blocks[1:].shape).to(blocks.dtype)
        self.cache.side[1:] = 0xFF  # NaN scales in what is not written
        self.twin.blocks.copy_(blocks)
        self.twin.side.copy_(self.cache.side)
        self.ops = BlockOps(self.cache, load)

    def compress(self, src, dst, srcs, block_id):
        """With the kernel in the cache, by definition in the twin."""
        self.ops.compress(src, dst, ints((block_id, *srcs)))
        self.twin.apply([CompressSpan(srcs=srcs, src_codec=src, dst=block_id, codec=dst)])

    def assert_equal(self):
        assert torch.equal(self.cache.payload, self.twin.payload)
        assert torch.equal(self.cache.side, self.twin.side)


@pytest.fixture(scope="module", params=MACHINES)
def load(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def pool(request, load):
    """One a shape, its blocks compressed both ways: 9, 10 INT8, 11 and 12 INT4."""
    pool = Pool(load, *request.param)
    pool.compress(NATIVE, INT8, (1, 2), 9)
    pool.compress(NATIVE, INT8, (3, 4), 10)
    pool.compress(INT8, INT4, (9, 10), 11)
    pool.compress(NATIVE, INT4, (5, 6, 7, 8), 12)
    return pool


def test_compressed_blocks_are_the_definition_bit_for_bit(pool):
    pool.assert_equal()


def test_gather_decodes_a_mix_of_codecs(pool):
    cache = pool.cache
    spec, layout = cache.spec, cache.layout
    table = [
        pack_entry(1, NATIVE, 0),
        pack_entry(9, INT8, 1),
        *(pack_entry(12, INT4, idx) for idx in (3, 1, 0)),
        pack_entry(11, INT4, 2),
        pack_entry(10, INT8, 0),
        pack_entry(2, NATIVE, 0),
    ]
    for num_tokens in (len(table) * spec.block_size - 3, (len(table) - 1) * spec.block_size + 1):
        shape = (2, spec.num_kv_heads, num_tokens, spec.head_dim)
        out = torch.full(shape, float("nan"), dtype=cache.blocks.dtype)

        pool.ops.gather(1, out, ints(*table))

        pieces = []
        for entry in table:
            block_id, codec, span_idx = unpack_entry(entry)
            values = codecs.decode(
                codec, cache.payload[block_id, 1], cache.side[block_id, 1], layout
            )
            start = span_idx * spec.block_size
            pieces.append(torch.stack(values)[:, :, start : start + spec.block_size])
        assert torch.equal(out, torch.cat(pieces, 2)[:, :, :num_tokens].to(out.dtype))
    pool.assert_equal()


def write_batch(pool, num_heads, slots):
    """Write a token to each slot in layer 1; (q, k, v, what went out, cos, sin by token)."""
    spec = pool.cache.spec
    dtype, num_tokens = pool.cache.blocks.dtype, len(slots)
    fused = torch.randn(num_tokens, num_heads + 2 * spec.num_kv_heads, spec.head_dim).to(dtype)
    qkv = fused.split((num_heads, spec.num_kv_heads, spec.num_kv_heads), 1)  # strided views
    angles = torch.randn(2, 40, spec.head_dim // 2)
    rope = RopeTable(angles[0].cos(), angles[0].sin())
    positions = torch.randint(0, 40, (num_tokens,))
    out = torch.full(qkv[0].shape, float("nan"), dtype=dtype)
    rotated = torch.full(qkv[0].shape, float("nan"), dtype=torch.float16)
    pool.ops.write(1, (out, rotated), qkv, (rope.cos, rope.sin), positions.int(), ints(*slots))
    return qkv, out, rotated, rope.cos[positions], rope.sin[positions]


def test_write_rotates_q_and_k_and_fills_just_the_slots(pool):
    spec = pool.cache.spec
    size = spec.block_size
    slots = [13 * size + 3, 14 * size + size - 1, -1, 15 * size, 5]  # 5: in the null block

    (q, k, v), out, rotated, cos, sin = write_batch(pool, 5, slots)

    wide_q = apply_rope(q.float(), cos, sin)
    assert torch.equal(out, wide_q.to(out.dtype))
    assert torch.equal(rotated, codecs.rotate(wide_q).half())
    rope_k = apply_rope(k, cos, sin)
    for idx, slot in enumerate(slots):
        if slot >= size:
            pool.twin.blocks[slot // size, 1, 0, :, slot % size] = rope_k[idx]
            pool.twin.blocks[slot // size, 1, 1, :, slot % size] = v[idx]
    pool.assert_equal()


def test_native_pools_need_no_side_array_and_no_rotation(load):
    pool = Pool(load, 64, 16, "float16", lowest=NATIVE)
    q, k = torch.randn(3, 4, 64).half(), torch.randn(3, 2, 64).half()
    out = torch.full_like(q, float("nan"))
    cos = torch.ones(1, 32)
    angles, positions = (cos, torch.zeros(1, 32)), torch.zeros(3, dtype=torch.int32)

    pool.ops.write(0, (out, None), (q, k, k), angles, positions, ints(16, 18, 40))
    gathered = torch.full((2, 2, 20, 64), float("nan")).half()
    pool.ops.gather(0, gathered, ints(1, 2))
    pool.ops.copy(ints((1, 5), (2, 6)))

    for slot, row in zip((16, 18, 40), k, strict=True):
        pool.twin.blocks[slot // 16, 0, :, :, slot % 16] = row
    pool.twin.apply([CopyBlock(1, 5), CopyBlock(2, 6)])
    pool.assert_equal()
    assert torch.equal(out, q)
    assert torch.equal(
        gathered, pool.twin.layer(0)[1:3].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :20]
    )


def test_copy_moves_payload_and_side(pool):
    pool.ops.copy(ints((9, 13), (12, 14)))
    pool.twin.apply([CopyBlock(9, 13), CopyBlock(12, 14)])

    pool.assert_equal()


def test_what_fp16_cannot_scale_becomes_nan_and_nothing_else_does(load):
    pool = Pool(load, 64, 16, "bfloat16")
    blocks = pool.cache.blocks
    blocks[1, 0, 0, 0, 3, 7] = float("nan")
    blocks[1, 0, 1, 0, 4, 9] = float("inf")
    blocks[2, 1, 0, 1, 5] = 1e30
    blocks[2, 1, 1, 1, 6] = -1e6
    blocks[3, 0, :, 0, :, 5] = 300.0  # a constant offset: coarse zeros
    blocks[3, 0, 0, 0, :, 6] = 2047.0 + torch.arange(16).bfloat16() / 100
    blocks[4, 0] = 0.0
    blocks[4, 1] = 1e-9
    pool.twin.blocks.copy_(blocks)

    pool.compress(NATIVE, INT8, (1, 2), 9)
    pool.compress(NATIVE, INT8, (3, 4), 10)
    pool.compress(NATIVE, INT4, (4, 3, 2, 1), 11)
    pool.compress(INT8, INT4, (10, 9), 12)

    pool.assert_equal()


def test_several_spans_of_one_launch(load):
    pool = Pool(load, 64, 32, "float16")

    pool.ops.compress(NATIVE, INT8, ints((9, 1, 2), (10, 5, 4)))
    pool.ops.compress(NATIVE, INT4, ints((11, 1, 2, 3, 4), (12, 8, 7, 6, 5)))

    twin = [
        CompressSpan(srcs=(1, 2), src_codec=NATIVE, dst=9, codec=INT8),
        CompressSpan(srcs=(5, 4), src_codec=NATIVE, dst=10, codec=INT8),
        CompressSpan(srcs=(1, 2, 3, 4), src_codec=NATIVE, dst=11, codec=INT4),
        CompressSpan(srcs=(8, 7, 6, 5), src_codec=NATIVE, dst=12, codec=INT4),
    ]
    pool.twin.apply(twin)
    pool.assert_equal()


def ulp_close(found, expected):
    """Within one unit in the last place of the 16-bit dtype."""
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 2048, 8200])
def test_rms_norm_adds_the_residual_and_norms(load, dtype, size):
    torch.manual_seed(size)
    ops = RowOps(str(dtype).removeprefix("torch."), load)
    x, weight = torch.randn(3, size).to(dtype), torch.randn(size).to(dtype)
    residual = torch.randn(3, size).to(dtype) * 3
    out, plain = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    total = residual + x

    ops.rms_norm(plain, None, x, weight, 1e-5)
    ops.rms_norm(out, residual, x, weight, 1e-5)

    assert torch.equal(residual, total)
    for found, row in ((plain, x), (out, total)):
        wide = row.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        ulp_close(found, weight * normed)


def test_rms_norm_of_heads_inside_a_fused_row(load):
    ops = RowOps("float16", load)
    fused = torch.randn(3, 7, 64).half()
    x, weight = fused[:, 2:6], torch.randn(64).half()
    out = torch.full(x.shape, float("nan")).half()

    ops.rms_norm(out, None, x, weight, 1e-6)

    wide = x.float()
    ulp_close(out, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_mul(load, dtype):
    torch.manual_seed(3)
    ops = RowOps(str(dtype).removeprefix("torch."), load)
    gate_up = (torch.randn(3, 2 * 2056) * 4).to(dtype)
    gate_up[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    out = torch.full((3, 2056), float("nan"), dtype=dtype)

    ops.silu_mul(out, gate_up)

    gate, up = gate_up.chunk(2, -1)
    ulp_close(out, F.silu(gate) * up)


def test_float32_pools_are_refused_in_words():
    with pytest.raises(UsageError, match="float16 or bfloat16, not float32"):
        Pool(None, 64, 16, "float32", lowest=NATIVE)
