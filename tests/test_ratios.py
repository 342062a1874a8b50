"""The ratios of compressed pools: bytes of real tensors over tokens held when the pool says no."""

import io

import pytest

from kvchat.bench import capacity, ratios
from kvchat.bench.capacity import Capacity
from kvchat.bench.ratios import HEAD_DIMS, MODES, Ratios, fill_pool, measure_ratios
from kvchat.cli import run_cli
from kvchat.config import KVPolicy, KVSpec
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.kv.layout import Codec
from kvchat.terminal.show import Show

# By head_dim and mode, measured: the block's and the pool's are the lowest bounds.
LEAST_BLOCK = {(128, "auto"): 1.95, (64, "auto"): 1.9, (128, "auto4"): 3.7, (64, "auto4"): 3.6}


def spec_of(head_dim, block_size=16, dtype="bfloat16"):
    return KVSpec(1, 1, head_dim, block_size, dtype)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_block_and_a_pool_hold_as_many_tokens_as_promised(head_dim, mode, block_size):
    row = measure_ratios(spec_of(head_dim, block_size), mode, lengths=[2048, 8192])

    assert row.codec == {"auto": Codec.INT8, "auto4": Codec.INT4}[mode]
    assert row.block >= LEAST_BLOCK[head_dim, mode]
    # All of the pool but its null block and reserve is full of such blocks.
    assert 0.98 * row.block < row.pool < row.block
    (short, at_2k), (long, at_8k) = row.sessions
    assert 2048 <= short < 2048 + 256 and 8192 <= long < 8192 + 256
    assert 1.5 < at_2k < at_8k < row.pool


@pytest.mark.parametrize("mode", ["native", *MODES])
def test_a_pool_says_no_when_all_it_can_hold_is_held_and_readable(mode):
    spec = spec_of(64)
    policy = choose_kv_mode(mode, 128, 64, spec, Codec.INT4).policy
    full = fill_pool(spec, policy, 100)

    assert full.num_blocks == 99 - policy.num_reserved
    # as many whole blocks as fit, and not one more
    num_fitting = policy.max_tokens(full.num_blocks, 16)
    assert full.num_tokens == num_fitting // 16 * 16
    assert full.cache.num_bytes == full.cache.blocks.nbytes + full.cache.side.nbytes
    limits = {Codec.NATIVE: 0.003, Codec.INT8: 0.01, Codec.INT4: 0.15}  # of noise of size 1
    lowest = Codec(policy.rungs[-1][1]) if policy.rungs else Codec.NATIVE
    assert full.errors.keys() >= {Codec.NATIVE, lowest}
    assert all(error < limits[codec] for codec, error in full.errors.items())


def test_a_native_pool_holds_its_blocks_and_nothing_else():
    full = fill_pool(spec_of(128), KVPolicy(), 33)

    assert (full.num_tokens, full.num_blocks) == (512, 32)
    assert full.bytes_per_token == 33 * 16 * 2 * 128 * 2 / 512
    assert full.held_bytes == 512 * 2 * 128 * 2


def test_the_command_prints_both_tables(monkeypatch):
    row = Ratios(128, "auto4", Codec.INT4, 3.7034, 3.6904, ((2096, 2.82), (8240, 3.43), (1, 3.63)))
    monkeypatch.setattr(ratios, "run_ratio_bench", lambda: [row])
    held = Capacity("native", 2048, 1025, 255, 16_000)
    monkeypatch.setattr(capacity, "run_capacity_bench", lambda: [held])
    out = io.StringIO()

    code = run_cli(["bench", "capacity"], Show(out, io.StringIO()))

    assert code == 0
    assert "| 2,048 | native | 1,025 | 255 | 16,000 | 1.00 |\n\n| head dim |" in out.getvalue()
    assert "| 128 | auto4 | INT4 3.703 | 3.690 | 2.82 | 3.43 | 3.63 |\n" in out.getvalue()
