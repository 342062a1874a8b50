"""paged_decode over the full grid on a GPU, and over a slice of the same on the emulator."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decode_cases import LAYER, run_kernel, run_on_gpu
from decode_grid import (
    BATCHES,
    CODECS,
    GROUPS,
    NUM_CASES,
    NUM_ROWS,
    GridPool,
    PoolShape,
    attention,
    errors,
    grid_cases,
    is_good,
    lengths,
    pool_shapes,
)
from emulator import load_emulated
from machines import MACHINES

from kvchat.attention.kernels import compile_kernel_file, load_kernel
from kvchat.attention.paged_decode import (
    PagedDecode,
    _max_shared,
    decode_defines,
    default_tuning,
)

NUM_SLICE = 20


def slice_cases():
    """Seeded choices that the emulator does in seconds: (shape, length, group, rows)."""
    rng = random.Random(5)
    shapes = [shape for shape in pool_shapes() if shape.head_dim < 256]
    for idx in range(NUM_SLICE):
        shape = shapes[idx % 4 + 4 * rng.randrange(len(shapes) // 4)]  # every codec as often
        long = [97] if shape.num_kv_heads == 8 else [97, 2048]
        length = rng.choice([*lengths(shape.block_size)[:4], *long])
        num_rows = 1 if length == 2048 else rng.choice(BATCHES)
        yield shape, length, rng.choice(GROUPS), num_rows


def test_the_grid_is_complete():
    cases = [(shape, *case) for shape in pool_shapes() for case in grid_cases(shape)]

    assert len(set(cases)) == len(cases) == NUM_CASES


@pytest.mark.parametrize("load", MACHINES)
def test_a_slice_of_the_grid(load):
    for seed, (shape, length, group, num_rows) in enumerate(slice_cases()):
        pool = GridPool(shape, seed=seed)
        inputs = pool.rows((length,) * num_rows, group)

        out = run_kernel(load, inputs)

        expected = attention(inputs, *pool.keys_and_values(inputs.tables, length))
        assert is_good(errors(out, expected)), (shape, length, group, num_rows)
        assert pool.is_unchanged


@pytest.mark.parametrize("codec", ["native", "int8", "int4", "mixed"])
def test_every_length_within_a_block(codec):
    pool = GridPool(PoolShape(64, 1, 16, codec))
    inputs = pool.rows(tuple(range(65, 81)), 4)

    out = run_kernel(load_emulated, inputs)

    assert is_good(residue_errors(pool, inputs, out))
    assert pool.is_unchanged


def residue_errors(pool, inputs, out):
    """The worst of rows of different lengths, each for itself."""
    expected = []
    for row, length in enumerate(inputs.case.lens):
        k, v = pool.keys_and_values(inputs.tables[row : row + 1], length)
        q = inputs.q[row : row + 1].double().unflatten(1, (k.shape[1], -1))
        weights = (q @ k.mT * inputs.case.head_dim**-0.5).softmax(-1)
        expected.append((weights @ v).flatten(1, 2))
    return errors(out, torch.cat(expected))


def compile_all(shapes):
    """Every kernel of the grid into the cubin cache, several at a time."""
    major, minor = torch.cuda.get_device_capability()
    cuda_major = int(torch.version.cuda.split(".")[0])
    layouts = {(s.head_dim, s.codec): GridPool(s).cache.layout for s in shapes}

    def compile_one(layout):
        defines = decode_defines(layout, default_tuning(layout, _max_shared("cuda")))
        compile_kernel_file("paged_decode.cu", defines, 10 * major + minor, cuda_major)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(compile_one, layouts.values()))


class GridRun:
    """All cases of a pool; nothing is read back before the end."""

    def __init__(self, pool, load=load_kernel):
        self.pool, self.shape = pool, pool.shape
        device, longest = pool.cache.blocks.device.type, max(lengths(pool.shape.block_size))
        self.decodes = {
            group: PagedDecode(
                pool.cache.layout, pool.shape.num_kv_heads * group, NUM_ROWS, longest, device,
                load=load,
            )
            for group in GROUPS
        }  # fmt: skip

    def run(self, lens, groups=GROUPS):
        """Errors by case, on the device."""
        found = {}
        for length, group in itertools.product(lens, groups):
            inputs = self.pool.rows((length,) * NUM_ROWS, group)
            expected = attention(inputs, *self.pool.keys_and_values(inputs.tables, length))
            for num_rows in BATCHES:
                out = self.launch(inputs, num_rows)
                found[self.shape, length, group, num_rows] = errors(out, expected[:num_rows])
        return found

    def launch(self, inputs, num_rows):
        """The first rows; output and scratch begin as NaN."""
        case = inputs.case
        decode = self.decodes[case.group]
        for scratch in (decode._sums, decode._stats):
            scratch.fill_(torch.nan)
        plan, out = decode.make_plan(), torch.full_like(inputs.q[:num_rows], torch.nan)
        decode.plan(plan, inputs.tables[:num_rows], inputs.seq_lens[:num_rows])
        decode.attend(
            out, inputs.q[:num_rows], inputs.q_rotated[:num_rows], inputs.cache, plan,
            LAYER, case.head_dim**-0.5,
        )  # fmt: skip
        return out


def test_all_short_cases_of_a_pool():
    pool = GridPool(PoolShape(64, 1, 16, "mixed"))

    found = GridRun(pool, load_emulated).run((1, 15, 16, 17, 97), (4,))

    assert len(found) == 20 and all(map(is_good, found.values()))
    assert pool.is_unchanged


@pytest.mark.gpu
def test_all_cases_of_the_grid(capsys):
    shapes = pool_shapes()
    compile_all(shapes)
    found, changed = {}, []
    for seed, shape in enumerate(shapes):
        pool = GridPool(shape, "cuda", seed)
        found |= GridRun(pool).run(lengths(shape.block_size))
        changed += [] if pool.is_unchanged else [shape]

    worst = dict(zip(found, torch.stack([*found.values()]).cpu(), strict=True))
    bad = {case: pair.tolist() for case, pair in worst.items() if not is_good(pair)}
    with capsys.disabled():
        print(
            f"\n{len(found)} cases; by codec and length the largest error over the allowed, NMSE:"
        )
        for codec, length in itertools.product(CODECS, (97, 2048, 16384)):
            pairs = [
                pair
                for (shape, n, *_), pair in worst.items()
                if (shape.codec, n) == (codec, length)
            ]
            error, nmse = torch.stack(pairs).max(0).values.tolist()
            print(f"{codec:6} {length:6} {error:.2f} {nmse:.1e}")
    assert bad == {} and changed == []
    assert len(found) == NUM_CASES


@pytest.mark.gpu
@pytest.mark.parametrize("shape", pool_shapes(), ids=str)
def test_every_length_within_a_block_on_a_gpu(shape):
    pool = GridPool(shape, "cuda")
    size = shape.block_size
    inputs = pool.rows(tuple(range(4 * size + 1, 5 * size + 1)), 4)

    out = run_on_gpu(inputs)

    assert is_good(residue_errors(pool, inputs, out).cpu())
    assert pool.is_unchanged


def test_a_byte_that_changes_shows():
    pool = GridPool(PoolShape(64, 1, 16, "int8"))
    pool.cache.side[3, 1, 0, 5] ^= 1

    assert not pool.is_unchanged
