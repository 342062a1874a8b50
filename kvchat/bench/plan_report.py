"""A plan as a person reads it (markdown) and as a program does (JSON). No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

from kvchat.bench.plan import (
    MATRIX_SESSIONS,
    Ask,
    Plan,
    PlanModel,
    Suggestion,
    Waste,
    choose_dtype,
    default_mix,
    layout_of,
    load_model,
    load_shape,
    make_plan,
    matrix,
    max_sessions,
    mix_waste,
    modes,
    session_blocks,
    suggest,
)
from kvchat.errors import UsageError, quoted
from kvchat.kv.layout import Codec
from kvchat.kv.planner import available_memory, format_size, parse_size

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class PlanFlags:
    """The command line's words."""

    model: str | None  # None: the shape
    shape: str | None
    sessions: int
    context: int | None  # None: the model's own, at most DEFAULT_CONTEXT
    mem: str | None  # None: what this machine has available
    kv_cache: str
    dtype: str
    device: str
    block_size: str
    weights: str
    mix: str | None
    output: str


@dataclass(frozen=True)
class PlanReport:
    """All that `kvchat plan` says; plans by mode, all for the same sessions and context."""

    model: PlanModel
    ask: Ask
    plans: dict[Codec, Plan]
    suggestions: list[Suggestion]
    matrix: dict[int, dict[int, Codec | None]]
    mix: list[int]
    waste: list[Waste]


def answer(flags: PlanFlags) -> str:
    """What `kvchat plan` prints. Raises UsageError or ModelError, one line each."""
    assert flags.model or flags.shape, f"{flags}"
    model = load_model(flags.model) if flags.model else load_shape(str(flags.shape))
    top = model.config.max_position
    context = flags.context or min(DEFAULT_CONTEXT, top)
    if context > top:
        raise UsageError(f"--ctx {context}: {model.name} was made for at most {top} tokens")
    available = available_memory()
    mem = parse_size(flags.mem, available) if flags.mem else available
    if flags.device == "cpu" and flags.weights == "int8":
        raise UsageError("--weights int8 is for a GPU: add --device cuda and its --mem")
    ask = Ask(
        num_sessions=flags.sessions,
        context=context,
        mem=mem,
        mode=Codec[flags.kv_cache.upper()],
        dtype=choose_dtype(model, flags.dtype, flags.device, mem),
        device=flags.device,
        block_size=int(flags.block_size),
        weights=flags.weights,
    )
    layout_of(model.config, ask)  # heads that this codec cannot store are refused here
    mix = _parse_mix(flags.mix, context) if flags.mix else default_mix(flags.sessions, context)
    report = make_report(model, ask, mix)
    return format_json(report) if flags.output == "json" else format_markdown(report)


def _parse_mix(text: str, context: int) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(1 <= n <= context for n in lengths):
        raise UsageError(
            f"--mix {quoted(text, 60)}: give lengths of 1 to {context} tokens, as in 200,800,3000"
        )
    return lengths


def make_report(model: PlanModel, ask: Ask, mix: list[int]) -> PlanReport:
    """Everything about `ask`; what would have to change only where it does not fit."""
    plans = {mode: make_plan(model, replace(ask, mode=mode)) for mode in modes(model.config)}
    return PlanReport(
        model=model,
        ask=ask,
        plans=plans,
        suggestions=[] if plans[ask.mode].fits else suggest(model, ask),
        matrix=matrix(model, ask),
        mix=mix,
        waste=mix_waste(model, ask, mix),
    )


def format_markdown(report: PlanReport) -> str:
    """Five short sections."""
    sections = (_header, _token_table, _item_table, _verdict, _matrix_table, _waste_table)
    return "\n\n".join("\n".join(section(report)) for section in sections)


def format_json(report: PlanReport) -> str:
    """The same figures, all in bytes."""
    ask, model = report.ask, report.model
    return json.dumps(
        {
            "model": model.name,
            "num_values": model.num_values,
            "stored_bytes": model.stored_bytes,
            "ask": _ask_fields(ask),
            "tokens": {_name(mode): _token_fields(report, mode) for mode in report.plans},
            "plans": {_name(mode): _plan_fields(plan) for mode, plan in report.plans.items()},
            "fits": report.plans[ask.mode].fits,
            "suggestions": [
                {"change": s.change, **_plan_fields(s.plan)} for s in report.suggestions
            ],
            "matrix": [
                {"context": context, "sessions": n, "least": None if mode is None else _name(mode)}
                for context, row in report.matrix.items()
                for n, mode in row.items()
            ],
            "mix": report.mix,
            "waste": [
                {"way": w.way, "reserved": w.reserved, "used": w.used, "chats_that_fit": w.num_fit}
                for w in report.waste
            ],
        },
        indent=2,
    )


def _name(mode: Codec) -> str:
    return mode.name.lower()


def _ask_fields(ask: Ask) -> dict[str, object]:
    return {
        "sessions": ask.num_sessions,
        "context": ask.context,
        "mem": ask.mem,
        "kv_cache": _name(ask.mode),
        "dtype": ask.dtype,
        "device": ask.device,
        "block_size": ask.block_size,
        "weights": ask.weights,
    }


