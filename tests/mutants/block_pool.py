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
            "for block_id in block_ids(seq.table):\n            self._f",
            "for block_id in block_ids(seq.table)[-1:]:\n            self._f",
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
    # Compressed spans
    _mutant(
        "all entries of a span name its first piece",
        ("[pack_entry(dst, codec, i) for", "[pack_entry(dst, codec, 0) for"),
    ),
    _mutant(
        "the entries of a span are numbered backwards",
        ("(dst, codec, i) for", "(dst, codec, num_entries - 1 - i) for"),
    ),
    _mutant(
        "a compressed block is keyed as a native one",
        ("self._index.add(dst, prefix, codec)", "self._index.add(dst, prefix, Codec.NATIVE)"),
    ),
    _mutant(
        "a compressed block is keyed at its span's start",
        ("prefix = self._prefixes[srcs[-1]]", "prefix = self._prefixes[srcs[0]]"),
    ),
    _mutant(
        "a compressed block is not keyed",
        ("            self._index.add(dst, prefix, codec)\n", "            pass\n"),
    ),
    _mutant(
        "a block compressed from unsealed ones is keyed",
        ("if prefix is not None and is_sealed:", "if prefix is not None:"),
    ),
    _mutant(
        "what was compressed keeps its key",
        ("            self._forget(src)\n", ""),
    ),
    _mutant(
        "what was compressed is freed twice",
        ("self._recycled.append(src)", "self._recycled += [src, src]"),
    ),
    _mutant(
        "what was compressed is not freed",
        ("            self._ref_counts[src] = 0\n            self._recycled.append(src)\n", ""),
    ),
    _mutant(
        "a span is compressed into one of its own blocks",
        ("        dst = self._take()\n", ""),
        (
            "        self._ref_counts[dst] = len",
            "        dst = self._take()\n        self._ref_counts[dst] = len",
        ),
    ),
    _mutant(
        "only the first holder's table is rewritten",
        (
            "for seq in holders:\n            seq.table",
            "for seq in holders[:1]:\n            seq.table",
        ),
    ),
    _mutant(
        "a compressed block has one reference",
        ("        self._ref_counts[dst] = len(holders)\n", ""),
    ),
    _mutant(
        "a compressed block counts as a native one",
        ("        self._codecs[dst] = codec\n", ""),
    ),
    _mutant(
        "a block taken again stays compressed",
        ("        self._codecs[block_id] = Codec.NATIVE\n", ""),
    ),
    _mutant(
        "a compressed span still counts all of its blocks",
        ("            seq.num_blocks -= len(srcs) - 1\n", ""),
    ),
    _mutant(
        "who holds a part of the span is ignored",
        ("return found if num_refs == {len(found)} else None", "return found"),
    ),
    _mutant(
        "who has sealed a part of the span counts as a holder",
        ("if s.num_sealed >= end and s.table", "if s.table"),
    ),
    _mutant(
        "a shared span is never compressed",
        (
            "return found if num_refs == {len(found)} else None",
            "return found if num_refs == {1} else None",
        ),
    ),
    _mutant(
        "compress does not use the reserve",
        ("        if not self._num_unheld:\n", "        if not self.num_free:\n"),
    ),
    _mutant(
        "ordinary claims take the reserve",
        ("num_new > self.num_free or ", ""),
    ),
    _mutant(
        "a copy does not use the reserve",
        ("num_new > self.num_free or", "num_new + is_copied > self.num_free + num_returned or"),
    ),
    _mutant(
        "truncate keeps a part of a compressed span",
        ("num_tokens = self.num_kept(seq, num_tokens)\n        self._cut", "self._cut"),
    ),
    _mutant(
        "fork keeps a part of a compressed span",
        ("num_tokens = self.num_kept(seq, num_tokens)\n        child", "child"),
    ),
    _mutant(
        "a cut span is kept up to the cut entry",
        ("(idx - span_idx) * self.block_size", "idx * self.block_size"),
    ),
    _mutant(
        "a span that ends at the cut is given up",
        ("idx = num_tokens // self", "idx = (num_tokens - 1) // self"),
    ),
    _mutant(
        "fork takes a reference for each entry",
        (
            "held_ids = block_ids(child.table)",
            "held_ids = [unpack_entry(entry)[0] for entry in child.table]",
        ),
    ),
    _mutant(
        "a hit takes a reference for each entry",
        ("held_ids = block_ids(table)", "held_ids = [unpack_entry(entry)[0] for entry in table]"),
    ),
    _mutant(
        "a block that was not encoded keeps its key",
        ("        self._forget(op.dst)\n", ""),
    ),
    _mutant(
        "a block that was not encoded stays cached without a key",
        ("            del self._cached[op.dst]\n", "            return\n"),
    ),
    index_mutant(
        "a look-up takes the smallest block",
        ("in self._span_blocks:", "in self._span_blocks[::-1]:"),
        (
            "                    return entries, chain[idx - 1] if entries else None\n",
            "                    continue\n",
        ),
    ),
    index_mutant(
        "a look-up of a codec finds another's key",
        (
            "self._ids.get((prefix.hash, codec), NULL_BLOCK_ID)",
            "max(self._ids.get((prefix.hash, c), 0) for c in Codec)",
        ),
    ),
    index_mutant(
        "a short native prefix hides the compressed one",
        ("start = idx - idx % num_links", "start = idx"),
    ),
    index_mutant(
        "a compressed hit leaves nothing to compute",
        ("if end > num_usable:", "if end * self._block_size > len(token_ids):"),
    ),
    index_mutant(
        "a look-up knows two codecs",
        ("in self._span_blocks:", "in self._span_blocks[:2]:"),
    ),
    index_mutant(
        "what follows a compressed block is looked up behind another text",
        ("block_id, chain[end - 1] = found", "block_id, chain[-1] = found[0], chain[0]"),
    ),
]
