"""Both backends over sequences of native, INT8 and INT4 blocks, against dense float64."""

import pytest
import torch
from attention_world import LAYER, Shape, World, assert_close, pairwise

from kvchat.attention import AttentionBatch
from kvchat.attention import cpu_kernels as kernels
from kvchat.attention.backends import BACKENDS, make_backend
from kvchat.attention.cpu import MAX_KERNEL_TOKENS
from kvchat.bench.attention import format_attention, run_attention_bench
from kvchat.kv.codecs import rotate, rotation_signs, rotation_size
from kvchat.kv.layout import Codec

ALL = tuple(Codec)
MIXES = {"int8": (Codec.INT8,), "int4": (Codec.INT4,), "mixed": ALL}
SHAPES = pairwise(
    (16, 32), (8, 64, 96, 128), (1, 2), (1, 4, 7), ("float32", "bfloat16", "float16"), (0, 40),
    tuple(MIXES), (0, 64),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and other tests may run beside these
    yield
    torch.set_num_threads(num_threads)


def edge_lens(world_shape, sink):
    """(query_len, seq_len): past tokens that end at the spans of 2, 4 and 8 blocks and beside."""
    spans = [n * world_shape.block_size for n in (2, 4, 8)]
    pasts = [sink + span + d for span in spans for d in (-1, 0, 1)]
    decodes = [(1, n + 1) for n in pasts] + [(MAX_KERNEL_TOKENS, 600)]
    return [*decodes, *((MAX_KERNEL_TOKENS + 1 + i, n + 7 + i) for i, n in enumerate(pasts[::2]))]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("values", SHAPES, ids=lambda values: "-".join(map(str, values)))
def test_every_mix_of_codecs_equals_dense_float64(values, name):
    *dims, mix, sink = values
    shape = Shape(*dims)
    world = World(shape, edge_lens(shape, sink), codecs=MIXES[mix], sink=sink)
    before = world.cache.payload.clone(), world.cache.side.clone()

    out, _ = world.run(name)

    keys, expected = world.expected()
    assert_close(out, expected, shape.dtype)
    stored = torch.stack(world.new_slots())
    assert_close(stored[:, 0], keys, shape.dtype)
    # Apart from the new slots not a byte of the pool has changed.
    assert world.cache.side.equal(before[1])
    for slot in world.new_slots():
        slot.zero_()
    after = world.cache.payload.clone()
    world.cache.payload.copy_(before[0])
    for slot in world.new_slots():
        slot.zero_()
    assert after.equal(world.cache.payload)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [1, 15, 33, 63, 64, 65, 127, 200, 511, 513])
def test_a_window_begins_anywhere_in_a_span(window, name):
    shape = Shape(head_dim=8, num_kv_heads=1, group=2, dtype="float16", window=window)
    lens = [(1, n) for n in range(257, 321, 9)] + [(1, 1100), (20, 700), (150, 530)]
    world = World(shape, lens, codecs=ALL)

    out, _ = world.run(name)

    assert_close(out, world.expected()[1], shape.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decodes_and_chunks_agree(dtype):
    shape, num_new = Shape(head_dim=96, dtype=dtype), MAX_KERNEL_TOKENS + 2
    world = World(shape, [(num_new, 700)], codecs=ALL)

    chunk, backend = world.run("cpu")
    assert backend.bytes_gathered > 0
    rows = []
    for i in range(num_new):
        one = make_backend("cpu", world.config, world.cache, world.rope)
        one.plan(AttentionBatch([1], [700 - num_new + i + 1], world.tables))
        part = slice(i, i + 1)
        rows.append(one.attend(LAYER, one.write_kv(LAYER, *(x[part] for x in world.qkv))))
        assert one.bytes_gathered == 0

    assert_close(chunk, torch.cat(rows).double(), dtype)


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads():
    shape, lens = Shape(num_kv_heads=8, head_dim=64, dtype="bfloat16"), [
        (1, 1100), (1, 40), (3, 700), (90, 390), (1, 1), (1, 300),
    ]  # fmt: skip
    together, _ = World(shape, lens, codecs=ALL).run("cpu")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    shared, _ = World(shape, lens, codecs=ALL).run("cpu")
    torch.set_num_threads(num_threads)

    world = World(shape, lens, codecs=ALL)
    alone, first = [], 0
    for (num_new, seq_len), table in zip(lens, world.tables, strict=True):
        backend = make_backend("cpu", world.config, world.cache, world.rope)
        backend.plan(AttentionBatch([num_new], [seq_len], [table]))
        rows = slice(first, first + num_new)
        rotated = backend.write_kv(LAYER, *(x[rows] for x in world.qkv))
        alone.append(backend.attend(LAYER, rotated))
        first += num_new

    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(shared, together)


def test_a_native_row_is_the_same_in_a_pool_that_compresses():
    lens = [(1, 1100), (3, 700), (30, 90)]
    native = World(Shape(), lens)
    compressing = World(Shape(), lens, codecs=ALL, sink=4096)

    outs = [world.run("cpu")[0] for world in (native, compressing)]

    # Not to the bit: its kernels are compiled apart, and add in another order.
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-5)


