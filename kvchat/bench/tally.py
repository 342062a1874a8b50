"""A second bookkeeping, kept from the batches that go by and the tables as they stand.

It uses none of the scheduler's and the pool's counters, so that these can be held against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kvchat.engine.request import Batch, Row
from kvchat.engine.scheduler import Scheduler
from kvchat.engine.stats import EngineStats
from kvchat.kv.block_pool import CompressSpan, CopyBlock, Sequence
from kvchat.kv.layout import BlockLayout, Codec, unpack_entry


class Held(NamedTuple):
    """What the live tables name at one moment. Blocks once each, however many share them."""

    blocks: dict[int, Codec]
    num_named: int  # blocks, counted for every sequence that names them
    num_open_slots: int  # claimed or left over at the ends of tables, nothing written yet

    def num_slots(self, layout: BlockLayout) -> int:
        """Token slots of the blocks."""
        return sum(layout.span_tokens(codec) for codec in self.blocks.values())

    def num_bytes(self, layout: BlockLayout) -> int:
        """Bytes that the blocks use, scales included."""
        return sum(layout.bytes_used(codec) for codec in self.blocks.values())


@dataclass
class Tally:
    """Counted from the start of a run, batch by batch and look by look."""

    num_steps: int = 0
    num_tokens: int = 0  # rows' tokens, prompts and replies
    num_redone: int = 0  # of these, positions that the session had computed before
    num_decodes: int = 0
    num_decode_steps: int = 0
    num_sampled: int = 0
    num_spans: int = 0  # compressed
    num_freed: int = 0  # blocks, by those
    num_copies: int = 0
    peak_blocks: int = 0
    peak_saved_blocks: int = 0  # by sharing
    peak_running: int = 0
    sum_slots: int = 0  # over the looks
    sum_open_slots: int = 0
    sum_held_blocks: int = 0
    sum_held_bytes: int = 0
    sum_held_tokens: int = 0
    num_looks: int = 0
    num_setbacks: int = 0  # times that a session had lost what it had computed
    reached: dict[int, int] = field(default_factory=dict)  # by session: positions computed
    last_end: dict[int, int] = field(default_factory=dict)  # of its last row
    redone_sessions: set[int] = field(default_factory=set)

    def count(self, batch: Batch) -> None:
        """A batch is about to run."""
        self.num_steps += 1
        decodes = sum(is_decode(row) for row in batch.rows)
        self.num_decodes += decodes
        self.num_decode_steps += decodes > 0
        self.peak_running = max(self.peak_running, len(batch.rows))
        for row in batch.rows:
            self._count_row(row)
        for op in batch.block_ops:
            if isinstance(op, CompressSpan):
                self.num_spans += 1
                self.num_freed += len(op.srcs) - 1
            elif isinstance(op, CopyBlock):
                self.num_copies += 1

    def look(self, scheduler: Scheduler, layout: BlockLayout) -> int:
        """What is held now, between two steps; returns the blocks that the tables name."""
        held = look_at(scheduler.sequences(), layout.spec.block_size)
        num_blocks, num_slots = len(held.blocks), held.num_slots(layout)
        self.num_looks += 1
        self.peak_blocks = max(self.peak_blocks, num_blocks)
        self.peak_saved_blocks = max(self.peak_saved_blocks, held.num_named - num_blocks)
        self.sum_slots += num_slots
        self.sum_open_slots += held.num_open_slots
        self.sum_held_blocks += num_blocks
        self.sum_held_bytes += held.num_bytes(layout)
        self.sum_held_tokens += num_slots - held.num_open_slots
        return num_blocks

    @property
    def waste(self) -> float:
        """Of the token slots held, over time, those that hold nothing."""
        return self.sum_open_slots / self.sum_slots if self.sum_slots else 0.0

    @property
    def bytes_a_token(self) -> float:
        """Of what was held, over time, blocks that several share once."""
        return self.sum_held_bytes / self.sum_held_tokens if self.sum_held_tokens else 0.0

    def differences(self, stats: EngineStats) -> list[str]:
        """Sentences about counters of the engine that say something else."""
        pairs = {
            "steps": (self.num_steps, stats.num_steps),
            "tokens computed": (self.num_tokens, stats.num_scheduled_tokens),
            "tokens generated": (self.num_sampled, stats.num_generated_tokens),
            "decode rows": (self.num_decodes, stats.num_decode_rows),
            "decode steps": (self.num_decode_steps, stats.num_decode_steps),
            "spans compressed": (self.num_spans, sum(stats.num_compressions.values())),
            "blocks freed": (self.num_freed, sum(stats.num_blocks_freed.values())),
            "blocks copied": (self.num_copies, stats.num_copies),
        }
        return [f"{k}: {a:,} seen, {b:,} told" for k, (a, b) in pairs.items() if a != b]

    def _count_row(self, row: Row) -> None:
        session_id = row.request.session_id
        reached = self.reached.get(session_id, 0)
        num_again = max(0, min(reached, row.end) - row.start)
        if num_again:
            self.redone_sessions.add(session_id)
            self.num_setbacks += row.start != self.last_end[session_id]
        self.last_end[session_id] = row.end
        self.num_tokens += row.num_tokens
        self.num_redone += num_again
        self.num_sampled += row.is_sampled
        self.reached[session_id] = max(reached, row.end)


def is_decode(row: Row) -> bool:
    """It takes a reply one token on, and does nothing else."""
    return row.num_tokens == 1 and row.start >= row.request.num_prompt_tokens


def look_at(sequences: Iterable[tuple[int, Sequence, int]], block_size: int) -> Held:
    """Read the tables of (session id, sequence, tokens computed in it)."""
    blocks: dict[int, Codec] = {}
    num_named = num_open = 0
    for _, seq, num_computed in sequences:
        named = dict(_blocks(seq))
        num_named += len(named)
        blocks |= named
        num_open += len(seq.table) * block_size - num_computed
    return Held(blocks, num_named, num_open)


def _blocks(seq: Sequence) -> Iterator[tuple[int, Codec]]:
    for entry in seq.table:
        block_id, codec, span_idx = unpack_entry(entry)
        if not span_idx:
            yield block_id, codec
