"""Both backends against a dense float64 computation, over a pool whose unused slots are NaN."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from attention_world import LAYER, TOLERANCE, Shape, World, assert_close, pairwise

from kvchat.attention import AttentionBatch
from kvchat.attention import cpu_jit as jit
from kvchat.attention import cpu_kernels as kernels
from kvchat.attention.backends import BACKENDS, make_backend
from kvchat.attention.cpu import MAX_KERNEL_TOKENS, SPLIT_TOKENS
from kvchat.errors import UsageError


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and other tests may run beside these
    yield
    torch.set_num_threads(num_threads)


def mixed_lens(block_size):
    """Decodes and chunks in a shuffled order: (query_len, seq_len)."""
    b = block_size
    decodes = [(1, n) for n in (1, b - 1, b, b + 1, 97, 600)]
    chunks = [(2, 2), (MAX_KERNEL_TOKENS, 97), (MAX_KERNEL_TOKENS + 1, 97), (b + 1, b + 1)]
    lens = [*decodes, *chunks, (b, 3 * b), (40, 97), (7, 600), (150, 150)]
    random.Random(block_size).shuffle(lens)
    return lens


DIMS = pairwise((16, 32), (8, 16, 64, 128), (1, 2, 8), (1, 4, 7, 8), tuple(TOLERANCE), (0, 24))
SHAPES = [Shape(*dims) for dims in DIMS]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, vars(s).values())))
def test_backend_equals_dense_float64(shape, name):
    world = World(shape, mixed_lens(shape.block_size))
    before = world.cache.blocks.clone()

    out, _ = world.run(name)

    keys, expected = world.expected()
    assert out.dtype == world.q.dtype
    assert_close(out, expected, shape.dtype)
    stored = torch.stack(world.new_slots())
    assert_close(stored[:, 0], keys, shape.dtype)
    assert torch.equal(stored[:, 1], world.v)
    # Apart from the new slots not a byte of the pool has changed, NaN and null block included.
    for slot in world.new_slots():
        slot.zero_()
    after = world.cache.blocks.clone()
    world.cache.blocks.copy_(before)
    for slot in world.new_slots():
        slot.zero_()
    assert after.view(torch.uint8).equal(world.cache.blocks.view(torch.uint8))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_residue_of_the_block_size(name):
    lens = [(1, n) for n in range(1, 33)] + [(n, n) for n in range(5, 21)]
    world = World(Shape(block_size=16), lens)

    out, _ = world.run(name)

    assert_close(out, world.expected()[1], "float32")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [1, 16, SPLIT_TOKENS - 1, SPLIT_TOKENS, 700, 5000])
def test_windows_and_splits_meet_at_any_position(window, name):
    lens = [(1, n) for n in (SPLIT_TOKENS - 1, SPLIT_TOKENS, SPLIT_TOKENS + 1, 1100)]
    world = World(Shape(head_dim=8, group=2, window=window), [*lens, (30, 1030), (200, 530)])

    out, _ = world.run(name)

    assert_close(out, world.expected()[1], "float32")
    if window == 1:  # a query that sees only itself gets its own v, to the bit
        assert torch.equal(out, world.v.repeat_interleave(2, dim=1))


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads():
    lens = [(1, 1100), (1, 40), (3, 700), (90, 190), (1, 1)]
    together, _ = World(Shape(num_kv_heads=8, head_dim=64), lens).run("cpu")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    shared, _ = World(Shape(num_kv_heads=8, head_dim=64), lens).run("cpu")
    torch.set_num_threads(num_threads)

    world = World(Shape(num_kv_heads=8, head_dim=64), lens)
    alone, first = [], 0
    for (num_new, seq_len), table in zip(lens, world.tables, strict=True):
        backend = make_backend("cpu", world.config, world.cache, world.rope)
        backend.plan(AttentionBatch([num_new], [seq_len], [table]))
        rows = slice(first, first + num_new)
        rotated = backend.write_kv(LAYER, world.q[rows], world.k[rows], world.v[rows])
        alone.append(backend.attend(LAYER, rotated))
        first += num_new

    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(shared, together)


def test_gathered_bytes_are_those_of_long_chunks_alone():
    shape = Shape(num_kv_heads=2, head_dim=16, dtype="bfloat16", window=24)
    decodes = World(shape, [(1, 600), (MAX_KERNEL_TOKENS, 97), (1, 1)])
    _, backend = decodes.run("cpu")
    assert backend.bytes_gathered == 0
    _, backend = decodes.run("reference")
    assert backend.bytes_gathered == (38 + 7 + 1) * 16 * 2 * 2 * 16 * 2  # whole blocks

    # The window of the oldest new token begins at 97 - 40 - 23 = 34, in the block from 32 on.
    _, backend = World(shape, [(1, 600), (40, 97), (8, 8)]).run("cpu")

    assert backend.bytes_gathered == ((97 - 32) + 8) * 2 * 2 * 16 * 2


def test_the_scratch_of_a_step_is_one_layer_of_its_longest_gathered_sequence():
    shape = Shape(num_kv_heads=2, head_dim=16, dtype="bfloat16")
    _, backend = World(shape, [(1, 3000), (40, 97), (8, 200), (150, 150)]).run("cpu")

    assert backend._scratch.nbytes == 2 * 2 * (13 * 16) * 16 * 4  # K and V, heads, 13 blocks, fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns_pass_through_the_cpu_pool(dtype):
    patterns = torch.arange(65536).to(torch.uint16).view(dtype).view(1024, 4, 16)
    pool = np.zeros((65, 1, 2, 4, 16, 16), np.uint16)
    bits = patterns.view(torch.uint16).numpy()
    kind = jit.BFLOAT16 if dtype == torch.bfloat16 else jit.FLOAT16
    angles = np.zeros((2, 1024, 8), np.float32) + np.array([1, 0], np.float32)[:, None, None]
    q_out, slots = np.full((1024, 4, 16), np.nan, np.float32), np.arange(16, 1040)

    kernels.rope_write(q_out, pool, 0, slots, bits, bits, bits, *angles, kind)

    is_finite = patterns.isfinite()
    assert torch.from_numpy(q_out)[is_finite].equal(patterns.float()[is_finite])
    k, v = torch.from_numpy(pool[1:, 0]).permute(1, 0, 3, 2, 4).reshape(2, 1024, 4, 16)
    assert v.equal(patterns.view(torch.uint16))
    # cos 1 and sin 0 leave K as it is, but for infinity and NaN, which 0 * x makes NaN in the pair
    pairs_finite = is_finite.unflatten(-1, (2, 8)).all(-2).repeat(1, 1, 2)
    assert k.view(dtype)[pairs_finite].equal(patterns[pairs_finite])
    assert not k.view(dtype)[~pairs_finite].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_are_rounded_to_nearest_even(dtype):
    generator = torch.Generator().manual_seed(3)
    scales = 2.0 ** torch.randint(-26, 16, (4096, 1), generator=generator)
    values = (torch.randn(4096, 8, generator=generator) * scales).clamp(-65519, 65519)
    ones = torch.ones(4096, 1, 16, dtype=dtype)
    bits = ones.view(torch.uint16).numpy()
    kind = jit.BFLOAT16 if dtype == torch.bfloat16 else jit.FLOAT16
    pool = np.zeros((257, 1, 2, 1, 16, 16), np.uint16)
    q_out, slots = np.empty((4096, 1, 16), np.float32), np.arange(16, 4112)

    zeros = np.zeros((4096, 8), np.float32)
    kernels.rope_write(q_out, pool, 0, slots, bits, bits, bits, values.numpy(), zeros, kind)

    stored = torch.from_numpy(pool[1:, 0, 0, 0].reshape(4096, 16)).view(dtype)
    assert stored.equal(values.to(dtype).repeat(1, 2))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bad_number_stays_in_its_own_sequence(name):
    world = World(Shape(num_kv_heads=2), [(1, 40), (1, 40), (8, 40), (8, 40)])
    world.slot(world.tables[1], 3)[0, 1, 5] = float("nan")
    world.slot(world.tables[2], 7)[1, 0, 2] = float("inf")

    out, _ = world.run(name)

    is_finite = out.isfinite().flatten(1).all(1)
    assert is_finite.tolist() == [True, False] + [False] * 8 + [True] * 8
    assert out[1, :4].isfinite().all()  # the heads of the other kv head


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("part", [0, 1], ids=["K", "V"])
def test_a_bad_number_does_not_leak_into_a_shorter_sequence_after_it(part, name):
    world = World(Shape(num_kv_heads=1), [(1, 4), (1, 1), (2, 2), (1, 18)])
    world.slot(world.tables[0], 2)[part, 0, 5] = float("nan")

    out, _ = world.run(name)

    assert out.isfinite().flatten(1).all(1).tolist() == [False, True, True, True, True]


def test_a_warm_backend_compiles_nothing_more():
    world = World(Shape(dtype="bfloat16", window=24), mixed_lens(16))
    calls = []
    make_backend("cpu", world.config, world.cache, world.rope).warm_up(
        lambda done, total: calls.append((done, total))
    )
    compiled = (kernels.rope_write, kernels.attend_splits, kernels.merge_splits)
    before = [len(kernel.signatures) for kernel in (*compiled, kernels.gather_blocks)]

    world.run("cpu")

    assert calls == [(done, 4) for done in range(5)]
    assert [len(kernel.signatures) for kernel in (*compiled, kernels.gather_blocks)] == before


WARM_START = """
from kvchat.attention import cpu_jit as jit, cpu_kernels as kernels
kernels.compile_kernels(jit.FLOAT32, False, lambda done, total: None)
all = (kernels.rope_write, kernels.attend_splits, kernels.merge_splits, kernels.gather_blocks)
print([sum(kernel.stats.cache_misses.values()) for kernel in all])
"""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )


def test_a_second_process_finds_the_kernels_compiled():
    kernels.compile_kernels(jit.FLOAT32, False, lambda done, total: None)

    done = run_python(WARM_START)

    assert (done.stdout, done.stderr) == ("[0, 0, 0, 0]\n", "")


def test_without_a_writable_cache_folder_it_compiles_in_silence():
    code = """
