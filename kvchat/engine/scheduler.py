"""Who runs in the next step, with which tokens and blocks. Knows ids and counts, never tensors.

There is no prefill and no decode here: every request has num_computed_tokens chasing num_tokens,
and a step hands a budget of tokens to all of them, in one order: the foreground session's request,
then by arrival. Where their blocks come from is engine/memory's. The first in the order can always
go on, and a request that the pool can hold alone always ends.

Who owns a sequence: a running request (request.seq), else the session's resident, nobody else.
A sequence covers, in positions:

    [0, num_computed_tokens)              computed once all launched steps are done
    [num_computed_tokens, seq.num_tokens) slots of a prompt that is taken in chunks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvchat.config import SchedulerConfig
from kvchat.engine.counters import SchedulerCounters
from kvchat.engine.history import Compressed
from kvchat.engine.memory import Memory
from kvchat.engine.request import Batch, Event, Request, Row, Shared
from kvchat.engine.roster import Roster
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.block_pool import BlockPool, Sequence
from kvchat.kv.parking import HostArena, Parked

NON_FINITE = "the model's output was not finite; the turn was stopped, its cached tokens forgotten"


class Scheduler:
    """The requests of all sessions, one at most for each, and what idle sessions hold.

    `schedule` and `update` are called in turn. `schedule` may run one step ahead: before the
    `update` of a step that is launched. All other methods may be called at any time between.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.counters = SchedulerCounters()
        # Every running request gets a token in every step, so no more may run than there are.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._max_request_tokens = config.max_request_tokens
        self._roster = Roster()
        self._requests = self._roster.requests
        self._memory = Memory(config, pool, self._roster, self.counters)
        self._residents = self._memory.residents
        self._unlaunched: Batch | None = None  # being scheduled
        self._launched: list[Batch] = []  # scheduled, not yet updated: two at most
        self._untold: list[Event] = []  # of an update that is not done

    @property
    def has_requests(self) -> bool:
        """There is something to schedule."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that hold a sequence."""
        return self._roster.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that do not; wait_reason says why."""
        return len(self._requests) - self.num_running

    def sequences(self) -> Iterator[tuple[int, Sequence, int]]:
        """(session id, sequence, tokens computed in it) of everything that holds blocks."""
        for session_id, request in self._requests.items():
            if request.seq is not None:
                yield session_id, request.seq, request.num_computed_tokens
        for session_id, resident in self._residents:
            yield session_id, resident.seq, len(resident.token_ids)

    @property
    def parked(self) -> Mapping[int, Parked]:
        """What idle sessions have in main memory, by session id: they hold no blocks."""
        return self._residents.parked

    @property
    def arena(self) -> HostArena:
        """The slots in main memory."""
        return self._memory.arena

    def submit(self, request: Request) -> None:
        """Take the request in, or raise CapacityError when it could not fit with nobody else there.

        token_ids is the scheduler's from here on. What the session computed before is not again.
        """
        assert request.session_id not in self._requests, f"two requests: {request.session_id=}"
        num_tokens, limit = len(request.token_ids), self._limit(request.session_id)
        if not num_tokens:
            raise UsageError("the prompt is empty; type a message first")
        if num_tokens >= limit:
            is_pool = limit < self.config.max_model_len
            holder, flag = ("the KV pool", "--kv-mem") if is_pool else ("a session", "--ctx-size")
            if limit < self._max_request_tokens:
                holder = "a session that is pinned, and so not compressed,"
            raise CapacityError(
                f"the prompt has {num_tokens} tokens and at most {limit - 1} fit, as {holder} holds"
                f" {limit} with the reply; shorten the chat by {num_tokens - limit + 1} tokens"
                f" or raise {flag}"
            )
        self._requests[request.session_id] = request

    def abort(self, request_id: int) -> Event | None:
        """End a request where it is, keeping what it has computed; None when it ended before."""
        for request in self._requests.values():
            if request.request_id == request_id:
                event = self._finish(request, "abort")
                self._settle_if_idle()
                return event
        return None

    def set_foreground(self, session_id: int | None) -> None:
        """The session on screen: it is served first and never gives way to others."""
        self._roster.foreground = session_id

    def set_pinned(self, session_id: int, is_pinned: bool) -> None:
        """Pinned: nothing of the session is compressed, and it gives way when nobody else can.

        Raises CapacityError when the session is longer than what the pool holds so.
        """
        held = [(seq, num) for held_id, seq, num in self.sequences() if held_id == session_id]
        request, parked = self._requests.get(session_id), self.parked.get(session_id)
        num_tokens = len(request.token_ids) if request else sum(num for _, num in held)
        num_tokens = num_tokens or (len(parked.token_ids) if parked else 0)
        if is_pinned and num_tokens >= self.config.max_native_tokens:
            raise CapacityError(
                f"the session has {num_tokens} tokens, and of a pinned one, which is not"
                f" compressed, the pool holds {self.config.max_native_tokens}; raise --kv-mem"
            )
        if is_pinned:
            self._roster.pinned.add(session_id)
        else:
            self._roster.pinned.discard(session_id)
        for seq, _ in held:
            self._memory.touch(seq)

    def history(self, session_id: int) -> tuple[Compressed, ...]:
        """What was compressed of the session's, and when: the last entries, oldest first."""
        return self._memory.history.of(session_id)

    def fork(self, parent_session_id: int, child_session_id: int, num_tokens: int) -> Shared:
        """Let the child share the parent's first num_tokens, as far as computed.

        The parent may be generating. A parent that holds nothing is no error: the child's first
        turn then finds in the prefix cache what is left there.
        """
        assert child_session_id not in self._requests, f"{child_session_id=} is generating"
        parent = self._requests.get(parent_session_id)
        if parent is not None and parent.seq is not None:
            seq, token_ids = parent.seq, parent.token_ids[: parent.num_computed_tokens]
        elif (resident := self._residents.get(parent_session_id)) is not None:
            seq, token_ids = resident.seq, resident.token_ids
        elif (parked := self.parked.get(parent_session_id)) is not None:
            num_wanted = min(num_tokens, len(parked.token_ids))
            num_kept = self._residents.fork_parked(parent_session_id, child_session_id, num_wanted)
            return self._shared(parent_session_id, child_session_id, num_kept, num_wanted)
        else:
            return Shared(0, 0)
        num_wanted = min(num_tokens, len(token_ids))
        child = self.pool.fork(seq, num_wanted)
        self._residents.keep(child_session_id, child, token_ids[: child.num_tokens])
        return self._shared(parent_session_id, child_session_id, child.num_tokens, num_wanted)

    def trim(self, session_id: int, num_tokens: int) -> int:
        """Let an idle session hold at most its first num_tokens; a running one is not touched.

        Returns how many of these it gives up as well, in a compressed span that is cut: they are
        computed again with the next turn.
        """
        if session_id in self._requests:
            return 0
        num_lost = self._residents.trim(session_id, num_tokens)
        self._memory.history.trim(session_id, num_tokens - num_lost)
        self._settle_if_idle()
        return num_lost

    def release(self, session_id: int) -> Event | None:
        """End the session's request, if any, and give all it holds back to the pool."""
        request = self._requests.get(session_id)
        event = self._finish(request, "abort") if request is not None else None
        self._residents.drop(session_id)
        self._roster.pinned.discard(session_id)
        self._memory.history.forget(session_id)
        self._settle_if_idle()
        return event

    def release_all(self) -> list[Event]:
        """Release every session; the events are those of the requests that were not finished."""
        session_ids = {session_id for session_id, _ in self._residents}
        session_ids |= self._requests.keys() | self.parked.keys()
        events = [self.release(session_id) for session_id in sorted(session_ids)]
        return [event for event in events if event is not None]

    def schedule(self) -> Batch | None:
        """The next step, or None when there is nothing to do before a launched step's update.

        A step may have no rows and only compress.
        """
        batch = self._unlaunched = Batch([], [], 0)
        self._memory.begin_step(batch.block_ops)
        budget, roster = self.config.max_num_batched_tokens, self._roster
        num_preemptions = self.counters.num_preemptions
        num_waiting, blocked = 0, ""
        # One newcomer a step gets in beside a long prompt that would take all of the budget.
        num_kept = int(roster.num_running < min(len(self._requests), self._max_running))
        num_served = 0  # running requests that this loop has passed
        for request in roster.by_priority():
            if request.seq is None:
                num_kept = 0
                # Who was preempted in this step must not come back in it: when tokens are read
                # late, rows of two sequences would be launched and a token still be pending.
                if not blocked and self.counters.num_preemptions != num_preemptions:
                    blocked = "memory"
                has_budget = budget > roster.num_running - num_served
                blocked = blocked or self._admit(request, has_budget, batch)
                if blocked:
                    request.wait_reason = f"waiting for {blocked} ({num_waiting} ahead)"
                    num_waiting += 1
                    continue
            num_served += 1
            # Everybody behind it is owed one token.
            num_owed = roster.num_running - num_served + num_kept
            budget -= self._serve(request, budget - num_owed, batch)
        self._unlaunched = None
        if not batch.rows and not batch.block_ops:
            assert self._launched or not self._requests, f"stalled: {self._requests}"
            return None
        batch.num_tokens = self.config.max_num_batched_tokens - budget
        self.counters.count_step(batch)
        self._launched.append(batch)
        return batch

    def update(self, batch: Batch, sampled: list[int]) -> list[Event]:
        """Apply a step's result: one token id per sampled row, in row order, -1 = not finite.

        A step that was scheduled meanwhile is launched by now. Rows of requests that have ended
        since are skipped; a preempted request keeps its token and computes it again.
        """
        assert batch is self._launched[0], "steps are read in the order of their launch"
        num_sampled = sum(row.is_sampled for row in batch.rows)
        assert len(sampled) == num_sampled, f"{len(sampled)} tokens for {num_sampled} rows"
        del self._launched[0]
        events = self._untold
        block_size = self.config.block_size
        sampled_ids = iter(sampled)
        for row in batch.rows:
            request = row.request
            token_id = next(sampled_ids) if row.is_sampled else None
            if request.finish_reason is not None:
                if token_id is None or token_id >= 0:
                    self._residents.seal(request.session_id, request.seq, row.end)
                continue
            if token_id is not None and token_id < 0:
                if request.seq is not None:
                    self.pool.unseal(request.seq)
                events.append(self._finish(request, "error", NON_FINITE))
                continue
            end = row.start + row.num_tokens
            has_filled_block = end % block_size < row.num_tokens
            if has_filled_block and request.seq is not None:
                self.pool.seal(request.seq, request.token_ids, end)
                self._memory.touch(request.seq)
            if token_id is not None:
                events.append(self._accept(request, token_id))
        self._residents.settle()
        self._untold = []
        return events

    def fail(self, batch: Batch | None, error: str) -> list[Event]:
        """End the requests of a step that was not done (None: all requests) with this sentence,
        and those of a step built on it, which may read what it was to write.

        What the idle sessions hold is dropped: a step may have been to write into it. All that
        was sealed stays cached. A step without rows was made for all requests.
        """
        failed = [batch] if batch else []
        requests = [*self._requests.values()]
        if batch:
            failed += [step for step in self._launched if step is not batch]
            self._launched = failed[1:]
            if batch.rows:
                requests = [row.request for step in failed for row in step.rows]
        elif self._unlaunched:
            failed = [self._unlaunched]
        events, self._untold = self._untold, []  # an update may have failed half way
        for request in requests:
            if request.finish_reason is None:
                events.append(self._finish(request, "error", error))
        self._memory.fail([op for step in failed for op in step.block_ops])
        return events

    def _admit(self, request: Request, has_budget: bool, batch: Batch) -> str:
        """Give a waiting request its sequence, with slots for its tokens; or what it lacks."""
        assert not request.num_pending_tokens, f"not read: {request=}"
        if self.num_running == self._max_running:
            if (victim := self._roster.victim(request)) is None:
                return "its turn"
            self._memory.preempt(victim)
        elif not has_budget:
            return "its turn"
        if lack := self._memory.admit(request, batch.block_ops):
            return lack
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
            self.counters.num_cached_tokens += request.num_computed_tokens
        return ""

    def _serve(self, request: Request, budget: int, batch: Batch) -> int:
        """Add a running request's row of at most `budget` tokens to the step; returns how many."""
        seq = request.seq
        assert seq is not None and budget > 0, f"{seq=} {budget=}"
        num_pending = request.num_pending_tokens
        num_tokens = len(request.token_ids) + num_pending
        if num_pending and self._is_full(request, num_tokens):
            return 0  # it ends when its pending token is read
        start = request.num_computed_tokens
        num_new = min(num_tokens - start, budget)
        num_slots = start + num_new - seq.num_tokens
        if num_slots > 0:
            ops = self.pool.append(seq, num_slots)
            if ops is None:
                num_new += self._memory.claim(request, seq, num_slots, batch.block_ops) - num_slots
                if num_new <= 0:  # it keeps its blocks until somebody before it wants them
                    request.wait_reason = f"waiting for {self._memory.shortage} (0 ahead)"
                    return 0
            elif ops:
                self._memory.part(seq)
                batch.block_ops += ops
            request.wait_reason = ""
        is_sampled = start + num_new == num_tokens
        if is_sampled:
            request.num_pending_tokens = num_pending + 1
        request.num_computed_tokens = start + num_new
        batch.rows.append(Row(request, start, num_new, is_sampled))
        return num_new

    def _limit(self, session_id: int) -> int:
        """The longest sequence that the session's request may reach."""
        if session_id in self._roster.pinned:
            return self.config.max_native_tokens
        return self._max_request_tokens

    def _is_full(self, request: Request, num_tokens: int) -> bool:
        """With num_tokens the request is at the end of the context, or has all it asked for."""
        max_tokens = request.sampling.max_tokens
        if max_tokens is not None and num_tokens - request.num_prompt_tokens >= max_tokens:
            return True
        if not self._roster.pinned:  # asked for every token
            return num_tokens >= self._max_request_tokens
        return num_tokens >= self._limit(request.session_id)

    def _accept(self, request: Request, token_id: int) -> Event:
        """Append what was sampled and end the request if that ends it."""
        token_ids = request.token_ids
        token_ids.append(token_id)
        request.num_pending_tokens -= 1
        self.counters.num_generated_tokens += 1
        is_first = len(token_ids) == request.num_prompt_tokens + 1
        num_cached = request.num_cached_tokens if is_first else 0
        sampling = request.sampling
        reason = None
        if token_id in sampling.stop_token_ids and not sampling.ignore_eos:
            reason = "stop"
        elif self._is_full(request, len(token_ids)):
            reason = "length"
        if reason is not None:
            self._finish(request, reason)
        return Event(request.request_id, request.session_id, (token_id,), reason, "", num_cached)

    def _finish(self, request: Request, reason: str, error: str = "") -> Event:
        """Take the request out. Its session keeps what is computed, but not after an error.

        request.seq stays as it is: a step that is being launched may still read it.
        """
        del self._requests[request.session_id]
        request.finish_reason, request.wait_reason = reason, ""
        if request.seq is not None:
            self._roster.num_running -= 1
            token_ids = [] if error else request.token_ids[: request.num_computed_tokens]
            self._residents.keep(request.session_id, request.seq, token_ids)
        return Event(request.request_id, request.session_id, (), reason, error)

    def _shared(self, parent_id: int, child_id: int, num_kept: int, num_wanted: int) -> Shared:
        self.counters.num_recomputed_tokens += num_wanted - num_kept
        self._memory.history.fork(parent_id, child_id, num_kept)
        self._settle_if_idle()
        return Shared(num_kept, num_wanted - num_kept)

    def _settle_if_idle(self) -> None:
        if not self._launched:
            self._residents.settle()
