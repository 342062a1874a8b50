"""What is shown, as lines of fragments: tables, the pool map, the toolbar. Reads, never changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from kvchat import __version__
from kvchat.chat.library import Library
from kvchat.chat.messages import Message
from kvchat.chat.runtime import Runtime
from kvchat.chat.session import ReplyStats, Session
from kvchat.chat.turns import TreeRow
from kvchat.engine.build import EngineFacts
from kvchat.engine.stats import BlockOwner, EngineStats, SessionKV
from kvchat.kv.planner import format_size
from kvchat.terminal.show import NUM_OWNER_STYLES, Fragment, one_line

Line = list[Fragment]

MAX_POOL_ROWS = 16  # of /pool in all
MAX_LEGEND_ROWS = 3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHARED, CACHED, FREE = "*", "=", "."


def format_count(number: int) -> str:
    """3100 is 3.1k, 52000 is 52k; powers of two as people call them: 8192 is 8k."""
    if number < 1000:
        return str(number)
    if number % 1024 == 0:
        return f"{number // 1024}k"
    return f"{number / 1000:.{1 if number < 10_000 else 0}f}k"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Line]:
    """Columns two spaces apart; numbers to the right, the header dim."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [
        all(re.fullmatch(r"[\d.,%kM]*( \w+)?", cell) for cell in column)
        for column in zip(*cells[1:], strict=True)
    ] or [False] * len(header)
    lines = []
    for index, row in enumerate(cells):
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        lines.append([("" if index else "dim", "  ".join(parts).rstrip())])
    return lines


def banner(runtime: Runtime) -> list[Line]:
    """What runs, on what, with how much room; and what a newcomer must know."""
    facts = runtime.facts
    return [
        [
            ("bold", f"kvchat {__version__}"),
            ("", f"  {runtime.model_name}  {facts.device} {facts.dtype}"),
        ],
        [
            ("", f"context {facts.scheduler.max_request_tokens:,} tokens"),
            ("", f"  pool {format_size(facts.pool_bytes)} for {facts.pool_tokens:,} tokens"),
            ("", f"  chat format: {runtime.chat_format}"),
        ],
        [("dim", "not saved: chats end with this process  /help lists the commands")],
    ]


def toolbar(library: Library, stats: EngineStats, tokens_per_s: float | None) -> str:
    """One line of state, made anew at every repaint."""
    session = library.current
    parts = [
        session.name,
        f"context {format_count(session.num_context_tokens)}/{format_count(session.max_context)}",
        f"pool {100 * stats.num_blocks_used / max(1, stats.num_blocks):.0f}%",
    ]
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:.{0 if tokens_per_s >= 10 else 1}f} tok/s")
    num_working = sum(other.is_working for other in library.sessions)
    unread = [other.name for other in library.sessions if other.unread and other is not session]
    if num_working:
        parts.append(f"{num_working} working")
    if unread:
        parts.append(f"unread {', '.join(unread[:3])}" + ("..." if len(unread) > 3 else ""))
    if session.queued:
        parts.append(f"queued {len(session.queued)}")
    return "  ".join(parts)


def user_lines(text: str) -> list[Line]:
    """A turn as it was typed."""
    first, *rest = text.split("\n")
    return [[("bold", f"> {first}")], *([("bold", f"  {line}")] for line in rest)]


def exchange_lines(messages: Sequence[Message]) -> list[Line]:
    """Whole messages, a blank line after each reply."""
    lines: list[Line] = []
    for message in messages:
        if message.role == "user":
            lines += user_lines(message.content)
            continue
        if message.reasoning:
            lines += [[("dim", line)] for line in message.reasoning.strip().split("\n")]
        lines += [[("", line)] for line in message.content.strip("\n").split("\n")]
        lines.append([])
    return lines


def tree_lines(rows: Iterable[TreeRow]) -> list[Line]:
    """/tree: what was asked, one step in where ways part; ">" leads to where the session stands."""
    lines: list[Line] = []
    for row in rows:
        style, mark = ("", ">") if row.is_on_path else ("dim", "-")
        lines.append([(style, f"{'  ' * row.depth}{mark} {one_line(row.user, 60)}")])
    return lines


def session_lines(library: Library) -> list[Line]:
    """/sessions: number, name, what it does, how long it is, how it began."""
    rows = []
    for number, session in enumerate(library.sessions, start=1):
        asked = next((m.content for m in session.messages if m.role == "user"), "")
        state = "working" if session.is_working else f"unread {session.unread}"
        state = "" if not session.is_working and not session.unread else state
        mark = ">" if session is library.current else ""
        tokens = f"{session.num_context_tokens:,}"
        rows.append((mark, str(number), session.name, state, tokens, " ".join(asked.split())[:40]))
    return table(("", "#", "session", "state", "tokens", "begins with"), rows)


