"""`kvchat bench`: many sessions in one pool, each mode of the KV cache beside the others.

One repetition serves the whole workload once in every mode, and two of its sessions once more, one
after the other. Within it all of these take turns of SLICE_S seconds, in step with each other, so
that whatever slows the machine slows them all; a ratio is the median over the repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from kvchat.bench.arms import (
    Arm,
    Compute,
    Model,
    Setup,
    least_bytes,
    load_model,
    make_arm,
    make_setup,
    supported_modes,
)
from kvchat.bench.capacity_search import max_context, max_sessions, peak_blocks
from kvchat.bench.drive import Driver
from kvchat.bench.layouts.blocks import PagedLayout
from kvchat.bench.layouts.contiguous import StaticLayout
from kvchat.bench.layouts.replay import Replay, replay, trace_steps
from kvchat.bench.metrics import RunLog, Speed, measure, median_ratio
from kvchat.bench.tally import Tally
from kvchat.bench.trace import TracedChat, Turn
from kvchat.bench.workload import Script, Workload, make_scripts
from kvchat.engine.device import device_memory
from kvchat.engine.profile import Watch, unwatched
from kvchat.errors import UsageError
from kvchat.kv.layout import BlockLayout
from kvchat.kv.planner import parse_size
from kvchat.model.source import Progress

SLICE_S = 0.2
POOL_SHARE = 0.6  # of the blocks that native needs for the workload
MODES = ("native", "int8", "auto")
NUM_SOLO = 2  # sessions that are also served one by one


@dataclass(frozen=True)
class BenchOptions:
    """What a person chose. kv_mem None: POOL_SHARE of what native needs."""

    model: str | None
    shape: str | None = None
    dtype: str = "auto"
    block_size: int = 16
    modes: tuple[str, ...] = MODES
    kv_mem: str | None = None
    workload: Workload = field(default_factory=Workload)
    reps: int = 5
    warmup: int = 1
    ignore_eos: bool = True
    compute: Compute = field(default_factory=Compute)

    def load(self, progress: Progress) -> Model:
        """The model or shape. Raises KvchatError."""
        return load_model(
            self.model, self.shape, self.dtype, self.block_size, progress, self.compute
        )


@dataclass
class ModeResult:
    """One column of the report. Counts are of the first repetition."""

    mode: str
    setup: Setup
    compile_s: float
    logs: list[RunLog] = field(default_factory=list)
    solo_logs: list[RunLog] = field(default_factory=list)  # of the same repetitions
    tally: Tally = field(default_factory=Tally)
    peak_held: int = 0
    held: list[tuple[float, int]] = field(default_factory=list)  # (seconds, blocks) by step
    num_preemptions: int = 0
    num_drops: int = 0
    num_calm: int = 0  # sessions that were never preempted
    num_cached_tokens: int = 0
    num_evictions: int = 0
    num_parks: int = 0
    num_parked_blocks: int = 0
    speed: Speed | None = None
    speed_ratio: float | None = None  # to native, in generated tokens a second
    times_one: float | None = None
    times_one_by_one: float | None = None
    max_sessions: int = 0
    max_context: int = 0
    problems: list[str] = field(default_factory=list)
    num_leaked: int = 0


@dataclass(frozen=True)
class BenchResult:
    """Everything that a report may say."""

    options: BenchOptions
    model: Model
    num_needed: int  # native blocks that the workload holds at its peak
    scripts: list[Script]
    modes: list[ModeResult]
    missing: tuple[str, ...]  # modes that this model's heads do not allow
    static: Replay
    paged: Replay
    warmup_s: float
    total_s: float
    peak_device_bytes: int | None  # of tensors on a device with memory of its own

    @property
    def kept_bytes(self) -> int:
        """Weights, and every mode's two pools: one for all sessions, one for the solo runs."""
        pools = sum(mode.setup.pool_bytes for mode in self.modes)
        return self.model.weight_bytes + 2 * pools


