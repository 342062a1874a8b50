"""Bugs of a block pool: those that the field has had (forks, copies, hashes, leaks) and ours."""

from __future__ import annotations

from mutants import Mutant

COMPARE = (" or not is_same(held, prefix):", ":")
NO_PARENT = ('_field(b"P", parent_hash) + ', "")
WEAK_HASH = ("return hasher.digest()", "return hasher.digest()[:1]")


def _mutant(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.kv.block_pool", edits)


def index_mutant(name: str, *edits: tuple[str, str]) -> Mutant:
    """A bug of the hash chain or of the index, under the pool."""
    return Mutant(name, "kvchat.kv.prefix", edits, user="kvchat.kv.block_pool")


MUTANTS = [
    _mutant(
        "fork forgets the last block's reference",
        ("held_ids = block_ids(child.table)", "held_ids = block_ids(child.table[:-1])"),
    ),
    _mutant(
        "fork keeps the parent's sealed count",
        ("        self._cut(child, num_tokens)\n", "        child.num_tokens = num_tokens\n"),
    ),
    _mutant(
        "no copy on write",
        ("        return self._ref_counts[block_id] == 1 and", "        return True or"),
    ),
    _mutant(
        "a shared tail is written in place while it has room",
        (" and self._is_writable(table[-1]):\n            seq", ":\n            seq"),
    ),
    _mutant(
        "a sealed tail is written in place",
        ("== 1 and self._prefixes[block_id] is None", "== 1"),
    ),
    _mutant(
        "copy in the wrong direction",
        ("CopyBlock(old_id, table[-1])", "CopyBlock(table[-1], old_id)"),
    ),
    _mutant(
        "copy forgotten",
        ("                ops.append(CopyBlock(old_id, table[-1]))\n", ""),
    ),
    _mutant(
        "the copied tail keeps its reference",
        ("            self._release([old_id])\n", ""),
    ),
    _mutant("double free unnoticed", ("seq.is_freed = True", "seq.is_freed = False")),
    _mutant(
        "freed twice",
        ("        self._release(dropped)\n", "        self._release(dropped + dropped[:1])\n"),
    ),
    _mutant(
        "truncate keeps a freed block",
        ("del seq.table[num_kept:]", "del seq.table[num_kept + 1 :]"),
    ),
    _mutant(
        "truncate leaks a block",
        ("block_ids(seq.table[num_kept:])", "block_ids(seq.table[num_kept + 1 :])"),
    ),
    _mutant(
        "truncate keeps the longer prefix",
        ("seq.num_sealed - 1, seq.prefix.parent", "seq.num_sealed - 1, seq.prefix"),
    ),
    _mutant(
        "tail freed last",
        ("in reversed(block_ids):", "in block_ids:"),
    ),
    _mutant(
        "leak when memory runs out in the middle of an append",
        (
            "            return None\n        ops",
            "            self.num_free and self._take()\n            return None\n        ops",
        ),
    ),
    _mutant(
        "an append of one block too many is begun",
        (
            "num_new > self.num_free or num_new + is_copied > self._num_unheld + num_returned",
            "num_new + is_copied > self._num_unheld + num_returned + 1",
        ),
    ),
    _mutant(
        "the last block is never given",
        ("num_new > self.num_free or", "num_new > max(0, self.num_free - 1) or"),
    ),
    _mutant(
        "a shared tail counts as a block to be had",
        (
            "num_returned = is_copied and self._ref_counts[table[-1]] == 1",
            "num_returned = is_copied",
        ),
    ),
    _mutant("null block handed out", ("self._num_touched = 1 ", "self._num_touched = 0 ")),
    _mutant(
        "stale key after an eviction",
        ("(last=False)\n            self._forget(block_id)\n", "(last=False)\n"),
    ),
    index_mutant(
        "stale index after an eviction",
        ("        del self._ids[prefix.hash, codec]\n", ""),
    ),
    _mutant(
        "a hit block stays in the free queue",
        ("                del self._cached[block_id]\n", "                pass\n"),
    ),
    _mutant(
        "a hit takes no reference",
        (
            "            self._ref_counts[block_id] += 1\n        num_tokens = len",
            "        num_tokens = len",
        ),
    ),
    index_mutant(
        "a total hit leaves nothing to compute",
        ("(len(token_ids) - 1) //", "len(token_ids) //"),
    ),
    _mutant(
        "seal of what is claimed but not computed",
        ("min(num_computed, len(token_ids))", "min(seq.num_tokens, len(token_ids))"),
    ),
    _mutant(
        "seal of a partial block",
        ("min(num_computed, len(token_ids)) //", "(min(num_computed, len(token_ids)) + 1) //"),
    ),
    index_mutant(
        "seal keys a second equal block too",
        ("not in self._ids:", "or True:"),
    ),
    _mutant(
        "unseal of the last block only",
        (
            "for block_id in block_ids(seq.table):\n            if self",
            "for block_id in block_ids(seq.table)[-1:]:\n            if self",
        ),
    ),
    index_mutant("weak hash believed", WEAK_HASH, COMPARE),
    index_mutant(
        "hash without the parent believed",
        NO_PARENT,
        COMPARE,
    ),
    index_mutant(
        "hash without the token ids believed",
        (' + _field(b"T", packed_ids)', ""),
        COMPARE,
    ),
    index_mutant(
        "hash without the parent, only the block's own ids compared",
        NO_PARENT,
        ("        a, b = a.parent, b.parent\n", "        return True\n"),
    ),
]
