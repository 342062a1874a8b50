"""Drives one engine through the scripts, step by step, on a clock that runs only while it works.

So several engines can take turns on one machine, slice by slice, and each sees the times that it
would see alone; and what is measured between two steps costs no time.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from kvchat.bench.arms import Setup
from kvchat.bench.metrics import Reply, RunLog, StepTime
from kvchat.bench.tally import Tally, is_decode
from kvchat.bench.workload import Script
from kvchat.config import SamplingParams
from kvchat.engine.engine import StepHandle, StepRunner
from kvchat.engine.ledger import TensorBytes, read_ledger
from kvchat.engine.request import Batch, Event, Request
from kvchat.errors import EngineError
from kvchat.kv.layout import unpack_entry

_LOOK_STEPS = 4  # the tables are read after every so many steps


class CountingRunner:
    """Any runner, with a tally of what goes by; remembers the last batch."""

    def __init__(self, runner: StepRunner, tally: Tally) -> None:
        self._runner, self.tally = runner, tally
        self.is_async = runner.is_async
        self.last: Batch | None = None

    def launch(self, batch: Batch) -> StepHandle:
        """Count, then run."""
        self.tally.count(batch)
        self.last = batch
        return self._runner.launch(batch)

    def count_bytes(self) -> TensorBytes:
        """The runner's."""
        return self._runner.count_bytes()


class NoModel:
    """Samples the same token for every row: what scheduler and pool do, without forward passes."""

    is_async = False

    class _Step:
        def __init__(self, num_sampled: int) -> None:
            self._num_sampled = num_sampled

        def tokens(self) -> list[int]:
            return [1] * self._num_sampled

    def launch(self, batch: Batch) -> NoModel._Step:
        """Nothing is computed."""
        return self._Step(sum(row.is_sampled for row in batch.rows))

    def count_bytes(self) -> TensorBytes:
        """There are no tensors."""
        raise EngineError("a run without a model has no tensors")