def kv_lines(held: Iterable[tuple[Session, SessionKV]]) -> list[Line]:
    """/kv: what each session holds in the pool; shared blocks count in full for each."""
    rows = []
    for session, kv in held:
        counts = (session.num_context_tokens, kv.num_tokens, kv.num_blocks)
        rows.append((session.name, *(f"{n:,}" for n in counts), format_size(kv.num_bytes)))
    return table(("session", "tokens", "in pool", "blocks", "bytes"), rows)


def pool_lines(
    owners: Sequence[BlockOwner], names: Mapping[int, str], facts: EngineFacts, columns: int
) -> list[Line]:
    """/pool: the blocks in order, `names` by session id. A cell is n blocks and shows who holds
    most of those that are held: a capital for half of the cell or more, else a small letter. Of a
    large pool the part that was never used is a number: drawn, it would shrink all the rest."""
    owners = owners[1:]  # the null block is nobody's
    marks = {
        session_id: (f"owner{i % NUM_OWNER_STYLES}", LETTERS[i % len(LETTERS)])
        for i, session_id in enumerate(names)
    }
    room = columns * (MAX_POOL_ROWS - MAX_LEGEND_ROWS - 1)
    extent = max((i for i, owner in enumerate(owners, 1) if owner != "free"), default=1)
    per_cell = max(1, -(-extent // room))
    num_drawn = len(owners)
    if num_drawn > room:
        num_drawn = min(num_drawn, -(-extent // (columns * per_cell)) * columns * per_cell)
    cells = [
        _pool_cell(Counter(owners[start : min(start + per_cell, num_drawn)]), marks)
        for start in range(0, num_drawn, per_cell)
    ]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    counts = Counter(owners)
    legend: list[Line] = [
        [("bold", SHARED), ("", f" shared {counts['shared']:,}")],
        [("dim", CACHED), ("", f" cached {counts['cached']:,}")],
        [("dim", FREE), ("", f" free {counts['free']:,}")],
    ]
    legend += [
        [marks[session_id], ("", f" {name} {counts[session_id]:,}")]
        for session_id, name in names.items()
    ]
    unit = f"a cell is {per_cell} x {format_size(facts.spec.bytes_per_block)}"
    scale = f"{unit}, {facts.spec.block_size} tokens a block"
    if num_drawn < len(owners):
        scale += f"; {len(owners) - num_drawn:,} more are free"
    return [*rows, *_packed(legend, columns)[:MAX_LEGEND_ROWS], [("dim", scale)]]


def _pool_cell(group: Counter[BlockOwner], marks: Mapping[int, Fragment]) -> Fragment:
    num_blocks = group.total()
    num_free, num_cached = group.pop("free", 0), group.pop("cached", 0)
    if not group:
        return ("dim", CACHED if num_cached >= num_free else FREE)
    owner, most = group.most_common(1)[0]
    if not isinstance(owner, int):
        return ("bold", SHARED)
    style, letter = marks.get(owner, ("", "?"))
    return (style, letter if 2 * most >= num_blocks else letter.lower())


def _packed(entries: Iterable[Line], columns: int) -> list[Line]:
    """Entries side by side, as many as fit in a row."""
    rows: list[Line] = []
    width = columns + 1
    for entry in entries:
        size = sum(len(text) for _, text in entry)
        if width + 2 + size > columns:
            rows.append(entry)
            width = size
            continue
        rows[-1] = [*rows[-1], ("", "  "), *entry]
        width += 2 + size
    return rows


def stats_lines(reply: ReplyStats | None, stats: EngineStats) -> list[Line]:
    """/stats: how the last reply was made, and what the engine did since the start."""
    rows = {
        "requests": f"{stats.num_running} running, {stats.num_waiting} waiting",
        "blocks": f"{stats.num_blocks_used:,} used, {stats.num_blocks_cached:,} cached, "
        f"{stats.num_blocks_free:,} free of {stats.num_blocks:,}",
        "tokens": f"{stats.num_scheduled_tokens:,} computed, {stats.num_cached_tokens:,} found in "
        f"the pool, {stats.num_generated_tokens:,} generated",
        "steps": f"{stats.num_steps:,}, mean decode batch {stats.mean_decode_batch:.2f}",
        "pressure": f"{stats.num_preemptions:,} preemptions, {stats.num_drops:,} drops of idle "
        f"chats, {stats.num_evictions:,} evictions, {stats.num_copies:,} copies on write",
    }
    if reply:
        rows["prompt"] = (
            f"{reply.num_prompt_tokens:,} tokens, {reply.num_cached_tokens:,} found in the pool, "
            f"{reply.num_recomputed_tokens:,} recomputed"
        )
        rows["reply"] = f"{reply.num_generated_tokens:,} tokens, ended by {reply.finish_reason}"
        if reply.ttft_s is not None:
            rows["reply"] += f", first after {reply.ttft_s:.2f} s"
        if reply.tokens_per_s is not None:
            rows["reply"] += f", {reply.tokens_per_s:.1f} tok/s"
    return [[("", f"{name:<10}{text}")] for name, text in rows.items()]
