"""20 seeds x 10,000 random steps on a pool of 24 blocks: no invariant is ever broken."""

from __future__ import annotations

from pool_walk import walk

from kvchat.kv import block_pool

# How often, at least, the walk must meet what it is to check.
NUM_LEAST = {
    "hit": 2_000,
    "hit compressed": 500,
    "hit mixed": 200,
    "copy": 2_000,
    "copy into the reserve": 100,
    "evict": 2_000,
    "evict own tail": 20,
    "out of memory": 2_000,
    "unseal": 200,
    "compress NATIVE to INT8": 2_000,
    "compress NATIVE to INT4": 200,
    "compress INT8 to INT4": 500,
    "compress shared": 300,
    "compress with the reserve only": 500,
    "compress what is not to be found": 300,
    "compress twice": 10,
    "no block to compress into": 500,
    "partial sharer": 1_000,
    "fork inside a span": 200,
    "truncate inside a span": 500,
    "fail": 100,
}


def test_200_000_random_steps_break_no_invariant():
    counts = walk(block_pool, range(20), 10_000)

    print(dict(counts))
    rare = {event: counts[event] for event, num in NUM_LEAST.items() if counts[event] < num}
    assert not rare, counts