class Driver:
    """One run of the scripts. `num_at_once` sessions are open at a time: a session ends with its
    last reply, and stays in the pool while there is room, as a chat that is left open does."""

    def __init__(
        self,
        setup: Setup,
        runner: StepRunner,
        scripts: list[Script],
        num_at_once: int | None = None,
        stop_ids: frozenset[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.setup, self.log, self.tally = setup, RunLog(), Tally()
        self._clock, self._stop_ids = clock, stop_ids
        self._runner = CountingRunner(runner, self.tally)
        self._events: list[Event] = []
        self.engine, self.scheduler = setup.start(self._runner, self._events.extend)
        self._chats = {s.session_id: [*s.depth_ids] for s in scripts}
        self._scripts = {script.session_id: script for script in scripts}
        self._now_s = 0.0
        self._num_requests = 0
        self._open: dict[int, tuple[Request, Reply, int]] = {}  # with the index of the turn
        self.replies: dict[tuple[int, int], list[int]] = {}  # ids, by session and turn
        self.problems: list[str] = []
        self.held: list[tuple[float, int]] = []  # (seconds, blocks) after each step
        self.num_leaked = 0  # blocks, once all is given back
        num_first = len(scripts) if num_at_once is None else num_at_once
        self._due = [(s.arrival_s, s.session_id, 0) for s in scripts[:num_first]]
        self._later = scripts[num_first:]
        heapq.heapify(self._due)
        self._prefill_depth()

    @property
    def is_done(self) -> bool:
        """Every reply has been made."""
        return not self._due and not self._open

    @property
    def peak_held(self) -> int:
        """Blocks, at the end of the step that held most."""
        return max((num_held for _, num_held in self.held), default=0)

    @property
    def share_done(self) -> float:
        """Of all tokens that are to be generated."""
        turns = [turn for script in self._scripts.values() for turn in script.turns]
        return self.tally.num_sampled / sum(turn.num_reply for turn in turns)

    @property
    def num_calm(self) -> int:
        """Sessions that were never preempted, and lost nothing that they had to compute again."""
        preempted = {r.session_id for r in self.log.replies if r.num_preemptions}
        return len(self._scripts) - len(preempted | self.tally.redone_sessions)

    def run(self, seconds: float = float("inf")) -> None:
        """Work for so many seconds, or to the end."""
        end_s = self._now_s + seconds
        while not self.is_done and self._now_s < end_s:
            self._submit_due()
            self._step()

    def take_turn(self, session_id: int, token_ids: list[int]) -> list[int]:
        """A chat that goes on by one token, by itself; the chat after it."""
        request = self._submit(session_id, token_ids, 1)
        while self.scheduler.has_requests:
            self.engine.step()
        self._events.clear()
        return request.token_ids

    def close(self) -> None:
        """Check the books, give everything back, and look whether anything is left."""
        pool = self.scheduler.pool
        self._look()
        self.problems += self.tally.differences(self.engine.stats())
        pool.check_integrity([seq for _, seq, _ in self.scheduler.sequences()])
        self.engine.close()
        pool.check_integrity([])
        self.num_leaked = pool.num_held

    def audit(self) -> list[str]:
        """The ledger's own findings: every byte of the tensors against map and tables."""
        ledger = read_ledger(self.scheduler, self._runner.count_bytes())
        return list(ledger.problems)

    def _prefill_depth(self) -> None:
        """Compute what stands before the first turns; none of it is in the log."""
        for script in self._scripts.values():
            if script.depth_ids:
                self._submit(script.session_id, script.depth_ids, 1)
        while self.engine.step():
            pass
        self._events.clear()

    def _submit(self, session_id: int, token_ids: list[int], max_tokens: int) -> Request:
        self._num_requests += 1
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=self._stop_ids is None,
            stop_token_ids=self._stop_ids or frozenset(),
        )
        request = Request(self._num_requests, session_id, [*token_ids], len(token_ids), sampling)
        self.engine.submit(request)
        return request

    def _submit_due(self) -> None:
        if not self._open and self._due:
            self._now_s = max(self._now_s, self._due[0][0])  # nobody waits through a pause
        while self._due and self._due[0][0] <= self._now_s:
            due_s, session_id, turn_idx = heapq.heappop(self._due)
            turn = self._scripts[session_id].turns[turn_idx]
            chat = self._chats[session_id]
            chat += turn.prompt_ids
            request = self._submit(session_id, chat, turn.num_reply)
            reply = Reply(session_id, due_s, len(chat))
            self._open[session_id] = (request, reply, turn_idx)

    def _step(self) -> None:
        started = self._clock()
        self.engine.step()
        seconds = self._clock() - started
        self._now_s += seconds
        self.log.seconds = self._now_s
        if self._runner.last is not None:
            self.log.steps.append(self._time_step(self._runner.last, seconds))
        for event in self._events:
            self._take(event)
        self._events.clear()
        self.held.append((self._now_s, self.scheduler.pool.num_held))
        if self.tally.num_steps % _LOOK_STEPS == 0:
            self._look()

    def _look(self) -> None:
        """Read the tables, and compare the pool's own count of held blocks with them."""
        num_blocks = self.tally.look(self.scheduler, self.setup.layout)
        if num_blocks != self.scheduler.pool.num_held:
            self.problems.append(
                f"tables name {num_blocks} blocks, the pool counts {self.scheduler.pool.num_held}"
            )

    def _time_step(self, batch: Batch, seconds: float) -> StepTime:
        decodes = [row for row in batch.rows if is_decode(row)]
        num_prompt = sum(row.num_tokens for row in batch.rows) - len(decodes)
        kv_bytes = 0
        if not num_prompt:
            kv_bytes = sum(self._kv_bytes(row.request, row.end) for row in decodes)
        return StepTime(seconds, num_prompt, len(decodes), kv_bytes)

    def _kv_bytes(self, request: Request, num_tokens: int) -> int:
        """Stored bytes that attention reads for one new token of the request."""
        if request.seq is None:
            return 0
        layout = self.setup.layout
        num_bytes = 0.0
        for entry in request.seq.table[: -(-num_tokens // layout.spec.block_size)]:
            codec = unpack_entry(entry)[1]
            num_bytes += layout.bytes_used(codec) / layout.span_blocks[codec]
        return round(num_bytes)

    def _take(self, event: Event) -> None:
        if event.session_id not in self._open:
            return
        request, reply, turn_idx = self._open[event.session_id]
        reply.token_times_s += [self._now_s] * len(event.token_ids)
        if event.finish_reason is None:
            return
        if event.finish_reason not in ("stop", "length"):
            self.problems.append(f"a reply ended with {event.finish_reason}: {event.error}")
        reply.num_preemptions = request.num_preemptions
        del self._open[event.session_id]
        if reply.token_times_s:
            self.log.replies.append(reply)
        chat = self._chats[event.session_id]
        self.replies[event.session_id, turn_idx] = request.token_ids[len(chat) :]
        self._chats[event.session_id] = [*request.token_ids]
        self._go_on(self._scripts[event.session_id], turn_idx + 1)

    def _go_on(self, script: Script, turn_idx: int) -> None:
        if turn_idx < len(script.turns):
            think_s = script.turns[turn_idx].think_s
            heapq.heappush(self._due, (self._now_s + think_s, script.session_id, turn_idx))
        elif self._later:
            following = self._later.pop(0)
            heapq.heappush(self._due, (self._now_s, following.session_id, 0))