import numba
from kvchat.attention import cpu_kernels as kernels
heads = numba.float32[:, :, ::1]
kernels.merge_splits.compile((heads, heads, heads, numba.int64[:, ::1]))
print(len(kernels.merge_splits.signatures), kernels.merge_splits.stats.cache_path)
"""
    done = run_python(code, XDG_CACHE_HOME="/proc/no-such-folder", HOME="/proc/no-such-folder")

    assert (done.stdout, done.stderr) == ("1 None\n", "")


@pytest.mark.slow
def test_a_cut_or_unwritable_cache_costs_time_and_nothing_else(tmp_path):
    run_python(WARM_START, XDG_CACHE_HOME=str(tmp_path))
    for path in tmp_path.rglob("*rope_write*"):
        path.write_bytes(path.read_bytes()[:100])

    cut = run_python(WARM_START, XDG_CACHE_HOME=str(tmp_path))
    mended = run_python(WARM_START, XDG_CACHE_HOME=str(tmp_path))
    for path in tmp_path.rglob("*merge_splits*"):
        path.unlink()
    no_space = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    full = run_python(no_space + WARM_START, XDG_CACHE_HOME=str(tmp_path))

    outs = [(done.stdout, done.stderr) for done in (cut, mended, full)]
    assert outs[1:] == [("[0, 0, 0, 0]\n", ""), ("[0, 0, 1, 0]\n", "")]
    assert outs[0][1] == ""


def test_an_unknown_backend_is_refused_by_name():
    world = World(Shape(), [(1, 1)])

    with pytest.raises(UsageError, match=r"'metal'; there are cpu, reference"):
        make_backend("metal", world.config, world.cache, world.rope)
