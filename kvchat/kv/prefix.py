"""Which sealed block holds which text: the hash chain over token ids, and the index of keys.

The chain has one link per block_size tokens, whatever the codecs. A sealed block's key is (hash of
all token ids up to its end, codec), so what is compressed stays in the chain of what follows it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from kvchat.config import NULL_BLOCK_ID
from kvchat.kv.layout import Codec, pack_entry


@dataclass(slots=True, eq=False)
class Prefix:
    """All token ids from position 0 on: block_size more than `parent` has."""

    parent: Prefix | None = field(repr=False)
    token_ids: bytes  # the last block_size, int32 little endian
    hash: bytes


class PrefixIndex:
    """The keys of sealed blocks: a block has one at most, and a key one block.

    `fingerprint` (model and KV format) and `salt` go into every hash, so that blocks of another
    model or of a private pool have other keys. `span_blocks` are, by codec, the links of the chain
    that one block holds.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        span_blocks: tuple[int, ...],
        fingerprint: bytes,
        salt: bytes,
    ) -> None:
        self.prefixes: list[Prefix | None] = [None] * num_blocks  # up to a sealed block's end
        self._ids: dict[tuple[bytes, Codec], int] = {}  # by key
        self._block_size = block_size
        self._span_blocks = [(Codec(codec), n) for codec, n in enumerate(span_blocks)]
        self._pack_ids = struct.Struct(f"<{block_size}i").pack
        self._hasher = hashlib.sha256(_field(b"F", fingerprint) + _field(b"S", salt))

    def extend(self, parent: Prefix | None, token_ids: list[int], idx: int) -> Prefix:
        """`parent` and the ids of the link `idx` after it."""
        start = idx * self._block_size
        packed = self._pack_ids(*token_ids[start : start + self._block_size])
        return Prefix(parent, packed, self.hash(parent.hash if parent else b"", packed))

    def hash(self, parent_hash: bytes, packed_ids: bytes) -> bytes:
        """sha256(fingerprint, salt, parent hash, token ids), each tagged and length-prefixed."""
        hasher = self._hasher.copy()
        hasher.update(_field(b"P", parent_hash) + _field(b"T", packed_ids))
        return hasher.digest()

    def add(self, block_id: int, prefix: Prefix, codec: Codec) -> None:
        """Seal a block, unless another has the key."""
        if (key := (prefix.hash, codec)) not in self._ids:
            self._ids[key] = block_id
            self.prefixes[block_id] = prefix

    def forget(self, block_id: int, codec: Codec) -> None:
        """Take a sealed block's key."""
        prefix = self.prefixes[block_id]
        assert prefix is not None, f"block {block_id} has no key"
        del self._ids[prefix.hash, codec]
        self.prefixes[block_id] = None

    def lookup(self, prefix: Prefix, codec: Codec) -> tuple[int, Prefix] | None:
        """The block sealed with exactly these token ids, and its own object for them.

        An equal hash alone is not believed.
        """
        block_id = self._ids.get((prefix.hash, codec), NULL_BLOCK_ID)
        held = self.prefixes[block_id]
        if held is None or not is_same(held, prefix):
            return None
        return block_id, held

    def find(self, token_ids: list[int]) -> tuple[list[int], Prefix | None]:
        """Table entries of the longest sealed prefix that leaves a token over, and that prefix.

        Of blocks that reach equally far the better codec is taken: one of a worse codec stands
        only where the better ones do not cover all of its span.
        """
        num_usable = (len(token_ids) - 1) // self._block_size
        entries: list[int] = []
        chain: list[Prefix] = []  # as far as looked; where a block is found, its own object
        while (idx := len(entries)) < num_usable:
            for codec, num_links in self._span_blocks:
                start = idx - idx % num_links
                end = start + num_links
                if end > num_usable:
                    return entries, chain[idx - 1] if entries else None
                while len(chain) < end:
                    chain.append(self.extend(chain[-1] if chain else None, token_ids, len(chain)))
                if found := self.lookup(chain[end - 1], codec):
                    block_id, chain[end - 1] = found
                    entries[start:] = [pack_entry(block_id, codec, i) for i in range(num_links)]
                    break
            else:
                break
        return entries, chain[len(entries) - 1] if entries else None

    def check(self, codecs: list[Codec]) -> set[int]:
        """Assert that every key is its block's own; the sealed blocks' ids."""
        keys = {(p.hash, codecs[i]): i for i, p in enumerate(self.prefixes) if p}
        assert keys == self._ids, f"{self._ids=} is not that of the sealed blocks {keys}"
        return set(keys.values())


def is_same(a: Prefix | None, b: Prefix | None) -> bool:
    """Equal token ids all the way; one step when the parents are the same object, as most are."""
    while a is not b:
        if a is None or b is None or a.token_ids != b.token_ids:
            return False
        a, b = a.parent, b.parent
    return True


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + len(value).to_bytes(8, "little") + value
