"""The engine: one scheduler, one runner, one worker thread; requests in, events out.

Everything but `step` may be called from any thread and answers at once: the lock is held while the
scheduler decides and never while the model computes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from kvchat.engine.ledger import Ledger, TensorBytes, read_ledger
from kvchat.engine.request import Batch, Event, Request, Shared
from kvchat.engine.scheduler import Scheduler
from kvchat.engine.stats import (
    BlockOwner,
    EngineStats,
    SessionKV,
    map_blocks,
    read_session_kv,
    read_stats,
)
from kvchat.errors import EngineError, quoted
from kvchat.kv.layout import Codec

_logger = logging.getLogger(__name__)


class StepHandle(Protocol):
    """A launched step."""

    def tokens(self) -> list[int]:
        """Wait for it: one id per sampled row in row order, -1 where logits were not finite."""


class StepRunner(Protocol):
    """What computes a step: engine/runner, or a fake in tests.

    is_async: launch returns before the step is computed, so the next one is launched before its
    tokens are read.
    """

    is_async: bool

    def launch(self, batch: Batch) -> StepHandle:
        """Start the step; the batch's block tables are not read after this returns."""

    def count_bytes(self) -> TensorBytes:
        """What its tensors take; asked between two steps."""


class Engine:
    """Owns who runs. `listener` gets every event once, in order; it must hand over, never wait.

    `bytes_per_block` are reserved for each block of the pool; of these a block of each codec uses
    `bytes_used`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        listener: Callable[[list[Event]], None],
        bytes_per_block: int = 0,
        bytes_used: tuple[int, ...] = (),
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._listener = listener
        self._bytes_per_block = bytes_per_block
        self._bytes_used = bytes_used
        self._lock = threading.Condition()  # over the scheduler and the outbox; told of new work
        self._outbox: deque[Event] = deque()
        self._delivery = threading.RLock()  # one thread delivers at a time, so order is kept
        self._audits: deque[Future[Ledger]] = deque()  # asked for
        self._unread: deque[tuple[Batch, StepHandle]] = deque()  # launched; two for a moment
        self._worker: threading.Thread | None = None
        self._is_closed = False

    def start(self) -> None:
        """Run steps in a thread of their own until `close`."""
        assert self._worker is None, "the engine is started already"
        self._worker = threading.Thread(target=self._work, name="kvchat-engine", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Finish the step in progress, end every request (`abort`) and give all blocks back."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        if self._worker is not None:
            self._worker.join()
        while self._unread:
            self._read(*self._unread.popleft())
        with self._lock:
            self._outbox += self._scheduler.release_all()
        for audit in self._audits:
            audit.cancel()
        self._deliver()

    def submit(self, request: Request) -> None:
        """Make a reply. Raises CapacityError, with the largest prompt that fits, if this cannot."""
        with self._lock:
            if self._is_closed:
                raise EngineError("the engine is closed; start kvchat again")
            self._scheduler.submit(request)
            self._lock.notify_all()

    def abort(self, request_id: int) -> Event | None:
        """End a request now; its last event is returned and delivered. None: it ended before."""
        with self._lock:
            event = self._scheduler.abort(request_id)
            self._outbox += [event] if event else []
        self._deliver()
        return event

    def release(self, session_id: int) -> Event | None:
        """Abort the session's request, if any, and give back the blocks it holds."""
        with self._lock:
            event = self._scheduler.release(session_id)
            self._outbox += [event] if event else []
        self._deliver()
        return event

    def fork(self, parent_session_id: int, child_session_id: int, num_tokens: int) -> Shared:
        """Let the child share the parent's first num_tokens, as far as computed."""
        with self._lock:
            return self._scheduler.fork(parent_session_id, child_session_id, num_tokens)

    def trim(self, session_id: int, num_tokens: int) -> int:
        """Let an idle session hold at most its first num_tokens; returns how many of these it has
        to compute again, as a compressed span was cut."""
        with self._lock:
            return self._scheduler.trim(session_id, num_tokens)

    def set_pinned(self, session_id: int, is_pinned: bool) -> None:
        """A pinned session is not compressed, and gives way last. Raises CapacityError when the
        pool could not hold it so."""
        with self._lock:
            self._scheduler.set_pinned(session_id, is_pinned)

    def set_foreground(self, session_id: int | None) -> None:
        """The session on screen is served first and never gives way."""
        with self._lock:
            self._scheduler.set_foreground(session_id)

    def stats(self) -> EngineStats:
        """The numbers for /stats and the toolbar."""
        with self._lock:
            return read_stats(self._scheduler)

    def pool_map(self) -> list[tuple[BlockOwner, Codec]]:
        """Who holds each block and how it stores its tokens, by block id, for /pool."""
        with self._lock:
            owners, pool = map_blocks(self._scheduler), self._scheduler.pool
            return [(owner, pool.codec(block_id)) for block_id, owner in enumerate(owners)]

    def session_kv(self, session_id: int) -> SessionKV:
        """What the session holds in the pool, for /kv."""
        with self._lock:
            return read_session_kv(
                self._scheduler, session_id, self._bytes_per_block, self._bytes_used
            )

    def audit(self) -> Future[Ledger]:
        """Where every byte is, counted anew by the worker between two steps."""
        audit: Future[Ledger] = Future()
        with self._lock:
            self._audits.append(audit)
            self._lock.notify_all()
        return audit

    def answer_audits(self) -> None:
        """Count, if anybody asked. For the worker, or tests without one; between two steps."""
        while self._audits:
            audit = self._audits.popleft()
            try:
                with self._lock:
                    ledger = read_ledger(self._scheduler, self._runner.count_bytes())
            except Exception as error:
                _logger.exception("an audit failed")
                audit.set_exception(error)
                continue
            audit.set_result(ledger)

    def step(self) -> bool:
        """Do one step; False when there is nothing to do. For the worker, or tests without one.

        Whatever goes wrong ends the requests of that step with a sentence, never the engine.
        """
        batch = None
        try:
            with self._lock:
                batch = self._scheduler.schedule()
            if batch is not None:
                self._unread.append((batch, self._runner.launch(batch)))
        except Exception as error:
            self._fail(batch, error)
            batch = None
        else:
            if batch is None and not self._unread:
                return False
        if self._unread and (batch is None or len(self._unread) > self._runner.is_async):
            self._read(*self._unread.popleft())
        self._deliver()
        return True

    def _read(self, batch: Batch, handle: StepHandle) -> None:
        """Wait for a step's tokens and hand them on."""
        try:
            sampled = handle.tokens()
            with self._lock:
                self._outbox += self._scheduler.update(batch, sampled)
        except Exception as error:
            self._fail(batch, error)

    def _fail(self, batch: Batch | None, error: Exception) -> None:
        _logger.error("a step failed", exc_info=error)
        sentence = f"the step failed ({type(error).__name__}: {quoted(str(error))}); send again"
        with self._lock:
            self._outbox += self._scheduler.fail(batch, sentence)

    def _work(self) -> None:
        while not self._is_closed:
            self.answer_audits()
            if self.step():
                continue
            with self._lock:
                self._lock.wait_for(
                    lambda: self._is_closed or self._scheduler.has_requests or self._audits
                )

    def _deliver(self) -> None:
        with self._delivery:
            with self._lock:
                events = [*self._outbox]
                self._outbox.clear()
            if events:
                self._listener(events)
