"""What the engine tells about itself: numbers for /stats, owners of blocks for /pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

from kvchat.engine.history import Compressed
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import Sequence
from kvchat.kv.layout import Codec, block_ids, unpack_entry

# A number is the one session that holds the block.
BlockOwner = int | Literal["null", "free", "cached", "shared"]


class CodecShare(NamedTuple):
    """What of a session is stored in one codec. The bytes are those that its blocks use."""

    num_tokens: int
    num_blocks: int
    num_bytes: int


class SessionKV(NamedTuple):
    """What one session holds in the pool now; shared blocks count in full. num_bytes are those
    reserved for its blocks."""

    num_tokens: int
    num_blocks: int
    num_bytes: int
    shares: Mapping[Codec, CodecShare] = {}  # of the codecs that occur
    history: tuple[Compressed, ...] = ()  # what was compressed when, oldest first
    num_parked_tokens: int = 0  # in main memory instead, while the session is idle
    num_parked_blocks: int = 0


@dataclass(frozen=True)
class EngineStats:
    """A picture of the engine: requests and blocks as they are now, then the scheduler's and the
    pool's counters, by their names there."""

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
    num_drops: int  # idle sessions that gave up their blocks
    num_copies: int  # blocks copied on write
    num_evictions: int  # cached blocks overwritten
    # By (codec of the sources, codec of the block that they became):
    num_compressions: dict[tuple[Codec, Codec], int] = field(default_factory=dict)  # spans
    num_blocks_freed: dict[tuple[Codec, Codec], int] = field(default_factory=dict)  # by those
    num_recomputed_tokens: int = 0  # given up where a fork or an undo cut a compressed span
    num_host_blocks: int = 0  # places for blocks of idle sessions in main memory
    num_host_blocks_used: int = 0
    num_parks: int = 0  # sessions put there
    num_displaced: int = 0  # sessions that were dropped there for one that was used later
    num_resumes: int = 0  # sessions that came back
    num_parked_blocks: int = 0  # copied there, and
    num_restored_blocks: int = 0  # copied back: the others were still in the pool

    @property
    def mean_decode_batch(self) -> float:
        """Replies that go on together in a step that has any."""
        return self.num_decode_rows / max(1, self.num_decode_steps)


def read_stats(scheduler: Scheduler) -> EngineStats:
    """The numbers as they are between two steps."""
    pool = scheduler.pool
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_blocks=pool.num_usable,
        num_blocks_used=pool.num_held,
        num_blocks_cached=pool.num_cached,
        num_blocks_free=pool.num_usable - pool.num_held - pool.num_cached,
        **asdict(scheduler.counters),
        **asdict(pool.counters),
        num_host_blocks=scheduler.arena.num_slots,
        num_host_blocks_used=scheduler.arena.num_slots - scheduler.arena.num_free,
        **asdict(scheduler.arena.counters),
    )


def map_blocks(scheduler: Scheduler) -> list[BlockOwner]:
    """Who holds each block, by block id."""
    states = scheduler.pool.map()
    owners: list[BlockOwner] = ["free" if isinstance(state, int) else state for state in states]
    for session_id, seq, _ in scheduler.sequences():
        for block_id in block_ids(seq.table):
            owners[block_id] = session_id if states[block_id] == 1 else "shared"
    return owners


def read_session_kv(
    scheduler: Scheduler, session_id: int, bytes_per_block: int, bytes_used: tuple[int, ...]
) -> SessionKV:
    """What a session holds, of what, and how it became that."""
    history = scheduler.history(session_id)
    for holder_id, seq, num_tokens in scheduler.sequences():
        if holder_id == session_id:
            shares = _shares(seq, num_tokens, scheduler.pool.block_size, bytes_used)
            num_bytes = seq.num_blocks * bytes_per_block
            return SessionKV(num_tokens, seq.num_blocks, num_bytes, shares, history)
    if parked := scheduler.parked.get(session_id):
        return SessionKV(0, 0, 0, {}, history, len(parked.token_ids), len(parked.blocks))
    return SessionKV(0, 0, 0, {}, history)


def _shares(
    seq: Sequence, num_tokens: int, block_size: int, bytes_used: tuple[int, ...]
) -> dict[Codec, CodecShare]:
    """By codec, for the sequence's first num_tokens."""
    tokens: dict[Codec, int] = {}
    blocks: dict[Codec, int] = {}
    for idx, entry in enumerate(seq.table):
        _, codec, span_idx = unpack_entry(entry)
        num_here = max(0, min(block_size, num_tokens - idx * block_size))
        tokens[codec] = tokens.get(codec, 0) + num_here
        blocks[codec] = blocks.get(codec, 0) + (span_idx == 0)
    sizes = dict(zip(Codec, bytes_used, strict=False))
    return {
        codec: CodecShare(tokens[codec], blocks[codec], blocks[codec] * sizes.get(codec, 0))
        for codec in sorted(tokens)
    }
