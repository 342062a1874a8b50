"""How long eight growing chats fit into a pool: real scheduler and pool, no model.

The same trace for every mode: eight chats that share nothing take turns, each turn a prompt and a
reply of fixed lengths, round after round; they grow until the pool can hold no more. All pools have
the same bytes, side arrays counted. What is counted: turns served before anybody is preempted or
loses what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvchat.config import KV_RUNGS, KVPolicy, KVSpec, SamplingParams, SchedulerConfig
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Request
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.layout import BlockLayout, Codec

MODES = ("native", "auto", "auto4")
NUM_CHATS = 8
CHAT_TOKENS = (2048, 8192, 32_768)  # of each of the eight when a native pool is full
TURNS_PER_CHAT = 16  # in a chat of so many tokens
PLOTTED_TOKENS = 8192  # the chats that --plot draws
REPLY_SHARE = 8  # one token in so many is sampled, the others are prompt: the same memory, sooner
# llama3-8b's
SPEC = KVSpec(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")


class Held(NamedTuple):
    """What all chats hold after a turn: tokens, and bytes reserved for them."""

    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class Capacity:
    """What a pool held. `num_tokens` are of all chats when the first of them had to give way,
    `held` is after each turn before that. `pool_bytes` are those that every mode may use."""

    mode: str
    chat_tokens: int
    num_blocks: int
    num_turns: int
    num_tokens: int
    pool_bytes: int = 0
    held: tuple[Held, ...] = ()


def run_capacity_bench(chat_tokens: Sequence[int] = CHAT_TOKENS) -> list[Capacity]:
    """One row for each mode and length of chat."""
    return [measure_capacity(mode, tokens) for tokens in chat_tokens for mode in MODES]


def measure_capacity(
    mode: str, chat_tokens: int, spec: KVSpec = SPEC, turns_per_chat: int = TURNS_PER_CHAT
) -> Capacity:
    """Serve turns from a pool of the bytes that hold NUM_CHATS native chats of chat_tokens."""
    kv_mode = choose_kv_mode(mode, 128, 64, spec, Codec.INT4)
    num_native_blocks = NUM_CHATS * chat_tokens // spec.block_size + 1
    num_bytes = num_native_blocks * spec.bytes_per_block
    bytes_per_block = BlockLayout(spec, kv_mode.lowest).bytes_per_block
    num_blocks = num_bytes // bytes_per_block
    scheduler = _scheduler(num_blocks, spec.block_size, kv_mode.policy)
    num_new = chat_tokens // turns_per_chat
    num_reply = num_new // REPLY_SHARE
    chats = [[chat_id + 1] for chat_id in range(NUM_CHATS)]
    held: list[Held] = []
    while True:
        num_turns = len(held)
        chat_id = num_turns % NUM_CHATS
        prompt = chats[chat_id] + [chat_id + 1] * (num_new - num_reply)
        chats[chat_id] = _serve_turn(scheduler, num_turns, chat_id, prompt, num_reply)
        num_tokens = sum(map(len, chats))
        if scheduler.counters.num_preemptions + scheduler.counters.num_drops:
            counts = (num_blocks, num_turns, num_tokens, num_bytes)
            return Capacity(mode, chat_tokens, *counts, tuple(held))
        held.append(Held(num_tokens, scheduler.pool.num_held * bytes_per_block))


def format_capacity(capacities: Sequence[Capacity]) -> str:
    """A markdown table; ratios are to the native row of the same length of chat."""
    lines = [
        "| chats of | KV cache | blocks | turns | tokens held | turns / native |",
        "|---:|:---|---:|---:|---:|---:|",
    ]
    native = {c.chat_tokens: c.num_turns for c in capacities if not KV_RUNGS[c.mode]}
    for c in capacities:
        counts = f"{c.num_blocks:,} | {c.num_turns:,} | {c.num_tokens:,}"
        ratio = f"{c.num_turns / native[c.chat_tokens]:.2f}" if c.chat_tokens in native else "-"
        lines.append(f"| {c.chat_tokens:,} | {c.mode} | {counts} | {ratio} |")
    return "\n".join(lines)


def _scheduler(num_blocks: int, block_size: int, kv: KVPolicy) -> Scheduler:
    config = SchedulerConfig(num_blocks, block_size, 1 << 30, NUM_CHATS, 512, kv)
    pool = BlockPool(
        num_blocks, block_size, span_blocks=kv.span_blocks, num_reserved=kv.num_reserved
    )
    return Scheduler(config, pool)


def _serve_turn(
    scheduler: Scheduler, request_id: int, chat_id: int, prompt: list[int], num_reply: int
) -> list[int]:
    """The chat after a turn that samples its own id again and again."""
    sampling = SamplingParams(max_tokens=num_reply)
    request = Request(request_id, chat_id, prompt, len(prompt), sampling)
    scheduler.submit(request)
    while scheduler.has_requests:
        batch = scheduler.schedule()
        assert batch is not None, "nothing to schedule"
        num_sampled = sum(row.is_sampled for row in batch.rows)
        scheduler.update(batch, [chat_id + 1] * num_sampled)
    return request.token_ids
