"""What `kvchat bench` prints: a page of at most MAX_LINES lines, and records for programs."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from kvchat import __version__
from kvchat.bench.layouts.replay import Replay
from kvchat.bench.metrics import Speed, Spread, goodput
from kvchat.bench.sessions import POOL_SHARE, BenchResult, ModeResult
from kvchat.kv.layout import Codec
from kvchat.kv.planner import format_size

MAX_LINES = 25
NONE = "n/a"
FOOTER = (
    "TTFT: submit to first token, queue included; gap: between tokens; speeds: generated tokens a"
    " second; ratios: medians of pairs"
)

# A row of the table: its name, and what it says of a mode.
Row = tuple[str, Callable[[ModeResult], str]]


def number(value: float | None, decimals: int = 0) -> str:
    """With thousands separators; n/a for None."""
    return NONE if value is None else f"{value:,.{decimals}f}"


def ratio(value: float | None) -> str:
    """1.94x."""
    return NONE if value is None else f"{value:.2f}x"


def milliseconds(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bytes_a_token(result: ModeResult) -> str:
    """Of the codec that its blocks come to, scales counted; of auto also where it starts."""
    layout, setup = result.setup.layout, result.setup
    lowest = f"{layout.bytes_used(layout.lowest) / layout.span_tokens(layout.lowest):,.0f}"
    if layout.lowest == Codec.NATIVE or setup.kv.is_eager:
        return lowest
    return f"{layout.spec.bytes_per_token:,} to {lowest}"


def table_rows(num_sessions: int, has_solo: bool) -> list[Row]:
    """The rows of the default report."""

    def speed(read: Callable[[Speed], str]) -> Callable[[ModeResult], str]:
        return lambda m: read(m.speed) if m.speed else NONE

    def p50_95(found: Spread) -> str:
        return f"{milliseconds(found.p50)} / {milliseconds(found.p95)}"

    solo = "" if not has_solo else f" (from 2 of {num_sessions})"
    return [
        ("bytes a token", bytes_a_token),
        ("pool peak", lambda m: f"{m.peak_held / (m.setup.config.num_blocks - 1):.0%}"),
        ("waste of slots held", lambda m: f"{m.tally.waste:.1%}"),
        ("served without preemption", lambda m: f"{m.num_calm} of {num_sessions}"),
        (
            "preemptions, drops (tokens redone)",
            lambda m: f"{m.tally.num_setbacks} ({m.tally.num_redone:,})",
        ),
        ("compressed blocks (freed)", lambda m: f"{m.tally.num_spans} ({m.tally.num_freed})"),
        (
            "shared bytes saved, peak",
            lambda m: format_size(m.tally.peak_saved_blocks * m.setup.layout.bytes_per_block),
        ),
        ("tok/s over all", speed(lambda s: f"{number(s.tokens_a_second)}")),
        (
            "tok/s a session, median (min)",
            speed(lambda s: f"{number(s.session_median, 1)} ({number(s.session_min, 1)})"),
        ),
        ("TTFT p50 / p95, ms", speed(lambda s: p50_95(s.ttft))),
        ("gap between tokens p50 / p95, ms", speed(lambda s: p50_95(s.gap))),
        ("prefill tok/s", speed(lambda s: number(s.prefill))),
        ("mean batch", speed(lambda s: number(s.mean_batch, 1))),
        ("times one session", lambda m: ratio(m.times_one)),
        (f"times {num_sessions} one by one{solo}", lambda m: ratio(m.times_one_by_one)),
    ]


def report_lines(result: BenchResult) -> list[str]:
    """The default report: no line more than MAX_LINES."""
    lines = [
        *setup_lines(result),
        *aligned(table(result)),
        *capacity_lines(result),
        layouts_line(result.static, result.paged, result.scripts),
        checks_line(result),
        FOOTER,
    ]
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines"
    return lines


def report_markdown(result: BenchResult) -> list[str]:
    """The same to paste: the table as markdown, the other lines one below the other."""
    lines = report_lines(result)
    num_rows = len(table(result))
    before, after = lines[:3], lines[3 + num_rows :]
    fenced = ["```", *after, "```"]
    return ["```", *before, "```", "", *markdown(table(result)), "", *fenced]


SWEEP_HEADER = [
    "sessions",
    "mode",
    "tok/s over all",
    "a session",
    "TTFT p50, ms",
    "gap p50, ms",
    "pool peak",
    "preemptions",
    "times one",
]


def sweep_rows(result: BenchResult) -> list[list[str]]:
    """One for each mode, below SWEEP_HEADER."""
    return [
        [
            f"{len(result.scripts)}",
            mode.mode,
            number(mode.speed.tokens_a_second, 1),
            number(mode.speed.session_median, 1),
            milliseconds(mode.speed.ttft.p50),
            milliseconds(mode.speed.gap.p50),
            f"{mode.peak_held / (mode.setup.config.num_blocks - 1):.0%}",
            f"{mode.num_preemptions}",
            ratio(mode.times_one),
        ]
        for mode in result.modes
        if mode.speed is not None
    ]


def goodput_line(result: BenchResult, limits_ms: dict[str, float]) -> str:
    """Replies a second within the limits, by mode."""
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in limits_ms.items())
    found = ", ".join(f"{m.mode} {goodput(m.logs, limits_ms):.2f}" for m in result.modes)
    return f"goodput, replies a second within {limits}: {found}"


def table(result: BenchResult) -> list[list[str]]:
    """Header and rows, a column for each mode that was asked for; n/a where it cannot be."""
    has_solo = len(result.scripts) > 1
    rows = table_rows(len(result.scripts), has_solo)
    header = ["", *(m.mode for m in result.modes), *result.missing]
    cells = [
        [name, *(_shown(name, read, m) for m in result.modes), *(NONE for _ in result.missing)]
        for name, read in rows
    ]
    return [header, *cells]


def _shown(name: str, read: Callable[[ModeResult], str], mode: ModeResult) -> str:
    if name == "tok/s over all" and mode.speed_ratio is not None:
        return f"{read(mode)} ({ratio(mode.speed_ratio)})"
    return read(mode)


def setup_lines(result: BenchResult) -> list[str]:
    """Three lines: what runs where, over what, serving what."""
    model, options = result.model, result.options
    work = options.workload
    pool = max(mode.setup.pool_bytes for mode in result.modes)
    share = f"{POOL_SHARE:.0%} of what native needs" if options.kv_mem is None else "--kv-mem"
    compile_s = sum(mode.compile_s for mode in result.modes)
    lengths = f"{work.turns} turns of {work.prompt} + {work.reply} tokens"
    if work.trace is not None:
        lengths = f"lengths of {work.trace.name}"
    arrival = f"{work.rate} chats a second" if work.rate else "all at once"
    depth = f", {work.depth} before" if work.depth else ""
    return [
        f"kvchat {__version__}  {model.name}  {model.spec.dtype}  {device_name(model.device)}"
        f"  torch {torch.__version__.partition('+')[0]}  attention: {model.attention}",
        f"pool {format_size(pool)}, {share}; blocks of {model.spec.block_size}; load"
        f" {model.load_s:.1f} s, compile {compile_s:.1f} s, warm-up {result.warmup_s:.1f} s;"
        f" all {result.total_s:.0f} s",
        f"{len(result.scripts)} sessions, {lengths}, {work.shared_prefix} shared{depth}, {arrival},"
        f" seed {work.seed}; {options.reps} repetitions in slices",
    ]


def device_name(device: str) -> str:
    """The device in words, with the threads that torch uses."""
    if device != "cpu":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def capacity_lines(result: BenchResult) -> list[str]:
    """Two lines, from real pool and scheduler without forward passes."""
    sessions = ", ".join(f"{m.mode} {m.max_sessions}" for m in result.modes)
    contexts = ", ".join(f"{m.mode} {m.max_context:,}" for m in result.modes)
    missing = "".join(f", {mode} {NONE}" for mode in result.missing)
    return [
        f"capacity: sessions like these before anybody gives way: {sessions}{missing}",
        f"capacity: tokens in each of {len(result.scripts)} chats before anybody gives way:"
        f" {contexts}{missing}",
    ]


def layouts_line(static: Replay, paged: Replay, scripts: list[Any]) -> str:
    """The same chats and bytes, unshared, in two ways of keeping them."""
    longest = max(script.num_tokens for script in scripts)
    return (
        f"same bytes, nothing shared: paged finishes {paged.num_finished} of {len(scripts)}, waste"
        f" {paged.waste:.1%}; contiguous ({longest} each) {static.num_finished}, waste"
        f" {static.waste:.1%}"
    )


def checks_line(result: BenchResult) -> str:
    """What was held against an independent count, in every repetition."""
    leaks = sum(mode.num_leaked for mode in result.modes)
    problems = [f"{m.mode}: {problem}" for m in result.modes for problem in m.problems]
    if problems:
        return f"CHECKS FAILED ({len(problems)}): {problems[0]}; leaks {leaks}"
    return f"checks: leaks {leaks}; ledger = allocator; tokens, blocks, bytes = a second count"


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown(rows: list[list[str]]) -> list[str]:
    """The same as a markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def record(mode: ModeResult, limits_ms: dict[str, float]) -> dict[str, Any]:
    """One mode as plain values: counts, speeds, and what they were read from."""
    layout, tally = mode.setup.layout, mode.tally
    found: dict[str, Any] = {
        "mode": mode.mode,
        "bytes_a_token": layout.bytes_used(layout.lowest) / layout.span_tokens(layout.lowest),
        "held_bytes_a_token": tally.bytes_a_token,
        "pool_bytes": mode.setup.pool_bytes,
        "pool_blocks": mode.setup.config.num_blocks - 1,
        "peak_blocks": mode.peak_held,
        "waste": tally.waste,
        "sessions_not_preempted": mode.num_calm,
        "preemptions": mode.num_preemptions,
        "drops": mode.num_drops,
        "tokens_computed": tally.num_tokens,
        "setbacks": tally.num_setbacks,
        "tokens_redone": tally.num_redone,
        "tokens_generated": tally.num_sampled,
        "tokens_cached": mode.num_cached_tokens,
        "spans_compressed": tally.num_spans,
        "blocks_freed": tally.num_freed,
        "blocks_copied": tally.num_copies,
        "evictions": mode.num_evictions,
        "shared_bytes_saved": tally.peak_saved_blocks * layout.bytes_per_block,
        "speed_ratio": mode.speed_ratio,
        "times_one_session": mode.times_one,
        "times_one_by_one": mode.times_one_by_one,
        "max_sessions": mode.max_sessions,
        "max_context": mode.max_context,
        "leaks": mode.num_leaked,
        "problems": mode.problems,
        "seconds": [log.seconds for log in mode.logs],
        "solo_seconds": [log.seconds for log in mode.solo_logs],
        "tokens_a_second_by_rep": [log.tokens_a_second for log in mode.logs],
        "generation_by_rep": [log.generation_speed for log in mode.logs],
        "solo_generation_by_rep": [log.generation_speed for log in mode.solo_logs],
    }
    if limits_ms:
        found["goodput_replies_a_second"] = goodput(mode.logs, limits_ms)
    if mode.speed is not None:
        found |= asdict(mode.speed)
    return found


def records(result: BenchResult, limits_ms: dict[str, float]) -> list[dict[str, Any]]:
    """One for each mode, the set-up repeated in it."""
    base = {
        "version": __version__,
        "model": result.model.name,
        "dtype": result.model.spec.dtype,
        "device": device_name(result.model.device),
        "attention": result.model.attention,
        "block_size": result.model.spec.block_size,
        "sessions": len(result.scripts),
        "seed": result.options.workload.seed,
        "reps": result.options.reps,
        "native_blocks_needed": result.num_needed,
    }
    return [base | record(mode, limits_ms) for mode in result.modes]


def as_json(found: list[dict[str, Any]]) -> str:
    """A list of records."""
    return json.dumps(found, indent=2)


def as_jsonl(found: list[dict[str, Any]]) -> str:
    """A record a line."""
    return "\n".join(json.dumps(line) for line in found)


def as_csv(found: Iterable[dict[str, Any]]) -> str:
    """A record a row; what is itself a record or a list goes as `name.part`, or is left out."""
    rows = [_flat(line) for line in found]
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{part}": x for part, x in value.items()}
        elif not isinstance(value, list):
            flat[name] = value
    return flat
