"""`kvchat bench`: from the words of the command line to what is printed."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import torch

from kvchat.bench import sessions_report as report
from kvchat.bench.arms import Compute, supported_modes
from kvchat.bench.detail import detail_lines, processor_name, read_bandwidth
from kvchat.bench.probing import ProbeOptions, report_lines, run_probe
from kvchat.bench.sessions import BenchOptions, BenchResult, run_bench
from kvchat.bench.speeds import run_speeds, speed_tests, speeds_table
from kvchat.bench.verify import run_verify
from kvchat.bench.workload import (
    Workload,
    parse_arrival,
    parse_range,
)
from kvchat.config import KV_RUNGS
from kvchat.engine.profile import Watch
from kvchat.errors import EngineError, UsageError, quoted
from kvchat.model.source import Progress

_MAX_DEPTH = 1_000_000


def answer(flags: dict[str, Any], model: str | None, progress: Progress, watch: Watch) -> str:
    """What the flags ask for, as text; `watch` sees every engine that is timed. Raises
    KvchatError."""
    options = _options(flags, model)
    if flags["pp"] or flags["tg"]:
        return _speeds(options, flags, progress, watch)
    options = replace(options, workload=replace(options.workload, depth=_one_depth(flags)))
    if flags["sweep"]:
        return _sweep(options, flags, progress, watch)
    limits_ms = _parse_goodput(flags["goodput"])
    if flags["plot"] is not None:
        from kvchat.bench.plot import check_plot

        check_plot(flags["plot"])
    result = run_bench(options, progress, watch)
    if flags["plot"] is not None:
        from kvchat.bench.plot import draw

        draw(result, flags["plot"])
    more = _verified(result, progress) if flags["verify"] else []
    if flags["quality"]:
        more += ["", *_quality(options, progress)]
    return _formatted(result, flags["output"], flags["detail"], limits_ms, more)


def _options(flags: dict[str, Any], model: str | None) -> BenchOptions:
    workload = Workload(
        sessions=flags["sessions"],
        turns=flags["turns"],
        prompt=parse_range(flags["prompt"], "--prompt"),
        reply=parse_range(flags["gen"], "--gen"),
        shared_prefix=flags["shared_prefix"],
        rate=parse_arrival(flags["arrival"]),
        trace=flags["trace"],
        seed=flags["seed"],
    )
    modes = tuple(dict.fromkeys(flags["kv_cache"].split(",")))
    for mode in modes:
        if mode not in KV_RUNGS:
            raise UsageError(f"--kv-cache {quoted(mode, 40)}: choose of {', '.join(KV_RUNGS)}")
    return BenchOptions(
        model=model,
        shape=flags["shape"],
        dtype=flags["dtype"],
        block_size=int(flags["block"]),
        modes=modes,
        kv_mem=flags["kv_mem"],
        workload=workload,
        reps=flags["reps"],
        warmup=flags["warmup"],
        ignore_eos=flags["ignore_eos"],
        compute=Compute(flags["device"], flags["weights"], not flags["no_graphs"]),
    )


def _formatted(
    result: BenchResult,
    output: str,
    is_detailed: bool,
    limits_ms: dict[str, float],
    more: list[str],
) -> str:
    if output in ("text", "md"):
        lines = report.report_lines(result)
        if output == "md":
            lines = report.report_markdown(result)
        if limits_ms and not is_detailed:
            more = [report.goodput_line(result, limits_ms), *more]
        if is_detailed:
            more = ["", *detail_lines(result, limits_ms, read_bandwidth()), *more]
        return "\n".join([*lines, *more])
    return _records(report.records(result, limits_ms), output)


def _records(found: list[dict[str, Any]], output: str) -> str:
    formats = {"json": report.as_json, "jsonl": report.as_jsonl, "csv": report.as_csv}
    return formats[output](found)


def _table(rows: list[list[str]], output: str) -> list[str]:
    return report.markdown(rows) if output == "md" else report.aligned(rows)


def _verified(result: BenchResult, progress: Progress) -> list[str]:
    """The checks' lines; EngineError when one does not hold."""
    checks = run_verify(result.model, result.scripts, progress)
    failed = [check.line() for check in checks if not check.is_good]
    if failed:
        raise EngineError(f"--verify: {'; '.join(failed)}")
    return ["", *(check.line() for check in checks)]


