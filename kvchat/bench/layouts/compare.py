"""`kvchat bench layouts`: all layouts under one trace, in the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvchat.bench.layouts import Layout
from kvchat.bench.layouts.blocks import ChunksLayout, PagedLayout
from kvchat.bench.layouts.cells import SlotsLayout, UnifiedLayout
from kvchat.bench.layouts.contiguous import DynamicLayout, StaticLayout
from kvchat.bench.layouts.replay import Replay, replay, trace_steps
from kvchat.bench.shapes import find_shape
from kvchat.bench.trace import (
    Mix,
    TracedChat,
    clip_trace,
    generate_trace,
    read_trace,
    write_trace,
)
from kvchat.config import KVSpec
from kvchat.errors import CapacityError
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import format_size

Progress = Callable[[str, int, int], None]
_MAX_WORDS = 2**26  # 512 MiB of arena


@dataclass(frozen=True)
class LayoutOptions:
    """What is compared under what."""

    shape: str = "llama3-8b"
    num_bytes: int = 4 * 2**30  # of KV, in every layout
    max_tokens: int = 4096  # of a chat
    block_size: int = 16
    num_parts: int = 16  # equal slots
    chunk_tokens: int = 256
    trace: Path | None = None  # None: a mix is drawn
    mix: Mix = field(default_factory=Mix)
    seed: int = 0
    record: Path | None = None  # where to write the trace


@dataclass(frozen=True)
class Comparison:
    """One Replay a layout, and the trace without any limit of memory."""

    options: LayoutOptions
    spec: KVSpec
    chats: list[TracedChat]
    num_words: int  # tokens that the bytes hold natively
    seconds: float  # of the trace
    demand: Replay
    replays: list[Replay]


def compare_layouts(options: LayoutOptions, progress: Progress) -> Comparison:
    """Replay the trace under every layout. Raises UsageError or CapacityError."""
    config = find_shape(options.shape)
    spec = KVSpec(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        options.block_size,
        config.checkpoint_dtype,
    )
    num_words = options.num_bytes // spec.bytes_per_token
    _check_size(options, spec, num_words)
    chats = _read_or_draw(options)
    num_steps = trace_steps(chats)
    # Whole reservations for everybody: nobody is ever refused.
    endless = StaticLayout(len(chats) * options.max_tokens, options.max_tokens)
    demand = replay(chats, endless, num_steps)
    replays: list[Replay] = []
    layouts = list(_layouts(options, spec, num_words))
    for layout in layouts:
        progress(f"replaying: {layout.name}", len(replays), len(layouts))
        replays.append(replay(chats, layout, num_steps))
        layout.check()
    progress("replaying", 1, 1)
    seconds = demand.samples[-1].at_s
    return Comparison(options, spec, chats, num_words, seconds, demand, replays)


def _check_size(options: LayoutOptions, spec: KVSpec, num_words: int) -> None:
    least = max(options.max_tokens, options.num_parts, options.chunk_tokens)
    if not least < num_words <= _MAX_WORDS:
        raise CapacityError(
            f"{format_size(options.num_bytes)} hold {num_words:,} tokens of {options.shape}; give"
            f" {format_size((least + 1) * spec.bytes_per_token)} to"
            f" {format_size(_MAX_WORDS * spec.bytes_per_token)} with --kv-mem"
        )


def _read_or_draw(options: LayoutOptions) -> list[TracedChat]:
    chats = generate_trace(options.mix, options.seed)
    if options.trace is not None:
        chats = read_trace(options.trace)
    if options.record is not None:
        write_trace(options.record, chats)
    return clip_trace(chats, options.max_tokens)


def _layouts(options: LayoutOptions, spec: KVSpec, num_words: int) -> Iterator[Layout]:
    yield StaticLayout(num_words, options.max_tokens)
    yield DynamicLayout(num_words)
    yield SlotsLayout(num_words, options.num_parts)
    yield UnifiedLayout(num_words)
    yield ChunksLayout(num_words, options.chunk_tokens)
    for codec in Codec:
        yield PagedLayout(BlockLayout(spec, codec), options.num_bytes, options.max_tokens)
