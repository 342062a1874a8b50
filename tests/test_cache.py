"""The pool's tensors: exact bytes, memory that is reserved and not touched, ops in order."""

import subprocess
import sys

import pytest

from kvchat.config import DTYPE_BYTES, KVSpec
from kvchat.errors import CapacityError
from kvchat.kv.block_pool import CopyBlock
from kvchat.kv.cache import KVCache

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_are_exactly_those_of_the_blocks(dtype):
    cache = KVCache(KVSpec(3, 2, 8, 32, dtype), 5)

    assert cache.num_bytes == 5 * 3 * 2 * 2 * 32 * 8 * DTYPE_BYTES[dtype]
    assert cache.num_bytes == cache.num_blocks * cache.spec.bytes_per_block
    assert cache.blocks.shape == (5, 3, 2, 2, 32, 8)
    assert cache.blocks.is_contiguous()


def test_layer_is_a_view_of_the_pool():
    cache = KVCache(SPEC, 4)

    cache.layer(2)[3, 1, 0, 15, 7] = 42.0

    assert cache.blocks[3, 2, 1, 0, 15, 7] == 42.0
    assert cache.layer(1).shape == (4, 2, 2, 16, 8)


def test_block_operations_run_in_order_on_whole_blocks():
    cache = KVCache(SPEC, 5)
    for block_id in range(1, 5):
        cache.blocks[block_id] = float(block_id)

    cache.apply([CopyBlock(1, 2), CopyBlock(2, 3), CopyBlock(4, 1)])

    assert [cache.blocks[i].unique().tolist() for i in range(5)] == [[0], [4], [1], [1], [4]]


def test_a_pool_that_cannot_be_reserved_is_refused_in_words():
    with pytest.raises(CapacityError, match=r"pool of \d+ bytes could not be reserved; lower"):
        KVCache(SPEC, 1 << 50)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_is_reserved_and_grows_with_the_blocks_used():
    code = """
import resource
from pathlib import Path
import torch
from kvchat.config import KVSpec
from kvchat.kv.cache import KVCache
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
spec = KVSpec(4, 8, 64, 16, "bfloat16")  # 128 KiB a block
torch.zeros(1000).sum()
before = resident()
cache = KVCache(spec, 8192)
reserved = resident() - before
cache.blocks[100:356] = 1.0
print(cache.num_bytes, reserved, resident() - before - reserved, bool(cache.blocks[0].any()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    num_bytes, reserved, touched, is_null_block_set = out.stdout.split()
    assert int(num_bytes) == 1 << 30
    assert int(reserved) < 8 << 20
    assert 32 << 20 <= int(touched) < 40 << 20
    assert is_null_block_set == "False"