def test_queries_are_rotated_only_where_a_table_names_int8(monkeypatch):
    rotated, original = [], kernels.rotate_heads
    monkeypatch.setattr(
        kernels, "rotate_heads", lambda out, q, tokens, signs: (
            rotated.append(tokens.tolist()), original(out, q, tokens, signs)
        )
    )  # fmt: skip
    shape, lens = Shape(dtype="bfloat16"), [(2, 300), (40, 300), (1, 300)]

    World(shape, lens, codecs=(Codec.NATIVE, Codec.INT4)).run("cpu")
    assert rotated == []
    World(shape, lens, codecs=(Codec.INT8, Codec.INT4), seed=1).run("cpu")

    assert rotated == [[0, 1, 42]]  # once a layer, and not for chunks


@pytest.mark.parametrize("dim", [8, 24, 64, 80, 96, 128, 256])
def test_the_kernels_rotate_as_the_codecs_do(dim):
    q = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(dim))
    signs = rotation_signs(dim) * rotation_size(dim) ** -0.5
    out, tokens = torch.zeros_like(q), torch.tensor([4, 1])

    kernels.rotate_heads(out.numpy(), q.numpy(), tokens.numpy(), signs.numpy())

    torch.testing.assert_close(out[tokens], rotate(q[tokens]), atol=1e-6, rtol=1e-6)
    assert not out[[0, 2, 3]].any()


# Of one side piece without its padding, for head_dim 128 and blocks of 16 16-bit tokens.
SIDE_BYTES = {Codec.INT8: 2 * 32 * 2, Codec.INT4: 128 * 2 + 64 * 2 * 2 + 2 + 128}


@pytest.mark.parametrize("codec", SIDE_BYTES)
def test_gathered_bytes_are_those_of_the_stored_tokens(codec):
    shape = Shape(num_kv_heads=2, head_dim=128, dtype="bfloat16")
    world = World(shape, [(40, 64 + 40)], codecs=(codec,))  # one INT4 block or two INT8 ones
    layout, part_bytes = world.cache.layout, 16 * 128 * 2
    num_blocks = 64 // layout.span_tokens(codec)

    _, backend = world.run("cpu")
    stored = num_blocks * 2 * (2 * part_bytes + SIDE_BYTES[codec])
    assert backend.bytes_gathered == stored + 40 * 2 * 2 * 128 * 2

    _, backend = world.run("reference")
    stored = num_blocks * 2 * (2 * part_bytes + layout.side_used(codec))
    assert backend.bytes_gathered == stored + 48 * 2 * 2 * 128 * 2  # whole blocks


def test_a_window_gathers_whole_entries_and_the_key_scales_of_their_group():
    shape = Shape(num_kv_heads=1, head_dim=64, dtype="float16", window=24)
    world = World(shape, [(64, 64 + 64)], codecs=(Codec.INT4,))

    _, backend = world.run("cpu")

    # The window of the first new token begins at 64 - 23 = 41, in the entry from 32 on.
    int4 = 32 * 64 // 2 * 2 + 32 * 2 + (64 * 2 + 2 + 64)
    assert backend.bytes_gathered == int4 + 64 * 2 * 64 * 2


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4])
def test_a_bad_scale_stays_in_its_own_sequence(codec, name):
    world = World(
        Shape(dtype="bfloat16"), [(1, 200), (1, 200), (8, 200), (8, 200)], codecs=(codec,)
    )
    for seq_idx in (1, 2):
        block_id = world.tables[seq_idx][0] & 0xFFFFFF
        world.cache.side[block_id, LAYER, 1, :2] = 0xFF  # a scale or a zero of its first keys

    out, _ = world.run(name)

    is_finite = out.isfinite().flatten(1).all(1)
    assert is_finite.tolist() == [True, False] + [False] * 8 + [True] * 8
    assert out[1, :4].isfinite().all()  # the heads of the other kv head


def test_a_bad_number_outside_the_window_is_not_seen():
    shape = Shape(dtype="bfloat16", window=20)
    world = World(shape, [(1, 129)], codecs=(Codec.INT8,))
    block_id = world.tables[0][7] & 0xFFFFFF  # the span from 96 on; the window begins at 109
    world.cache.side[block_id, LAYER].view(torch.float16)[:, [5, 32 + 5]] = float("nan")

    out, _ = world.run("cpu")

    assert out.isfinite().all()


def test_a_warm_backend_compiles_nothing_more():
    shape = Shape(dtype="bfloat16", window=24)
    world, calls = World(shape, edge_lens(shape, 64), codecs=ALL), []
    compiled = (
        kernels.rope_write, kernels.attend_splits, kernels.merge_splits, kernels.gather_blocks,
        kernels.rotate_heads,
    )  # fmt: skip
    make_backend("cpu", world.config, world.cache, world.rope).warm_up(
        lambda done, total: calls.append((done, total))
    )
    before = [len(kernel.signatures) for kernel in compiled]

    world.run("cpu")

    assert calls == [(done, 5) for done in range(6)]
    assert [len(kernel.signatures) for kernel in compiled] == before


def test_the_bench_has_a_row_for_each_codec_and_moves_fewer_bytes_for_less():
    costs = run_attention_bench(lambda *done: None, ("bfloat16",), ((1, 128),), num_repeats=1)

    lines = format_attention(costs).splitlines()
    assert [cost.codec for cost in costs] == list(Codec)
    assert [line.split(" | ")[2] for line in lines[-3:]] == ["native", "int8", "int4"]
    native, int8, int4 = (cost.num_bytes for cost in costs)
    assert native == 128 * 2 * 8 * 128 * 2
    assert (native / int8, native / int4) == pytest.approx((1.969, 3.70), abs=0.005)
