"""A seeded random walk over a small block pool, checked after every step.

Beside the pool runs a shadow of the KV memory. What a slot holds is a number that stands for the
whole text up to its position (a node of a trie), so equal numbers mean equal token, position and
prefix. Writes land late, as on a device: a step's slots are written when the next step is about to
be claimed, whatever was forked, truncated, freed or found in between. A compressed block's shadow
holds the tokens of all its span, and is read through the packed entries of a table.

After every step: the pool's own check_integrity with all sequences (I1 to I4, I6, I7, I11) and
every computed position of every chat read back through its table (I9, I11, I12). On the way: no
write into a sealed block (I5), None exactly when blocks are short, and changing nothing; what a
look-up finds is, span by span, what a search through all shadows finds; a span is compressed in all
tables that name it or in none. At the end all blocks are home (I14).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

from kvchat.kv.layout import Codec, unpack_entry

NUM_BLOCKS = 24
# (block_size, span_blocks, num_reserved), seed by seed
SHAPES = ((2, (1, 2, 4), 1), (2, (1, 4, 8), 2), (4, (1, 2, 4), 0))
MAX_CHATS, MAX_CHAT_TOKENS = 7, 40
ALPHABET = (1, 2)  # short, so that prefixes meet
UNWRITTEN = -1


class WalkFailure(Exception):
    """What went wrong, and in which step of which walk."""

    def __init__(self, seed: int, step: int, cause: BaseException) -> None:
        super().__init__(f"seed {seed}, step {step}: {cause!r}")
        self.step = step


@dataclass(slots=True, eq=False)
class Chat:
    """A sequence and the text that it should hold; [0, num_computed) has been written."""

    seq: object
    token_ids: list[int]
    num_computed: int
    epoch: int = 0  # grows when launched writes no longer count
    numbered: tuple[list[int], list[int]] = field(default=([], []), repr=False)  # ids and payloads


class PoolWalk:
    """The walk over `module`.BlockPool (a mutated module in the tests of the tests)."""

    def __init__(self, module: ModuleType, seed: int) -> None:
        self.module, self.seed = module, seed
        self.rng = random.Random(seed)
        self.block_size, self.span_blocks, self.num_reserved = SHAPES[seed % len(SHAPES)]
        self.pool = module.BlockPool(
            NUM_BLOCKS,
            self.block_size,
            span_blocks=self.span_blocks,
            num_reserved=self.num_reserved,
        )
        self.slots = [[UNWRITTEN] * self.block_size for _ in range(NUM_BLOCKS)]
        self.codecs = [Codec.NATIVE] * NUM_BLOCKS
        self.trie: dict[tuple[int, int], int] = {}
        self.chats: list[Chat] = []
        self.texts: list[list[int]] = [[]]  # of the last chats: what a new one may begin with
        self.launched: list[tuple[Chat, int, int]] = []  # not read: chat, epoch, end
        self.cells: list[tuple[int, int, int]] = []  # launched writes: block id, offset, payload
        self.counts: Counter[str] = Counter()

    def run(self, num_steps: int) -> None:
        """Walk, or raise WalkFailure."""
        weights = self.weights()
        plan = self.rng.choices([*weights], weights=[*weights.values()], k=num_steps)
        step = -1
        try:
            for action in plan:
                step += 1
                if action == self.start:
                    self.start()
                elif self.chats:
                    action(self.rng.choice(self.chats))
                self.check()
            self.end()
            self.check()
            assert self.num_unheld() == self.pool.num_usable, f"{self.num_unheld()} blocks home"
        except Exception as error:
            raise WalkFailure(self.seed, step, error) from error

    def weights(self) -> dict[Callable[..., None], int]:
        """How often each action is taken, of the sum of all."""
        actions = [self.start, self.append, self.exhaust, self.seal]
        actions += [self.fork, self.truncate, self.free, self.unseal, self.compress]
        return dict(zip(actions, [16, 40, 3, 18, 8, 8, 8, 1, 16], strict=True))

    def end(self) -> None:
        """All chats go."""
        for chat in self.chats[:]:
            self.free(chat)

    def check(self) -> None:
        self.pool.check_integrity([chat.seq for chat in self.chats])
        for chat in self.chats:
            num_computed = chat.num_computed
            held = self.read(chat.seq.table)
            if chat.numbered[0] is not chat.token_ids:
                chat.numbered = chat.token_ids, self.payloads(chat.token_ids)
            expected = chat.numbered[1][:num_computed]
            assert held[:num_computed] == expected, f"{chat} reads {held}, not {expected}"
            assert chat.seq.num_sealed * self.block_size <= num_computed, f"{chat} sealed too early"

    def read(self, table: list[int]) -> list[int]:
        """What the slots of all entries hold."""
        size, held = self.block_size, []
        for entry in table:
            if entry < NUM_BLOCKS:
                assert self.codecs[entry] == Codec.NATIVE, f"block {entry} is compressed: {table}"
                held += self.slots[entry]
                continue
            block_id, codec, span_idx = unpack_entry(entry)
            assert self.codecs[block_id] == codec, f"{block_id}: {self.codecs[block_id]!r} {table}"
            held += self.slots[block_id][span_idx * size : (span_idx + 1) * size]
        return held

    def payloads(self, token_ids: list[int]) -> list[int]:
        """The number of each position's whole prefix."""
        node, trie, nodes = 0, self.trie, []
        for token_id in token_ids:
            node = trie.setdefault((node, token_id), len(trie) + 1)
            nodes.append(node)
        return nodes

    # Actions

    def start(self) -> None:
        if len(self.chats) == MAX_CHATS:
            return
        text = self.rng.choice(self.texts)
        token_ids = text[: self.rng.randint(0, len(text))]
        if self.rng.random() < 0.5:  # whole spans and no more: all that is stored, but for a token
            token_ids = token_ids[: len(token_ids) // 4 * 4]
            num_new = not token_ids
        else:
            num_new = self.rng.randint(not token_ids, 6)
        token_ids = token_ids + self.rng.choices(ALPHABET, k=num_new)
        num_matched = self.pool.match(token_ids)
        best = self.best_codecs(token_ids)
        seq = self.pool.alloc(token_ids)
        assert seq.num_tokens == num_matched < len(token_ids), f"{seq} {num_matched} {token_ids}"
        found = [unpack_entry(entry)[1] for entry in seq.table]
        assert found == best, f"{token_ids}: found {found}, not {best}"
        assert num_matched == len(best) * self.block_size
        self.counts["hit"] += num_matched > 0
        self.counts["hit compressed"] += any(best)
        self.counts["hit mixed"] += len(set(best)) > 1
        self.chats.append(Chat(seq, token_ids, num_matched))

    def append(self, chat: Chat) -> None:
        self.land()
        want = self.rng.randint(1, 6)
        if chat.seq.num_tokens + want > MAX_CHAT_TOKENS:
            return
        missing = chat.seq.num_tokens + want - len(chat.token_ids)
        chat.token_ids = chat.token_ids + self.rng.choices(ALPHABET, k=max(missing, 0))
        if self.claim(chat, want):
            self.launch(chat)
        else:
            relief = self.rng.choice([self.free, self.compress, self.compress])
            relief(self.rng.choice(self.chats))

    def exhaust(self, chat: Chat) -> None:
        """More than there is, and then the last block."""
        self.land()
        size, num_tokens = self.block_size, chat.seq.num_tokens
        assert not self.claim(chat, (self.pool.num_free + 2) * size)
        end = (len(chat.seq.table) + self.pool.num_free) * size
        if num_tokens < end <= 2 * MAX_CHAT_TOKENS:
            missing = max(end - len(chat.token_ids), 0)
            chat.token_ids = chat.token_ids + self.rng.choices(ALPHABET, k=missing)
            if self.claim(chat, end - num_tokens):
                self.launch(chat)

    def claim(self, chat: Chat, num_tokens: int) -> bool:
        """Append, and do its block operations on the shadow."""
        pool, seq = self.pool, chat.seq
        before = (list(seq.table), seq.num_tokens, seq.num_sealed, pool.map())
        tail_id = seq.table[-1] if seq.num_tokens % self.block_size else None
        is_shared = tail_id is not None and pool.ref_count(tail_id) > 1
        is_sealed = tail_id is not None and self.is_sealed(tail_id)
        num_needed = -(-(seq.num_tokens + num_tokens) // self.block_size) - len(seq.table)
        num_unheld = self.num_unheld()
        num_free = max(0, num_unheld - self.num_reserved)
        assert pool.num_free == num_free, f"{pool.num_free} of {num_unheld}"
        can = num_needed <= num_free and num_needed + is_shared <= num_unheld
        if is_sealed and not is_shared and can and num_needed == num_unheld:
            self.counts["evict own tail"] += 1  # in place, instead of a copy
        if is_shared and can and num_needed == num_free:
            self.counts["copy into the reserve"] += self.num_reserved > 0

        ops = pool.append(seq, num_tokens)

        assert (ops is not None) == can, f"{ops} for {num_needed} of {pool.num_free}"
        if ops is None:
            after = (list(seq.table), seq.num_tokens, seq.num_sealed, pool.map())
            assert before == after, f"failed append: {before} -> {after}"
            self.counts["out of memory"] += 1
            return False
        assert seq.num_tokens == before[1] + num_tokens, f"{num_tokens} after {before}: {seq}"
        for op in ops:
            assert self.codecs[op.src] == Codec.NATIVE, f"{op} of {self.codecs[op.src]!r}"
            self.slots[op.dst], self.codecs[op.dst] = self.slots[op.src][:], Codec.NATIVE
        self.counts["copy"] += len(ops)
        for block_id in set(seq.table) - set(before[0]) - {op.dst for op in ops}:
            self.slots[block_id] = [UNWRITTEN] * self.block_size
            self.codecs[block_id] = Codec.NATIVE
        return True

    def launch(self, chat: Chat) -> None:
        """Send off the writes of all that chat has claimed and not computed."""
        table, end = chat.seq.table, chat.seq.num_tokens
        nodes = self.payloads(chat.token_ids[:end])
        cells = [
            (table[position // self.block_size], position % self.block_size, nodes[position])
            for position in range(chat.num_computed, end)
        ]
        assert all(block_id < NUM_BLOCKS for block_id, _, _ in cells), f"not native: {cells}"
        assert not any(self.is_sealed(block_id) for block_id, _, _ in cells), f"{cells} {chat}"
        self.cells += cells
        self.launched.append((chat, chat.epoch, end))

    def land(self) -> None:
        """Let the launched writes happen, and the host know."""
        self.write()
        for chat, epoch, end in self.launched:
            if chat.epoch == epoch:
                chat.num_computed = end
        self.launched.clear()

    def write(self) -> None:
        """Let the launched writes happen: block operations that come later find them done."""
        for block_id, offset, payload in self.cells:
            self.slots[block_id][offset] = payload
        self.cells.clear()

    def seal(self, chat: Chat) -> None:
        if self.rng.random() < 0.5:
            self.land()
        self.pool.seal(chat.seq, chat.token_ids, chat.num_computed)

    def unseal(self, chat: Chat) -> None:
        held_ids = ids_of(chat.seq.table)
        num_sealed = sum(map(self.is_sealed, held_ids))
        self.pool.unseal(chat.seq)
        assert not any(map(self.is_sealed, held_ids)), f"still sealed: {chat}"
        self.counts["unseal"] += num_sealed

    def fork(self, chat: Chat) -> None:
        if len(self.chats) == MAX_CHATS:
            return
        num_tokens = self.rng.randint(0, chat.num_computed)
        num_kept = self.num_kept(chat, num_tokens)
        child = self.pool.fork(chat.seq, num_tokens)
        self.chats.append(Chat(child, chat.token_ids[:num_tokens], num_kept))
        assert child.num_tokens == num_kept, f"fork at {num_tokens}, not {num_kept}: {child}"
        self.counts["fork inside a span"] += num_kept < num_tokens

    def truncate(self, chat: Chat) -> None:
        num_tokens = self.rng.randint(0, chat.seq.num_tokens)
        num_kept = self.num_kept(chat, num_tokens)
        assert self.pool.num_kept(chat.seq, num_tokens) == num_kept, f"{num_tokens} {num_kept}"
        self.remember(chat)
        assert self.pool.truncate(chat.seq, num_tokens) == num_kept, f"{num_tokens} {num_kept}"
        assert chat.seq.num_tokens == num_kept, f"{chat} {num_kept}"
        chat.token_ids = chat.token_ids[:num_tokens]
        chat.num_computed = min(chat.num_computed, num_kept)
        chat.epoch += 1
        self.counts["truncate inside a span"] += num_kept < num_tokens

    def num_kept(self, chat: Chat, num_tokens: int) -> int:
        """num_tokens, or where the compressed span starts that has some of them and some more."""
        for start, length, codec in self.spans(chat):
            if codec and start < num_tokens < start + length:
                return start
        return num_tokens

    def compress(self, chat: Chat) -> None:
        """Some of the chat's spans, where all who name their blocks can follow."""
        self.write()
        for _ in range(self.rng.randint(1, 4)):
            if candidates := [*self.compressible(chat)]:
                self.compress_span(chat, *self.rng.choice(candidates))

    def compress_span(self, chat: Chat, start: int, codec: Codec) -> None:
        end = start + self.span_blocks[codec]
        span = chat.seq.table[start:end]
        expected = self.whole_holders(span, start, end)
        sequences = [other.seq for other in self.chats]
        holders = self.pool.holders(chat.seq, start, end - start, sequences)
        assert holders == expected, f"{span} at {start} of {chat}: {holders}, not {expected}"
        if holders is None:
            self.counts["partial sharer"] += 1
        else:
            self.rewrite(holders, start, codec)

    def compressible(self, chat: Chat) -> Iterator[tuple[int, Codec]]:
        """(first entry, target codec) of all sealed spans of one better codec."""
        num_sealed = chat.seq.num_sealed
        codecs = [unpack_entry(entry)[1] for entry in chat.seq.table[:num_sealed]]
        for target in (Codec.INT8, Codec.INT4):
            num_entries = self.span_blocks[target]
            for start in range(0, num_sealed - num_entries + 1, num_entries):
                kinds = set(codecs[start : start + num_entries])
                if len(kinds) == 1 and min(kinds) < target:
                    yield start, target

    def whole_holders(self, span: list[int], start: int, end: int) -> list[object] | None:
        """Who holds all of the span sealed; None when somebody else names a block of it."""
        block_ids, whole = set(ids_of(span)), []
        for other in self.chats:
            if other.seq.num_sealed >= end and other.seq.table[start:end] == span:
                whole.append(other.seq)
            elif block_ids & set(ids_of(other.seq.table)):
                return None
        return whole

    def rewrite(self, holders: list[object], start: int, codec: Codec) -> None:
        """Compress, and do it on the shadow."""
        pool, end = self.pool, start + self.span_blocks[codec]
        srcs = ids_of(holders[0].table[start:end])
        payloads = self.read(holders[0].table[start:end])
        was_sealed = all(map(self.is_sealed, srcs))
        tables = [list(seq.table) for seq in holders]
        states, num_unheld = pool.map(), self.num_unheld()

        op = pool.compress(holders, start, codec)

        assert (op is None) == (num_unheld == 0), f"{op} with {num_unheld} blocks to be had"
        if op is None:
            assert pool.map() == states and [seq.table for seq in holders] == tables
            self.counts["no block to compress into"] += 1
            return
        assert (list(op.srcs), op.codec) == (srcs, codec), f"{op}, not {srcs} {codec!r}"
        assert {self.codecs[src] for src in srcs} == {op.src_codec}, f"{op}"
        assert states[op.dst] in ("free", "cached") and op.dst, f"{op} {states}"
        assert self.num_unheld() == num_unheld + len(srcs) - 1, f"{op} freed nothing"
        self.slots[op.dst], self.codecs[op.dst] = payloads, codec
        for seq, table in zip(holders, tables, strict=True):
            assert ids_of(seq.table[start:end]) == [op.dst], f"{op} {seq}"
            assert seq.table[:start] + seq.table[end:] == table[:start] + table[end:]
        others = [i for i in self.sealed() if self.slots[i] == payloads and i != op.dst]
        is_taken = any(self.codecs[i] == codec for i in others) or self.collides(holders[0], end)
        assert self.is_sealed(op.dst) == (was_sealed and not is_taken), f"{op} {was_sealed=}"
        self.counts[f"compress {op.src_codec.name} to {codec.name}"] += 1
        self.counts["compress shared"] += len(holders) > 1
        self.counts["compress with the reserve only"] += num_unheld <= self.num_reserved
        self.counts["compress what is not to be found"] += not was_sealed
        self.counts["compress twice"] += is_taken
        if self.rng.random() < 0.05:
            self.fail(op, holders)

    def fail(self, op: object, holders: list[object]) -> None:
        """The device did not encode the span: who holds it ends, and nobody finds it."""
        self.slots[op.dst] = [UNWRITTEN] * len(self.slots[op.dst])
        is_late = self.rng.random() < 0.5
        if not is_late:
            self.pool.distrust(op)
        for chat in [chat for chat in self.chats if chat.seq in holders]:
            self.free(chat)
        if is_late:
            self.pool.distrust(op)
        assert not self.is_sealed(op.dst) and self.pool.map()[op.dst] == "free", f"{op}"
        self.counts["fail"] += 1

    def collides(self, seq: object, end: int) -> bool:
        """Another text has the key of the first `end` entries (with a hash of 8 bits only)."""
        prefix = seq.prefix
        for _ in range(seq.num_sealed - end):
            prefix = prefix.parent
        codec = unpack_entry(seq.table[end - 1])[1]
        held_id = self.pool._index._ids.get((prefix.hash, codec))
        return held_id is not None and self.slots[held_id] != self.read(
            seq.table[end - self.span_blocks[codec] : end]
        )

    def free(self, chat: Chat) -> None:
        self.remember(chat)
        self.chats.remove(chat)
        chat.epoch += 1
        pool, seq = self.pool, chat.seq
        held_ids = ids_of(seq.table)
        cached = [b for b in held_ids[::-1] if pool.ref_count(b) == 1 and self.is_sealed(b)]
        pool.free(seq)
        queue = list(pool._cached)
        assert queue[len(queue) - len(cached) :] == cached, f"freed {cached}, queue {queue}"
        try:
            pool.free(seq)
        except AssertionError:
            return
        raise RuntimeError("a double free went unnoticed")

    # Helpers

    def num_unheld(self) -> int:
        """Blocks that nobody holds, the reserve included."""
        return sum(state in ("free", "cached") for state in self.pool.map())

    def spans(self, chat: Chat) -> Iterator[tuple[int, int, Codec]]:
        """(first position, positions, codec) of what each block of the chat holds."""
        for idx, entry in enumerate(chat.seq.table):
            _, codec, span_idx = unpack_entry(entry)
            if not span_idx:
                yield idx * self.block_size, self.span_blocks[codec] * self.block_size, codec

    def sealed(self) -> list[int]:
        return [i for i, prefix in enumerate(self.pool._prefixes) if prefix is not None]

    def best_codecs(self, token_ids: list[int]) -> list[Codec]:
        """By entry, what the longest prefix found is stored as, by a search through the shadow."""
        stored = {(self.codecs[i], *self.slots[i]) for i in self.sealed()}
        payloads = self.payloads(
            token_ids[: (len(token_ids) - 1) // self.block_size * self.block_size]
        )

        def cover(idx: int, codec: Codec) -> list[Codec]:
            """By blocks of this codec or better, from entry idx to the end of its span at most."""
            num_entries, found = self.span_blocks[codec], []
            if codec:
                finer = Codec(codec - 1)
                for start in range(idx, idx + num_entries, self.span_blocks[finer]):
                    if len(found) == start - idx:
                        found += cover(start, finer)
            span = payloads[idx * self.block_size : (idx + num_entries) * self.block_size]
            if len(found) < num_entries and (codec, *span) in stored:
                return [codec] * num_entries
            return found

        best, step = [], self.span_blocks[-1]
        while len(best) % step == 0:
            found = cover(len(best), Codec.INT4)
            if not found:
                break
            best += found
        return best

    def is_sealed(self, block_id: int) -> bool:
        return self.pool._prefixes[block_id] is not None

    def remember(self, chat: Chat) -> None:
        self.texts = [*self.texts[-5:], chat.token_ids]


def ids_of(table: list[int]) -> list[int]:
    """The blocks that a table names, each once, in order."""
    return list(dict.fromkeys(unpack_entry(entry)[0] for entry in table))


def walk(module: ModuleType, seeds: range, num_steps: int) -> Counter[str]:
    """Walk each seed; what happened how often."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        one = PoolWalk(module, seed)
        one.run(num_steps)
        counts += one.counts
        counts["evict"] += one.pool.counters.num_evictions
    return counts
