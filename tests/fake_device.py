"""A device in plain Python: what a block's slots hold, and a model that is a pure function.

A slot holds a number that stands for the whole text up to its position, made from the number in
the slot before it, as K and V are. The next token is a function of the last position's number. So
a wrong block, a lost write, a mixed-up row or a stale cache entry changes what is sampled. A
compressed block holds the numbers of its whole span and is not the same as its sources: it has its
codec beside it, and a table's entry that tells another codec reads nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Tokens

from kvchat.config import SamplingParams
from kvchat.engine.request import Batch, Request, Row
from kvchat.kv.block_ops import BlockOp, CompressSpan, ParkBlock, RestoreBlock
from kvchat.kv.layout import Codec, unpack_entry

START = 1
MODULUS = (1 << 61) - 1
VOCAB_SIZE = 997
EOS_ID = 0  # every 50th token or so, see `next_token`
UNWRITTEN, NON_FINITE = -1, -2  # a row that reads NON_FINITE computes NON_FINITE


def extend(state: int, token_id: int) -> int:
    """The number of a text that is one token longer."""
    return (state * 1_000_003 + token_id + 7) % MODULUS


def states_of(token_ids: Tokens[int], start: int = START) -> list[int]:
    """The numbers of all prefixes of a text, its own last."""
    states = []
    for token_id in token_ids:
        start = extend(start, token_id)
        states.append(start)
    return states


def next_token(state: int) -> int:
    """The model: what follows a text."""
    token_id = (state ^ (state >> 31)) % VOCAB_SIZE
    return EOS_ID if token_id < 20 else token_id


def continuation(token_ids: Tokens[int], num_tokens: int) -> list[int]:
    """The greedy reply of num_tokens to a text, eos or not."""
    state = states_of(token_ids)[-1]
    reply = []
    for _ in range(num_tokens):
        reply.append(next_token(state))
        state = extend(state, reply[-1])
    return reply


class FakeStep:
    """The tokens of a launched step."""

    def __init__(self, sampled: list[int]) -> None:
        self.sampled = sampled

    def tokens(self) -> list[int]:
        """One id per sampled row."""
        return self.sampled


class FakeDevice:
    """A StepRunner over its own slots; it checks each row against the request's own text."""

    is_async = False

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        self.slots = [[UNWRITTEN] * block_size for _ in range(num_blocks)]
        self.codecs = [Codec.NATIVE] * num_blocks
        self.host: dict[int, tuple[list[int], Codec]] = {}  # by slot
        self.pending: dict[int, int] = {}  # request id -> what was sampled last
        self.rng = random.Random(seed)
        self.non_finite_rate = 0.0
        self.num_computed = 0  # tokens

    def launch(self, batch: Batch) -> FakeStep:
        """Copy and compress, read, then write: rows of one step do not see each other's tokens."""
        self.apply(batch.block_ops)
        computed = [(row, self._compute(row)) for row in batch.rows]
        sampled = []
        for row, states in computed:
            if row.is_sampled and self.rng.random() < self.non_finite_rate:
                states = [NON_FINITE] * len(states)
            self._write(row, states)
            if row.is_sampled:
                sampled.append(-1 if states[-1] == NON_FINITE else next_token(states[-1]))
                self.pending[row.request.request_id] = sampled[-1]
        self.num_computed += sum(row.num_tokens for row in batch.rows)
        return FakeStep(sampled)

    def launch_in_part(self, batch: Batch) -> None:
        """A step that fails half way: half of the operations, and nonsense in the rows' slots."""
        self.apply(batch.block_ops[: len(batch.block_ops) // 2])
        for row in batch.rows:
            self._write(row, [UNWRITTEN] * row.num_tokens)

    def apply(self, ops: list[BlockOp]) -> None:
        """Block operations, in order."""
        for op in ops:
            if isinstance(op, CompressSpan):
                assert all(self.codecs[src] == op.src_codec for src in op.srcs), f"{op=}"
                assert op.dst not in op.srcs and op.src_codec < op.codec, f"{op=}"
                self.slots[op.dst] = [state for src in op.srcs for state in self.slots[src]]
                self.codecs[op.dst] = op.codec
            elif isinstance(op, ParkBlock):
                self.host[op.slot] = self.slots[op.src][:], self.codecs[op.src]
            elif isinstance(op, RestoreBlock):
                states, self.codecs[op.dst] = self.host[op.slot]
                self.slots[op.dst] = states[:]
            else:
                self.slots[op.dst] = self.slots[op.src][:]
                self.codecs[op.dst] = self.codecs[op.src]

    def read(self, table: list[int], num_tokens: int) -> list[int]:
        """What a table's first slots hold."""
        num_blocks = -(-num_tokens // self.block_size)
        return [state for entry in table[:num_blocks] for state in self.piece(entry)][:num_tokens]

    def piece(self, entry: int) -> list[int]:
        """What the slots of one entry hold."""
        block_id, codec, span_idx = unpack_entry(entry)
        if self.codecs[block_id] != codec:
            return [UNWRITTEN] * self.block_size
        return self.slots[block_id][span_idx * self.block_size : (span_idx + 1) * self.block_size]

    def _compute(self, row: Row) -> list[int]:
        request, start, end = row.request, row.start, row.start + row.num_tokens
        input_ids = request.token_ids[start:end]
        if start >= len(request.token_ids):  # a step ahead: the input is still on the device
            input_ids = [self.pending[request.request_id]]
        assert len(input_ids) == row.num_tokens > 0, f"{start=} {end=} {request=}"
        assert request.seq.num_tokens >= end, f"no slots: {request.seq.num_tokens} < {end}"
        assert 0 not in request.seq.table, "the null block is in a table"
        if not start:
            return states_of(input_ids)
        last = self.piece(request.seq.table[(start - 1) // self.block_size])
        state = last[(start - 1) % self.block_size]
        if row.num_tokens > 1 or start % 4 == 0:  # every position that attention would read
            held = self.read(request.seq.table, start)
            if NON_FINITE in held:
                state = NON_FINITE
            else:
                assert held == states_of(request.token_ids[:start]), f"foreign: {request=}"
        return [NON_FINITE] * row.num_tokens if state == NON_FINITE else states_of(input_ids, state)

    def _write(self, row: Row, states: list[int]) -> None:
        table = row.request.seq.table
        for position, state in enumerate(states, row.start):
            block_id, codec, _ = unpack_entry(table[position // self.block_size])
            assert codec == Codec.NATIVE, f"a compressed block is written: {row=}"
            if self.codecs[block_id] != codec:  # it was a compressed one before
                self.slots[block_id] = [UNWRITTEN] * self.block_size
                self.codecs[block_id] = codec
            self.slots[block_id][position % self.block_size] = state


def make_request(
    request_id: int,
    token_ids: Tokens[int],
    session_id: int | None = None,
    max_tokens: int | None = None,
    **sampling: object,
) -> Request:
    """A request of its own session unless told; it ends at EOS_ID."""
    sampling.setdefault("stop_token_ids", frozenset({EOS_ID}))
    return Request(
        request_id=request_id,
        session_id=request_id if session_id is None else session_id,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )
