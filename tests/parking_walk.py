"""The random walk of pool_walk with a host arena: chats are parked, cut, forked and come back.

Beside the arena runs a shadow of its slots, filled and read by the block operations alone. After
every step the arena's own check_integrity with all parked records (I10); what comes back is read
position by position, through the table, as for every other chat. At the end all slots are home.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from pool_walk import MAX_CHATS, UNWRITTEN, Chat, PoolWalk, WalkFailure

from kvchat.kv import parking
from kvchat.kv.block_ops import BlockOp, ParkBlock
from kvchat.kv.layout import Codec, unpack_entry

NUM_SLOTS = 16


@dataclass(slots=True, eq=False)
class ParkedChat:
    """A record, and the text whose first tokens it has."""

    parked: object
    token_ids: list[int]


class ParkingWalk(PoolWalk):
    """The walk over `module`.BlockPool and `arena_module`.HostArena; either may be mutated."""

    def __init__(self, module: ModuleType, seed: int, arena_module: ModuleType = parking) -> None:
        super().__init__(module, seed)
        self.arena = arena_module.HostArena(NUM_SLOTS, self.pool)
        self.host: list[tuple[list[int], Codec]] = [([], Codec.NATIVE)] * NUM_SLOTS
        self.parked: list[ParkedChat] = []

    def weights(self) -> dict[Callable[..., None], int]:
        """More is compressed, so that more of it is parked."""
        weights = super().weights() | {self.compress: 40}
        return weights | {self.park: 12, self.resume: 10, self.change_parked: 4}

    def check(self) -> None:
        super().check()
        self.arena.check_integrity([chat.parked for chat in self.parked])

    def end(self) -> None:
        super().end()
        for chat in self.parked:
            self.arena.release(chat.parked)
        self.parked.clear()
        assert self.arena.num_free == NUM_SLOTS, f"{self.arena.num_free} slots are home"

    def park(self, chat: Chat) -> None:
        """An idle chat: all that it claimed is computed, or given up."""
        self.land()
        self.pool.truncate(chat.seq, chat.num_computed)
        held_ids = {unpack_entry(entry)[0] for entry in chat.seq.table}
        num_own = sum(self.pool.ref_count(block_id) == 1 for block_id in held_ids)
        is_useful = num_own >= len(held_ids) / 2
        if is_useful and self.rng.random() < 0.15:
            self.displace(chat.seq)
        can = is_useful and len(held_ids) <= self.arena.num_free
        assert self.arena.can_park(chat.seq) == can, f"{self.arena.num_free} for {chat}"
        if not can:
            self.counts["not parked"] += 1
            return
        ops: list[BlockOp] = []
        record = self.arena.park(chat.seq, chat.token_ids[: chat.num_computed], ops)
        self.apply(ops)
        self.free(chat)
        self.parked.append(ParkedChat(record, chat.token_ids[: chat.num_computed]))
        self.counts["park"] += 1
        self.counts["park compressed"] += any(block.codec for block in record.blocks)

    def displace(self, seq: object) -> None:
        """Let some leave the arena, in any order, so that there is room for seq: no more of them
        than it takes, and nobody where all are not enough."""
        leaving = self.rng.sample(self.parked, self.rng.randint(0, len(self.parked)))
        num_leaving = self.arena.num_leaving(seq, (chat.parked for chat in leaving))
        staying = [block.slot for chat in self.parked for block in chat.parked.blocks]
        for idx in range(len(leaving) + 1):
            if NUM_SLOTS - len({*staying}) >= seq.num_blocks:
                break
            for block in leaving[idx].parked.blocks if idx < len(leaving) else ():
                staying.remove(block.slot)
        else:
            idx = None
        assert num_leaving == idx, f"{num_leaving} of {leaving} leave, not {idx}"
        for chat in leaving[: idx or 0]:
            self.release(chat)
        self.counts["not enough"] += idx is None
        self.counts["displaced"] += idx or 0

    def resume(self, _: Chat) -> None:
        """With a prompt that goes on, or that leaves the parked text somewhere."""
        if not self.parked or len(self.chats) >= MAX_CHATS:
            return
        chat = self.rng.choice(self.parked)
        if self.rng.random() < 0.3:
            self.trim(chat)
        prompt = [*chat.token_ids, *self.rng.choices((1, 2), k=self.rng.randint(1, 5))]
        seq = self.pool.alloc(prompt)
        num_found, num_parked = seq.num_tokens, len(chat.parked.token_ids)
        missing = self.arena.missing(chat.parked, seq)
        assert seq.num_tokens <= num_found, f"{seq} {num_found}"
        self.counts["go back to a boundary"] += seq.num_tokens < min(num_found, num_parked)
        if len(missing) > self.pool.num_free:
            self.counts["no room"] += 1
            self.pool.free(seq)
            return
        if not missing and num_found < num_parked:
            raise AssertionError(f"{num_found} of {num_parked} tokens found and nothing missing")
        ops: list[BlockOp] = []
        blocks = chat.parked.blocks
        self.arena.resume(chat.parked, missing, seq, ops)
        for block, op in zip(missing, ops, strict=True):
            assert block.is_findable or not self.is_sealed(op.dst), f"{block} has a key now: {op}"
        for block in blocks:
            codec = unpack_entry(seq.table[block.start])[1]
            assert codec <= block.codec, f"{block} is {codec!r} now: {seq}"
        self.check_chain(seq, prompt)
        self.parked.remove(chat)
        self.write()
        self.apply(ops)
        self.chats.append(Chat(seq, prompt, seq.num_tokens))
        assert seq.num_tokens >= num_parked, f"{num_parked} tokens were parked: {seq}"
        self.counts["resume"] += 1
        self.counts["resume what is cached"] += 0 < len(missing) < len(seq.table)
        self.counts["resume compressed"] += any(block.codec for block in missing)
        self.counts["resume a tail"] += num_parked % self.block_size > 0

    def check_chain(self, seq: object, token_ids: list[int]) -> None:
        """What is restored is keyed by its own text."""
        prefix, size = seq.prefix, self.block_size
        for start in range((seq.num_sealed - 1) * size, -1, -size):
            packed = struct.pack(f"<{size}i", *token_ids[start : start + size])
            assert prefix.token_ids == packed, f"{prefix} of {token_ids} at {start}"
            prefix = prefix.parent

    def change_parked(self, _: Chat) -> None:
        """Undo, fork or close while parked."""
        if not self.parked:
            return
        chat = self.rng.choice(self.parked)
        action = self.rng.choice([self.trim, self.fork_parked, self.release])
        action(chat)

    def trim(self, chat: ParkedChat) -> None:
        num_tokens = self.rng.randint(0, len(chat.token_ids))
        num_kept = self.num_parked_kept(chat, num_tokens)
        self.arena.trim(chat.parked, num_tokens)
        chat.token_ids = chat.token_ids[:num_tokens]
        assert chat.parked.token_ids == chat.token_ids[:num_kept], f"{num_kept}: {chat}"
        self.counts["trim inside a span"] += num_kept < num_tokens

    def fork_parked(self, chat: ParkedChat) -> None:
        if len(self.parked) == 6:
            return
        num_tokens = self.rng.randint(0, len(chat.parked.token_ids))
        child = self.arena.fork(chat.parked, num_tokens)
        num_kept = self.num_parked_kept(chat, num_tokens)
        assert child.token_ids == chat.token_ids[:num_kept], f"{num_kept}: {child}"
        self.parked.append(ParkedChat(child, chat.token_ids[:num_tokens]))
        self.counts["fork parked"] += 1

    def release(self, chat: ParkedChat) -> None:
        self.arena.release(chat.parked)
        self.parked.remove(chat)

    def num_parked_kept(self, chat: ParkedChat, num_tokens: int) -> int:
        """num_tokens, or where the compressed span starts that has some of them and some more."""
        num_tokens = min(num_tokens, len(chat.parked.token_ids))
        for block in chat.parked.blocks:
            start = block.start * self.block_size
            end = start + self.span_blocks[block.codec] * self.block_size
            if block.codec and start < num_tokens < end:
                return start
        return num_tokens

    def apply(self, ops: list[BlockOp]) -> None:
        """On the shadows, in order; what was launched before has been written."""
        for op in ops:
            if isinstance(op, ParkBlock):
                self.host[op.slot] = self.slots[op.src][:], self.codecs[op.src]
                continue
            held, self.codecs[op.dst] = self.host[op.slot]
            self.slots[op.dst] = held[:]
            assert len(held) == self.block_size * self.span_blocks[self.codecs[op.dst]], f"{op}"
            assert UNWRITTEN not in held or not self.is_sealed(op.dst), f"{op} {held}"


def walk(
    module: ModuleType, seeds: range, num_steps: int, arena_module: ModuleType = parking
) -> Counter[str]:
    """Walk each seed; what happened how often."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        one = ParkingWalk(module, seed, arena_module)
        one.run(num_steps)
        counts += one.counts
    return counts


__all__ = ["WalkFailure", "walk"]