def _quality(options: BenchOptions, progress: Progress) -> list[str]:
    if options.model is None:
        raise UsageError("--quality needs a model that writes text; give -m instead of --shape")
    probe = ProbeOptions(options.model, dtype=options.dtype, block_size=options.block_size)
    return report_lines(run_probe(probe, progress))


def _speeds(options: BenchOptions, flags: dict[str, Any], progress: Progress, watch: Watch) -> str:
    """llama-bench's rows."""
    tests = speed_tests(
        _numbers(flags["pp"] or "", "-p"),
        _numbers(flags["tg"] or "", "-n"),
        _numbers(flags["depth"], "-d") or [0],
    )
    if not tests:
        raise UsageError("-p and -n are 0: there is nothing to measure")
    model = options.load(progress)
    rows = run_speeds(
        model, supported_modes(model, list(options.modes)), tests, options.reps, progress, watch
    )
    output = flags["output"]
    if output not in ("text", "md"):
        base = {"model": model.name, "dtype": model.spec.dtype, "processor": processor_name()}
        return _records(
            [
                base
                | asdict(row.test)
                | {"mode": row.mode, "test": row.test.name}
                | {"mean": row.mean, "deviation": row.deviation, "samples": row.samples}
                for row in rows
            ],
            output,
        )
    return "\n".join(_table(speeds_table(model, rows, torch.get_num_threads()), output))


def _sweep(options: BenchOptions, flags: dict[str, Any], progress: Progress, watch: Watch) -> str:
    """The benchmark for several numbers of sessions, one row for each and mode."""
    found = re.fullmatch(r"sessions=(.+)", flags["sweep"])
    if not found or options.workload.trace is not None:
        raise UsageError(
            f"--sweep {quoted(flags['sweep'], 40)}: write sessions=1,2,4,8, without --trace"
        )
    records, rows = [], [report.SWEEP_HEADER]
    for number in _numbers(found[1], "--sweep"):
        workload = replace(options.workload, sessions=max(1, number))
        result = run_bench(replace(options, workload=workload), progress, watch)
        records += report.records(result, _parse_goodput(flags["goodput"]))
        rows += report.sweep_rows(result)
    output = flags["output"]
    if output not in ("text", "md"):
        return _records(records, output)
    return "\n".join([*_table(rows, output), *([""] if output == "md" else []), report.FOOTER])


def _one_depth(flags: dict[str, Any]) -> int:
    depths = _numbers(flags["depth"], "-d")
    if len(depths) != 1:
        raise UsageError("-d takes several depths only with -p and -n; give one")
    return depths[0]


def _numbers(text: str, flag: str) -> list[int]:
    """`1,2,4`; empty for nothing."""
    if not text:
        return []
    if not re.fullmatch(r"\d{1,7}(,\d{1,7})*", text):
        raise UsageError(f"{flag} {quoted(text, 40)}: write whole numbers as 512 or 128,512")
    found = [int(part) for part in text.split(",")]
    if max(found) > _MAX_DEPTH:
        raise UsageError(f"{flag} {max(found)}: at most {_MAX_DEPTH:,}")
    return found


def _parse_goodput(text: str | None) -> dict[str, float]:
    """Milliseconds by name."""
    if not text:
        return {}
    found = re.fullmatch(r"((ttft|itl):\d{1,6}(,|$))+", text)
    pairs = dict(part.split(":") for part in text.split(",")) if found else {}
    if not pairs or text.endswith(","):
        raise UsageError(f"--goodput {quoted(text, 40)}: write ttft:500,itl:50 (milliseconds)")
    return {name: float(limit) for name, limit in pairs.items()}
