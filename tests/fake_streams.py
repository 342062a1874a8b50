"""Two streams in plain Python, whose work is done late and in any order that their events allow.

Whatever is queued is done when somebody waits for it, or by chance before: so an order that no
event asks for is sooner or later broken, and wrong bytes show it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable


class FakeEvent:
    """A point in a stream; queued in another one, it is waited for."""

    def __init__(self) -> None:
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed

    def set(self) -> None:
        self.has_passed = True


class FakeStreams:
    """kv/transfers.Streams over queues. `rng` decides what is done next; `haste` is how likely the
    side stream is that when both could go on."""

    def __init__(self, rng: random.Random, haste: float) -> None:
        self.rng, self.haste = rng, haste
        self.compute: deque[FakeEvent | Callable[[], object]] = deque()
        self.side: deque[FakeEvent | Callable[[], object]] = deque()
        self.num_waits = 0  # of the compute stream

    def launch(self, action: Callable[[], object]) -> None:
        """Queue it on the compute stream."""
        self.compute.append(action)
        self.advance(self.rng.choice((0, 0, 1, 3)))

    def follow(self) -> None:
        self.advance(self.rng.choice((0, 0, 1, 3)))
        event = FakeEvent()
        self.compute.append(event.set)
        self.side.append(event)

    def copy(self, pieces: list) -> None:
        self.side += [lambda dst=dst, src=src: dst.copy_(src) for dst, src in pieces]

    def record(self) -> FakeEvent:
        event = FakeEvent()
        self.side.append(event.set)
        return event

    def wait(self, event: FakeEvent) -> None:
        self.num_waits += 1
        self.compute.append(event)

    def synchronize(self) -> None:
        while self.side:
            self.advance()

    def advance(self, num_actions: int = 1) -> None:
        """Do so many of the actions that can be done now."""
        for _ in range(num_actions):
            ready = [queue for queue in (self.compute, self.side) if self._is_ready(queue)]
            if not ready:
                assert not self.compute and not self.side, "the streams wait for each other"
                return
            is_side = len(ready) == 2 and self.rng.random() < self.haste
            action = ready[is_side].popleft()
            if not isinstance(action, FakeEvent):
                action()

    def drain(self) -> None:
        """Do all."""
        while self.compute or self.side:
            self.advance()

    @staticmethod
    def _is_ready(queue: deque) -> bool:
        return bool(queue) and not (isinstance(queue[0], FakeEvent) and not queue[0].has_passed)
