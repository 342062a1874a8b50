"""`--detail`: what the default page of `kvchat bench` leaves out."""

from __future__ import annotations

import os
import platform
import sys
import time

import numpy
import torch

from kvchat.bench.metrics import Spread, goodput
from kvchat.bench.sessions import BenchResult, ModeResult
from kvchat.bench.sessions_report import (
    NONE,
    bytes_a_token,
    device_name,
    markdown,
    milliseconds,
    number,
    ratio,
)
from kvchat.kv.planner import format_size

_READ_BYTES = 256 * 2**20
_READ_TIMES = 5


def read_bandwidth() -> float:
    """GB/s of summing an array larger than the caches, the best of a few times."""
    array = torch.ones(_READ_BYTES // 4)
    best = float("inf")
    for _ in range(_READ_TIMES):
        started = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - started)
    return _READ_BYTES / best / 1e9


def detail_lines(result: BenchResult, limits_ms: dict[str, float], bandwidth: float) -> list[str]:
    """Set-up, speed, memory and capacity, as markdown."""
    return [
        *_setup(result, bandwidth),
        "",
        "## Speed",
        "",
        *markdown(_speed(result, limits_ms, bandwidth)),
        "",
        "## Memory",
        "",
        *markdown(_memory(result)),
        "",
        "Counts are of the first repetition; with closed arrivals they are the same in all. TPOT:",
        "of a reply, seconds a token after the first. GB/s: weights and KV read in steps that only",
        "generate. A percentile without 5 samples beyond it is n/a; so is parking where no main",
        "memory is set apart for it.",
    ]


def _setup(result: BenchResult, bandwidth: float) -> list[str]:
    model, work = result.model, result.options.workload
    config = model.config
    return [
        "## Set-up",
        "",
        f"- model {model.name}: {config.num_layers} layers, {config.num_heads} heads,"
        f" {config.num_kv_heads} KV heads of {config.head_dim}, {model.spec.dtype}, matrices"
        f" {format_size(model.weight_bytes)}",
        f"- device {device_name(model.device)}, {processor_name()}; reads {bandwidth:.1f} GB/s",
        f"- Python {platform.python_version()}, torch {torch.__version__}, numpy"
        f" {numpy.__version__}, {sys.platform}",
        f"- pool {format_size(result.modes[0].setup.pool_bytes)}, native needs"
        f" {result.num_needed} blocks of {model.spec.block_size} tokens; seed {work.seed}",
        f"- memory of the device: {_device_memory(result)}",
        f"- load {model.load_s:.2f} s, compile"
        f" {sum(mode.compile_s for mode in result.modes):.2f} s, warm-up {result.warmup_s:.2f} s,"
        f" in all {result.total_s:.1f} s",
    ]


def _device_memory(result: BenchResult) -> str:
    kept = f"weights and two pools a mode {format_size(result.kept_bytes)}"
    if result.peak_device_bytes is None:
        return f"{NONE}, main memory holds all; {kept}"
    return f"{format_size(result.peak_device_bytes)} at its peak, {kept}"


def _speed(result: BenchResult, limits_ms: dict[str, float], bandwidth: float) -> list[list[str]]:
    rows = [["", *(mode.mode for mode in result.modes)]]

    def add(name: str, cells: list[str]) -> None:
        rows.append([name, *cells])

    speeds = [mode.speed for mode in result.modes if mode.speed is not None]
    add("tok/s over all", [number(s.tokens_a_second, 1) for s in speeds])
    add("ratio to the first", [ratio(mode.speed_ratio) for mode in result.modes])
    for name, spreads in (
        ("TTFT", [s.ttft for s in speeds]),
        ("gap (ITL)", [s.gap for s in speeds]),
        ("TPOT", [s.tpot for s in speeds]),
    ):
        add(f"{name} ms: mean, p50, p95, p99", [_spread(found) for found in spreads])
        add(f"{name} samples", [f"{found.num_samples:,}" for found in spreads])
    add("tok/s a session, median", [number(s.session_median, 1) for s in speeds])
    add("tok/s a session, min", [number(s.session_min, 1) for s in speeds])
    add("generation alone, tok/s", [number(s.generation, 1) for s in speeds])
    add("prefill tok/s", [number(s.prefill) for s in speeds])
    add("batch, mean and largest", [f"{s.mean_batch:.2f}, {s.max_batch}" for s in speeds])
    add("read GB/s", [number(s.read_gb_s, 2) for s in speeds])
    shares = [s.read_gb_s and f"{s.read_gb_s / bandwidth:.0%}" for s in speeds]
    add("of the machine's", [share or NONE for share in shares])
    if limits_ms:
        found = [goodput(mode.logs, limits_ms) for mode in result.modes]
        add("goodput, replies a second", [number(good, 2) for good in found])
    return rows


def _spread(found: Spread) -> str:
    return ", ".join(map(milliseconds, (found.mean, found.p50, found.p95, found.p99)))


def _memory(result: BenchResult) -> list[list[str]]:
    modes = result.modes
    rows = [["", *(mode.mode for mode in modes)]]

    def add(name: str, cells: list[str]) -> None:
        rows.append([name, *cells])

    add("bytes a token of the codec", [bytes_a_token(mode) for mode in modes])
    add("bytes a token held, on average", [number(m.tally.bytes_a_token, 1) for m in modes])
    add("pool, blocks", [f"{m.setup.config.num_blocks - 1:,}" for m in modes])
    add("live tokens over slots held", [f"{1 - m.tally.waste:.1%}" for m in modes])
    add("blocks held over pool, mean", [f"{_mean_held(m):.0%}" for m in modes])
    add(
        "blocks held over pool, peak",
        [f"{m.peak_held / (m.setup.config.num_blocks - 1):.0%}" for m in modes],
    )
    add("prompt tokens found in the cache", [f"{m.num_cached_tokens:,}" for m in modes])
    add("tokens computed", [f"{m.tally.num_tokens:,}" for m in modes])
    add("of these again", [f"{m.tally.num_redone:,}" for m in modes])
    add("preemptions", [f"{m.num_preemptions}" for m in modes])
    add("idle chats dropped", [f"{m.num_drops}" for m in modes])
    add("idle chats parked, blocks copied", [_parks(mode) for mode in modes])
    add(
        "spans compressed, blocks freed",
        [f"{m.tally.num_spans}, {m.tally.num_freed}" for m in modes],
    )
    add("blocks copied on write", [f"{m.tally.num_copies}" for m in modes])
    add("cached blocks evicted", [f"{m.num_evictions}" for m in modes])
    add(
        "shared bytes saved, peak",
        [format_size(m.tally.peak_saved_blocks * m.setup.layout.bytes_per_block) for m in modes],
    )
    return rows


def _parks(mode: ModeResult) -> str:
    has_room = mode.setup.config.num_host_slots > 0
    return f"{mode.num_parks}, {mode.num_parked_blocks}" if has_room else NONE


def _mean_held(mode: ModeResult) -> float:
    num_looks = max(1, mode.tally.num_looks)
    return mode.tally.sum_held_blocks / num_looks / (mode.setup.config.num_blocks - 1)


def processor_name() -> str:
    """The processor in words, where the system says."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return platform.processor() or platform.machine()
