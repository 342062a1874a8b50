"""The records that cross the engine: what is asked, what runs, what came out. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvchat.config import SamplingParams
from kvchat.kv.block_pool import BlockOp, Sequence


@dataclass(slots=True, eq=False)
class Request:
    """One reply being made: the conversation's token ids so far, growing by what is sampled.

    num_computed_tokens chases num_tokens; both count positions from the conversation's start.
    `num_pending_tokens` are sampled on the device and not yet read (0 or 1 between two steps).
    From `submit` on the scheduler owns it: others read it, and none but the scheduler changes it.
    """

    request_id: int
    session_id: int
    token_ids: list[int]  # prompt, then what was sampled
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int = 0
    branch: int = 0
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int = 0  # taken from blocks that were already computed, at first admission
    num_preemptions: int = 0
    seq: Sequence | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    wait_reason: str = ""  # shown while it waits: "waiting for memory (2 ahead)"

    @property
    def num_tokens(self) -> int:
        """Tokens known, read or pending."""
        return len(self.token_ids) + self.num_pending_tokens


@dataclass(slots=True, eq=False)
class Row:
    """One request's share of a step: positions start .. start + num_tokens - 1."""

    request: Request
    start: int
    num_tokens: int
    is_sampled: bool  # its last position's logits are drawn from

    @property
    def end(self) -> int:
        """The position after its last."""
        return self.start + self.num_tokens

    @property
    def table(self) -> list[int]:
        """The block table of its request, which holds blocks as long as it is in a step."""
        assert self.request.seq is not None, f"request {self.request.request_id} holds no blocks"
        return self.request.seq.table


@dataclass(slots=True, eq=False)
class Batch:
    """What the scheduler hands to the runner for one step; `block_ops` run first, in order.

    There may be no rows: the step then makes room for those that wait.
    """

    rows: list[Row]
    block_ops: list[BlockOp]
    num_tokens: int


class Shared(NamedTuple):
    """What a fork got. A compressed span is shared whole or not at all: `num_lost_tokens` were
    computed and wanted, and the child computes them again."""

    num_tokens: int
    num_lost_tokens: int


class Event(NamedTuple):
    """What came out of a step for one request; finish_reason "error" comes with a sentence."""

    request_id: int
    session_id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: str = ""
    num_cached_tokens: int = 0  # set on the first event of a request
