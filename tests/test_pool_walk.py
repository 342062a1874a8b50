"""20 seeds x 10,000 random steps on a pool of 24 blocks: no invariant is ever broken."""

from __future__ import annotations

from pool_walk import walk

from kvchat.kv import block_pool


def test_200_000_random_steps_break_no_invariant():
    counts = walk(block_pool, range(20), 10_000)

    print(dict(counts))
    for event in ("hit", "copy", "evict", "out of memory"):
        assert counts[event] > 2_000, counts
    assert counts["evict own tail"] > 10 and counts["unseal"] > 200, counts
