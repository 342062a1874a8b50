"""Which span is compressed next: the policy of the ladder. No tensors, no requests.

A rung takes whole spans of one codec to a lower one. A span may be compressed when every sequence
that holds it lets it go: it is sealed there, outside the sequence's sinks and window, and the
sequence is not pinned. Within a rung the coldest sequences come first, in each the old positions
before the new. A span that several share is as warm as the warmest of them. Nothing looks at all
blocks: a sequence is looked at when something has happened to it (`touch`), from where the last
look ended, and a shared span waits with the holder that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from typing import NamedTuple

from kvchat.config import KVPolicy
from kvchat.kv.block_pool import BlockPool, CompressSpan, Sequence
from kvchat.kv.layout import CODEC_SHIFT, Codec, block_ids

# What rewriting one more table takes of a slice: a span that 1,000 share has a step of its own.
_TOKENS_PER_HOLDER = 16


class Warmth(IntEnum):
    """Who a sequence serves; the colder ones are compressed first."""

    IDLE = 0
    RUNNING = 1
    FOREGROUND = 2


class Holder(NamedTuple):
    """A live sequence, with what the ladder must know of its session."""

    seq: Sequence
    warmth: Warmth
    is_pinned: bool
    session_id: int


class Span(NamedTuple):
    """What may be compressed now: the entries from `start`, as all of `holders` have them."""

    holders: list[Sequence]
    start: int
    codec: Codec


class Compression(NamedTuple):
    """A span that was compressed, and the sessions that held it."""

    op: CompressSpan
    session_ids: list[int]
    start: int  # position
    end: int


@dataclass(slots=True)
class _Order:
    """All holders, coldest first, as they are in one step."""

    holders: list[Holder]
    by_seq: dict[Sequence, Holder] = field(init=False)
    pinned: set[Sequence] = field(init=False)

    def __post_init__(self) -> None:
        self.by_seq = {holder.seq: holder for holder in self.holders}
        self.pinned = {holder.seq for holder in self.holders if holder.is_pinned}

    def warmer(self, warmth: Warmth) -> Iterator[Sequence]:
        """Those that come after all of this warmth."""
        for holder in reversed(self.holders):
            if holder.warmth <= warmth:
                return
            yield holder.seq

    def who_names(self, entry: int, start: int) -> Sequence | None:
        """Some sequence whose table has this entry there."""
        for seq in self.by_seq:
            if start < len(seq.table) and seq.table[start] == entry:
                return seq
        return None


class Ladder:
    """`read_holders` gives all live sequences, coldest first: asked once a step, or `refresh`.
    `step_tokens`: what a step computes at most; only the eager modes ask."""

    def __init__(
        self,
        policy: KVPolicy,
        pool: BlockPool,
        read_holders: Callable[[], Iterable[Holder]],
        step_tokens: int = 0,
    ) -> None:
        self._policy, self._pool, self._read_holders = policy, pool, read_holders
        self.rungs = [_Rung(policy, pool, Codec(src), Codec(to)) for src, to in policy.rungs]
        self._order: _Order | None = None
        self._step_tokens = step_tokens
        self._num_touches = 0  # since the step began
        self._slice_tokens = self._num_tokens_left = 0  # of this step
        self.is_spent = False  # the last `compress` found something, but not for this step
        self._low_blocks = int(policy.low_share * pool.num_usable)
        self._high_blocks = int(policy.high_share * pool.num_usable)
        self._is_refilling = False

    def begin_step(self) -> None:
        """A new slice."""
        self._slice_tokens = self._num_tokens_left = self._slice()
        self._num_touches = 0
        self.is_spent = False
        self._order = None

    def refresh(self) -> None:
        """Sequences have come, or serve others than before."""
        self._order = None

    def touch(self, seq: Sequence) -> None:
        """A sequence is new, has sealed blocks, or its session is no longer pinned."""
        self._num_touches += 1
        for rung in self.rungs:
            rung.touch(seq)

    def forget(self, seq: Sequence) -> None:
        """A sequence was freed, or cut: `touch` it then."""
        for rung in self.rungs:
            rung.forget(seq)

    def part(self, seq: Sequence) -> None:
        """A sequence has its own copy of its last block: others need not wait for it there."""
        for rung in self.rungs:
            rung.part(seq)

    @property
    def is_wanted(self) -> bool:
        """Compress, though nobody waits for it: there is too little room, or the mode says so."""
        if not self.rungs:
            return False
        if self._policy.is_eager:
            return True
        num_free = self._pool.num_free
        self._is_refilling = num_free < (
            self._high_blocks if self._is_refilling else self._low_blocks
        )
        return self._is_refilling

    def compress(self) -> Compression | None:
        """Compress the next span; None when there is none, when this step's slice is used up, or
        when not even the reserve has a block."""
        span = self._find()
        self.is_spent = span is not None and not self._has_budget(span)
        if span is None or self.is_spent:
            return None
        assert self._order is not None
        entry = span.holders[0].table[span.start]
        op = self._pool.compress(span.holders, span.start, span.codec)
        if op is None:
            return None
        num_entries = self._pool.span_blocks[span.codec]
        block_size = self._pool.block_size
        self._num_tokens_left -= self._cost(span)
        for rung in self.rungs:
            rung.note(span, entry)
        session_ids = [self._order.by_seq[seq].session_id for seq in span.holders]
        first = span.start * block_size
        return Compression(op, session_ids, first, first + num_entries * block_size)

    def _find(self) -> Span | None:
        """What is compressed next."""
        if not any(rung.has_work for rung in self.rungs):
            return None
        if self._order is None:
            self._order = _Order(list(self._read_holders()))
        for rung in self.rungs:
            if (span := rung.find(self._order)) is not None:
                return span
        return None

    def _slice(self) -> int:
        """Tokens that this step may compress. An eager mode always has enough for what was computed
        since the last step, also when that ends a span in each sequence: what is stored depends on
        the position alone. Twice as much, so that a backlog (of a session that was pinned) ends."""
        policy = self._policy
        if not policy.is_eager:
            return policy.slice_tokens
        span_tokens = self._pool.span_blocks[policy.rungs[-1][1]] * self._pool.block_size
        return max(policy.slice_tokens, 2 * self._step_tokens) + self._num_touches * span_tokens

    def _has_budget(self, span: Span) -> bool:
        is_first = self._num_tokens_left == self._slice_tokens
        return is_first or self._num_tokens_left >= self._cost(span)

    def _cost(self, span: Span) -> int:
        """What it takes of the slice, in tokens."""
        num_tokens = self._pool.span_blocks[span.codec] * self._pool.block_size
        return max(num_tokens, (len(span.holders) - 1) * _TOKENS_PER_HOLDER)


class _Torn(NamedTuple):
    """A span that `seq` holds and `other` only in part, or has not sealed. What they had when that
    was seen: entries, and whether it was sealed there."""

    start: int
    seqs: tuple[Sequence, ...]
    states: tuple[tuple[list[int], bool], ...]


class _Rung:
    """From one codec to another: what of each sequence has been looked at."""

    def __init__(self, policy: KVPolicy, pool: BlockPool, src: Codec, codec: Codec) -> None:
        self._policy, self._pool, self._src, self._codec = policy, pool, src, codec
        self._num_entries = pool.span_blocks[codec]
        self._src_entries = pool.span_blocks[src]
        self._fresh: dict[Sequence, None] = {}  # may have something to compress
        self._cursors: dict[Sequence, int] = {}  # below, all is compressed or waits in _waiting
        # Shared spans: by the holder that keeps it, {first entry's value: its place in the table}.
        self._waiting: dict[Sequence, dict[int, int]] = {}
        self._keepers: dict[int, Sequence] = {}  # the same, by first entry
        self._torn: dict[int, _Torn] = {}  # by first entry
        self._orphans: dict[int, int] = {}  # {first entry: place}: the keeper is gone
        self._order: _Order | None = None  # the last one seen
        self._place = 0  # in it: nobody before is fresh

    @property
    def has_work(self) -> bool:
        """There may be something to compress."""
        self._mend()
        return bool(self._fresh or self._orphans)

    def touch(self, seq: Sequence) -> None:
        """Look at it again."""
        self._fresh[seq] = None
        self._place = 0

    def forget(self, seq: Sequence) -> None:
        """It has other entries now, or none."""
        self._fresh.pop(seq, None)
        self._cursors.pop(seq, None)
        for entry, start in self._waiting.pop(seq, {}).items():
            del self._keepers[entry]
            self._orphans[entry] = start

    def part(self, seq: Sequence) -> None:
        """It has another block at the end: a span that waits with it there belongs to nobody."""
        for entry, start in [*self._waiting.get(seq, {}).items()]:
            if seq.table[start] != entry:
                self._release(entry)
                self._orphans[entry] = start
        self.touch(seq)

    def note(self, span: Span, entry: int) -> None:
        """A span whose table began with `entry` there has been compressed."""
        self._release(entry)
        if span.codec == self._src:  # it may now go down this rung
            start = span.start - span.start % self._num_entries
            for seq in span.holders:
                if seq in self._cursors:
                    self._cursors[seq] = min(self._cursors[seq], start)
                self.touch(seq)

    def find(self, order: _Order) -> Span | None:
        """The coldest span that may be compressed."""
        if order is not self._order:
            self._order, self._place = order, 0
        self._adopt(order)
        while self._fresh and self._place < len(order.holders):
            holder = order.holders[self._place]
            if holder.seq in self._fresh:
                if (span := self._look_at(holder, order)) is not None:
                    return span
                del self._fresh[holder.seq]
            self._place += 1
            self._adopt(order)
        return None

    def _mend(self) -> None:
        """Spans that are torn no longer belong to nobody for now."""
        for entry, torn in [*self._torn.items()]:
            if self._states(torn.seqs, torn.start) != torn.states:
                del self._torn[entry]
                self._orphans[entry] = torn.start

    def _adopt(self, order: _Order) -> None:
        """Let spans whose keeper is gone wait with another holder, who is looked at next."""
        self._mend()
        for entry, start in self._orphans.items():
            if entry not in self._keepers and (seq := order.who_names(entry, start)) is not None:
                self._wait(seq, entry, start)
                self.touch(seq)
        self._orphans.clear()

    def _look_at(self, holder: Holder, order: _Order) -> Span | None:
        """The holder's first span that may be compressed."""
        if holder.is_pinned:
            return None
        seq, num_entries = holder.seq, self._num_entries
        first, end = self._eligible(seq)
        for entry, start in [*self._waiting.get(seq, {}).items()]:
            if start + num_entries > end and seq.table[start] == entry:
                continue
            if (span := self._try(holder, entry, start, order)) is not None:
                return span
        span, cursor = None, self._cursors.get(seq, first)
        while span is None and cursor + num_entries <= end:
            entry = seq.table[cursor]
            is_seen = entry in self._keepers or entry in self._torn  # with another who shares it
            if not is_seen and self._is_source(seq.table, cursor):
                if self._is_exclusive(seq, cursor):
                    span = Span([seq], cursor, self._codec)
                else:
                    span = self._try(holder, entry, cursor, order)
            cursor += num_entries if span is None else 0
        self._cursors[seq] = cursor
        return span

    def _try(self, holder: Holder, entry: int, start: int, order: _Order) -> Span | None:
        """A shared span, if nobody keeps it; else it waits with whoever does."""
        self._release(entry)
        seq, end = holder.seq, start + self._num_entries
        if start >= len(seq.table) or seq.table[start] != entry:
            self._orphans[entry] = start
            return None
        if not self._is_source(seq.table, start):
            return None
        for other in order.warmer(holder.warmth):
            if start < len(other.table) and other.table[start] == entry:
                self._wait(other, entry, start)
                self._fresh[other] = None  # it comes later in the order
                return None
        holders = self._pool.holders(seq, start, self._num_entries, order.by_seq)
        if holders is None:
            self._tear(seq, entry, start, order)
            return None
        shortest = min(holders, key=attrgetter("num_sealed"))
        pinned = order.pinned.intersection(holders)
        if pinned or self._eligible(shortest)[1] < end:
            self._wait(pinned.pop() if pinned else shortest, entry, start)
            return None
        self._wait(seq, entry, start)  # until it is compressed
        return Span(holders, start, self._codec)

    def _eligible(self, seq: Sequence) -> tuple[int, int]:
        """The entries [start, end) of whole spans that this holder alone would let go. What is
        sealed was computed before this step: its own tokens do not move the window yet."""
        block_size = self._pool.block_size
        num_tokens = seq.num_sealed * block_size
        start, end = self._policy.compressible(num_tokens, self._codec, block_size)
        return start // block_size, end // block_size

    def _is_source(self, table: list[int], start: int) -> bool:
        """All of the span is of this rung's source codec."""
        if table[start] >> CODEC_SHIFT != self._src:
            return False
        span = table[start : start + self._num_entries : self._src_entries]
        return all(entry >> CODEC_SHIFT == self._src for entry in span)

    def _is_exclusive(self, seq: Sequence, start: int) -> bool:
        ids = block_ids(seq.table[start : start + self._num_entries])
        return all(self._pool.ref_count(block_id) == 1 for block_id in ids)

    def _wait(self, seq: Sequence, entry: int, start: int) -> None:
        self._waiting.setdefault(seq, {})[entry] = start
        self._keepers[entry] = seq

    def _release(self, entry: int) -> None:
        """It waits with nobody."""
        if (keeper := self._keepers.pop(entry, None)) is not None:
            del self._waiting[keeper][entry]
        self._torn.pop(entry, None)

    def _tear(self, seq: Sequence, entry: int, start: int, order: _Order) -> None:
        """Remember who else holds the span in part: it waits until one of the two changes."""
        end = start + self._num_entries
        span = seq.table[start:end]
        ids = {*block_ids(span)}
        seqs = [seq]
        for other in order.by_seq:
            part = other.table[start:end]
            is_whole = part == span and other.num_sealed >= end
            if not is_whole and not ids.isdisjoint(block_ids(part)):
                seqs.append(other)
                break
        self._torn[entry] = _Torn(start, tuple(seqs), self._states(seqs, start))

    def _states(self, seqs: Iterable[Sequence], start: int) -> tuple[tuple[list[int], bool], ...]:
        end = start + self._num_entries
        return tuple((seq.table[start:end], seq.num_sealed >= end) for seq in seqs)
