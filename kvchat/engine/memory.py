"""Blocks for those who run: where they come from when none is free, and who has to give way.

Whoever needs a block takes it, in this order, from: the free queue (the prefix cache is its end),
idle sessions that can be parked in main memory, the ladder, the coldest idle session, the youngest
running request behind it; pinned sessions give way last of all. Who has to give way is parked, if
sessions in the arena that were idle for longer make room for it. A waiting request in the
background only takes what is free, parked, compressed or idle. What the ladder may do in one step
is bounded: when that is used up and there is more to compress, nobody has to give way and whoever
still needs a block waits for the next step.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvchat.config import SchedulerConfig
from kvchat.engine.counters import SchedulerCounters
from kvchat.engine.history import History
from kvchat.engine.request import Request
from kvchat.engine.residents import Residents
from kvchat.engine.roster import Roster
from kvchat.kv.block_ops import BlockOp, CompressSpan, ParkBlock, RestoreBlock
from kvchat.kv.block_pool import BlockPool, Sequence
from kvchat.kv.ladder import Holder, Ladder, Warmth
from kvchat.kv.layout import block_ids
from kvchat.kv.parking import HostArena, ParkedBlock


class Memory:
    """What sessions hold in the pool. `ops` are the block operations of the step being made."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, roster: Roster, counters: SchedulerCounters
    ) -> None:
        self.pool = pool
        self.history = History()
        self._config, self._roster, self._counters = config, roster, counters
        self._ladder = Ladder(config.kv, pool, self._holders, config.max_num_batched_tokens)
        self.arena = HostArena(config.num_host_slots, pool)
        self.residents = Residents(pool, self._ladder, self.arena, counters, roster.requests)
        self._entering: Holder | None = None  # of the request that `admit` is about
        self._num_moved_tokens = 0  # parked and compressed in this step
        self._is_parking_spent = False  # what was parked left nothing of the slice for who is next

    def begin_step(self, ops: list[BlockOp]) -> None:
        """Give back what sessions gave up, and make room where that is due; all is launched."""
        self.residents.settle()
        self._ladder.begin_step()
        self._num_moved_tokens, self._is_parking_spent = 0, False
        relieve = self._compress if self._config.kv.is_eager else self._relieve
        while self._ladder.is_wanted and relieve(ops):
            pass

    def touch(self, seq: Sequence) -> None:
        """It has sealed blocks, or its session is no longer pinned."""
        self._ladder.touch(seq)

    def part(self, seq: Sequence) -> None:
        """It has its own copy of its last block."""
        self._ladder.part(seq)

    def admit(self, request: Request, ops: list[BlockOp]) -> str:
        """Give a waiting request its sequence, with slots for its tokens, or say what it lacks.

        Where compression may make room for it on the way, it gets slots for a step at first.
        """
        session_id, token_ids = request.session_id, request.token_ids
        seq = self.residents.take(session_id, token_ids, request.request_id)
        missing = self.residents.missing(session_id, seq)
        if self._ladder.rungs:
            self._enter(request, seq)
        is_foreground = session_id == self._roster.foreground
        is_given = is_foreground or self._make_room(request, seq, len(missing), ops)
        is_given = is_given and self._restore(request, seq, missing, ops)
        num_computed = seq.num_tokens
        num_slots = len(token_ids) - num_computed
        if self._ladder.rungs:
            num_slots = min(num_slots, self._config.max_num_batched_tokens)
        is_given = is_given and self.claim(request, seq, num_slots, ops) > 0
        lack = "" if is_given else self.shortage
        self._entering = None
        if not is_given and session_id in self.residents.parked:
            return self._leave_parked(request, seq, lack, ops)
        if not is_given:
            self.residents.keep(session_id, seq, token_ids[:num_computed], request.request_id)
            return lack
        request.seq, request.num_computed_tokens, request.wait_reason = seq, num_computed, ""
        self._roster.num_running += 1
        return ""

    def claim(self, request: Request, seq: Sequence, num_tokens: int, ops: list[BlockOp]) -> int:
        """Slots for num_tokens more, whoever has to give way, or for as many as there is room
        for before that, when compression goes on; 0 when nobody has to."""
        while (new_ops := self.pool.append(seq, num_tokens)) is None:
            if self._relieve(ops):
                continue
            if self._ladder.rungs and (num_fitting := self._claim_some(seq, num_tokens, ops)):
                return num_fitting
            if not self._force(request, ops):
                return 0
        if new_ops:
            self._ladder.part(seq)
            ops += new_ops
        return num_tokens

    @property
    def shortage(self) -> str:
        """What somebody waits for whose claim has failed."""
        if self._is_parking_spent:
            return "memory, parking"
        return "memory, compressing" if self._ladder.is_spent else "memory"

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it computes again later what is not cached then."""
        assert request.seq is not None, f"{request.request_id=} is not running"
        self.residents.free(request.seq)
        request.seq, request.num_computed_tokens = None, 0
        request.num_preemptions += 1
        self._roster.num_running -= 1
        self._counters.num_preemptions += 1

    def fail(self, ops: list[BlockOp]) -> None:
        """These operations were not done, and their requests have ended: whoever else holds what
        they were to write computes it again."""
        written = [op for op in ops if isinstance(op, CompressSpan | RestoreBlock)]
        lost = {op.dst for op in written}
        for op in written:
            self.pool.distrust(op)
        slots = {op.slot for op in ops if isinstance(op, ParkBlock)}
        self._counters.num_drops += self.residents.lose(slots)
        for request in self._roster.requests.values():
            if request.seq is not None and not lost.isdisjoint(block_ids(request.seq.table)):
                self.preempt(request)
        while (session_id := self.residents.coldest(None, set())) is not None:
            self.residents.drop_at_once(session_id)
            self._counters.num_drops += 1
        self.residents.settle()

    def _enter(self, request: Request, seq: Sequence) -> None:
        """Let the ladder know the sequence before the request has it."""
        is_foreground = request.session_id == self._roster.foreground
        warmth = Warmth.FOREGROUND if is_foreground else Warmth.RUNNING
        is_pinned = request.session_id in self._roster.pinned
        self._entering = Holder(seq, warmth, is_pinned, request.session_id)
        self._ladder.touch(seq)
        self._ladder.refresh()

    def _make_room(
        self, request: Request, seq: Sequence, num_missing: int, ops: list[BlockOp]
    ) -> bool:
        """Park and compress until a background request's tokens, those that are parked as they
        were, fit into what is free or idle."""
        while not self._has_room(request, seq, num_missing):
            if not self._relieve(ops):
                return False
        return True

    def _restore(
        self, request: Request, seq: Sequence, missing: list[ParkedBlock], ops: list[BlockOp]
    ) -> bool:
        """Bring back all that is missing, and leave a block for what comes next; or nothing."""
        while missing and self.pool.num_free <= len(missing):
            if not self._relieve(ops) and not self._force(request, ops):
                return False
        self.residents.resume(request.session_id, missing, seq, ops)
        return True

    def _leave_parked(self, request: Request, seq: Sequence, lack: str, ops: list[BlockOp]) -> str:
        """There is no room for what is parked: it stays where it is, unless there never will be."""
        self.residents.free(seq)
        if lack != "memory" or not self._roster.is_first(request):
            return lack
        self.residents.drop(request.session_id)
        self._counters.num_drops += 1
        return self.admit(request, ops)

    def _has_room(self, request: Request, seq: Sequence, num_missing: int) -> bool:
        roster = self._roster
        num_needed = max(num_missing, self._num_blocks(request) - seq.num_blocks)
        # Each running request is left a block to grow into, else it would soon preempt this one.
        num_needed += roster.num_running
        if self._ladder.rungs:  # prompts are claimed as they are computed
            num_needed += sum(
                max(0, self._num_blocks(other) - other.seq.num_blocks)
                for other in roster.requests.values()
                if other.seq is not None and other.seq.num_tokens < len(other.token_ids)
            )
        spared = roster.pinned if roster.num_running else set[int]()
        return num_needed <= self.pool.num_free + self.residents.num_blocks(spared)

    def _num_blocks(self, request: Request) -> int:
        """Blocks of the request's tokens when they are compressed as far as they may be."""
        num_tokens, block_size = len(request.token_ids), self._config.block_size
        if request.session_id in self._roster.pinned:
            return -(-num_tokens // block_size)
        return self._config.kv.num_blocks(num_tokens, block_size)

    def _claim_some(self, seq: Sequence, num_tokens: int, ops: list[BlockOp]) -> int:
        """As many slots as the free blocks give, fewer than num_tokens."""
        block_size = self._config.block_size
        num_room = len(seq.table) * block_size - seq.num_tokens
        for num_slots in (num_room + self.pool.num_free * block_size, num_room):
            new_ops = self.pool.append(seq, num_slots) if 0 < num_slots < num_tokens else None
            if new_ops is not None:
                if new_ops:
                    self._ladder.part(seq)
                ops += new_ops
                return num_slots
        return 0

    def _force(self, request: Request, ops: list[BlockOp]) -> bool:
        """Let a session give up its blocks, unless there is more to park or to compress in the next
        step."""
        is_spent = self._is_parking_spent or self._ladder.is_spent
        return not is_spent and self._make_way(request, ops)

    def _make_way(self, request: Request, ops: list[BlockOp]) -> bool:
        """Let one session give up its blocks, if there is one that has to."""
        roster = self._roster
        for is_pinned in (False, True):
            if is_pinned and not roster.is_first(request):
                break  # somebody before it will end
            spared = set[int]() if is_pinned else roster.pinned
            session_id = self.residents.coldest(roster.foreground, spared)
            if session_id is not None:
                return self._give_up(session_id, ops)
            if victim := roster.victim(request, is_pinned):
                self.preempt(victim)
                return True
        return False

    def _give_up(self, session_id: int, ops: list[BlockOp]) -> bool:
        """Take the blocks of a session that is idle or waits to run. It is parked, where need be in
        place of colder ones, or dropped. False: it would be parked, but in the next step."""
        roster, leaving = self._roster, None
        if session_id != roster.foreground:
            leaving = self.residents.find_leaving(session_id, self._unparkable)
        if leaving is not None:
            return self._park(session_id, leaving, ops)
        resident = self.residents.drop_at_once(session_id)
        # A waiting request's prefix is found again in every step: that is no loss.
        self._counters.num_drops += resident.request_id is None
        return True

    @property
    def _unparkable(self) -> set[int]:
        """Sessions that are best where they are: pinned, or on screen."""
        roster = self._roster
        return roster.pinned if roster.foreground is None else {*roster.pinned, roster.foreground}

    def _park(self, session_id: int, leaving: list[int], ops: list[BlockOp]) -> bool:
        """Park a session in place of those that leave.

        That takes of the step's slice as compression does, but a session is parked whole: as the
        first thing of a step it may be longer than the slice, else it waits for the next step."""
        resident = self.residents.get(session_id)
        assert resident is not None, f"{session_id=} holds nothing"
        moved, num_tokens = self._num_moved_tokens, resident.seq.num_tokens
        self._is_parking_spent = moved > 0 and moved + num_tokens > self._config.kv.slice_tokens
        if self._is_parking_spent:
            return False
        self.residents.park(session_id, leaving, ops)
        self._counters.num_drops += len(leaving)
        self._num_moved_tokens += num_tokens
        return True

    def _relieve(self, ops: list[BlockOp]) -> bool:
        """Let an idle session, or else a span, take less of the pool."""
        session_id = self.residents.find_parkable(self._unparkable)
        if session_id is not None:
            return self._park(session_id, [], ops)
        is_used_up = self._num_moved_tokens >= self._config.kv.slice_tokens
        is_used_up = bool(self._ladder.rungs) and is_used_up
        self._is_parking_spent = is_used_up and any(isinstance(op, ParkBlock) for op in ops)
        return not self._is_parking_spent and self._compress(ops)

    def _compress(self, ops: list[BlockOp]) -> bool:
        compression = self._ladder.compress()
        if compression is None:
            return False
        ops.append(compression.op)
        if not self._config.kv.is_eager:  # which compresses first in every step: nobody would park
            self._num_moved_tokens += compression.end - compression.start
        self.history.note(compression)
        return True

    def _holders(self) -> Iterator[Holder]:
        """All live sequences, coldest first."""
        roster = self._roster
        front = [self._entering] if self._entering else []
        held = [(session_id, held.seq, Warmth.IDLE) for session_id, held in self.residents]
        for session_id, request in reversed(roster.requests.items()):
            if request.seq is not None:
                held.append((session_id, request.seq, Warmth.RUNNING))
        for session_id, seq, warmth in held:
            is_pinned = session_id in roster.pinned
            if session_id == roster.foreground:
                front.append(Holder(seq, Warmth.FOREGROUND, is_pinned, session_id))
            else:
                yield Holder(seq, warmth, is_pinned, session_id)
        yield from front