def run_bench(options: BenchOptions, progress: Progress, watch: Watch = unwatched) -> BenchResult:
    """Measure; `watch` sees every engine that is timed. Raises KvchatError for what can be
    mended."""
    started = time.perf_counter()
    model = options.load(progress)
    modes = supported_modes(model, list(options.modes))
    scripts = make_scripts(options.workload, model.vocab, model.config.max_position)
    if any(not script.turns for script in scripts):
        raise UsageError("a chat has no turns; use longer lengths, or less --depth")
    setups, num_needed = make_setups(model, modes, options, scripts)
    arms = [make_arm(model, setup, progress) for setup in setups]
    results = [ModeResult(arm.setup.mode, arm.setup, arm.compile_s) for arm in arms]
    warmup_s = _warm_up(arms, scripts, options.warmup, progress)
    _measure(model, arms, results, scripts, options, progress, watch)
    _summarise(model, results, scripts)
    for i, result in enumerate(results):
        progress("looking for capacity", i, len(results))
        result.max_sessions = max_sessions(result.setup, options.workload)
        result.max_context = max_context(result.setup, len(scripts))
    progress("looking for capacity", 1, 1)
    static, paged = _replay_layouts(setups[0], scripts)
    missing = tuple(mode for mode in options.modes if mode not in modes)
    total_s = time.perf_counter() - started
    return BenchResult(
        options,
        model,
        num_needed,
        scripts,
        results,
        missing,
        static,
        paged,
        warmup_s,
        total_s,
        peak_device_bytes(model.device),
    )


def peak_device_bytes(device: str) -> int | None:
    """The most that tensors took of the device's memory so far; None where it has none."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated(device)


def make_setups(
    model: Model, modes: list[str], options: BenchOptions, scripts: list[Script]
) -> tuple[list[Setup], int]:
    """One pool a mode, all of the same bytes, and the native blocks that the workload needs."""
    longest = max(script.num_tokens for script in scripts) + 1
    size = model.spec.block_size
    ample = (
        sum(-(-script.num_tokens // size) + 2 for script in scripts) * model.spec.bytes_per_block
    )
    num_needed = peak_blocks(make_setup(model, "native", ample, longest), scripts)
    num_bytes = (round(POOL_SHARE * num_needed) + 1) * model.spec.bytes_per_block
    # of few sessions the share might not hold the longest
    num_bytes = max([num_bytes, *(least_bytes(model, mode, longest) for mode in modes)])
    if options.kv_mem is not None:
        num_bytes = parse_size(options.kv_mem, device_memory(model.device))
    return [make_setup(model, mode, num_bytes, longest) for mode in modes], num_needed


def _warm_up(arms: list[Arm], scripts: list[Script], num_reps: int, progress: Progress) -> float:
    """A first turn of a few sessions in every mode, not measured; returns the seconds."""
    started = time.perf_counter()
    few = _solo_scripts(scripts)
    first = [replace(script, turns=script.turns[:1], arrival_s=0.0) for script in few]
    for rep in range(num_reps):
        for i, arm in enumerate(arms):
            progress("warming up", rep * len(arms) + i, num_reps * len(arms))
            driver = Driver(arm.setup, arm.runner, first)
            driver.run()
            driver.engine.close()
    progress("warming up", 1, 1)
    return time.perf_counter() - started


def _measure(
    model: Model,
    arms: list[Arm],
    results: list[ModeResult],
    scripts: list[Script],
    options: BenchOptions,
    progress: Progress,
    watch: Watch,
) -> None:
    """Fill the results' logs and counts."""
    stop_ids = None if options.ignore_eos else frozenset(model.config.eos_token_ids)
    solo_scripts = [replace(script, arrival_s=0.0) for script in _solo_scripts(scripts)]
    # in pools of their own: two engines must not write into one
    others = [make_arm(model, arm.setup, progress) for arm in arms]
    for rep in range(options.reps):
        drivers = [Driver(arm.setup, arm.runner, scripts, None, stop_ids) for arm in arms]
        solos = [Driver(arm.setup, arm.runner, solo_scripts, 1, stop_ids) for arm in others]
        for driver in (*drivers, *solos):
            watch(driver.engine)
        for share in _alternate(drivers, solos, rep):
            progress(
                f"repetition {rep + 1} of {options.reps}",
                round(1000 * (rep + share)),
                1000 * options.reps,
            )
        for arm, result, driver, solo in zip(arms, results, drivers, solos, strict=True):
            _keep(arm, result, driver)
            _keep_solo(result, solo)
    progress("repetition", 1, 1)


