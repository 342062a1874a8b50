"""Bugs of parking: slots that leak or are mixed up, what comes back as something else."""

from __future__ import annotations

from mutants import Mutant

POOL, PARKING = "kvchat.kv.block_pool", "kvchat.kv.parking"
MEMORY, RESIDENTS = "kvchat.engine.memory", "kvchat.engine.residents"


def _mutant(module: str, name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, module, edits)


# Found by tests/parking_walk
WALKED = [
    _mutant(
        POOL,
        "restored as another codec",
        ("        self._codecs[block_id] = codec\n        seq.table", "        seq.table"),
    ),
    _mutant(
        POOL,
        "restored and keyed as native",
        ("self._index.add(block_id, prefix, codec)", "self._index.add(block_id, prefix, Codec(0))"),
    ),
    _mutant(
        POOL,
        "restored and keyed by another text",
        (
            "extend(seq.prefix, token_ids, idx)\n            seq",
            "extend(seq.prefix, token_ids, start)\n            seq",
        ),
    ),
    _mutant(
        POOL,
        "what nobody may find is found",
        ("            elif is_findable:", "            else:"),
    ),
    _mutant(
        POOL,
        "a restored span counts as one sealed entry",
        ("seq.num_sealed += num_entries", "seq.num_sealed += 1"),
    ),
    _mutant(
        POOL,
        "a restored tail is sealed",
        ("        is_full = end == capacity\n", "        is_full = True\n"),
    ),
    _mutant(
        PARKING,
        "slots leak when they are given back",
        ("                self._free.append(block.slot)\n", "                pass\n"),
    ),
    _mutant(
        PARKING,
        "the tail is lost",
        ("in enumerate(seq.table):", "in enumerate(seq.table[: seq.num_sealed]):"),
    ),
    _mutant(
        PARKING,
        "copied back from another slot",
        ("RestoreBlock(block.slot, dst)", "RestoreBlock(missing[0].slot, dst)"),
    ),
    _mutant(
        PARKING,
        "copied back to another block",
        ("RestoreBlock(block.slot, dst)", "RestoreBlock(block.slot, 1 + dst % 23)"),
    ),
    _mutant(
        PARKING,
        "a fork owns no share of the slots",
        ("            self._ref_counts[block.slot] += 1\n", "            pass\n"),
    ),
    _mutant(
        PARKING,
        "a slot is free while a fork has it",
        ("            if not num_refs:\n", "            if True:\n"),
    ),
    _mutant(PARKING, "a part of a span is kept", ("and start < num_tokens < end:", "and False:")),
    _mutant(
        PARKING,
        "a hit on a part of a span is believed",
        ("is_whole = block.start + len(found) == end", "is_whole = bool(found)"),
    ),
    _mutant(
        PARKING,
        "what was stored better comes back worse",
        (
            "if not is_whole or any(unpack_entry(entry)[1] > block.codec for entry in found):",
            "if not is_whole:",
        ),
    ),
    _mutant(
        PARKING,
        "parked though there are too few slots",
        ("return seq.num_blocks <= len(self._free)", "return True"),
    ),
    _mutant(
        PARKING,
        "what others share counts as freed",
        ("+= num_refs[block.slot] == self._ref_counts[block.slot]", "+= 1"),
    ),
    _mutant(
        PARKING,
        "one more than needed leaves",
        (
            "            if num_free >= seq.num_blocks:\n",
            "            if num_free > seq.num_blocks:\n",
        ),
    ),
    _mutant(
        PARKING,
        "some leave though all are not enough",
        ("return num_leaving if num_free >= seq.num_blocks else None", "return num_leaving"),
    ),
    _mutant(
        PARKING,
        "parked though most of it stays",
        ("2 * self.num_own(seq) >= seq.num_blocks", "self.num_own(seq) > 0"),
    ),
]
# Found by tests/simulation with an arena
SIMULATED = [
    _mutant(
        RESIDENTS,
        "what is parked keeps its blocks",
        ("token_ids, ops)\n        self.free(resident.seq)\n", "token_ids, ops)\n"),
    ),
    _mutant(
        RESIDENTS,
        "closing a parked session leaks its slots",
        ("            self._arena.release(parked)\n", "            pass\n"),
    ),
    _mutant(
        RESIDENTS,
        "what is parked is taken for another text",
        ("                self._trim_parked(session_id, num_common)\n", "                pass\n"),
    ),
    _mutant(
        RESIDENTS,
        "an undo leaves what is parked",
        (
            "            return self._trim_parked(session_id, num_tokens)\n",
            "            return 0\n",
        ),
        ("                self._trim_parked(session_id, num_common)\n", "                pass\n"),
    ),
    _mutant(
        RESIDENTS,
        "nobody leaves the arena",
        ("        for parked_id in leaving:\n            self.drop(parked_id)\n", ""),
    ),
    _mutant(
        MEMORY,
        "what was not parked is believed",
        ("self._counters.num_drops += self.residents.lose(slots)", "pass"),
    ),
    _mutant(
        MEMORY,
        "what was not restored is believed",
        ("CompressSpan | RestoreBlock)", "CompressSpan)"),
    ),
    _mutant(
        MEMORY,
        "restored where there is no room",
        ("while missing and self.pool.num_free <= len(missing):", "while False:"),
    ),
    _mutant(
        MEMORY,
        "whoever has no room for what is parked waits for ever",
        ('if lack != "memory" or not self._roster.is_first(request):', "if True:"),
    ),
    _mutant(
        MEMORY,
        "restored and not copied",
        (
            "self.residents.resume(request.session_id, missing, seq, ops)",
            "self.residents.resume(request.session_id, missing, seq, [])",
        ),
    ),
]
