"""A seeded random walk over a small block pool, checked after every step.

Beside the pool runs a shadow of the KV memory. What a slot holds is a number that stands for the
whole text up to its position (a node of a trie), so equal numbers mean equal token, position and
prefix. Writes land late, as on a device: a step's slots are written when the next step is about to
be claimed, whatever was forked, truncated, freed or found in between.

After every step: the pool's own check_integrity with all sequences (I1 to I4, I6, I7, I11) and
every computed position of every chat read back through its table (I9, I11, I12). On the way: no
write into a sealed block (I5), None exactly when blocks are short, and changing nothing. At the
end all blocks are home (I14).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from types import ModuleType

NUM_BLOCKS, BLOCK_SIZE = 24, 4
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


class PoolWalk:
    """The walk over `module`.BlockPool (a mutated module in the tests of the tests)."""

    def __init__(self, module: ModuleType, seed: int) -> None:
        self.module, self.seed = module, seed
        self.rng = random.Random(seed)
        self.pool = module.BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.slots = [[UNWRITTEN] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]
        self.trie: dict[tuple[int, int], int] = {}
        self.chats: list[Chat] = []
        self.texts: list[list[int]] = [[]]  # of the last chats: what a new one may begin with
        self.launched: list[tuple[Chat, int, int, list[tuple[int, int, int]]]] = []
        self.counts: Counter[str] = Counter()

    def run(self, num_steps: int) -> None:
        """Walk, or raise WalkFailure."""
        actions = [self.start, self.append, self.exhaust, self.seal]
        actions += [self.fork, self.truncate, self.free, self.unseal]
        plan = self.rng.choices(actions, weights=[16, 40, 2, 18, 8, 8, 8, 1], k=num_steps)
        step = -1
        try:
            for action in plan:
                step += 1
                if action == self.start:
                    self.start()
                elif self.chats:
                    action(self.rng.choice(self.chats))
                self.check()
            for chat in self.chats[:]:
                self.free(chat)
            self.check()
            assert self.pool.num_free == self.pool.num_usable, f"{self.pool.num_free} blocks home"
        except Exception as error:
            raise WalkFailure(self.seed, step, error) from error

    def check(self) -> None:
        self.pool.check_integrity([chat.seq for chat in self.chats])
        slots = self.slots
        for chat in self.chats:
            held: list[int] = []
            for block_id in chat.seq.table:
                held += slots[block_id]
            num_computed = chat.num_computed
            expected = self.payloads(chat.token_ids[:num_computed])
            assert held[:num_computed] == expected, f"{chat} reads {held}, not {expected}"
            assert chat.seq.num_sealed * BLOCK_SIZE <= num_computed, f"{chat} sealed too early"

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
        num_new = self.rng.randint(not token_ids, 6)
        token_ids = token_ids + self.rng.choices(ALPHABET, k=num_new)
        num_matched = self.pool.match(token_ids)
        seq = self.pool.alloc(token_ids)
        assert seq.num_tokens == num_matched < len(token_ids), f"{seq} {num_matched} {token_ids}"
        assert num_matched % BLOCK_SIZE == 0
        self.counts["hit"] += num_matched > 0
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
        elif self.rng.random() < 0.5:
            self.free(self.rng.choice(self.chats))

    def exhaust(self, chat: Chat) -> None:
        self.land()
        assert not self.claim(chat, (self.pool.num_free + 2) * BLOCK_SIZE)

    def claim(self, chat: Chat, num_tokens: int) -> bool:
        """Append, and do its block operations on the shadow."""
        pool, seq = self.pool, chat.seq
        before = (list(seq.table), seq.num_tokens, seq.num_sealed, pool.map())
        tail_id = seq.table[-1] if seq.num_tokens % BLOCK_SIZE else None
        is_shared = tail_id is not None and pool.ref_count(tail_id) > 1
        is_sealed = tail_id is not None and self.is_sealed(tail_id)
        num_needed = -(-(seq.num_tokens + num_tokens) // BLOCK_SIZE) - len(seq.table)
        can = num_needed + is_shared <= pool.num_free
        if is_sealed and not is_shared and num_needed == pool.num_free:
            self.counts["evict own tail"] += 1  # in place, instead of a copy

        ops = pool.append(seq, num_tokens)

        assert (ops is not None) == can, f"{ops} for {num_needed} of {pool.num_free}"
        if ops is None:
            after = (list(seq.table), seq.num_tokens, seq.num_sealed, pool.map())
            assert before == after, f"failed append: {before} -> {after}"
            self.counts["out of memory"] += 1
            return False
        assert seq.num_tokens == before[1] + num_tokens, f"{num_tokens} after {before}: {seq}"
        for op in ops:
            self.slots[op.dst] = self.slots[op.src][:]
        self.counts["copy"] += len(ops)
        for block_id in set(seq.table) - set(before[0]) - {op.dst for op in ops}:
            self.slots[block_id] = [UNWRITTEN] * BLOCK_SIZE
        return True

    def launch(self, chat: Chat) -> None:
        """Send off the writes of all that chat has claimed and not computed."""
        table, end = chat.seq.table, chat.seq.num_tokens
        nodes = self.payloads(chat.token_ids[:end])
        cells = [
            (table[position // BLOCK_SIZE], position % BLOCK_SIZE, nodes[position])
            for position in range(chat.num_computed, end)
        ]
        assert not any(self.is_sealed(block_id) for block_id, _, _ in cells), f"{cells} {chat}"
        self.launched.append((chat, chat.epoch, end, cells))

    def land(self) -> None:
        """Let the launched writes happen."""
        for chat, epoch, end, cells in self.launched:
            for block_id, offset, payload in cells:
                self.slots[block_id][offset] = payload
            if chat.epoch == epoch:
                chat.num_computed = end
        self.launched.clear()

    def seal(self, chat: Chat) -> None:
        if self.rng.random() < 0.5:
            self.land()
        self.pool.seal(chat.seq, chat.token_ids, chat.num_computed)

    def unseal(self, chat: Chat) -> None:
        num_sealed = sum(map(self.is_sealed, chat.seq.table))
        self.pool.unseal(chat.seq)
        assert not any(map(self.is_sealed, chat.seq.table)), f"still sealed: {chat}"
        self.counts["unseal"] += num_sealed

    def fork(self, chat: Chat) -> None:
        if len(self.chats) == MAX_CHATS:
            return
        num_tokens = self.rng.randint(0, chat.num_computed)
        child = self.pool.fork(chat.seq, num_tokens)
        self.chats.append(Chat(child, chat.token_ids[:num_tokens], num_tokens))
        assert child.num_tokens == num_tokens, f"fork at {num_tokens}: {child}"

    def truncate(self, chat: Chat) -> None:
        num_tokens = self.rng.randint(0, chat.seq.num_tokens)
        self.remember(chat)
        self.pool.truncate(chat.seq, num_tokens)
        chat.token_ids = chat.token_ids[:num_tokens]
        chat.num_computed = min(chat.num_computed, num_tokens)
        chat.epoch += 1

    def free(self, chat: Chat) -> None:
        self.remember(chat)
        self.chats.remove(chat)
        chat.epoch += 1
        pool, seq = self.pool, chat.seq
        cached = [b for b in seq.table[::-1] if pool.ref_count(b) == 1 and self.is_sealed(b)]
        pool.free(seq)
        queue = list(pool._cached)
        assert queue[len(queue) - len(cached) :] == cached, f"freed {cached}, queue {queue}"
        try:
            pool.free(seq)
        except AssertionError:
            return
        raise RuntimeError("a double free went unnoticed")

    # Helpers

    def is_sealed(self, block_id: int) -> bool:
        return self.pool._prefixes[block_id] is not None

    def remember(self, chat: Chat) -> None:
        self.texts = [*self.texts[-5:], chat.token_ids]


def walk(module: ModuleType, seeds: range, num_steps: int) -> Counter[str]:
    """Walk each seed; what happened how often."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        one = PoolWalk(module, seed)
        one.run(num_steps)
        counts += one.counts
        counts["evict"] += one.pool.counters.num_evictions
    return counts
