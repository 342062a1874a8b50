"""Copies beside the compute stream: nothing is read too early or overwritten too soon, and nobody
waits who need not."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from cache_walk import SPEC, CacheWalk
from fake_streams import FakeStreams
from mutants import Mutant, kill, load
from mutants.transfers import MUTANTS

from kvchat.kv import cache as cache_module
from kvchat.kv import host_memory
from kvchat.kv.block_ops import CopyBlock, ParkBlock, RestoreBlock
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec
from kvchat.kv.transfers import _stretches


def late_walk(module: ModuleType, seed: int, num_steps: int) -> CacheWalk:
    """Walk over fake streams of which either is likely to be behind; then all is done."""
    rng = random.Random(seed)
    streams = FakeStreams(rng, haste=(0.02, 0.5, 0.98)[seed % 3])
    walk = CacheWalk(module, rng, streams.launch, streams=streams)
    for _ in range(num_steps):
        walk.step()
        streams.advance(rng.choice((0, 5, 20, 40)))
        if rng.random() < 0.05:
            walk.check_slots()
    streams.drain()
    walk.check_blocks()
    walk.check_slots()
    return walk


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_late_the_bytes_are_those_of_one_after_another(seed):
    walk = late_walk(cache_module, seed, 150)

    assert walk.kernels.num_launches > 60


def check(module: ModuleType) -> None:
    for seed in range(9):
        late_walk(module, seed, 60)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_walk_kills(mutant):
    print(f"{mutant.name}: {kill(mutant, check)!r}"[:200])


def test_the_unchanged_cache_survives_in_the_same_harness():
    check(load(Mutant("none", "kvchat.kv.transfers", (), user="kvchat.kv.cache")))


def late_cache(haste: float = 0.0) -> tuple[KVCache, FakeStreams]:
    """A cache of eight blocks, each filled with its id, whose copies are done when they must be."""
    streams = FakeStreams(random.Random(0), haste)
    cache = KVCache(SPEC, 8, lowest=Codec.INT4, num_host_slots=4, streams=streams)
    for block_id in range(8):
        cache.payload[block_id] = cache.side[block_id] = block_id
    return cache, streams


def refuse():
    raise AssertionError("looked at")
    yield


def test_while_no_copy_is_under_way_nobody_is_asked_what_they_write():
    cache, streams = late_cache()

    cache.await_copies(refuse())
    cache.apply([ParkBlock(1, 0)])
    streams.drain()
    cache.await_copies([5])  # finds that it is done
    cache.await_copies(refuse())

    assert streams.num_waits == 0


def test_only_who_writes_a_parked_block_waits_and_only_once():
    cache, streams = late_cache()
    cache.apply([ParkBlock(1, 0), ParkBlock(2, 1)])
    cache.apply([ParkBlock(3, 2)])

    cache.await_copies([4, 5])
    assert streams.num_waits == 0
    cache.await_copies([5, 2])
    assert streams.num_waits == 1
    cache.await_copies([1])  # parked before what was waited for
    assert streams.num_waits == 1
    cache.await_copies([3])
    assert streams.num_waits == 2
    cache.await_copies(refuse())


def test_a_park_that_is_done_does_not_stand_for_a_later_one():
    cache, streams = late_cache()
    cache.host_payload.zero_()
    cache.apply([ParkBlock(1, 0)])
    cache.apply([ParkBlock(2, 1)])
    while len(streams.side) > 4:  # wait, payload and side, event of the second
        streams.advance()

    cache.await_copies([1])
    assert streams.num_waits == 0
    cache.await_copies([2])
    assert streams.num_waits == 1
    streams.launch(cache.payload[2].zero_)
    streams.drain()

    assert cache.host_payload[:2, 0, 0, 0, 0].tolist() == [1, 2]


def test_a_block_may_be_read_while_it_is_being_parked():
    cache, streams = late_cache()

    cache.apply([ParkBlock(1, 0), CopyBlock(1, 2)])
    assert streams.num_waits == 0
    cache.apply([CopyBlock(2, 1)])

    assert streams.num_waits == 1


def test_the_host_reads_a_slot_after_its_copy():
    cache, _ = late_cache()
    cache.host_payload.zero_()
    cache.apply([ParkBlock(3, 0)])
    assert not cache.host_payload[0].any()

    cache.synchronize()

    assert (cache.host_payload[0] == 3).all()
    cache.await_copies(refuse())


def test_a_slot_is_taken_again_and_restored_in_the_order_of_emission():
    cache, streams = late_cache()

    ops = [ParkBlock(1, 0), RestoreBlock(0, 5), ParkBlock(2, 0), RestoreBlock(0, 1)]
    cache.apply(ops)
    streams.drain()

    assert [int(cache.payload[i].unique()) for i in range(8)] == [0, 2, 2, 3, 4, 1, 6, 7]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], []),
        ([(4, 0)], [(4, 0, 1)]),
        ([(4, 0), (5, 1), (6, 2)], [(4, 0, 3)]),
        ([(4, 0), (5, 2), (6, 3), (5, 4)], [(4, 0, 1), (5, 2, 2), (5, 4, 1)]),
        ([(4, 1), (3, 0), (3, 1)], [(4, 1, 1), (3, 0, 1), (3, 1, 1)]),
    ],
)
def test_neighbours_are_copied_as_one(pairs, expected):
    assert _stretches(pairs) == expected


def test_a_session_that_lies_in_a_row_is_one_copy_of_each_tensor():
    cache, streams = late_cache()

    cache.apply([ParkBlock(block_id, block_id - 2) for block_id in range(2, 6)])

    assert len(streams.side) == 1 + 2 + 1  # wait, payload and side, event


def test_locked_memory_is_exact_and_has_pages_of_its_own(monkeypatch):
    locked = []

    class Runtime:
        def cudaHostRegister(self, address, num_bytes, flags):
            locked.append((address, num_bytes))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)

    memory = host_memory.reserve(100_001, is_locked=True)
    memory.fill_(7)

    assert locked == [(memory.data_ptr(), 100_001)]
    assert memory.untyped_storage().nbytes() == 100_001
    assert memory.data_ptr() % 4096 == 0
    assert (memory == 7).all()


def test_memory_that_may_not_be_locked_is_refused_in_words(monkeypatch):
    class Runtime:
        def cudaHostRegister(self, address, num_bytes, flags):
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)

    words = r"4096 bytes of main memory could not be page-locked \(CUDA error 2\); lower --host"
    with pytest.raises(cache_module.CapacityError, match=words):
        host_memory.reserve(4096, is_locked=True)
    with pytest.raises(cache_module.CapacityError, match=r"could not be reserved; lower --host-m"):
        host_memory.reserve(1 << 60, is_locked=True)
