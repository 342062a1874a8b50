"""What the engine tells about itself: numbers for /stats, owners of blocks for /pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import unpack_entry

# A number is the one session that holds the block.
BlockOwner = int | Literal["null", "free", "cached", "shared"]


class SessionKV(NamedTuple):
    """What one session holds in the pool now; shared blocks count in full."""

    num_tokens: int
    num_blocks: int
    num_bytes: int


@dataclass(frozen=True)
class EngineStats:
    """A picture of the engine. Requests and blocks are counted now, the rest since the start."""

    num_running: int
    num_waiting: int
    num_blocks: int  # usable ones: used + cached + free
    num_blocks_used: int
    num_blocks_cached: int  # free, and a later prompt may still hit them
    num_blocks_free: int  # free, and nothing in them
    num_steps: int
    num_decode_steps: int
    num_decode_rows: int
    num_scheduled_tokens: int  # computed: prompts and replies
    num_generated_tokens: int
    num_cached_tokens: int  # of prompts, not computed because a block held them
    num_preemptions: int
    num_drops: int  # of what sessions that do not run held
    num_copies: int  # blocks copied on write
    num_evictions: int  # cached blocks overwritten

    @property
    def mean_decode_batch(self) -> float:
        """Replies that go on together in a step that has any."""
        return self.num_decode_rows / max(1, self.num_decode_steps)


def read_stats(scheduler: Scheduler) -> EngineStats:
    """The numbers as they are between two steps."""
    pool, counters = scheduler.pool, scheduler.counters
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_blocks=pool.num_usable,
        num_blocks_used=pool.num_usable - pool.num_free,
        num_blocks_cached=pool.num_cached,
        num_blocks_free=pool.num_free - pool.num_cached,
        num_steps=counters.num_steps,
        num_decode_steps=counters.num_decode_steps,
        num_decode_rows=counters.num_decode_rows,
        num_scheduled_tokens=counters.num_scheduled_tokens,
        num_generated_tokens=counters.num_generated_tokens,
        num_cached_tokens=counters.num_cached_tokens,
        num_preemptions=counters.num_preemptions,
        num_drops=counters.num_drops,
        num_copies=pool.counters.num_copies,
        num_evictions=pool.counters.num_evictions,
    )


def map_blocks(scheduler: Scheduler) -> list[BlockOwner]:
    """Who holds each block, by block id."""
    states = scheduler.pool.map()
    owners: list[BlockOwner] = ["free" if isinstance(state, int) else state for state in states]
    for session_id, seq, _ in scheduler.sequences():
        for entry in seq.table:
            block_id = unpack_entry(entry)[0]
            owners[block_id] = session_id if states[block_id] == 1 else "shared"
    return owners
