"""paged_decode on the emulator, against float64 attention over the decoded values.

Every case: shuffled blocks, NaN wherever no position stands and in outputs and scratch, the pool's
bytes unchanged, counters back at zero.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from decode_cases import (
    MIXED,
    DecodeCase,
    excess,
    make_inputs,
    reference,
    run_emulated,
    run_on_gpu,
)

from kvchat.attention.paged_decode import default_tuning
from kvchat.config import KVSpec
from kvchat.kv.layout import BlockLayout, Codec

GRID = {
    "head_dim": (64, 128),
    "num_kv_heads": (1, 2, 8),
    "group": (1, 4, 7, 8),
    "block_size": (16, 32),
    "kind": (
        ("float16", "native"),
        ("bfloat16", "native"),
        ("float16", "int8"),
        ("bfloat16", "int8"),
        ("float16", "int4"),
        ("bfloat16", "int4"),
        ("float16", MIXED),
        ("bfloat16", MIXED),
    ),
    "rows": (1, 3, 8),
    "length": ("1", "block-1", "block", "block+1", "97", "600"),
}
MIN_CASES = 200
EDGES = (-1, 0, 1)


def pairwise_cases(seed: int = 0) -> list[dict]:
    """Choices of GRID in which every pair of values of two factors occurs, MIN_CASES at least.

    Greedy: the next case is the best of some random ones by the new pairs it brings.
    """
    rng = random.Random(seed)
    names = list(GRID)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in GRID[a] for y in GRID[b]
    }
    cases = []
    while missing or len(cases) < MIN_CASES:
        tries = [{name: rng.choice(GRID[name]) for name in names} for _ in range(30)]
        best = max(tries, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        cases.append(best)
    return cases


def _pairs(case: dict) -> set:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(case, 2)}


def decode_case(choice: dict, seed: int) -> DecodeCase:
    """Rows of the length that `choice` names, or of it and others of the grid by turns."""
    block = choice["block_size"]
    lengths = {"1": 1, "block-1": block - 1, "block": block, "block+1": block + 1, "97": 97}
    first = lengths.get(choice["length"], 600)
    short = [1, block - 1, block, block + 1, 97]
    dtype, codec = choice["kind"]
    return DecodeCase(
        head_dim=choice["head_dim"],
        num_kv_heads=choice["num_kv_heads"],
        group=choice["group"],
        block_size=block,
        dtype=dtype,
        codec=codec,
        lens=(first, *(short[(seed + i) % 5] for i in range(choice["rows"] - 1))),
        seed=seed,
    )


def check(case: DecodeCase, **options: int) -> torch.Tensor:
    inputs = make_inputs(case)
    payload, side = inputs.cache.payload.clone(), inputs.cache.side.clone()

    out = run_emulated(inputs, **options)

    assert excess(out, reference(inputs)) < 1, case
    assert torch.equal(inputs.cache.payload, payload), case
    assert torch.equal(inputs.cache.side, side), case
    return out


CASES = pairwise_cases()


def test_the_grid_has_all_pairs():
    met = set().union(*map(_pairs, CASES))
    num_pairs = sum(len(GRID[a]) * len(GRID[b]) for a, b in itertools.combinations(GRID, 2))

    assert len(met) == num_pairs
    assert len(CASES) >= MIN_CASES


@pytest.mark.parametrize("part", range(8))
def test_the_grid(part):
    for seed, choice in list(enumerate(CASES))[part::8]:
        check(decode_case(choice, seed))


@pytest.mark.parametrize("codec", ["int8", "int4", MIXED])
def test_lengths_around_the_edges_of_spans(codec):
    sink = 64
    for tokens, edge in itertools.product((32, 64, 128), EDGES):
        lens = (tokens + edge, sink + tokens + edge)
        check(DecodeCase(num_kv_heads=1, codec=codec, lens=lens, seed=tokens))


@pytest.mark.parametrize("codec", ["native", "int4", MIXED])
def test_windows_cut_spans_anywhere(codec):
    for window in (1, 15, 16, 33, 63, 64, 65, 200):
        check(DecodeCase(num_kv_heads=1, codec=codec, lens=(300, 64, 40), window=window))


@pytest.mark.parametrize(("head_dim", "group"), [(96, 4), (256, 2)])
def test_other_head_dims(head_dim, group):
    for block_size, codec in ((16, MIXED), (32, MIXED), (16, "int8")):
        check(DecodeCase(head_dim, 2, group, block_size, "bfloat16", codec, lens=(200, 33)))


@pytest.mark.parametrize("group", [9, 16, 17])
def test_groups_beyond_one_tile_of_heads(group):
    check(DecodeCase(group=group, codec=MIXED, lens=(300, 31)))


def test_a_row_of_no_tokens_is_zero():
    out = check_rows(DecodeCase(lens=(40, 0, 17)))

    assert not out[1].any()


def check_rows(case: DecodeCase) -> torch.Tensor:
    """The output of a case whose empty rows have no reference."""
    inputs = make_inputs(case)
    out = run_emulated(inputs)
    for row, seq_len in enumerate(case.lens):
        if seq_len:
            one = reference(inputs, rows=[row])
            assert excess(out[row : row + 1], one) < 1
    return out


@pytest.mark.parametrize("codec", ["native", MIXED])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_grid(codec):
    alone = DecodeCase(codec=codec, lens=(700,))
    inputs = make_inputs(replace(alone, lens=(700, 97, 130)))
    together = run_emulated(inputs)
    for grid in (1, 2, 50):
        assert torch.equal(run_emulated(inputs, grid=grid), together)

    inputs.tables, inputs.seq_lens = inputs.tables[:1], inputs.seq_lens[:1]
    inputs.q, inputs.q_rotated = inputs.q[:1].contiguous(), inputs.q_rotated[:1].contiguous()

    assert torch.equal(run_emulated(inputs)[0], together[0])


@pytest.mark.parametrize("codec", ["native", "int8", "int4"])
def test_any_number_of_splits_gives_the_same_up_to_rounding(codec):
    case = DecodeCase(codec=codec, lens=(900, 300), num_kv_heads=1)
    for target_splits in (1, 2, 32):
        check(case, target_splits=target_splits)


def test_large_values_and_scales_do_not_overflow():
    inputs = make_inputs(DecodeCase(codec=MIXED, lens=(300,), magnitude=200.0))

    out = run_emulated(inputs)

    expected = reference(inputs)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-3


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_scale_that_is_nan_shows(codec):
    inputs = make_inputs(DecodeCase(codec=codec, lens=(128,), num_kv_heads=1))
    block_id = int(inputs.tables[0, 0]) & 0xFFFFFF
    inputs.cache.side[block_id, :, :, : inputs.cache.layout.side_used(1)] = 0xFF

    assert run_emulated(inputs).isnan().any()


@pytest.mark.parametrize("lowest", [Codec.NATIVE, Codec.INT8])
def test_kernels_of_pools_that_never_go_lower(lowest):
    codec = lowest.name.lower()
    for block_size, window in ((16, 0), (32, 150)):
        case = DecodeCase(block_size=block_size, codec=codec, lens=(300, 33), window=window)
        check(case, lowest=lowest)


@pytest.mark.parametrize(("grid", "teams"), [(1, 1), (2, 1), (1, 2)])
def test_a_team_with_very_many_items(grid, teams):
    case = DecodeCase(head_dim=64, num_kv_heads=3, group=17, codec=MIXED,
                      lens=(300, 0, 17, 64, 513, 200, 1, 33))  # fmt: skip
    inputs = make_inputs(case)

    assert excess(run_emulated(inputs, grid, teams=teams), reference(inputs)) < 1


def test_splits_of_the_full_length():
    inputs = make_inputs(DecodeCase(head_dim=64, codec=MIXED, lens=(2100, 0, 40)))

    assert excess(run_emulated(inputs, grid=1, target_splits=1), reference(inputs)) < 1


@pytest.mark.parametrize("warps", [1, 4])
def test_fewer_warps(warps):
    inputs = make_inputs(DecodeCase(head_dim=64, codec=MIXED, lens=(513, 0, 40), window=300))

    assert excess(run_emulated(inputs, warps=warps), reference(inputs)) < 1


def test_as_many_warps_as_shared_memory_holds():
    def tuning(head_dim: int, lowest: Codec, kib: int) -> tuple[int, int]:
        spec = KVSpec(32, 8, head_dim, 16, "bfloat16")
        found = default_tuning(BlockLayout(spec, lowest), kib << 10)
        return found.warps, found.teams

    assert tuning(128, Codec.NATIVE, 227) == (8, 2)
    assert tuning(128, Codec.INT4, 227) == (8, 2)
    assert tuning(128, Codec.INT4, 163) == (6, 2)
    assert tuning(128, Codec.NATIVE, 99) == (4, 2)
    assert tuning(128, Codec.NATIVE, 64) == (6, 1)
    assert tuning(256, Codec.NATIVE, 227) == (4, 2)
    assert tuning(256, Codec.INT4, 227) == (4, 2)
    assert tuning(256, Codec.INT4, 64) == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(8))
def test_the_grid_on_a_gpu(part):
    for seed, choice in list(enumerate(CASES))[part::8]:
        case = decode_case(choice, seed)
        for longer in (case, replace(case, lens=(*case.lens, 2500), window=seed % 3 * 500)):
            inputs = make_inputs(longer, "cuda")
            assert excess(run_on_gpu(inputs), reference(inputs)) < 1, longer


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [96, 256])
def test_other_head_dims_on_a_gpu(head_dim):
    for codec in ("native", "int8", MIXED):
        inputs = make_inputs(DecodeCase(head_dim, codec=codec, lens=(2500, 33)), "cuda")
        for target_splits in (1, 16):
            assert excess(run_on_gpu(inputs, target_splits), reference(inputs)) < 1


@pytest.mark.slow
def test_on_turing_the_same():
    for codec in ("native", MIXED):
        for dtype in ("float16", "bfloat16"):
            check(DecodeCase(dtype=dtype, codec=codec, lens=(130,), num_kv_heads=1), ARCH=750)
