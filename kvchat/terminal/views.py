"""What is shown, as lines of fragments: chats, lists, the toolbar. Reads, never changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvchat import __version__
from kvchat.chat.library import Library
from kvchat.chat.messages import Message
from kvchat.chat.runtime import Runtime
from kvchat.chat.session import ReplyStats, Session
from kvchat.chat.turns import TreeRow
from kvchat.engine.stats import EngineStats, SessionKV
from kvchat.terminal import memory_views
from kvchat.terminal.show import one_line
from kvchat.terminal.tables import Line, table


def format_count(number: int) -> str:
    """3100 is 3.1k, 52000 is 52k; powers of two as people call them: 8192 is 8k."""
    if number < 1000:
        return str(number)
    if number % 1024 == 0:
        return f"{number // 1024}k"
    return f"{number / 1000:.{1 if number < 10_000 else 0}f}k"


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
            ("", f"  chat format: {runtime.chat_format}"),
        ],
        [("", memory_views.pool_summary(facts))],
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


def session_lines(library: Library, held: Mapping[int, SessionKV]) -> list[Line]:
    """/sessions: number, name, what it does, how long it is, how much of it is compressed (where
    any is), how it began. `held` is by session id."""
    shares = {session_id: memory_views.compressed_share(kv) for session_id, kv in held.items()}
    rows = []
    for number, session in enumerate(library.sessions, start=1):
        asked = next((m.content for m in session.messages if m.role == "user"), "")
        states = ("pinned" if session.is_pinned else "", _state(session))
        rows.append(
            (
                ">" if session is library.current else "",
                str(number),
                session.name,
                ", ".join(filter(None, states)),
                f"{session.num_context_tokens:,}",
                *([shares[session.id]] if any(shares.values()) else []),
                " ".join(asked.split())[:40],
            )
        )
    compressed = ["compressed"] if any(shares.values()) else []
    return table(("", "#", "session", "state", "tokens", *compressed, "begins with"), rows)


def _state(session: Session) -> str:
    if session.is_working:
        return "working"
    return f"unread {session.unread}" if session.unread else ""


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
