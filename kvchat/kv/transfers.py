"""Copies between the pool and the host arena, beside what the device computes.

They are queued on a stream of their own, the side stream, in the order of their emission, so copies
that meet in a slot of the arena are done one after another. Against the compute stream, in which
all else is launched, events keep these orders; the host waits for none of them:

    a copy, out of or into a block      after all that was launched before it
    what reads a block copied into      after the copy: the compute stream waits at once
    what writes a block copied out of   after the copy: whoever launches it calls `await_copies`

So a block is free for its next owner as soon as its copy is queued.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kvchat.kv.block_ops import ParkBlock, RestoreBlock

Piece = tuple[Tensor, Tensor]  # destination and source: uint8, of equal shapes


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """The stream has passed it."""


class Streams(Protocol):
    """A compute stream, the one that is current whenever this is used, and a side stream."""

    def follow(self) -> None:
        """What comes on the side stream from now on waits for all that was launched."""

    def copy(self, pieces: list[Piece]) -> None:
        """Queue copies on the side stream."""

    def record(self) -> Event:
        """The point behind all that is queued on the side stream."""

    def wait(self, event: Event) -> None:
        """What is launched from now on waits for the event."""

    def synchronize(self) -> None:
        """Wait here until all that is queued on the side stream is done."""


class _Passed:
    """The event of what is done already."""

    def query(self) -> bool:
        return True


class DirectStreams:
    """On a CPU: everything is done at once, in the order of the calls."""

    def follow(self) -> None:
        """Nothing is ever launched and not done."""

    def copy(self, pieces: list[Piece]) -> None:
        """Copy now."""
        for dst, src in pieces:
            dst.copy_(src)

    def record(self) -> Event:
        """It has passed."""
        return _Passed()

    def wait(self, event: Event) -> None:
        """It has passed."""

    def synchronize(self) -> None:
        """All is done."""


class CudaStreams:
    """On a GPU: torch's current stream and one of our own. Host tensors are to be page-locked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def follow(self) -> None:
        """By an event of the current stream."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, pieces: list[Piece]) -> None:
        """Returns before they are done."""
        with torch.cuda.stream(self._side):
            for dst, src in pieces:
                dst.copy_(src, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        """An event of the side stream."""
        event = torch.cuda.Event()
        event.record(self._side)
        return event

    def wait(self, event: Event) -> None:
        """The current stream waits, not the host."""
        assert isinstance(event, torch.cuda.Event), f"{event}"
        torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self) -> None:
        """The host waits."""
        self._side.synchronize()


class Transfers:
    """Parks and restores whole blocks. `pool` and `host` are tensors in pairs, payload and side:
    [num_blocks, ...] on the device, [num_slots, ...] of the same pieces in main memory."""

    def __init__(
        self, streams: Streams, pool: tuple[Tensor, ...], host: tuple[Tensor, ...]
    ) -> None:
        self._streams = streams
        self._tensors = [*zip(pool, host, strict=True)]
        self._num_parks = 0  # lists of them, which are numbered from 1
        # Those that the compute stream may have to wait for, oldest first, and by block id the
        # number of the last one that reads it. An event stands for all before it, too.
        self._events: dict[int, Event] = {}
        self._readers: dict[int, int] = {}

    def park(self, ops: list[ParkBlock]) -> None:
        """Copy blocks to their slots. Whoever writes the blocks next calls `await_copies`."""
        self._streams.follow()
        pieces = []
        for block_id, slot, num_blocks in _stretches([(op.src, op.slot) for op in ops]):
            for blocks, slots in self._tensors:
                src = blocks[block_id : block_id + num_blocks]
                pieces.append((slots[slot : slot + num_blocks], src))
        self._streams.copy(pieces)
        self._forget_passed()
        self._num_parks += 1
        self._events[self._num_parks] = self._streams.record()
        self._readers.update(dict.fromkeys((op.src for op in ops), self._num_parks))

    def restore(self, ops: list[RestoreBlock]) -> None:
        """Copy slots back to blocks, which what is launched from now on may read and write."""
        self._streams.follow()
        pieces = []
        for block_id, slot, num_blocks in _stretches([(op.dst, op.slot) for op in ops]):
            for blocks, slots in self._tensors:
                dst = blocks[block_id : block_id + num_blocks]
                pieces.append((dst, slots[slot : slot + num_blocks]))
        self._streams.copy(pieces)
        self._streams.wait(self._streams.record())
        self._forget(self._num_parks)

    def await_copies(self, block_ids: Iterable[int]) -> None:
        """Let what is launched from now on wait for the copies out of these blocks, which it may
        write. block_ids are not looked at while no copy is under way."""
        if not self._events:
            return
        self._forget_passed()
        number = max((self._readers.get(block_id, 0) for block_id in block_ids), default=0)
        if number:
            self._streams.wait(self._events[number])
            self._forget(number)

    def synchronize(self) -> None:
        """Wait here until every slot holds what was parked in it, so that the host may read it."""
        self._streams.synchronize()
        self._forget(self._num_parks)

    def _forget_passed(self) -> None:
        passed = 0
        for number, event in self._events.items():
            if not event.query():
                break
            passed = number
        if passed:
            self._forget(passed)

    def _forget(self, number: int) -> None:
        """The compute stream cannot overtake these parks any more, up to this number."""
        self._events = {n: event for n, event in self._events.items() if n > number}
        self._readers = {block_id: n for block_id, n in self._readers.items() if n > number}


def _stretches(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(block id, slot, how many) of pairs in a row that go on by one on both sides: one copy each.

    Sessions mostly lie so, and a copy costs the host about as much as its blocks the device.
    """
    starts = [0] if pairs else []
    for idx, (last, pair) in enumerate(pairwise(pairs), 1):
        if pair != (last[0] + 1, last[1] + 1):
            starts.append(idx)
    return [(*pairs[i], j - i) for i, j in pairwise([*starts, len(pairs)])]
