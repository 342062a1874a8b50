"""Bugs of copies beside the compute stream, found by tests/cache_walk: a wait that is missing."""

from __future__ import annotations

from mutants import Mutant

TRANSFERS, CACHE = "kvchat.kv.transfers", "kvchat.kv.cache"
_PARK = (
    "        self._streams.follow()\n"
    "        pieces = []\n"
    "        for block_id, slot, num_blocks in _stretches([(op.src"
)
_RESTORE = _PARK.replace("op.src", "op.dst")
_WAIT = "        self._streams.wait(self._streams.record())\n"


def _transfers(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, TRANSFERS, edits, user=CACHE)


def _cache(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, CACHE, edits)


MUTANTS = [
    _transfers("parked before it is written", (_PARK, _PARK.split("\n", 1)[1])),
    _transfers("restored over what is still read", (_RESTORE, _RESTORE.split("\n", 1)[1])),
    _transfers("read before it is restored", (_WAIT, "")),
    _transfers(
        "restored and waited for too early",
        (
            "        self._streams.copy(pieces)\n" + _WAIT,
            _WAIT + "        self._streams.copy(pieces)\n",
        ),
    ),
    _transfers(
        "overwritten while it is parked",
        ("            self._streams.wait(self._events[number])\n", ""),
    ),
    _transfers("waits for the oldest park", ("number = max((", "number = min((")),
    _transfers(
        "a block that is parked again is overwritten",
        (
            "self._readers.update(dict.fromkeys((op.src for op in ops), self._num_parks))",
            "[self._readers.setdefault(op.src, self._num_parks) for op in ops]",
        ),
    ),
    _transfers("every park counts as done", ("if not event.query():", "if False:")),
    _transfers(
        "the last block of a park is not noted",
        ("(op.src for op in ops), self", "(op.src for op in ops[:-1]), self"),
    ),
    _transfers(
        "blocks in a row that lie apart in the arena",
        ("if pair != (last[0] + 1, last[1] + 1):", "if pair[0] != last[0] + 1:"),
    ),
    _transfers("the side piece stays", ("[*zip(pool, host, strict=True)]", "[(pool[0], host[0])]")),
    _transfers(
        "the host reads too early",
        ("        self._streams.synchronize()\n", ""),
    ),
    _cache(
        "a copy overwrites what is parked",
        ("self.await_copies(op.dst for op in ops)\n        if self._k", "if self._k"),
    ),
    _cache(
        "a compression overwrites what is parked",
        ("self.await_copies(op.dst for op in ops)\n        for (src", "for (src"),
    ),
    _cache("copies race", ("batches(ops, is_at_once=True)", "batches(ops, is_at_once=False)")),
    _cache(
        "compressions race", ("batches(run, is_at_once=True)", "batches(run, is_at_once=False)")
    ),
    _cache(
        "all sources count as native", ("op: (op.src_codec, op.codec)", "op: (Codec(0), op.codec)")
    ),
]
