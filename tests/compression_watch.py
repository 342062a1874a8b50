"""What compression must keep, watched while tests/simulation runs.

Every span is looked at before it is compressed: it is outside the sinks and windows of all who hold
it and nobody has pinned it, and the step's slice is kept. And nobody is dropped or preempted for
memory while there is something to compress, found by looking at everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvchat.engine.request import Request
from kvchat.kv.block_ops import BlockOp
from kvchat.kv.block_pool import BlockPool, CompressSpan, Sequence
from kvchat.kv.layout import Codec, block_ids

if TYPE_CHECKING:
    from simulation import Simulation


class WatchedPool(BlockPool):
    """A pool that looks at every span before it is compressed."""

    def __init__(self, simulation: Simulation) -> None:
        scenario, kv = simulation.scenario, simulation.scenario.kv
        spans = {"span_blocks": kv.span_blocks, "num_reserved": kv.num_reserved}
        super().__init__(scenario.num_blocks, scenario.block_size, **spans)
        self.simulation = simulation

    def compress(self, holders: list[Sequence], start: int, codec: Codec) -> CompressSpan | None:
        simulation = self.simulation
        allowed = [seq for seq in holders if lets_go(simulation, seq, start, codec)]
        assert allowed == holders, f"kept by one: {start=} {codec=} {holders=}"
        op = super().compress(holders, start, codec)
        if op is None:
            return None
        num_tokens = self.span_blocks[codec] * self.block_size
        kv = simulation.config.kv
        simulation.num_compressed += num_tokens
        if not kv.is_eager:
            limit = max(kv.slice_tokens, num_tokens)
            assert simulation.num_compressed <= limit, f"{simulation.num_compressed=}"
        simulation.counts[f"to {codec.name}"] += 1
        simulation.counts["shared spans"] += len(holders) > 1
        return op


def lets_go(simulation: Simulation, seq: Sequence, start: int, codec: Codec) -> bool:
    """The span is outside the sequence's sinks and window, sealed, and its session not pinned."""
    num_computed = min(simulation.computed.get(seq, seq.num_tokens), seq.num_tokens)
    for session_id, other, _ in simulation.scheduler.sequences():
        if other is seq and simulation.people[session_id].is_pinned:
            return False
    kv, size = simulation.config.kv, simulation.pool.block_size
    end = start + kv.span_blocks[codec]
    first, last = kv.sink, num_computed // size * size - kv.window
    return first <= start * size and end * size <= last and end <= seq.num_sealed


def watch_giving_way(simulation: Simulation) -> None:
    """Nobody is dropped or preempted for memory while there is something to compress."""
    memory = simulation.scheduler._memory
    make_way = memory._make_way

    def checked(request: Request, ops: list[BlockOp]) -> bool:
        if simulation.pool.num_held < simulation.pool.num_usable:
            assert (found := find_compressible(simulation)) is None, f"{found=}"
        return make_way(request, ops)

    memory._make_way = checked


def find_compressible(simulation: Simulation) -> tuple[Sequence, int] | None:
    """Some span that may be compressed, found by looking at everything."""
    pool, memory = simulation.pool, simulation.scheduler._memory
    live = [holder.seq for holder in memory._holders()]
    kept = {holder.seq for holder in memory._holders() if holder.is_pinned}
    for src, codec in simulation.config.kv.rungs:
        num_entries = pool.span_blocks[codec]
        for seq in live:
            for start in range(0, seq.num_sealed - num_entries + 1, num_entries):
                end = start + num_entries
                ids = block_ids(seq.table[start:end])
                if {pool.codec(block_id) for block_id in ids} != {src}:
                    continue
                holders = pool.holders(seq, start, num_entries, live)
                # The window moves with what is sealed, which lags when tokens are read late.
                num_sealed = min((s.num_sealed for s in holders or ()), default=0)
                last = num_sealed * pool.block_size - simulation.config.kv.window
                if not holders or not kept.isdisjoint(holders) or end * pool.block_size > last:
                    continue
                if all(lets_go(simulation, s, start, codec) for s in holders):
                    return seq, start
    return None
