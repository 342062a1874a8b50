"""The sequences of sessions that are not generating: what their next turn need not compute again.

Other threads than the worker change this under the engine's lock, also while a step that reads the
same block tables is being launched. So what is trimmed or dropped keeps its blocks until `settle`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from kvchat.engine.counters import SchedulerCounters
from kvchat.kv.block_ops import BlockOp
from kvchat.kv.block_pool import BlockPool, Sequence
from kvchat.kv.ladder import Ladder
from kvchat.kv.parking import HostArena, Parked, ParkedBlock


@dataclass(slots=True, eq=False)
class Resident:
    """token_ids are computed in the first slots of seq, which may have more until `settle`."""

    seq: Sequence
    token_ids: list[int]  # its own copy
    request_id: int | None  # it is cut to this waiting request's prompt already


class Residents:
    """At most one resident per session, kept from the coldest to the one that was used last; or
    what was one and is parked in the arena.

    `ladder` is told of every sequence that comes, is cut or goes. `waiting` always has the sessions
    with a request: of these, what is held here is wanted soon."""

    def __init__(
        self,
        pool: BlockPool,
        ladder: Ladder,
        arena: HostArena,
        counters: SchedulerCounters,
        waiting: Collection[int],
    ) -> None:
        self._pool, self._ladder, self._arena, self._counters = pool, ladder, arena, counters
        self._waiting = waiting
        self._held: dict[int, Resident] = {}  # by session id, coldest first
        self._parked: dict[int, Parked] = {}  # by session id, which holds nothing else
        self._trimmed: list[Resident] = []  # until settle: their sequences are too long
        self._dropped: list[Sequence] = []  # until settle: they belong to nobody
        self._num_own: dict[int, int] = {}  # by session id: blocks that nobody else holds, at most
        self._num_copies = 0  # the pool's, then

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[tuple[int, Resident]]:
        return iter(self._held.items())

    def num_blocks(self, spared: set[int]) -> int:
        """Blocks that dropping all but these sessions would free; one that is shared counts once
        for each holder."""
        return sum(
            resident.seq.num_blocks
            for session_id, resident in self._held.items()
            if session_id not in spared
        )

    def get(self, session_id: int) -> Resident | None:
        """What the session holds, to look at or to fork from."""
        return self._held.get(session_id)

    @property
    def parked(self) -> Mapping[int, Parked]:
        """What sessions have in main memory, by session id."""
        return self._parked

    def keep(
        self, session_id: int, seq: Sequence, token_ids: list[int], request_id: int | None = None
    ) -> None:
        """Own seq and token_ids, the computed ones, from now on, in place of what was held."""
        self.drop(session_id)
        self._held[session_id] = Resident(seq, token_ids, request_id)
        self._num_own.pop(session_id, None)
        self._ladder.touch(seq)
        self.trim(session_id, len(token_ids))

    def take(self, session_id: int, token_ids: list[int], request_id: int) -> Sequence:
        """A sequence, now the caller's, with the longest computed prefix of token_ids.

        It is the session's, cut to what it shares with token_ids, or one from the prefix cache if
        that has more. At least one token is left to compute. Call `settle` first.
        """
        resident = self._held.pop(session_id, None)
        if resident is None:
            return self._find(session_id, token_ids)
        if resident.request_id == request_id:
            return resident.seq
        num_common = min(_num_common(resident.token_ids, token_ids), len(token_ids) - 1)
        num_kept = self._pool.num_kept(resident.seq, num_common)
        num_found = self._pool.match(token_ids)
        self._counters.num_recomputed_tokens += max(0, num_common - max(num_kept, num_found))
        if num_found > num_kept:
            self.free(resident.seq)
            return self._pool.alloc(token_ids)
        self._cut(resident.seq, num_common)
        return resident.seq

    def missing(self, session_id: int, seq: Sequence) -> list[ParkedBlock]:
        """What has to be restored behind seq, which `take` has just given; none for most."""
        parked = self._parked.get(session_id)
        self._num_own.clear()  # a part of seq may be given back
        return self._arena.missing(parked, seq) if parked else []

    def resume(
        self, session_id: int, missing: list[ParkedBlock], seq: Sequence, ops: list[BlockOp]
    ) -> None:
        """Restore it into free blocks, of which there are enough."""
        if parked := self._parked.pop(session_id, None):
            self._arena.resume(parked, missing, seq, ops)
            self._ladder.touch(seq)

    def find_parkable(self, spared: set[int]) -> int | None:
        """The session that was idle for longest and fits into the arena; not the spared ones, nor
        those that wait to run. Call `settle` first."""
        if not self._arena.num_free:
            return None
        for session_id, resident in self._held.items():
            is_kept = session_id in self._waiting or session_id in spared
            if is_kept or not self._arena.has_room(resident.seq):
                continue
            if self._owns_half(session_id, resident.seq):
                return session_id
        return None

    def find_leaving(self, session_id: int, spared: set[int]) -> list[int] | None:
        """The sessions, coldest first, that have to leave the arena so that this one can be parked
        there; not the spared ones, nor those that wait to run. None if that is not enough, or if
        parking it would free too little. Call `settle` first."""
        seq = self._held[session_id].seq
        if seq.num_blocks > self._arena.num_slots or not self._owns_half(session_id, seq):
            return None
        parked_ids = [i for i in self._parked if i not in self._waiting and i not in spared]
        num_leaving = self._arena.num_leaving(seq, (self._parked[i] for i in parked_ids))
        return None if num_leaving is None else parked_ids[:num_leaving]

    def park(self, session_id: int, leaving: list[int], ops: list[BlockOp]) -> None:
        """Let a session wait in the arena, for which those that are `leaving` make room, as
        `find_parkable` or `find_leaving` has just said."""
        for parked_id in leaving:
            self.drop(parked_id)
        self._arena.counters.num_displaced += len(leaving)
        resident = self._held.pop(session_id)
        self._parked[session_id] = self._arena.park(resident.seq, resident.token_ids, ops)
        self.free(resident.seq)

    def fork_parked(self, parent_id: int, child_id: int, num_tokens: int) -> int:
        """Share a parked session's first num_tokens; returns how many of them are kept."""
        child = self._arena.fork(self._parked[parent_id], num_tokens)
        self.drop(child_id)
        if child.token_ids:
            self._parked[child_id] = child
        return len(child.token_ids)

    def lose(self, slots: set[int]) -> int:
        """Forget the sessions that are parked in these slots; returns how many."""
        lost = [
            session_id
            for session_id, parked in self._parked.items()
            if not slots.isdisjoint(block.slot for block in parked.blocks)
        ]
        for session_id in lost:
            self.drop(session_id)
        return len(lost)

    def seal(self, session_id: int, seq: Sequence | None, num_computed: int) -> None:
        """A step that was launched for a request that has ended is read: if the session still holds
        its sequence, so many tokens of it are computed."""
        resident = self._held.get(session_id)
        if resident is not None and resident.seq is seq:
            self._pool.seal(seq, resident.token_ids, num_computed)
            self._ladder.touch(seq)

    def trim(self, session_id: int, num_tokens: int) -> int:
        """Hold at most the first num_tokens; returns how many of these are given up as well, as
        they are a part of a compressed span."""
        resident = self._held.get(session_id)
        if resident is None:
            return self._trim_parked(session_id, num_tokens)
        token_ids, seq = resident.token_ids, resident.seq
        num_wanted = min(num_tokens, len(token_ids))
        del token_ids[self._pool.num_kept(seq, num_wanted) :]
        num_lost = num_wanted - len(token_ids)
        self._counters.num_recomputed_tokens += num_lost
        if not token_ids:
            self.drop(session_id)
        elif seq.num_tokens > len(token_ids):
            self._trimmed.append(resident)
        return num_lost

    def drop(self, session_id: int) -> None:
        """Forget the session."""
        if resident := self._held.pop(session_id, None):
            self._dropped.append(resident.seq)
        if parked := self._parked.pop(session_id, None):
            self._arena.release(parked)

    def coldest(self, last_session_id: int | None, spared: set[int]) -> int | None:
        """What was idle for longest, then what waits to run, the last session last and the spared
        ones not at all; None: none left."""
        held_ids = [held_id for held_id in self._held if held_id not in spared]
        return min(
            held_ids,
            key=lambda held_id: (held_id == last_session_id, held_id in self._waiting),
            default=None,
        )

    def drop_at_once(self, session_id: int) -> Resident:
        """Forget a session that is not parked, and free what it held."""
        resident = self._held.pop(session_id)
        self.free(resident.seq)
        return resident

    def free(self, seq: Sequence) -> None:
        """Give back all of a sequence."""
        self._num_own.clear()
        self._ladder.forget(seq)
        self._pool.free(seq)

    def settle(self) -> None:
        """Give back the blocks of what was trimmed and dropped; every step is launched by now."""
        for seq in self._dropped:
            self.free(seq)
        for resident in self._trimmed:
            if not resident.seq.is_freed and resident.seq.num_tokens > len(resident.token_ids):
                self._cut(resident.seq, len(resident.token_ids))
        self._dropped.clear()
        self._trimmed.clear()

    def _find(self, session_id: int, token_ids: list[int]) -> Sequence:
        """What the pool has of token_ids; what the session has parked is cut to them, or given back
        where the pool has more."""
        seq = self._pool.alloc(token_ids)
        if parked := self._parked.get(session_id):
            num_common = min(_num_common(parked.token_ids, token_ids), len(token_ids) - 1)
            if seq.num_tokens > self._arena.num_kept(parked, num_common):
                self._counters.num_recomputed_tokens += max(0, num_common - seq.num_tokens)
                self.drop(session_id)
            else:
                self._trim_parked(session_id, num_common)
        return seq

    def _trim_parked(self, session_id: int, num_tokens: int) -> int:
        parked = self._parked.get(session_id)
        if parked is None:
            return 0
        num_wanted = min(num_tokens, len(parked.token_ids))
        self._arena.trim(parked, num_wanted)
        num_lost = num_wanted - len(parked.token_ids)
        self._counters.num_recomputed_tokens += num_lost
        if not parked.token_ids:
            del self._parked[session_id]
        return num_lost

    def _owns_half(self, session_id: int, seq: Sequence) -> bool:
        """At least half of its blocks would be free if it were parked.

        Tables are long: who shares more than half of its blocks is looked at again when blocks were
        given back, or when so many were compressed that it may be no more than half.
        """
        if self._num_copies != self._pool.counters.num_copies:  # a shared tail was given back
            self._num_copies = self._pool.counters.num_copies
            self._num_own.clear()
        if 2 * self._num_own.get(session_id, seq.num_blocks) < seq.num_blocks:
            return False
        num_own = self._num_own[session_id] = self._arena.num_own(seq)
        return 2 * num_own >= seq.num_blocks

    def _cut(self, seq: Sequence, num_tokens: int) -> None:
        self._num_own.clear()
        self._ladder.forget(seq)
        self._pool.truncate(seq, num_tokens)
        self._ladder.touch(seq)


def _num_common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    num_shorter = min(len(a), len(b))
    if a[:num_shorter] == b[:num_shorter]:
        return num_shorter
    return next(idx for idx in range(num_shorter) if a[idx] != b[idx])