def _token_fields(report: PlanReport, mode: Codec) -> dict[str, object]:
    layout = layout_of(report.model.config, replace(report.ask, mode=mode))
    span = layout.span_tokens(mode)
    return {
        "bytes_a_token": layout.bytes_used(mode) / span,
        "bytes_a_token_reserved": layout.bytes_per_block / span,
        "tokens_a_block": span,
        "bytes_a_block": layout.bytes_per_block,
        "ratio": layout.block_ratio(mode),
    }


def _plan_fields(plan: Plan) -> dict[str, object]:
    items = ("weights", "workspace", "logits", "cuda_context", "num_blocks", "pool", "total")
    return {item: getattr(plan, item) for item in items} | {"fits": plan.fits}


def _header(report: PlanReport) -> list[str]:
    config, ask, stored = report.model.config, report.ask, report.model.stored_bytes
    layers = f"{config.num_layers} layers x {config.num_kv_heads} KV heads x {config.head_dim}"
    lines = [
        f"# {report.model.name}: {report.model.num_values:,} weights, {layers}, {ask.dtype}"
        f"{' with int8 matrices' if ask.weights == 'int8' else ''} on {ask.device}"
    ]
    if stored is not None:
        parts = [f"{format_size(size)} of {dtype}" for dtype, size in stored.items()]
        lines.append(f"in its files: {', '.join(parts)}")
    one = make_plan(report.model, replace(ask, num_sessions=1, mode=Codec.NATIVE))
    spec = layout_of(config, one.ask).spec
    both = ask.context * spec.bytes_per_token
    lines.append(
        f"one session of {ask.context:,} tokens: {_decimal(both // 2)} for K alone,"
        f" {_decimal(both)} for K and V; {ask.num_sessions} sessions"
        f" {_decimal(ask.num_sessions * both)} (1 GB = 10^9 bytes)"
    )
    return lines


def _decimal(num_bytes: int) -> str:
    """In the textbook's units, three digits: 1.07 GB, 25.2 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{num_bytes} B"


def _token_table(report: PlanReport) -> list[str]:
    lines = [
        f"| KV cache | bytes a token | ratio | tokens a block | {report.ask.context:,} tokens"
        " in the pool | most sessions of them |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for mode, plan in report.plans.items():
        fields = _token_fields(report, mode)
        layout = layout_of(report.model.config, plan.ask)
        one = session_blocks(layout, mode, report.ask.context) * layout.bytes_per_block
        lines.append(
            f"| {_name(mode)} | {fields['bytes_a_token']:,.0f} | {fields['ratio']:.2f}x |"
            f" {fields['tokens_a_block']} | {format_size(one)} |"
            f" {max_sessions(report.model, plan.ask)} |"
        )
    return lines


def _item_table(report: PlanReport) -> list[str]:
    ask, plans = report.ask, report.plans.values()
    rows: dict[str, list[str]] = {
        "weights": [format_size(p.weights) for p in plans],
        "workspace": [format_size(p.workspace) for p in plans],
        "logits": [format_size(p.logits) for p in plans],
        "CUDA context": [format_size(p.cuda_context) if p.cuda_context else "-" for p in plans],
        f"pool for {ask.num_sessions} x {ask.context:,}": [format_size(p.pool) for p in plans],
        "all": [format_size(p.total) for p in plans],
        f"of {format_size(ask.mem)}": [_fit(p) for p in plans],
    }
    names = " | ".join(map(_name, report.plans))
    lines = [f"| | {names} |", "|---|" + "---:|" * len(report.plans)]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def _fit(plan: Plan) -> str:
    left = plan.ask.mem - plan.total
    return f"{format_size(left)} left" if plan.fits else f"{format_size(-left)} short"


def _verdict(report: PlanReport) -> list[str]:
    plan = report.plans[report.ask.mode]
    asked = (
        f"{report.ask.num_sessions} sessions x {report.ask.context:,} tokens, KV cache"
        f" {_name(report.ask.mode)}"
    )
    if plan.fits:
        return [f"Fits: {asked}. Give the pool --kv-mem {_mib(plan.pool)}MiB."]
    if not report.suggestions:
        return [f"Does not fit: {asked}; nothing that can be changed here would do."]
    lines = [f"Does not fit: {asked}. It would with one of (each worked out again):"]
    lines += [
        f"- {s.change}: {format_size(s.plan.total)} of {format_size(s.plan.ask.mem)},"
        f" --kv-mem {_mib(s.plan.pool)}MiB"
        for s in report.suggestions
    ]
    return lines


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // 2**20)


def _matrix_table(report: PlanReport) -> list[str]:
    lines = [
        f"The least compression with which so many sessions fit {format_size(report.ask.mem)}"
        " (- = none):",
        "",
        "| context | " + " | ".join(map(str, MATRIX_SESSIONS)) + " |",
        "|---:|" + "---|" * len(MATRIX_SESSIONS),
    ]
    for context, row in report.matrix.items():
        cells = ("-" if mode is None else _name(mode) for mode in row.values())
        lines.append(f"| {context:,} | {' | '.join(cells)} |")
    return lines


def _waste_table(report: PlanReport) -> list[str]:
    lengths = ", ".join(f"{n:,}" for n in report.mix)
    lines = [
        f"Chats of {lengths} tokens, native:",
        "",
        "| kept | token slots | used | wasted | chats of this mix that fit |",
        "|---|---:|---:|---:|---:|",
    ]
    for waste in report.waste:
        lines.append(
            f"| {waste.way} | {waste.reserved:,} | {waste.used:,} | {waste.share:.1%} |"
            f" {waste.num_fit} |"
        )
    return lines