def _solo_scripts(scripts: list[Script]) -> list[Script]:
    return [scripts[i * len(scripts) // NUM_SOLO] for i in range(min(NUM_SOLO, len(scripts)))]


def _alternate(drivers: list[Driver], solos: list[Driver], rep: int) -> Iterator[float]:
    """Turns of a slice each until all are done, another mode first each time. A mode's solo run
    goes on in step with it, so that both see the same machine. Yields what is done, of 1."""
    turn = rep
    while not all(driver.is_done for driver in (*drivers, *solos)):
        for i in ((turn + i) % len(drivers) for i in range(len(drivers))):
            drivers[i].run(SLICE_S)
            if solos[i].share_done < drivers[i].share_done or drivers[i].is_done:
                solos[i].run(SLICE_S)
        turn += 1
        yield sum(driver.share_done for driver in drivers) / len(drivers)


def _keep(arm: Arm, result: ModeResult, driver: Driver) -> None:
    """Take what a repetition has left, and check its books."""
    driver.problems += driver.audit()
    if arm.cache.num_bytes != arm.setup.pool_bytes:
        driver.problems.append(f"the tensors have {arm.cache.num_bytes:,} bytes")
    counters, stats = driver.scheduler.counters, driver.engine.stats()
    driver.close()
    if not result.logs:
        result.tally, result.peak_held = driver.tally, driver.peak_held
        result.held = driver.held
        result.num_preemptions, result.num_drops = counters.num_preemptions, counters.num_drops
        result.num_calm, result.num_cached_tokens = driver.num_calm, counters.num_cached_tokens
        result.num_evictions = stats.num_evictions
        result.num_parks, result.num_parked_blocks = stats.num_parks, stats.num_parked_blocks
    result.logs.append(driver.log)
    result.problems += driver.problems
    result.num_leaked += driver.num_leaked


def _keep_solo(result: ModeResult, solo: Driver) -> None:
    solo.close()
    result.solo_logs.append(solo.log)
    result.problems += solo.problems
    result.num_leaked += solo.num_leaked


def _summarise(model: Model, results: list[ModeResult], scripts: list[Script]) -> None:
    """Speeds, and ratios to the first mode and to the solo runs, by pairs of one repetition."""
    base = [log.tokens_a_second for log in results[0].logs]
    solo_tokens = sum(script.num_tokens for script in _solo_scripts(scripts))
    scale = sum(script.num_tokens for script in scripts) / solo_tokens
    for result in results:
        logs, solos = result.logs, result.solo_logs
        result.speed = measure(logs, model.weight_bytes)
        result.speed_ratio = median_ratio([log.tokens_a_second for log in logs], base)
        if len(scripts) > 1:
            result.times_one = median_ratio(
                [log.generation_speed for log in logs], [log.generation_speed for log in solos]
            )
            result.times_one_by_one = median_ratio(
                [log.seconds * scale for log in solos], [log.seconds for log in logs]
            )


def _replay_layouts(setup: Setup, scripts: list[Script]) -> tuple[Replay, Replay]:
    """The same chats in the native pool's bytes, all at the start: every chat's slots reserved at
    the length of the longest, and paged; nothing shared, nobody waits."""
    chats = [
        TracedChat(
            0.0,
            tuple(
                Turn(len(turn.prompt_ids) + (0 if i else len(script.depth_ids)), turn.num_reply)
                for i, turn in enumerate(script.turns)
            ),
        )
        for script in scripts
    ]
    longest = max(chat.num_tokens for chat in chats)
    spec = setup.layout.spec
    num_bytes = setup.pool_bytes
    layouts = (
        StaticLayout(num_bytes // spec.bytes_per_token, longest),
        PagedLayout(BlockLayout(spec), num_bytes, longest),
    )
    num_steps = trace_steps(chats) + 2 * longest
    static, paged = (replay(chats, layout, num_steps) for layout in layouts)
    return static, paged
