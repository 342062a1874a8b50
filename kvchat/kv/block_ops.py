"""What the owner of the tensors must do with blocks, in the order of emission: plain records."""

from __future__ import annotations

from dataclasses import dataclass

from kvchat.kv.layout import Codec


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy all of block `src` to block `dst`, before anything is written in this step."""

    src: int
    dst: int


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
