"""The KV pool as lines of fragments: its map, what each chat holds, where every byte is.

Three ratios, never mixed up: a block ratio counts the bytes that a block of a codec uses, a pool
ratio those that are reserved for it, an effective ratio what stands in the pool at this moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvchat.chat.session import Session
from kvchat.engine.build import EngineFacts
from kvchat.engine.device import GpuBytes
from kvchat.engine.history import Compressed
from kvchat.engine.ledger import Ledger
from kvchat.engine.stats import BlockOwner, EngineStats, SessionKV
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import format_size
from kvchat.terminal.show import NUM_OWNER_STYLES, Fragment
from kvchat.terminal.tables import Line, counted, table

MAX_ROWS = 22  # of /pool: a small terminal shows it whole, above the prompt
MAX_MAP_ROWS = 12
MAX_LEGEND_ROWS = 3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHARED, CACHED, FREE = "*", "=", "."
CODEC_MARKS: dict[Codec, Fragment] = {
    Codec.NATIVE: ("", " "),
    Codec.INT8: ("", "8"),
    Codec.INT4: ("mark", "4"),
}

# A block as the map knows it: who holds it, and how it stores its tokens.
Block = tuple[BlockOwner, Codec]


def format_ratio(ratio: float) -> str:
    """1.94x: so many times smaller than native."""
    return f"{ratio:.2f}x"


def format_since_start(seconds: float) -> str:
    """12 s, 4:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def pool_lines(
    blocks: Sequence[Block],
    names: Mapping[int, str],
    facts: EngineFacts,
    stats: EngineStats,
    columns: int,
) -> list[Line]:
    """/pool: the map, its legend, and what compression and pressure have done; `names` by session
    id. In a pool that compresses a cell is two characters: who holds it, and how it is stored."""
    blocks = blocks[1:]  # the null block is nobody's
    numbers = [*_codec_lines(blocks, facts.layout), *_pressure_lines(stats, facts)]
    num_rows = min(MAX_MAP_ROWS, MAX_ROWS - len(numbers) - MAX_LEGEND_ROWS - 2)
    marks = {
        session_id: (f"owner{i % NUM_OWNER_STYLES}", LETTERS[i % len(LETTERS)])
        for i, session_id in enumerate(names)
    }
    cell_width = 1 if facts.lowest == Codec.NATIVE else 2
    rows, scale = _map_rows(blocks, marks, facts, max(1, columns // cell_width), num_rows)
    return [*rows, *_legend(blocks, names, marks, columns), *scale, *numbers]


def _map_rows(
    blocks: Sequence[Block],
    marks: Mapping[int, Fragment],
    facts: EngineFacts,
    num_cells: int,
    num_rows: int,
) -> tuple[list[Line], list[Line]]:
    """The blocks in order, and what a cell is. Of a large pool the part that was never used is a
    number: drawn, it would shrink all the rest."""
    extent = max((i for i, (owner, _) in enumerate(blocks, 1) if owner != "free"), default=1)
    per_cell = max(1, -(-extent // (num_cells * num_rows)))
    num_drawn = len(blocks)
    if num_drawn > num_cells * num_rows:
        row = num_cells * per_cell
        num_drawn = min(num_drawn, -(-extent // row) * row)
    cells = [
        _pool_cell(blocks[start : min(start + per_cell, num_drawn)], marks)
        for start in range(0, num_drawn, per_cell)
    ]
    if facts.lowest == Codec.NATIVE:
        cells = [cell[:1] for cell in cells]
    rows = [
        [fragment for cell in cells[start : start + num_cells] for fragment in cell]
        for start in range(0, len(cells), num_cells)
    ]
    return rows, _scale(facts, per_cell, len(blocks) - num_drawn)


def _scale(facts: EngineFacts, per_cell: int, num_undrawn: int) -> list[Line]:
    """What a cell is, and what its second character means."""
    layout = facts.layout
    text = f"a cell is {per_cell} x {format_size(layout.bytes_per_block)}"
    text += f", {facts.spec.block_size} tokens a block"
    for codec in Codec:
        if Codec.NATIVE < codec <= facts.lowest:
            text += f", {CODEC_MARKS[codec][1]}: {layout.span_tokens(codec)} as {codec.label}"
    lines: list[Line] = [[("dim", text)]]
    if num_undrawn:
        lines.append([("dim", f"{num_undrawn:,} more blocks are free")])
    return lines


def _pool_cell(group: Sequence[Block], marks: Mapping[int, Fragment]) -> list[Fragment]:
    """Who holds most of the blocks that are held, and the codec of most of theirs: a capital for
    half of the cell or more, else a small letter."""
    counts = Counter(owner for owner, _ in group)
    num_free, num_cached = counts.pop("free", 0), counts.pop("cached", 0)
    if not counts and num_cached < num_free:
        return [("dim", FREE), ("", " ")]
    owner, most = counts.most_common(1)[0] if counts else ("cached", num_cached)
    codec = Counter(codec for other, codec in group if other == owner).most_common(1)[0][0]
    if isinstance(owner, int):
        style, letter = marks.get(owner, ("", "?"))
        return [(style, letter if 2 * most >= len(group) else letter.lower()), CODEC_MARKS[codec]]
    return [("bold", SHARED) if counts else ("dim", CACHED), CODEC_MARKS[codec]]


def _legend(
    blocks: Sequence[Block], names: Mapping[int, str], marks: Mapping[int, Fragment], columns: int
) -> list[Line]:
    counts = Counter(owner for owner, _ in blocks)
    legend: list[Line] = [
        [("bold", SHARED), ("", f" shared {counts['shared']:,}")],
        [("dim", CACHED), ("", f" cached {counts['cached']:,}")],
        [("dim", FREE), ("", f" free {counts['free']:,}")],
    ]
    legend += [
        [marks[session_id], ("", f" {name} {counts[session_id]:,}")]
        for session_id, name in names.items()
    ]
    return _packed(legend, columns)[:MAX_LEGEND_ROWS]


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


def _codec_lines(blocks: Sequence[Block], layout: BlockLayout) -> list[Line]:
    """What is held, by codec, with the ratios; nothing for a pool that never compresses."""
    if layout.lowest == Codec.NATIVE:
        return []
    held = Counter(codec for owner, codec in blocks if owner not in ("free", "cached", "null"))
    rows, num_native_bytes = [], 0
    for codec in (codec for codec in Codec if codec <= layout.lowest):
        num_blocks = held[codec]
        num_tokens = num_blocks * layout.span_tokens(codec)
        num_native_bytes += num_tokens * layout.spec.bytes_per_token
        size = format_size(num_blocks * layout.bytes_used(codec))
        ratios = [format_ratio(f(codec)) for f in (layout.block_ratio, layout.pool_ratio)]
        rows.append((codec.label, f"{num_blocks:,}", f"{num_tokens:,}", size, *ratios))
    lines = table(("codec", "blocks", "for tokens", "bytes", "block ratio", "pool ratio"), rows)
    if num_held := held.total() * layout.bytes_per_block:
        lines.append(_effective(num_native_bytes, num_held))
    return lines


def _effective(num_native_bytes: int, num_held_bytes: int) -> Line:
    ratio = format_ratio(num_native_bytes / num_held_bytes)
    sizes = f"{format_size(num_native_bytes)} as native, {format_size(num_held_bytes)} reserved"
    return [("", f"effective ratio {ratio}: {sizes}")]


def _pressure_lines(stats: EngineStats, facts: EngineFacts) -> list[Line]:
    """What has been compressed so far, and what gave way."""
    rows = {}
    if facts.lowest != Codec.NATIVE:
        done = [
            f"{counted(num_spans, 'span')} {src.label} -> {codec.label} "
            f"({counted(stats.num_blocks_freed.get((src, codec), 0), 'block')} freed)"
            for (src, codec), num_spans in sorted(stats.num_compressions.items())
        ]
        rows["compressed"] = ", ".join(done) or "nothing yet"
    if stats.num_host_blocks:
        rows["parked"] = (
            f"{stats.num_host_blocks_used:,} of {counted(stats.num_host_blocks, 'block')} in main "
            f"memory, {counted(stats.num_parks, 'chat')} went, {stats.num_resumes:,} came back"
        )
    rows["pressure"] = (
        f"{counted(stats.num_evictions, 'eviction')}, {counted(stats.num_drops, 'idle chat')} "
        f"dropped, {counted(stats.num_preemptions, 'preemption')}"
    )
    if stats.num_recomputed_tokens:
        rows["pressure"] += f", {counted(stats.num_recomputed_tokens, 'token')} recomputed"
    return [[("", f"{name:<12}{text}")] for name, text in rows.items()]


def kv_lines(held: Sequence[tuple[Session, SessionKV]], facts: EngineFacts) -> list[Line]:
    """/kv: what each session holds in the pool, a line each; shared blocks count in full for each.
    Under a codec's name stand the tokens that are stored in it."""
    codecs = [codec for codec in Codec if codec <= facts.lowest != Codec.NATIVE]
    rows = []
    for session, kv in held:
        counts = (session.num_context_tokens, kv.num_tokens)
        shares = (kv.shares[codec].num_tokens if codec in kv.shares else 0 for codec in codecs)
        row = (session.name, *(f"{n:,}" for n in (*counts, *shares, kv.num_blocks)))
        row = (*row, format_size(kv.num_bytes))
        rows.append((*row, _session_ratio(kv, facts)) if codecs else row)
    names = [codec.label for codec in codecs]
    header = ("session", "tokens", "in pool", *names, "blocks", "bytes")
    lines = table((*header, "effective") if codecs else header, rows)
    parked = [
        f"{session.name}: {counted(kv.num_parked_tokens, 'token')} in "
        f"{counted(kv.num_parked_blocks, 'block')} parked in main memory"
        for session, kv in held
        if kv.num_parked_tokens
    ]
    return lines + [[("", text)] for text in parked]


def _session_ratio(kv: SessionKV, facts: EngineFacts) -> str:
    """Bytes that its tokens would take as native over those reserved for its blocks."""
    if not kv.num_bytes:
        return ""
    return format_ratio(kv.num_tokens * facts.spec.bytes_per_token / kv.num_bytes)


def session_kv_lines(session: Session, kv: SessionKV, facts: EngineFacts) -> list[Line]:
    """/kv: one session in detail, by codec, and what was compressed when; nothing where there is
    one codec."""
    if facts.lowest == Codec.NATIVE:
        return []
    layout = facts.layout
    rows = [
        (
            codec.label,
            *(f"{n:,}" for n in (share.num_tokens, share.num_blocks)),
            format_size(share.num_bytes),
            format_ratio(layout.block_ratio(codec)),
        )
        for codec, share in kv.shares.items()
    ]
    if unused := kv.num_bytes - sum(share.num_bytes for share in kv.shares.values()):
        rows.append(("side arrays, not used", "", "", format_size(unused), ""))
    lines: list[Line] = [[], [("bold", session.name), ("", f": {_protection(session, facts)}")]]
    if rows:
        lines += table(("stored as", "tokens", "blocks", "bytes", "block ratio"), rows)
    lines += [[("", _compressed(entry))] for entry in kv.history]
    return lines


def _protection(session: Session, facts: EngineFacts) -> str:
    if session.is_pinned:
        return "pinned, no more of it is compressed"
    policy = facts.scheduler.kv
    span = facts.layout.span_tokens(Codec(policy.rungs[0][1]))
    sink = -(-policy.sink // span) * span
    return (
        f"kv-cache {policy.mode}, the first {sink:,} tokens and at least the last "
        f"{policy.window:,} stay native"
    )


def _compressed(entry: Compressed) -> str:
    when = format_since_start(entry.at_s)
    change = f"{entry.src_codec.label} -> {entry.codec.label}"
    return f"{when:>8}  positions {entry.start:,}-{entry.end - 1:,}  {change}"


def compressed_share(kv: SessionKV) -> str:
    """How much of a session is compressed, for lists: 62% INT8."""
    return ", ".join(_shares(kv))


def _shares(kv: SessionKV) -> Iterator[str]:
    for codec, share in kv.shares.items():
        if codec != Codec.NATIVE and share.num_tokens:
            percent = 100 * share.num_tokens / max(1, kv.num_tokens)
            yield f"{percent:.0f}% {codec.label}"


def pool_summary(facts: EngineFacts) -> str:
    """The banner's words on the pool: its size, and what it holds."""
    policy, size = facts.scheduler.kv, format_size(facts.pool_bytes)
    if facts.lowest == Codec.NATIVE:
        return f"pool {size}, kv-cache native: {facts.pool_tokens:,} tokens"
    num_native = facts.scheduler.num_request_blocks * facts.spec.block_size
    num_lowest = policy.max_tokens(facts.scheduler.num_request_blocks, facts.spec.block_size)
    return (
        f"pool {size}, kv-cache {policy.mode}: {num_native:,} tokens native, about "
        f"{num_lowest:,} as {facts.lowest.label}"
    )


def ledger_lines(ledger: Ledger) -> list[Line]:
    """/kv --audit: every entry in bytes, then the sum, then whether it adds up."""
    rows = [
        (
            entry.part,
            entry.what,
            "" if entry.num_blocks is None else f"{entry.num_blocks:,}",
            f"{entry.num_bytes:,}",
        )
        for entry in ledger.entries
    ]
    total = sum(entry.num_bytes for entry in ledger.entries)
    rows.append(("all", format_size(total), "", f"{total:,}"))
    lines = table(("part", "what", "blocks", "bytes"), rows)
    if ledger.problems:
        return lines + [[("error", f"does not add up: {text}")] for text in ledger.problems]
    parts = " and ".join(f"{size:,} of {part}" for part, size in ledger.totals.items() if size)
    return [
        *lines,
        [("", f"adds up: the tensors have {parts};")],
        [("", "the blocks that the chats' tables name are those that the map says are held")],
        *_gpu(ledger.gpu),
        *_resident(ledger.resident, ledger.gpu is not None),
    ]


def _gpu(gpu: GpuBytes | None) -> list[Line]:
    if gpu is None:
        return []
    text = f"of the GPU {gpu.used:,} are in use, {gpu.allocated:,} of them given out by torch"
    return [[("", text)]]


def _resident(num_bytes: int | None, has_gpu: bool) -> list[Line]:
    if num_bytes is None:
        return []
    of_above = "tables, what is parked" if has_gpu else "of the above what was touched"
    text = f"in memory {format_size(num_bytes)}: {of_above}, Python, libraries"
    return [[("dim", text)]]
