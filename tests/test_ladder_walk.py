"""The ladder against the plain rule, after random calls: what it leaves is what may not go."""

from __future__ import annotations

import random
from itertools import count

import pytest
from test_ladder import AUTO, AUTO4, SIZE, Shelf

from kvchat.kv.ladder import Warmth
from kvchat.kv.layout import Codec, unpack_entry


class Walk:
    """A small pool, so that blocks are soon used again, and up to eight sequences that grow, share,
    are cut and freed; every other compression takes all there is."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.policy = self.rng.choice([AUTO, AUTO4])
        self.shelf = Shelf(self.policy, self.rng.choice([30, 45, 70]))
        self.pool, self.ladder = self.shelf.pool, self.shelf.ladder
        self.texts: dict[object, list[int]] = {}
        self.token_ids = count(100)

    def run(self, num_calls: int) -> None:
        calls = {"add": 20, "fork": 20, "grow": 30, "remove": 10, "cut": 5, "pin": 5, "take": 25}
        for name in self.rng.choices([*calls], [*calls.values()], k=num_calls):
            if self.shelf.holders or name == "add":
                getattr(self, name)()

    def seq(self):
        return self.rng.choice(self.shelf.holders).seq

    def warmth(self) -> Warmth:
        return self.rng.choice([*Warmth])

    def add(self) -> None:
        token_id, num_tokens = next(self.token_ids), self.rng.randrange(1, 45)
        seq, text = self.pool.alloc([token_id]), [token_id] * num_tokens
        if self.pool.append(seq, num_tokens) is None:
            self.pool.free(seq)
            return
        self.pool.seal(seq, text, max(1, num_tokens - self.rng.randrange(3)))
        self.texts[seq] = text
        self.shelf.put(seq, self.warmth())

    def fork(self) -> None:
        parent = self.seq()
        child = self.pool.fork(parent, self.rng.randrange(parent.num_tokens + 1))
        if child.num_tokens and len(self.shelf.holders) < 8:
            self.texts[child] = self.texts[parent][: child.num_tokens]
            self.shelf.put(child, self.warmth())
        else:
            self.pool.free(child)

    def grow(self) -> None:
        seq, num_tokens = self.seq(), self.rng.choice([1, 1, 2, 11])
        if (copies := self.pool.append(seq, num_tokens)) is None:
            return
        if copies:
            self.ladder.part(seq)
        self.texts[seq] += [self.rng.randrange(50) for _ in range(num_tokens)]
        num_sealed = seq.num_sealed
        self.pool.seal(seq, self.texts[seq], seq.num_tokens)
        if seq.num_sealed > num_sealed:
            self.ladder.touch(seq)

    def remove(self) -> None:
        self.shelf.remove(self.seq())

    def cut(self) -> None:
        seq = self.seq()
        self.ladder.forget(seq)
        self.pool.truncate(seq, self.rng.randrange(1, seq.num_tokens + 1))
        del self.texts[seq][seq.num_tokens :]
        self.ladder.touch(seq)

    def pin(self) -> None:
        idx = self.rng.randrange(len(self.shelf.holders))
        holder, is_pinned = self.shelf.holders[idx], self.rng.random() < 0.4
        if holder.is_pinned and not is_pinned:
            self.ladder.touch(holder.seq)
        self.shelf.holders[idx] = holder._replace(is_pinned=is_pinned, warmth=self.warmth())
        self.ladder.refresh()

    def take(self) -> None:
        is_all = self.rng.random() < 0.6
        self.ladder.begin_step()
        while self.shelf.compress() and is_all:
            self.ladder.begin_step()
        if is_all and self.pool.num_held < self.pool.num_usable:
            self.check()

    def check(self) -> None:
        for src, codec in self.policy.rungs:
            for holder in self.shelf.holders:
                for start in self.starts(holder.seq, codec):
                    assert not self.may_go(holder.seq, start, src, codec), f"{holder} {start=}"

    def starts(self, seq, codec: Codec) -> range:
        start, end = self.policy.compressible(seq.num_sealed * SIZE, codec, SIZE)
        num_entries = self.policy.span_blocks[codec]
        return range(start // SIZE, end // SIZE - num_entries + 1, num_entries)

    def may_go(self, seq, start: int, src: Codec, codec: Codec) -> bool:
        """Whoever holds the span holds all of it, is not pinned and would let it go."""
        num_entries, holders = self.policy.span_blocks[codec], self.shelf.holders
        if any(unpack_entry(entry)[1] != src for entry in seq.table[start : start + num_entries]):
            return False
        found = self.pool.holders(seq, start, num_entries, [holder.seq for holder in holders])
        return found is not None and all(
            start in self.starts(holder.seq, codec) and not holder.is_pinned
            for holder in holders
            if holder.seq in found
        )


@pytest.mark.parametrize("first_seed", [0, 100, 200])
def test_what_the_ladder_leaves_may_not_be_compressed(first_seed):
    for seed in range(first_seed, first_seed + 100):
        Walk(seed).run(150)


def test_what_waited_with_one_that_has_its_own_copy_now_goes():
    shelf = Shelf(AUTO, 60)
    parent = shelf.add(40)
    child = shelf.pool.fork(parent, 19)  # the first part of [16, 20) and so of [16, 24)
    shelf.put(child, Warmth.RUNNING)
    assert not any(start == 16 for _, start, _ in shelf.compress_all())

    assert shelf.pool.append(child, 1)
    shelf.ladder.part(child)

    assert [start for _, start, _ in shelf.compress_all()] == [16]
