"""What the pool counts for /stats and the reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvchat.kv.layout import Codec


@dataclass(slots=True)
class PoolCounters:
    """Blocks counted since the start."""

    num_evictions: int = 0  # cached ones taken, which lost their key
    num_copies: int = 0  # copied because a tail was shared or sealed
    # By (codec of the sources, codec of the block that they became):
    num_compressions: dict[tuple[Codec, Codec], int] = field(default_factory=dict)  # spans
    num_blocks_freed: dict[tuple[Codec, Codec], int] = field(default_factory=dict)  # by those

    def count_compression(self, src_codec: Codec, codec: Codec, num_freed: int) -> None:
        """One span was compressed and gave back so many blocks."""
        kind = (src_codec, codec)
        self.num_compressions[kind] = self.num_compressions.get(kind, 0) + 1
        self.num_blocks_freed[kind] = self.num_blocks_freed.get(kind, 0) + num_freed
