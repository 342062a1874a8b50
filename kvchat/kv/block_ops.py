"""What the owner of the tensors must do with blocks, in the order of emission: plain records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvchat.kv.layout import Codec


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy all of block `src` to block `dst`, before anything is written in this step."""

    src: int
    dst: int

    @property
    def srcs(self) -> tuple[int, ...]:
        """All blocks that are read."""
        return (self.src,)


@dataclass(frozen=True, slots=True)
class CompressSpan:
    """Encode the tokens of blocks `srcs`, in order of position, into block `dst`.

    All srcs are of codec `src_codec`; dst is none of them and becomes one of `codec`.
    """

    srcs: tuple[int, ...]
    src_codec: Codec
    dst: int
    codec: Codec


@dataclass(frozen=True, slots=True)
class ParkBlock:
    """Copy all of block `src`, of whatever codec, into slot `slot` of the host arena."""

    src: int
    slot: int


@dataclass(frozen=True, slots=True)
class RestoreBlock:
    """Copy all of slot `slot` back, into block `dst`, which becomes what was parked there."""

    slot: int
    dst: int


BlockOp = CopyBlock | CompressSpan | ParkBlock | RestoreBlock


def batches(ops: Sequence[CopyBlock | CompressSpan], is_at_once: bool) -> Iterator[slice]:
    """Cut operations in a row into batches, each done by one call: none of a batch touches what
    one before it writes. `is_at_once`: they are done side by side, so none writes what another
    reads either; else a batch reads all, then writes."""
    start, read, written = 0, set[int](), set[int]()
    for idx, op in enumerate(ops):
        if op.dst in written or (is_at_once and op.dst in read) or not written.isdisjoint(op.srcs):
            yield slice(start, idx)
            start, read, written = idx, set(), set()
        read.update(op.srcs)
        written.add(op.dst)
    if start < len(ops):
        yield slice(start, len(ops))
