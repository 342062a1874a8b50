"""Rows that a llama.cpp user can read: pp512, tg128, `@ d4096`, one chat alone, mean and deviation.

As in llama-bench: ids are drawn at random, choosing tokens and reading prompts from text are not in
the times, and what stands before (`@ d`) is in the pool when the clock starts. Unlike there, a
token's way through the scheduler is.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvchat.bench.arms import Arm, Model, make_arm, make_setup
from kvchat.config import SamplingParams
from kvchat.engine.engine import Engine
from kvchat.engine.profile import Watch, unwatched
from kvchat.engine.request import Event, Request
from kvchat.errors import EngineError
from kvchat.kv.planner import format_size
from kvchat.model.source import Progress

_DEPTH_SESSION = 0
_SPARE_BLOCKS = 16  # forks' tails, the reserve, the null block


@dataclass(frozen=True)
class SpeedTest:
    """Read `num_prompt` tokens, or write `num_reply` (one of them is 0), after `depth` others."""

    num_prompt: int
    num_reply: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it."""
        what = f"pp{self.num_prompt}" if self.num_prompt else f"tg{self.num_reply}"
        return f"{what} @ d{self.depth}" if self.depth else what

    @property
    def num_tokens(self) -> int:
        """In the pool at the end."""
        return self.depth + self.num_prompt + self.num_reply + 1


@dataclass
class SpeedRow:
    """One test in one mode; samples are tokens a second, one a repetition."""

    mode: str
    test: SpeedTest
    samples: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Of the samples; 0 of one."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


def speed_tests(prompts: list[int], replies: list[int], depths: list[int]) -> list[SpeedTest]:
    """Every length at every depth."""
    return [
        test
        for depth in depths
        for test in (
            *(SpeedTest(n, 0, depth) for n in prompts if n),
            *(SpeedTest(0, n, depth) for n in replies if n),
        )
    ]


def run_speeds(
    model: Model,
    modes: list[str],
    tests: list[SpeedTest],
    reps: int,
    progress: Progress,
    watch: Watch = unwatched,
) -> list[SpeedRow]:
    """Modes alternate within every repetition; one repetition before is not counted."""
    longest = max(test.num_tokens for test in tests)
    num_blocks = 2 * (-(-longest // model.spec.block_size)) + _SPARE_BLOCKS
    benches = [
        _Bench(model, make_arm(model, make_setup(model, mode, size, longest), progress))
        for mode in modes
        for size in [2 * num_blocks * model.spec.bytes_per_block]
    ]
    for bench in benches:
        watch(bench.engine)
    rows = []
    for i, test in enumerate(tests):
        found = [SpeedRow(bench.arm.setup.mode, test) for bench in benches]
        for rep in range(-1, reps):
            progress(f"{test.name}", i * reps + max(0, rep), len(tests) * reps)
            for bench, row in zip(benches, found, strict=True):
                sample = bench.measure(test)
                row.samples += [sample] if rep >= 0 else []
        rows += found
    progress("", 1, 1)
    return rows


def speeds_table(model: Model, rows: list[SpeedRow], num_threads: int) -> list[list[str]]:
    """Header and rows with llama-bench's columns."""
    header = ["model", "size", "params", "backend", "threads", "type_kv", "test", "t/s"]
    weights = {id(x): x for x in (model.decoder.embedding, *_weights(model))}.values()
    size = format_size(sum(w.nbytes for w in weights))
    params = f"{sum(w.numel() for w in weights) / 1e6:,.2f} M"
    fixed = [f"{model.name} {model.spec.dtype}", size, params, model.device, str(num_threads)]
    return [
        header,
        *(
            [*fixed, row.mode, row.test.name, f"{row.mean:,.2f} ± {row.deviation:,.2f}"]
            for row in rows
        ),
    ]


def _weights(model: Model) -> Iterator:
    for linear in model.decoder.linears():
        yield linear.weight


class _Bench:
    """One mode's engine, with the tokens of a depth kept in a session to fork from."""

    def __init__(self, model: Model, arm: Arm) -> None:
        self.arm = arm
        self._vocab = model.vocab
        self._rng = random.Random(0)
        self._events: list[Event] = []
        self.engine: Engine = arm.setup.start(arm.runner, self._events.extend)[0]
        self._depth_ids: list[int] = []
        self._num_requests = 0

    def measure(self, test: SpeedTest) -> float:
        """Tokens a second of one run."""
        self._go_to(test.depth)
        session_id = self._num_requests + 1
        if test.depth:
            self.engine.fork(_DEPTH_SESSION, session_id, test.depth)
        num_new = test.num_prompt or 1
        ids = self._depth_ids + self._ids(num_new)
        if test.num_prompt:
            seconds = self._reply(session_id, ids, 1)[-1]
        else:
            times = self._reply(session_id, ids, test.num_reply + 1)
            seconds = times[-1] - times[0]
        self.engine.release(session_id)
        return (test.num_prompt or test.num_reply) / seconds

    def _go_to(self, depth: int) -> None:
        if len(self._depth_ids) != depth:
            self.engine.release(_DEPTH_SESSION)
            self._depth_ids = self._ids(depth)
            self._reply(_DEPTH_SESSION, self._depth_ids, 1)

    def _ids(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(self._vocab.start, self._vocab.stop) for _ in range(num_tokens)]

    def _reply(self, session_id: int, ids: list[int], num_tokens: int) -> list[float]:
        """Seconds from the submit to each token."""
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._num_requests += 1
        self._events.clear()
        started = time.perf_counter()
        self.engine.submit(Request(self._num_requests, session_id, [*ids], len(ids), sampling))
        times: list[float] = []
        while len(times) < num_tokens:
            if not self.engine.step() or any(event.error for event in self._events):
                raise EngineError("a test's reply ended early; run again with --debug")
            num_come = sum(len(event.token_ids) for event in self._events)
            times += [time.perf_counter() - started] * num_come
            self._events.clear()
        return times
