"""The cache through its kernels: on the emulator and on GPUs, in the order of emission, with parks
beside a busy stream."""

import random

import pytest
import torch
from cache_walk import CacheWalk
from machines import MACHINES
from test_cache import decoded

from kvchat.attention.cuda_ops import BlockOps
from kvchat.config import KVSpec
from kvchat.kv import cache as cache_module
from kvchat.kv.block_ops import CompressSpan, CopyBlock, ParkBlock, RestoreBlock
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec

NATIVE, INT8, INT4 = Codec
SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
# Copies and compressions that depend on each other: on one that wrote, on one that read.
OPS = [
    CopyBlock(1, 20),
    CopyBlock(2, 21),
    CopyBlock(20, 22),
    CopyBlock(3, 2),
    CompressSpan((1, 2), NATIVE, 23, INT8),
    CompressSpan((4, 5), NATIVE, 24, INT8),
    CompressSpan((6, 7), NATIVE, 4, INT8),
    CompressSpan((23, 24), INT8, 25, INT4),
    CompressSpan((8, 9, 10, 11), NATIVE, 26, INT4),
    CompressSpan((12, 13, 14, 15), NATIVE, 27, INT4),
    CopyBlock(27, 28),
    CompressSpan((16, 17), NATIVE, 29, INT8),
    CopyBlock(29, 30),
    CopyBlock(16, 29),
]


def filled_cache(device: str = "cpu", spec: KVSpec = SPEC, num_host_slots: int = 0) -> KVCache:
    """32 blocks, all but the null block with random values."""
    cache = KVCache(spec, 32, device, INT4, num_host_slots)
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(cache.blocks[1:].shape, generator=generator)
    cache.blocks[1:] = values.to(cache.blocks.dtype)
    cache.side[1:] = 0xFF
    return cache


def with_kernels(cache: KVCache, load) -> KVCache:
    cache.use_kernels(BlockOps(cache, load))
    return cache


def assert_equal(cache: KVCache, expected: KVCache) -> None:
    assert torch.equal(cache.payload.cpu(), expected.payload)
    assert torch.equal(cache.side.cpu(), expected.side)


@pytest.mark.parametrize("load", MACHINES)
def test_kernels_do_what_the_definition_does_in_order(load):
    cache, plain = with_kernels(filled_cache(), load), filled_cache()

    cache.apply(OPS)
    plain.apply(OPS)

    assert_equal(cache, plain)
    assert not decoded(plain, 25, INT4)[0].isnan().any()


@pytest.fixture
def load_kernel():
    from kvchat.attention.kernels import load_kernel

    return load_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_operations_on_a_gpu_are_those_of_the_cpu(load_kernel, dtype):
    spec = KVSpec(2, 2, 128, 32, dtype)
    cache, plain = with_kernels(filled_cache("cuda", spec), load_kernel), filled_cache(spec=spec)

    cache.apply(OPS)
    plain.apply(OPS)

    assert_equal(cache, plain)


@pytest.mark.gpu
def test_parks_come_back_bit_for_bit_from_beside_a_busy_stream():
    cache = filled_cache("cuda", KVSpec(8, 8, 128, 16, "bfloat16"), num_host_slots=10)
    expected = cache.payload[11:21].cpu(), cache.side[11:21].cpu()
    assert cache.host_payload.is_pinned() and cache.host_side.is_pinned()
    slots = (2, 3, 4, 9, 8, 0, 1, 7, 5, 6)  # some of them in a row
    parks = [ParkBlock(1 + idx, slot) for idx, slot in enumerate(slots)]

    torch.cuda._sleep(50_000_000)  # cycles
    cache.payload[1:11].copy_(cache.payload[11:21])
    cache.side[1:11].copy_(cache.side[11:21])
    cache.apply(parks)
    cache.await_copies([op.src for op in parks])
    cache.payload[1:11].fill_(0xAA)
    cache.side[1:11].fill_(0xAA)
    cache.apply([RestoreBlock(op.slot, op.src + 20) for op in parks])
    found = cache.payload[21:31].clone(), cache.side[21:31].clone()
    cache.payload[21:31].zero_()

    for tensor, blocks in zip(found, expected, strict=True):
        assert torch.equal(tensor.cpu(), blocks)


@pytest.mark.gpu
def test_nobody_waits_on_the_host_for_a_park():
    cache = filled_cache("cuda", KVSpec(8, 8, 128, 16, "bfloat16"), num_host_slots=10)
    cache.host_payload.zero_()
    cache.apply([ParkBlock(1, 0)])  # what is loaded or reserved once is
    cache.synchronize()
    started = torch.cuda.Event()

    torch.cuda._sleep(200_000_000)
    started.record()
    cache.apply([ParkBlock(block_id, block_id - 1) for block_id in range(1, 11)])
    cache.await_copies([1, 2])
    cache.apply([RestoreBlock(3, 12), ParkBlock(12, 3)])

    assert not started.query(), "the host waited for the device"
    assert not cache.host_payload[5].any()
    cache.synchronize()
    assert torch.equal(cache.host_payload, cache.payload[1:11].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_on_a_gpu_is_one_after_another(seed):
    rng = random.Random(seed)

    def launch(work):
        if rng.random() < 0.2:
            torch.cuda._sleep(1_000_000)
        work()

    spec = KVSpec(8, 4, 128, 16, "bfloat16")  # 256 KiB a block
    walk = CacheWalk(cache_module, rng, launch, spec, device="cuda")
    for _ in range(150):
        walk.step()
        if rng.random() < 0.05:
            walk.check_slots()
    walk.check_blocks()
    walk.check_slots()
